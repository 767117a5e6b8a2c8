"""Where kernels run: `CpuTarget` (NumPy arrays, compiled loops) or `CudaTarget` (device arrays,
`numba.cuda` kernels; also under the CUDA simulator).

A target allocates, copies and counts. Every array that stands for device memory comes from it, so
`peak_bytes` is what a run really took and a budget can be held. Launchers in `atlas.ops` ask
`is_cuda` to pick kernel or loop; nobody else does.
"""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numba import config, cuda, get_num_threads, set_num_threads
from numba.cuda.cudadrv.driver import CudaAPIError

from atlas.driver_queue import DriverQueue, Grid, Launchable, SimulatorQueue
from atlas.pinned import MappedArray
from forge.errors import GGUFShardError

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register

# GNU OpenMP's threads spin for milliseconds at the end of every parallel loop. Where other work
# wants the processor (the prefetch thread does), that makes short loops ten times slower; after
# some microseconds they had better sleep. Read when the library is loaded, at the first loop.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Numba finds grids of less than 128 blocks worth a warning. Here they are meant.
warnings.filterwarnings("ignore", r".*Grid size \d+ will likely result in GPU under-utilization")

if config.ENABLE_CUDASIM and not config.DISABLE_JIT:
    raise RuntimeError(
        "the CUDA simulator needs NUMBA_DISABLE_JIT=1 beside NUMBA_ENABLE_CUDASIM=1: "
        "kernels call compiled helpers, which the simulator cannot enter"
    )


class Target:
    """Common part of the targets: allocation with a running count.

    Attributes
    ----------
    name
        "cpu", "cuda" or "cuda-simulator".
    is_cuda
        Whether launchers run kernels (True) or loops.
    has_clock
        Whether the time that something takes means anything: in the simulator it does not.
    block
        Threads per block of the simple kernels.
    stream
        Where kernels and copies are queued, in order.
    has_background
        Whether a second thread may read ahead while the first computes.
    allocated_bytes, peak_bytes
        Device memory held now, and the most ever held.
    """

    name = "target"
    is_cuda = False
    has_clock = True
    block = 1
    stream: Any = 0
    has_background = True

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.peak_bytes = 0

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """An uninitialised device array; its bytes count until it is garbage."""
        array, owner = self._allocate(shape, np.dtype(dtype))
        n_bytes = int(array.nbytes)
        self.allocated_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        weakref.finalize(owner, self._release, n_bytes)
        return array

    def full(self, shape: int | tuple[int, ...], value: Any, dtype: Any) -> Any:
        """A device array filled with `value`."""
        array = self.empty(shape, dtype)
        self.write(array, np.full(shape, value, dtype))
        return array

    def put(self, host: np.ndarray) -> Any:
        """A device copy of a host array."""
        array = self.empty(host.shape, host.dtype)
        self.write(array, host)
        return array

    def write(self, array: Any, host: np.ndarray) -> None:
        """Overwrite a device array (or a contiguous part of one) with a host array."""
        raise NotImplementedError

    def get(self, array: Any) -> np.ndarray:
        """A host copy of a device array."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until everything launched has run."""

    def address(self, array: Any) -> int:
        """Where an array lies."""
        raise NotImplementedError

    def launch(
        self, kernel: Launchable, blocks: Grid, threads: int, stream: Any, words: Sequence[int]
    ) -> None:
        """Queue a kernel whose arguments are these 64-bit words."""
        raise TypeError(f"kernels run on a CUDA target, not on {self.name}")

    def mapped(self, n: int, dtype: Any) -> MappedArray:
        """An array of `n` elements in host memory that kernels read and write, too."""
        raise TypeError(f"memory is mapped for a CUDA target, not for {self.name}")

    def _allocate(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, Any]:
        """The array, and the object that lives as long as its memory."""
        raise NotImplementedError

    def _release(self, n_bytes: int) -> None:
        self.allocated_bytes -= n_bytes


