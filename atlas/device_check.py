"""Pages of a file, checked by a GPU: for `gguf-shard verify --target cuda`."""

from __future__ import annotations

import threading

import numpy as np

from atlas.ops.gather import check_frames
from atlas.target import Target


class DeviceCheck:
    """Finds faulty pages with the kernel that checks resident ones; callable.

    Parameters
    ----------
    target
        Where to check.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._lock = threading.Lock()  # batches take turns: copies and kernels share a stream

    def __call__(self, pages: np.ndarray, page_crc32: np.ndarray) -> np.ndarray:
        """Indices of pages whose content, tag, magic or table entry disagree.

        Parameters
        ----------
        pages
            uint8 [n, 4096].
        page_crc32
            uint32 [n], the table's entries.
        """
        n = len(pages)
        numbers = np.arange(n, dtype=np.int32)  # every page a shard, in a frame of its own
        with self._lock:
            target = self.target
            faults = target.empty(n, np.uint32)
            where = target.put(numbers)
            check_frames(
                target, target.put(pages.reshape(-1)), where, where, 0, n, target.put(page_crc32),
                faults,
            )  # fmt: skip
            return np.flatnonzero(target.get(faults))
