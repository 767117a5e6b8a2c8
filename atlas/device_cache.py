"""A cache of shards that kernels drive: on a GPU, with host memory behind it.

A step of compute uses a band of shards. What it wants are those and the next ones of the schedule,
so that gathers run ahead of compute; the host queues swaps for the ones that are new in this window
(`atlas.swap_queue`) and does not wait for compute. Whatever was wanted since the oldest shard of
the window is not given up: a `lag` says how many selects back that is.

If a page does not hold, nothing of its swap is published and everything behind it does nothing; the
compute that was queued runs on whatever is there. That is looked at before any result leaves the
device (`CudaTarget.guards`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from atlas.eviction import PoolPlan
from atlas.host_store import FileStore
from atlas.host_tier import HostTier
from atlas.ops.lru import RANK_PINNED
from atlas.ops.paged import PageCache
from atlas.ops.select import AHEAD, DEMAND, UNCOUNTED
from atlas.ops.swap_state import HITS, MAX_INCOMING, MISSES, N_FREE, PAGES_IN
from atlas.prefetch import Schedule, count_shared
from atlas.stats import CacheStats
from atlas.swap_queue import SwapQueue
from atlas.target import CudaTarget
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.progress import progress_bar
from forge.sharded_model import ShardedModel
from forge.sizes import Size


class DeviceCache:
    """Shards of a model in the memory of a GPU, by a plan.

    Parameters
    ----------
    target
        The GPU.
    store
        The file.
    plan
        How the pool is used.
    schedule
        Shards in the order in which passes read them.
    is_cached
        bool [n_shards], the shards that may be asked for.
    ranks
        uint8 [n_shards] (`atlas.eviction.shard_ranks`); the pinned ones are brought in at once.
    host_memory
        Limit of pinned memory (`atlas.host_tier`).

    Attributes
    ----------
    pages
        Frames and table, as operations take them.
    host
        The tier behind.
    queue
        Where swaps are queued.
    is_complete
        Whether everything is resident and nothing moves any more.
    hits
        Uses of resident shards that no select has counted.

    Raises
    ------
    CorruptPageError
        If a page of a pinned shard fails its check twice.
    BudgetError
        If the host memory is too small.
    """

    def __init__(
        self,
        target: CudaTarget,
        store: FileStore,
        plan: PoolPlan,
        schedule: Sequence[int],
        is_cached: np.ndarray,
        ranks: np.ndarray,
        host_memory: Size | None,
    ) -> None:
        self.target = target
        self.plan = plan
        self.schedule = Schedule(schedule, len(is_cached))
        frames = target.empty(plan.n_frames * store.shard_bytes, np.uint8)
        table = target.full(len(is_cached), -1, np.int32)
        shift = store.shard_pages.bit_length() - 1
        self.pages = PageCache(frames, table, shift, frames.view(np.uint32))
        loan = min(max(plan.reserve, 1), MAX_INCOMING)
        self.host = HostTier(store, plan, schedule, is_cached, ranks, loan, host_memory)
        self.queue = SwapQueue(target, store, self.pages, self.host, ranks, plan.newest_first)
        self._lock = threading.RLock()
        self._is_pinned = ranks == RANK_PINNED
        n_cached = int(is_cached.sum())
        self._n_loose = plan.n_frames - int((is_cached & self._is_pinned).sum())
        self._holds_all = plan.n_frames >= n_cached
        self._staying = is_cached if self._holds_all else is_cached & self._is_pinned
        self._kept_free = 0 if self._holds_all else plan.reserve
        self._wanted: dict[int, int] = {}  # band and window: the tick that asked for each
        self._recent: dict[int, int] = {}  # all that was asked for since the oldest of those
        self._window: list[int] = []
        self._ahead: set[int] = set()  # asked for ahead, not yet used
        self._current: tuple[int, int] | None = None
        self._stats = CacheStats()
        self.hits = 0
        self.is_complete = False
        target.guards.append(self.check)
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Wait for what is queued and stop."""
        self.target.synchronize()
        if self.check in self.target.guards:
            self.target.guards.remove(self.check)
        self.host.close()

    def acquire(self, first: int, last: int) -> None:
        """Queue that shards `first` to `last` be resident for what is launched until the next call.

        A page that does not hold is reported when a result is fetched.
        """
        if self.is_complete:
            self.hits += last - first + 1 - count_shared(first, last, self._current)
            self._current = (first, last)
            return
        with self._lock:
            band = range(first, last + 1)
            self._window = self.schedule.after(last, self.plan.distance) or self._window
            kept = {*band, *self._window}
            self._wanted = {s: t for s, t in self._wanted.items() if s in kept}
            self._count_used_again(band)
            used = self.queue.compute_so_far()
            self._want([s for s in band if s not in self._wanted], DEMAND, used)
            ahead = [s for s in self._window if s not in self._wanted]
            self._want(ahead, AHEAD, used)
            self._ahead.update(ahead)
            self.queue.put_compute_behind(max(self._wanted[s] for s in band))
            self._current = (first, last)

    def swap(self, wanted: Sequence[int]) -> None:
        """Make shards resident: all of them, or nothing changes.

        Raises
        ------
        CorruptPageError
            If a page fails its check twice; what was resident is so still.
        GGUFShardError
            If the pool cannot hold all of them at once.
        """
        with self._lock:
            self.target.synchronize()
            self.check()
            before = self.target.get(self.pages.table)
            missing = [s for s in wanted if before[s] < 0]
            self._require_room(wanted, missing, before)
            kept = set(self._wanted)
            self._refresh([s for s in wanted if before[s] >= 0])
            try:
                self._want(missing, UNCOUNTED, self.queue.compute_so_far())
                self.target.synchronize()
                self.check()
            except GGUFShardError:
                self._restore(before)
                raise
            self._wanted = {s: t for s, t in self._wanted.items() if s in kept}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this is entered, nothing is under way and nothing is read ahead.

        Raises
        ------
        GGUFShardError
            If a swap has met a fault, of which whoever fetches the pass's result has to be told.
        """
        self.target.synchronize()
        if self.queue.has_fault:
            raise GGUFShardError(
                "a page has failed its check in a pass whose result nobody has fetched yet"
            )
        with self.host.cache.paused():
            yield

    def adopt(self, model: ShardedModel, changed: Sequence[int]) -> None:
        """Go over to another version of the model, in a pause, and while nobody uses any shard.

        Parameters
        ----------
        model
            The version, of the same layout.
        changed
            Shards that differ: they are given up, on the device and in host memory, and those that
            stay there are brought in again.

        Raises
        ------
        CorruptPageError
            If a page of what stays fails its check twice. Its shard is not resident then; it is
            read when it is wanted next.
        """
        with self._lock:
            self.is_complete = False
            self._take_out(changed)
            self.queue.expect(model.page_crc32)
            try:
                self.host.adopt(model, changed)
            finally:
                self.queue.publish_addresses()
            self._bring_in_staying()

    @property
    def stats(self) -> CacheStats:
        """Counts of all that has been queued, fetched from the device once it is done."""
        self.target.synchronize()  # what has been asked for ahead runs beside compute
        state = self.target.get(self.queue.state.state)
        n_pages = int(state[PAGES_IN])
        stats = self._stats
        return replace(
            stats,
            reuse_hits=self.hits + int(state[HITS + AHEAD] + state[HITS + DEMAND]),
            prefetch_hits=int(state[MISSES + AHEAD]),
            demand_misses=int(state[MISSES + DEMAND]),
            bytes_moved=n_pages * PAGE_BYTES,
            pages_checked=stats.pages_checked + n_pages,
        )

    def count_hits(self, n_shards: int) -> None:
        """Count uses of resident shards that did not go through `acquire`."""
        self.hits += n_shards

    def scrub(self, n_pages: int) -> None:
        """Queue a check of the next `n_pages` pages of the pool, those of empty frames included;
        `check` reports what is found. The shard is then given up."""
        with self._lock:
            self.queue.scrub(n_pages)
        self._stats.pages_checked += n_pages

    def count_checked(self, n_pages: int) -> None:
        """Count pages that the caller has checked past the cache."""
        self._stats.pages_checked += n_pages

    def check(self) -> None:
        """Raise what a swap has found since the last call, if anything.

        Raises
        ------
        CorruptPageError
            If a page did not hold; what has been computed since must not be used.
        """
        with self._lock:  # not amid another thread's swap, which must find its faults itself
            error = self.queue.take_fault()
            if error is not None:
                self.is_complete = False
                self._recover()
                raise error

    # The window

    def _count_used_again(self, band: range) -> None:
        """Count uses that no select counts: of shards that have not left the window since they were
        used before."""
        self._ahead &= self._wanted.keys()
        first, last = self._current or (0, -1)
        again = [s for s in band if s in self._wanted and s not in self._ahead]
        self.hits += sum(not first <= s <= last for s in again)
        self._ahead.difference_update(band)

    @property
    def _part(self) -> int:
        """Shards of one swap: as many as frames are kept free; half of that where they are copied,
        so that the next ones can come while these are checked."""
        part = min(self.plan.reserve, MAX_INCOMING)
        return max(part // 2 if self.queue.are_copied else part, 1)

    def _want(self, shards: Sequence[int], kind: int, used: Any) -> None:
        """Queue swaps for shards that are not in the window yet, and enter them into it; `used` is
        the compute that must be over before anything is given up."""
        size = self._part
        for i in range(0, len(shards), size):
            part = shards[i : i + size]
            oldest = self._oldest()
            self._recent = {s: t for s, t in self._recent.items() if t >= oldest}
            if self._is_crowded(part):
                self._refresh([])
            self._enter(part, kind, self._kept_free, used)
            self._stats.swaps += 1

    def _enter(self, shards: Sequence[int], kind: int, n_kept_free: int, used: Any) -> None:
        lag = self.queue.tick - self._oldest()
        try:
            tick = self.queue.queue(shards, kind, lag, n_kept_free, used)
        except BaseException:  # the file, the driver, or an interrupt: its gather is not queued
            self.target.synchronize()
            self._recover()
            raise
        for shard in shards:
            self._wanted[shard] = self._recent[shard] = tick

    def _oldest(self) -> int:
        return min(self._wanted.values(), default=self.queue.tick)

    def _is_crowded(self, shards: Sequence[int]) -> bool:
        """Whether what nobody wants any more, but was asked for after something that is still
        wanted, takes room that these shards need."""
        if len(self._recent) == len(self._wanted):
            return False
        loose = sum(not self._is_pinned[s] for s in {*self._recent, *shards})
        return loose + self._kept_free > self._n_loose

    def _refresh(self, others: Sequence[int]) -> None:
        """Ask again for what is in the window, and for others that are resident, so that nothing
        else counts as wanted since."""
        shards = [*self._wanted, *(s for s in others if s not in self._wanted)]
        self._wanted.clear()
        self._recent.clear()
        used = self.queue.compute_so_far()
        for i in range(0, len(shards), MAX_INCOMING):
            self._enter(shards[i : i + MAX_INCOMING], UNCOUNTED, 0, used)

    # Filling, and what rarely happens

    def _fill(self) -> None:
        """Bring in what stays on the device, then what stays in host memory."""
        self._bring_in_staying("device memory")
        self.host.fill()
        self.queue.publish_addresses()
        n_pages = int(self.target.get(self.queue.state.state)[PAGES_IN])
        self._stats.bytes_filled = n_pages * PAGE_BYTES

    def _bring_in_staying(self, label: str = "") -> None:
        """Bring in what stays on the device and is not there."""
        table = self.target.fetch(self.pages.table)
        self._load(np.flatnonzero(self._staying & (table < 0)).tolist(), label)
        self.queue.is_settled = self._staying & self._is_pinned
        self.is_complete = self._holds_all

    def _load(self, shards: Sequence[int], label: str = "") -> None:
        """Bring in shards, of which any number may be pinned, and wait for them; with a progress
        bar if there is a label."""
        used = self.queue.compute_so_far()
        shard_bytes = self.queue.store.shard_bytes
        with progress_bar(len(shards) * shard_bytes, label, bool(label)) as advance:
            size = self._part
            for i in range(0, len(shards), size):
                part = shards[i : i + size]
                self._wanted.clear()
                self._enter(part, UNCOUNTED, self._kept_free, used)
                advance(len(part) * shard_bytes)
        self._wanted.clear()
        self._recent.clear()
        self.target.synchronize()
        self.check()

    def _require_room(
        self, wanted: Sequence[int], missing: Sequence[int], table: np.ndarray
    ) -> None:
        def room() -> int:
            is_loose = (table >= 0) & ~self._is_pinned
            is_loose[[*wanted, *self._wanted]] = False
            n_free = int(self.target.get(self.queue.state.state)[N_FREE])
            return n_free + int(is_loose.sum()) - self._kept_free

        if len(missing) > room() and self._current is not None:
            first, last = self._current
            self._wanted = {s: t for s, t in self._wanted.items() if first <= s <= last}
        if len(missing) > room():
            raise GGUFShardError(
                f"{len(missing)} shards to bring in at once: the pool has room for {room()}"
            )

    def _restore(self, before: np.ndarray) -> None:
        """Undo the parts of a swap that came before the one that failed."""
        self.target.synchronize()
        table = self.target.fetch(self.pages.table)
        gone = np.flatnonzero((table < 0) & (before >= 0)).tolist()
        self._take_out(np.flatnonzero((table >= 0) & (before < 0)))
        # What has gone bad in the meantime comes back no more; it is the next acquire's error.
        for shard in gone:
            with suppress(GGUFShardError):
                self._load([shard])

    def _take_out(self, shards: Sequence[int] | np.ndarray) -> None:
        """Let shards be resident no more; nothing may be under way."""
        table = self.target.fetch(self.pages.table)
        table[shards] = -1
        self.target.write(self.pages.table, table)
        self._recover()

    def _recover(self) -> None:
        """Plan anew from what is published, with nothing in the window."""
        self.queue.recover()
        self._wanted.clear()
        self._recent.clear()
        self._window = []
        self._current = None
