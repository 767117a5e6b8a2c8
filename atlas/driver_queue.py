"""What is queued by the driver's own calls: kernels, and copies between addresses.

At every launch Numba looks at the types of the arguments, finds the kernel compiled for them, and
describes the grid anew: 26 us; this way it is 9 us in all (seen beside an H100). A kernel here
takes one word (`atlas.ops.kernel`), so it is compiled once, and what it is launched with is kept.
Numba's copies take 100 us, most of it for views of the arrays that it makes.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from numba import cuda, types
from numba.cuda.cudadrv.driver import CudaAPIError

ENTRY_TYPES = (types.int64,)
"""What an entry is compiled for: what Numba takes an address for."""


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

    def launch(self, entry: Any, blocks: int, threads: int, stream: Any, block: int) -> None:
        """Queue an entry (`Kernel.entry`) on a grid of `blocks` times `threads`.

        Parameters
        ----------
        block
            Address of its arguments.

        Raises
        ------
        CudaAPIError
            If the driver refuses.
        """
        if entry not in self._functions:
            self._functions[entry] = self._find_function(entry)
        function = self._functions[entry]
        if function is None:
            entry[blocks, threads, stream](block)
            return
        self._enter_context()
        word = ctypes.c_int64(block)
        parameters = ctypes.c_void_p(ctypes.addressof(word))  # an array of one pointer
        (status,) = self._driver.cuLaunchKernel(
            function, blocks, 1, 1, threads, 1, 1, 0, int(stream), ctypes.addressof(parameters), 0
        )
        _require(status, f"launch of {entry.__name__}")

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

    def _find_function(self, entry: Any) -> Any:
        """The driver's handle of an entry, compiled and loaded; None if Numba does not say."""
        compiled = entry.compile(ENTRY_TYPES)
        try:  # nothing public leads there
            handle = compiled._codelibrary.get_cufunc().handle
        except AttributeError:
            return None
        return self._driver.CUfunction(int(handle))


class SimulatorQueue:
    """The simulator's twin: everything is done at once, and all memory is the host's."""

    def launch(self, entry: Any, blocks: int, threads: int, stream: Any, block: int) -> None:
        """Run an entry."""
        entry[blocks, threads, stream](block)

    def copy(self, to: int, source: int, n_bytes: int, stream: Any) -> None:
        """Copy."""
        ctypes.memmove(to, source, n_bytes)


def _require(status: Any, what: str) -> None:
    if int(status) != 0:
        raise CudaAPIError(int(status), f"{what}: {status.name}")
