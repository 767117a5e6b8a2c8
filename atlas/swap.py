"""Bringing shards in: read into free frames, check every page, publish or change nothing.

Incoming shards go to frames that hold nothing, so a page that fails its check destroys no valid
shard. Only after all pages of a load hold do the table entries change and the victims' frames
become the free ones of the next load.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from atlas.errors import CorruptPageError
from atlas.eviction import MAX_RESERVE
from atlas.frame_pool import FramePool
from atlas.host_store import FileStore
from atlas.stats import CacheStats
from atlas.target import Target
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES

N_LANES = 2  # loads under way at once: on demand, and ahead


class Lane:
    """Buffers of one thread that loads shards: shards are read straight into their frames, and
    there is room for the faults of their pages."""

    def __init__(self, target: Target, shard_bytes: int) -> None:
        self.faults = target.empty(MAX_RESERVE * shard_bytes // PAGE_BYTES, np.uint32)


def lane_bytes(shard_bytes: int) -> int:
    """Memory of one lane."""
    return MAX_RESERVE * shard_bytes // PAGE_BYTES * 4


class Swapper:
    """Loads shards into a pool.

    Parameters
    ----------
    pool, store
        Where to and where from.
    changed
        The condition whose lock guards the pool; notified when frames become free or shards
        resident.
    stats
        Counts to add to.
    newest_first
        Direction of the policy.

    Attributes
    ----------
    n_waiting
        Threads that wait for free frames.
    """

    def __init__(
        self,
        pool: FramePool,
        store: FileStore,
        changed: threading.Condition,
        stats: CacheStats,
        newest_first: bool,
    ) -> None:
        self.pool = pool
        self.store = store
        self.changed = changed
        self.stats = stats
        self.newest_first = newest_first
        self.in_flight = 0
        self.n_waiting = 0

    def load(
        self, lane: Lane, shards: Sequence[int], victims_wanted: Callable[[], int]
    ) -> list[int]:
        """Make up to `MAX_RESERVE` shards resident that are not; returns those given up for them.

        The caller holds the lock of `changed`; it is let go while reading and checking.

        Parameters
        ----------
        lane
            Room to work in.
        shards
            The shards.
        victims_wanted
            Called with the lock held when they have come in; how many residents should make room.

        Raises
        ------
        CorruptPageError
            If a page does not hold, and again when read a second time. The pool is as before.
        GGUFShardError
            If the file cannot be read, or the pool has no room for so many. Likewise.
        """
        frames = self._take_frames(len(shards))
        self.in_flight += 1
        held = True
        try:
            self.changed.release()
            held = False
            started = time.perf_counter()
            n_bytes = self._bring_in(lane, shards, frames)
            elapsed = time.perf_counter() - started
            self.changed.acquire()
            held = True
            n_victims = victims_wanted()
            evicted = self.pool.publish(shards, frames, n_victims, self.newest_first)
        except BaseException:
            if not held:
                self.changed.acquire()
            self.pool.give_back(frames)
            raise
        finally:
            self.in_flight -= 1
            self.changed.notify_all()
        self.stats.swaps += 1
        self.stats.swap_seconds += elapsed
        self.stats.bytes_moved += n_bytes
        self.stats.pages_checked += n_bytes // PAGE_BYTES
        return evicted

    def _take_frames(self, count: int) -> list[int]:
        """Free frames, waited for while another thread's load will free some."""
        while self.pool.n_free < count:
            if not self.in_flight:
                raise GGUFShardError(f"the pool has no room for {count} more shards at once")
            self.n_waiting += 1
            try:
                self.changed.wait()
            finally:
                self.n_waiting -= 1
                self.changed.notify_all()  # whoever stood back for this one
        return self.pool.take_free(count)

    def _bring_in(self, lane: Lane, shards: Sequence[int], frames: Sequence[int]) -> int:
        n_bytes, faults = self._read_and_check(lane, shards, frames)
        if faults.any():
            # Once more: a page that a writer was replacing, or a flipped bit on the way.
            n_bytes, faults = self._read_and_check(lane, shards, frames)
            if faults.any():
                raise self._corrupt(shards, frames, int(np.flatnonzero(faults)[0]))
        return n_bytes

    def _read_and_check(
        self, lane: Lane, shards: Sequence[int], frames: Sequence[int]
    ) -> tuple[int, np.ndarray]:
        pool = self.pool
        n_bytes = sum(
            self.store.read_shard(shard, pool.frame(frame))
            for shard, frame in zip(shards, frames, strict=True)
        )
        faults = lane.faults[: len(shards) << pool.shard_shift]
        pool.check(shards, frames, faults)
        return n_bytes, faults

    def _corrupt(
        self, shards: Sequence[int], frames: Sequence[int], index: int
    ) -> CorruptPageError:
        i, slot = divmod(index, self.store.shard_pages)
        frame = self.pool.frame(frames[i])
        page = shards[i] * self.store.shard_pages + slot
        return self.store.corrupt_page(page, frame[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES])
