"""What is queued by the driver's own calls: kernels, and copies between addresses.

At every launch Numba looks at the types of the arguments, finds the kernel compiled for them, and
describes the grid anew: 26 us; this way it is 9 us in all (seen beside an H100). A kernel here
takes 64-bit words (`atlas.ops.kernel`), so it is compiled once, and what it is launched with is
written as it is.
Numba's copies take 100 us, most of it for views of the arrays that it makes.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError

#: Blocks of a launch, in one dimension or two.
Grid = int | tuple[int, int]


class Launchable(Protocol):
    """What is launched of a kernel (`atlas.ops.kernel.Kernel`).

    Attributes
    ----------
    name
        For errors.
    entry, entry_types
        What is compiled, and for which types: an int64 for each word.
    """

    name: str
    entry: Any
    entry_types: tuple[Any, ...]


class DriverQueue:
    """Queues on a device's streams.

    Parameters
    ----------
    driver
        `cuda.bindings.driver`.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._functions: dict[Any, Any] = {}
        self._thread = threading.local()

    def launch(
        self, kernel: Launchable, blocks: Grid, threads: int, stream: Any, words: Sequence[int]
    ) -> None:
        """Queue a kernel on a grid of `blocks` times `threads`.

        Parameters
        ----------
        words
            Its arguments, each within 0 to 2^64 - 1.

        Raises
        ------
        CudaAPIError
            If the driver refuses.
        """
        if kernel not in self._functions:
            self._functions[kernel] = self._find_function(kernel)
        function = self._functions[kernel]
        if function is None:
            kernel.entry[blocks, threads, stream](*(ctypes.c_int64(word).value for word in words))
            return
        self._enter_context()
        grid = blocks if isinstance(blocks, tuple) else (blocks, 1)
        (status,) = self._driver.cuLaunchKernel(
            function, *grid, 1, threads, 1, 1, 0, int(stream), self._parameters(words), 0
        )
        _require(status, f"launch of {kernel.name}")

    def _parameters(self, words: Sequence[int]) -> int:
        """Address of an array of pointers to the words, good until this thread's next launch: the
        driver has copied them when it returns."""
        n = len(words)
        kept = self._thread.__dict__.setdefault("parameters", {})
        if n not in kept:
            memory = (ctypes.c_uint64 * n)()
            first = ctypes.addressof(memory)
            kept[n] = memory, (ctypes.c_uint64 * n)(*range(first, first + 8 * n, 8))
        memory, pointers = kept[n]
        memory[:] = words
        return ctypes.addressof(pointers)

    def copy(self, to: int, source: int, n_bytes: int, stream: Any) -> None:
        """Queue a copy between two addresses, on the device or the host.

        Raises
        ------
        CudaAPIError
            If the driver refuses.
        """
        self._enter_context()
        (status,) = self._driver.cuMemcpyAsync(to, source, n_bytes, int(stream))
        _require(status, f"copy of {n_bytes} bytes")

    def _enter_context(self) -> None:
        if not hasattr(self._thread, "context"):
            self._thread.context = cuda.current_context()  # becomes this thread's

    def _find_function(self, kernel: Launchable) -> Any:
        """The driver's handle of a kernel, compiled and loaded; None if Numba does not say."""
        compiled = kernel.entry.compile(kernel.entry_types)
        try:  # nothing public leads there
            handle = compiled._codelibrary.get_cufunc().handle
        except AttributeError:
            return None
        return self._driver.CUfunction(int(handle))


class SimulatorQueue:
    """The simulator's twin: everything is done at once, and all memory is the host's."""

    def launch(
        self, kernel: Launchable, blocks: Grid, threads: int, stream: Any, words: Sequence[int]
    ) -> None:
        """Run a kernel."""
        kernel.entry[blocks, threads, stream](*words)

    def copy(self, to: int, source: int, n_bytes: int, stream: Any) -> None:
        """Copy."""
        ctypes.memmove(to, source, n_bytes)


def _require(status: Any, what: str) -> None:
    if int(status) != 0:
        raise CudaAPIError(int(status), f"{what}: {status.name}")
