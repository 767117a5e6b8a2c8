"""The pool of frames that the host manages: table, ticks, uses, free frames.

Callers serialise access (the lock of `atlas.shard_cache`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from atlas.ops.gather import check_frames, publish
from atlas.ops.lru import RANK_PINNED, choose_victims, hold, touch
from atlas.ops.paged import PageCache
from atlas.target import Target
from forge.pages import PAGE_BYTES

_BYTES_PER_FRAME = 4 + 8 + 4  # frame_shard, ticks, held
_BYTES_PER_SHARD = 4 + 1 + 4 + 4  # table, rank, numbers, missing
_BYTES_PER_PAGE = 4  # the table of CRCs
MAX_VICTIMS = 64  # of one load
_LIST_PART = 1024  # numbers that go to the device at once: lists take little of the budget


class FramePool:
    """Room for `n_frames` shards in host memory.

    Parameters
    ----------
    target
        Where the memory comes from.
    n_frames
        Room for so many shards.
    n_pages, shard_shift
        Pages of the model, and log2 of the pages per shard.
    page_crc32
        uint32 [n_pages], the CRC each page must have.
    shard_rank
        uint8 [n_shards], the order in which shards are given up (`atlas.ops.lru`).

    Attributes
    ----------
    cache
        Frames and table as operations take them.
    is_resident
        bool [n_shards], the host's mirror of the table.
    """

    def __init__(
        self,
        target: Target,
        n_frames: int,
        n_pages: int,
        shard_shift: int,
        page_crc32: np.ndarray,
        shard_rank: np.ndarray,
    ) -> None:
        self.target = target
        self.n_frames = n_frames
        self.n_pages = n_pages
        self.n_shards = len(shard_rank)
        self.frame_bytes = PAGE_BYTES << shard_shift
        self.shard_shift = shard_shift
        self.table = target.full(self.n_shards, -1, np.int32)
        self._allocate_frames()
        self.frame_shard = target.full(n_frames, -1, np.int32)
        self.ticks = target.full(n_frames, 0, np.int64)
        self.held = target.full(n_frames, 0, np.int32)
        self.shard_rank = target.put(shard_rank)
        self._is_pinned = shard_rank == RANK_PINNED
        self.page_crc32 = target.put(page_crc32)
        self._numbers = target.put(np.arange(self.n_shards, dtype=np.int32))
        self._missing = target.empty(self.n_shards, np.int32)
        self._victims = target.empty(MAX_VICTIMS, np.int32)
        self._shard_of = np.full(n_frames, -1, np.int32)
        self._free = list(range(n_frames - 1, -1, -1))
        self.is_resident = np.zeros(self.n_shards, np.bool_)
        self.tick = 0

    @property
    def n_free(self) -> int:
        return len(self._free)

    def numbers(self, first: int, last: int) -> Any:
        """Device array of the shards `first` to `last`, inclusive."""
        return self._numbers[first : last + 1]

    def touch(self, first: int, last: int) -> list[int]:
        """Mark shards `first` to `last` as used now; returns those that are not resident."""
        self.tick += 1
        missing = self._missing[: last - first + 1]
        count = touch(
            self.target, self.table, self.ticks, self.numbers(first, last), self.tick, missing
        )
        return self.target.get(missing[:count]).tolist() if count else []

    def touch_each(self, shards: Sequence[int]) -> None:
        """Mark resident shards that need not follow each other as used now."""
        self.tick += 1
        for numbers in self._lists(shards):
            touch(self.target, self.table, self.ticks, numbers, self.tick, self._missing)

    def hold(self, first: int, last: int, change: int) -> None:
        """Count uses of the resident ones among shards `first` to `last` up (+1) or down (-1)."""
        hold(self.target, self.table, self.held, self.numbers(first, last), change)

    def hold_each(self, shards: Sequence[int], change: int) -> None:
        """`hold` for shards that do not follow each other."""
        for numbers in self._lists(shards):
            hold(self.target, self.table, self.held, numbers, change)

    def _lists(self, numbers: Sequence[int] | np.ndarray) -> Iterator[Any]:
        for i in range(0, len(numbers), _LIST_PART):
            yield self.target.put(np.array(numbers[i : i + _LIST_PART], np.int32))

    def release_all(self) -> None:
        """End all uses."""
        self.target.write(self.held, np.zeros(self.n_frames, np.int32))

    def expect(self, page_crc32: np.ndarray) -> None:
        """Let pages have other CRCs from now on, uint32 [n_pages]; resident shards stay."""
        self.target.write(self.page_crc32, page_crc32)

    def absent_pinned(self) -> list[int]:
        """Pinned shards that are not resident."""
        return np.flatnonzero(self._is_pinned & ~self.is_resident).tolist()

    def n_evictable(self) -> int:
        """Frames whose shards are neither pinned nor held."""
        is_loose = (self._shard_of >= 0) & (self.target.get(self.held) == 0)
        return int((~self._is_pinned[self._shard_of[is_loose]]).sum())

    def take_free(self, count: int) -> list[int]:
        """Take free frames for shards that are coming in; ValueError if there are not so many."""
        if count > len(self._free):
            raise ValueError(f"{count} frames wanted, {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, frames: Sequence[int]) -> None:
        """Return frames whose shards did not hold."""
        self._free.extend(frames)

    def _allocate_frames(self) -> None:
        frames = self.target.empty(self.n_frames * self.frame_bytes, np.uint8)
        self.cache = PageCache(frames, self.table, self.shard_shift, frames.view(np.uint32))

    def frame(self, number: int) -> np.ndarray:
        """The bytes of a frame, uint8 [frame_bytes]."""
        return self.cache.frames[number * self.frame_bytes : (number + 1) * self.frame_bytes]

    def frame_of(self, shard: int) -> int:
        """The frame of a resident shard."""
        return int(self.table[shard])

    def shard_in(self, frame: int) -> int:
        """The resident shard in a frame, or -1."""
        return int(self._shard_of[frame])

    def is_held(self, frame: int) -> bool:
        """Whether a frame's shard is in use."""
        return bool(self.held[frame])

    def check(self, shards: Sequence[int], frames: Sequence[int], faults: np.ndarray) -> None:
        """Check the pages of shards that have just been read into frames; `faults` as for
        `atlas.ops.gather.check_frames`."""
        check_frames(
            self.target, self.cache.frames, np.array(frames, np.int32),
            np.array(shards, np.int32), self.shard_shift, self.n_pages, self.page_crc32, faults,
        )  # fmt: skip

    def publish(
        self, shards: Sequence[int], frames: Sequence[int], n_victims: int, newest_first: bool
    ) -> list[int]:
        """Make checked shards resident and give up others.

        Parameters
        ----------
        shards, frames
            What has been brought in, and where it lies.
        n_victims
            How many resident shards should make room, at most `MAX_VICTIMS`.
        newest_first
            Give up the most recently used, not the least recently used.

        Returns
        -------
        list[int]
            The shards that were given up: at most `n_victims`.
        """
        target = self.target
        victims = self._victims[:n_victims]
        found = 0
        if n_victims:
            found = choose_victims(
                target, self.frame_shard, self.ticks, self.shard_rank, self.held, n_victims,
                newest_first, victims,
            )  # fmt: skip
        victim_frames = target.get(victims[:found])
        evicted = self._shard_of[victim_frames].tolist()
        self.tick += 1
        publish(
            target, self.table, self.frame_shard, self.ticks, victims[:found],
            target.put(np.array(frames, np.int32)), target.put(np.array(shards, np.int32)),
            self.tick,
        )  # fmt: skip
        self._free.extend(victim_frames.tolist())
        self._shard_of[victim_frames] = -1
        self._shard_of[list(frames)] = shards
        self.is_resident[evicted] = False
        self.is_resident[list(shards)] = True
        return evicted

    def evict(self, shards: Sequence[int]) -> None:
        """Give up exactly these resident shards, which nobody holds."""
        frames = self.target.get(self.table)[list(shards)]
        none = self.target.empty(0, np.int32)
        for numbers in self._lists(frames):
            publish(
                self.target, self.table, self.frame_shard, self.ticks, numbers, none, none,
                self.tick,
            )  # fmt: skip
        self._free.extend(frames.tolist())
        self._shard_of[frames] = -1
        self.is_resident[list(shards)] = False


def pool_overhead_bytes(n_pages: int, n_shards: int) -> int:
    """Device memory of a pool without any frames."""
    return n_pages * _BYTES_PER_PAGE + n_shards * _BYTES_PER_SHARD + MAX_VICTIMS * 4


def frame_cost_bytes(shard_shift: int) -> int:
    """Device memory of each further frame."""
    return (PAGE_BYTES << shard_shift) + _BYTES_PER_FRAME
