"""Where kernels run: `CpuTarget` (NumPy arrays, compiled loops) or `CudaTarget` (device arrays,
`numba.cuda` kernels; also under the CUDA simulator).

A target allocates, copies and counts. Every array that stands for device memory comes from it, so
`peak_bytes` is what a run really took and a budget can be held. Launchers in `atlas.ops` ask
`is_cuda` to pick kernel or loop; nobody else does.
"""

from __future__ import annotations

import math
import os
import weakref
from typing import Any

import numpy as np
from numba import config, cuda, get_num_threads, set_num_threads

from forge.errors import GGUFShardError

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register

# GNU OpenMP's threads spin for milliseconds at the end of every parallel loop. Where other work
# wants the processor (the prefetch thread does), that makes short loops ten times slower; after
# some microseconds they had better sleep. Read when the library is loaded, at the first loop.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

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
    block
        Threads per block of the simple kernels.
    has_background
        Whether a second thread may launch work while the first computes.
    allocated_bytes, peak_bytes
        Device memory held now, and the most ever held.
    """

    name = "target"
    is_cuda = False
    block = 1
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

    def host_view(self, array: Any) -> np.ndarray | None:
        """The array itself where device memory is host memory, else None."""
        return None

    def synchronize(self) -> None:
        """Wait until everything launched has run."""

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

    def host_view(self, array: Any) -> np.ndarray | None:
        return array

    def _allocate(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, Any]:
        n_bytes = math.prod(shape if isinstance(shape, tuple) else (shape,)) * dtype.itemsize
        raw = np.empty(n_bytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + n_bytes].view(dtype).reshape(shape), raw


class CudaTarget(Target):
    """Kernels on the current CUDA device, or in the simulator."""

    name = "cuda-simulator" if config.ENABLE_CUDASIM else "cuda"
    is_cuda = True
    # The simulator swaps module globals while a kernel runs: one thread at a time.
    has_background = not config.ENABLE_CUDASIM
    # Tiny in the simulator, where a thread is a thread of the host.
    block = 8 if config.ENABLE_CUDASIM else 128

    def write(self, array: Any, host: np.ndarray) -> None:
        if host.size:  # the simulator compares the strides of empty arrays, which may differ
            array.copy_to_device(np.ascontiguousarray(host))

    def get(self, array: Any) -> np.ndarray:
        return array.copy_to_host()

    def synchronize(self) -> None:
        cuda.synchronize()

    def _allocate(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, Any]:
        array = cuda.device_array(shape, dtype)
        # Views share the allocation, and outlive the array they were made of.
        return array, getattr(array, "gpu_data", array)


def cuda_is_usable() -> bool:
    """Whether kernels can run here: a device with a driver, or the simulator."""
    return bool(config.ENABLE_CUDASIM) or bool(cuda.is_available())


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
        raise GGUFShardError("target cuda: no usable CUDA device (driver and numba-cuda needed)")
    return CudaTarget()
