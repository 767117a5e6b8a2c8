"""Slow, obvious twins of the operations: what every target is compared with."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

# ---- cache bookkeeping: checksums, the data pass of a swap, ticks and victims ----


def crc32_pages(pages: np.ndarray) -> np.ndarray:
    """CRC32 of the first 4088 bytes of each page, by zlib: uint8 [n, 4096] -> uint32 [n]."""
    return np.array([zlib.crc32(page[:4088].tobytes()) for page in pages], np.uint32)


def page_faults(
    frames: np.ndarray,
    frame_ids: Sequence[int],
    shard_ids: Sequence[int],
    pages_per_shard: int,
    page_crc32: np.ndarray,
) -> list[int]:
    """What is wrong with each page of the named frames: 1 tag, 2 magic, 4 table, summed.

    `frames` is uint8 [n_frames, pages_per_shard, 4096]; pages beyond the table are not looked at.
    """
    faults = []
    for frame, shard in zip(frame_ids, shard_ids, strict=True):
        for slot in range(pages_per_shard):
            page = shard * pages_per_shard + slot
            if page >= len(page_crc32):
                faults.append(0)
                continue
            data = frames[frame, slot].tobytes()
            crc = zlib.crc32(data[:4088])
            fault = 0
            if crc != int.from_bytes(data[4088:4092], "little"):
                fault += 1
            if data[4092:] != b"PGCR":
                fault += 2
            if crc != page_crc32[page]:
                fault += 4
            faults.append(fault)
    return faults


def victims(
    frame_shard: Sequence[int],
    ticks: Sequence[int],
    shard_rank: Sequence[int],
    held: Sequence[int],
    count: int,
    newest_first: bool,
) -> list[int]:
    """The first `count` frames that may be given up, in the order they go: by a full sort."""
    candidates = []
    for frame, shard in enumerate(frame_shard):
        if shard >= 0 and not held[frame] and shard_rank[shard] < 255:
            age = -ticks[frame] if newest_first else ticks[frame]
            candidates.append((shard_rank[shard], age, frame))
    return [frame for _, _, frame in sorted(candidates)[:count]]


class LruCache:
    """Which shards a cache of `capacity` holds, as an `OrderedDict` with the oldest first."""

    def __init__(self, capacity: int, newest_first: bool = False) -> None:
        self.capacity = capacity
        self.newest_first = newest_first
        self.resident: OrderedDict[int, None] = OrderedDict()

    def access(self, shard: int) -> bool:
        """Use a shard, evicting another where there is no room; whether it was resident."""
        if shard in self.resident:
            self.resident.move_to_end(shard)
            return True
        if len(self.resident) == self.capacity:
            self.resident.popitem(last=self.newest_first)
        self.resident[shard] = None
        return False