class CpuTarget(Target):
    """Loops compiled for the processor, over NumPy arrays.

    Parameters
    ----------
    threads
        Threads of the parallel loops; None for as many as Numba found.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        super().__init__()
        if threads is not None:
            if not 1 <= threads <= config.NUMBA_NUM_THREADS:
                raise GGUFShardError(
                    f"threads: {threads} is not within 1..{config.NUMBA_NUM_THREADS}, "
                    "the processors this process may use"
                )
            set_num_threads(threads)
        self.threads = get_num_threads()

    def write(self, array: Any, host: np.ndarray) -> None:
        array[...] = host

    def get(self, array: Any) -> np.ndarray:
        return np.array(array)

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def _allocate(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, Any]:
        n_bytes = math.prod(shape if isinstance(shape, tuple) else (shape,)) * dtype.itemsize
        raw = np.empty(n_bytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + n_bytes].view(dtype).reshape(shape), raw


class CudaTarget(Target):
    """Kernels on the current CUDA device, or in the simulator.

    Attributes
    ----------
    guards
        Called whenever a result is about to leave the device, once all that was launched has run:
        they raise if it must not.
    n_launches
        Kernels launched so far, one by one.
    has_tensor_cores
        Whether products of several tokens may run on tensor cores, with operands of 16 bits.
    """

    name = "cuda-simulator" if config.ENABLE_CUDASIM else "cuda"
    is_cuda = True
    has_clock = not config.ENABLE_CUDASIM
    # Small in the simulator, where threads run one after the other.
    block = 8 if config.ENABLE_CUDASIM else 128

    def __init__(self) -> None:
        super().__init__()
        self.stream = cuda.stream()
        self.guards: list[Callable[[], None]] = []
        self.has_tensor_cores = not config.ENABLE_CUDASIM and _capability() >= (8, 0)
        self._recorded: list[Callable[[], None]] | None = None
        self.n_launches = 0
        self._queue = _queue()

    def write(self, array: Any, host: np.ndarray) -> None:
        if host.size:  # the simulator compares the strides of empty arrays, which may differ
            source = np.ascontiguousarray(host)  # kept until the copy is over
            if _is_plain(array, source):
                self.copy(self.address(array), source.ctypes.data, source.nbytes, self.stream)
            else:
                array.copy_to_device(source, stream=self.stream)
            self.stream.synchronize()

    def get(self, array: Any) -> np.ndarray:
        host = self.fetch(array)
        for check in self.guards:
            check()
        return host

    def fetch(self, array: Any) -> np.ndarray:
        """A host copy whatever the guards say: for those who put right what one has found."""
        host = np.empty(array.shape, array.dtype)
        if host.size and _is_plain(array, host):
            self.copy(host.ctypes.data, self.address(array), host.nbytes, self.stream)
        else:
            host = array.copy_to_host(stream=self.stream)
        self.stream.synchronize()
        return host

    def synchronize(self) -> None:
        cuda.synchronize()

    def address(self, array: Any) -> int:
        if isinstance(array, MappedArray):
            return array.address
        if config.ENABLE_CUDASIM:
            return int(array._ary.ctypes.data)
        # An array stays where it is. To ask takes five microseconds (seen beside an H100).
        address = getattr(array, "_address", None)
        if address is None:
            address = array._address = int(array.device_ctypes_pointer.value or 0)
        return int(address)

    def new_stream(self) -> Any:
        """A stream beside that of compute."""
        return cuda.stream()

    def event(self) -> Any:
        """An event to put one stream behind another with; it takes no time."""
        return cuda.event() if config.ENABLE_CUDASIM else cuda.event(timing=False)

    def mapped(self, n: int, dtype: Any) -> MappedArray:
        return MappedArray(n, np.dtype(dtype))

    def launch(
        self, kernel: Launchable, blocks: Grid, threads: int, stream: Any, words: Sequence[int]
    ) -> None:
        self.n_launches += 1
        queue_it = partial(self._queue.launch, kernel, blocks, threads, stream, words)
        if self._recorded is not None:
            self._recorded.append(queue_it)
        else:
            queue_it()

    def copy(self, to: int, source: int, n_bytes: int, stream: Any) -> None:
        """Queue a copy between two addresses, on the device or the host. If memory of the host is
        not pinned, this may return only when the copy is over."""
        self._queue.copy(to, source, n_bytes, stream)

    @contextmanager
    def recorded_launches(self) -> Iterator[list[Callable[[], None]]]:
        """Note launches down instead of queueing them: the simulator's way to capture a graph."""
        recorded: list[Callable[[], None]] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    def _allocate(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, Any]:
        try:
            array = cuda.device_array(shape, dtype)
        except CudaAPIError as error:
            raise GGUFShardError(f"an array {shape} of {dtype} on the device: {error}") from None
        # Views outlive the array they were made of, and have pointers of their own to one owner.
        return array, array._ary if config.ENABLE_CUDASIM else array.gpu_data.owner


def _queue() -> DriverQueue | SimulatorQueue:
    if config.ENABLE_CUDASIM:
        return SimulatorQueue()
    from cuda.bindings import driver

    return DriverQueue(driver)


def _is_plain(array: Any, host: np.ndarray) -> bool:
    """Whether an array on a real device holds the same as a host array, byte for byte. Numba, which
    looks at more than that, takes 100 us for a copy (seen beside an H100)."""
    return (
        not config.ENABLE_CUDASIM
        and array.shape == host.shape
        and array.dtype == host.dtype
        and bool(array.flags["C_CONTIGUOUS"])
    )


def _capability() -> tuple[int, int]:
    major, minor = cuda.get_current_device().compute_capability
    return int(major), int(minor)


def cuda_is_usable() -> bool:
    """Whether kernels can run here: a device with a driver, or a simulator that runs warps, which
    Numba's own does not (`tests/warp_simulator.py` mends that)."""
    if config.ENABLE_CUDASIM:
        return hasattr(cuda, "shfl_xor_sync")
    return bool(cuda.is_available()) and not _lacks_numpy_name()


def _lacks_numpy_name() -> bool:
    """Whether NumPy has no `row_stack` any more, which numba-cuda asks for before it compiles
    anything (https://github.com/NVIDIA/numba-cuda/issues/907); NumPy 2.5 does not have it."""
    return not hasattr(np, "row_stack")


def as_vector(array: Any) -> Any:
    """A contiguous array of either target as a vector. On a device, where it takes the host 40 us
    to make a view (seen beside an H100), it is made once and kept with the array."""
    if len(array.shape) == 1:
        return array
    if isinstance(array, np.ndarray):
        return array.reshape(-1)
    vector = getattr(array, "_vector", None)
    if vector is None:
        vector = array._vector = array.reshape(math.prod(array.shape))
    return vector


def select_target(name: str = "auto", threads: int | None = None) -> Target:
    """The target called `name`: "cpu", "cuda", or "auto" (cuda where there is one).

    Raises
    ------
    GGUFShardError
        If the name is unknown, or "cuda" is asked for and no device is usable.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise GGUFShardError(f"target {name!r} is none of auto, cpu, cuda")
    if name == "cpu" or (name == "auto" and not cuda_is_usable()):
        return CpuTarget(threads)
    if not cuda_is_usable():
        if not config.ENABLE_CUDASIM and cuda.is_available():
            raise GGUFShardError(
                f"target cuda: numba-cuda cannot compile with NumPy {np.__version__} "
                "(pip install 'numpy<2.5')"
            )
        raise GGUFShardError("target cuda: no usable CUDA device (driver and numba-cuda needed)")
    return CudaTarget()
