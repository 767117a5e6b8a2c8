"""Host memory that is pinned, and mapped for the device: copies to and from it run at the speed of
the link, and kernels read and write it where it lies."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np
from numba import config, cuda

from forge.errors import GGUFShardError


class MappedArray:
    """Host memory that is pinned and mapped for the device; freed with the object.

    Attributes
    ----------
    host
        The array as the host sees it.
    address
        Where kernels find it.

    Raises
    ------
    GGUFShardError
        If so much memory cannot be pinned.
    """

    def __init__(self, n: int, dtype: np.dtype[Any]) -> None:
        self.shape = (n,)
        if config.ENABLE_CUDASIM:
            self.host = np.empty(n, dtype)
            self.address = int(self.host.ctypes.data)
            return
        n_bytes = max(n, 1) * dtype.itemsize
        pointer, self.address = pinned_memory(n_bytes)
        memory = (ctypes.c_uint8 * n_bytes).from_address(pointer)
        self.host = np.frombuffer(memory, dtype, n)
        weakref.finalize(self, _free_pinned, pointer)


def pinned_memory(n_bytes: int) -> tuple[int, int]:
    """Pinned host memory, mapped for every device: its address here and on the device.

    Raises
    ------
    GGUFShardError
        If so much memory cannot be pinned.
    """
    from cuda.bindings import driver

    cuda.current_context()
    flags = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
    status, pointer = driver.cuMemHostAlloc(n_bytes, flags)
    if int(status) != 0:
        raise GGUFShardError(f"{n_bytes} bytes of host memory cannot be pinned: {status.name}")
    status, device_pointer = driver.cuMemHostGetDevicePointer(pointer, 0)
    if int(status) != 0:
        _free_pinned(int(pointer))
        raise GGUFShardError(f"pinned host memory is not seen by the device: {status.name}")
    return int(pointer), int(device_pointer)


def _free_pinned(pointer: int) -> None:
    from cuda.bindings import driver

    driver.cuMemFreeHost(pointer)
