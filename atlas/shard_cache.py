"""A cache of shards that the host drives: that of the CPU target, and the one behind a GPU's.

The caller's thread brings in what is missing on demand; a second thread (`atlas.prefetch`) reads
ahead along the schedule. One lock guards all of it, and is let go while shards are read and
checked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np

from atlas.eviction import PoolPlan
from atlas.frame_pool import FramePool
from atlas.host_store import FileStore
from atlas.ops.paged import PageCache
from atlas.prefetch import MIN_BACKGROUND_BYTES, Prefetcher, Schedule, count_shared
from atlas.stats import CacheStats
from atlas.swap import N_LANES, Lane, Swapper
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.progress import progress_bar
from forge.sharded_model import ShardedModel


class ShardCache:
    """Shards of a model in a pool, by a plan.

    Parameters
    ----------
    pool
        The frames, empty.
    plan
        How the pool is used.
    store
        Where shards come from.
    schedule
        Shards in the order in which passes read them.
    is_cached
        bool [n_shards], the shards that may be asked for.
    pinned
        Shards to bring in at once, never given up.

    Attributes
    ----------
    stats
        Counts so far.

    Raises
    ------
    CorruptPageError
        If a page of a pinned shard fails its check twice.
    """

    def __init__(
        self,
        pool: FramePool,
        plan: PoolPlan,
        store: FileStore,
        schedule: Sequence[int],
        is_cached: np.ndarray,
        pinned: Sequence[int],
    ) -> None:
        self.pool = pool
        self.plan = plan
        self.store = store
        self.schedule = Schedule(schedule, len(is_cached))
        self.stats = CacheStats()
        self._is_cached = is_cached
        self._n_cached = int(is_cached.sum())
        self._demand = threading.Lock()  # taken before the other one: loads on demand, in turn
        self._lock = threading.Condition(threading.RLock())
        self._lanes = [Lane(pool.target, pool.frame_bytes) for _ in range(N_LANES)]
        self._swapper = Swapper(pool, store, self._lock, self.stats, plan.newest_first)
        self._current: tuple[int, int] | None = None
        self._loading: set[int] = set()
        self._ahead: set[int] = set()  # prefetched, held, not yet used
        self._window: set[int] = set()  # what may be read ahead now
        self._wanted: list[int] = []
        self._n_pauses = 0  # while there are any, no reading ahead begins
        self._scrubbed = -1  # the frame checked last
        self._complete = False  # for good: everything is resident, nothing moves any more
        self._prefetcher: Prefetcher | None = None
        self.fill(pinned)
        self.stats.bytes_filled = self.stats.bytes_moved
        is_worth_it = pool.frame_bytes >= MIN_BACKGROUND_BYTES
        if pool.target.has_background and is_worth_it and plan.distance:
            self._prefetcher = Prefetcher(self._lock, self._fetch_ahead)

    @property
    def pages(self) -> PageCache:
        """Frames and table, as operations take them."""
        return self.pool.cache

    def scrub(self, n_pages: int) -> None:
        """Check about `n_pages` resident pages again, by whole shards, from where the last call
        left off.

        Raises
        ------
        CorruptPageError
            If one does not hold any more. Its shard is given up, and so read again when it is
            wanted next, unless it is in use.
        """
        per_shard = self.store.shard_pages
        faults = np.empty(per_shard, np.uint32)
        with self._lock:
            for _ in range(min(-(-n_pages // per_shard), self.pool.n_frames)):
                frame = self._scrubbed = (self._scrubbed + 1) % self.pool.n_frames
                shard = self.pool.shard_in(frame)
                if shard < 0:
                    continue
                self.pool.check([shard], [frame], faults)
                self.stats.pages_checked += self.store.pages_of(shard)
                if faults.any():
                    self._report(shard, frame, int(np.flatnonzero(faults)[0]))

    def _report(self, shard: int, frame: int, slot: int) -> None:
        content = self.pool.frame(frame).reshape(-1, PAGE_BYTES)[slot].copy()
        if not self.pool.is_held(frame):
            self.pool.evict([shard])
            self._complete = False
        raise self.store.corrupt_page(shard * self.store.shard_pages + slot, content)

    def count_checked(self, n_pages: int) -> None:
        """Count pages that the caller has checked past the cache."""
        with self._lock:
            self.stats.pages_checked += n_pages

    def close(self) -> None:
        """Stop reading ahead."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None

    def acquire(self, first: int, last: int) -> None:
        """Make shards `first` to `last` resident and keep them so until the next call, by one
        thread.

        Raises
        ------
        CorruptPageError
            If one of the pages fails its check twice; then no shards are in use.
        """
        if self._complete:
            self.stats.reuse_hits += last - first + 1 - count_shared(first, last, self._current)
            self._current = (first, last)
            return
        with self._demand, self._lock:
            missing = self._begin_use(first, last)
            self._ask_ahead(last)
            try:
                self._await(missing)
            except BaseException:
                self._end_use()
                raise
            while self._prefetcher is None and self._fetch_ahead():
                pass
            self._complete = self._is_complete()

    def swap(self, wanted: Sequence[int]) -> None:
        """Make shards resident: all of them, or nothing changes.

        Raises
        ------
        CorruptPageError
            If a page fails its check twice; what was resident is so still.
        GGUFShardError
            If the pool cannot hold all of them at once.
        """
        with self._demand, self._lock, self.paused():
            self._load_all_or_nothing(wanted)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this is entered, nothing is under way and nothing is read ahead."""
        with self._lock:
            self._n_pauses += 1
        try:
            with self._lock:
                while self._loading:
                    self._lock.wait()
            yield
        finally:
            with self._lock:
                self._n_pauses -= 1
                self._lock.notify_all()

    def adopt(self, model: ShardedModel, changed: Sequence[int], n_threads: int = 1) -> None:
        """Go over to another version of the model, in a pause, and while nobody uses any shard.

        Parameters
        ----------
        model
            The version, of the same layout.
        changed
            Shards that differ: those that are resident are given up, and the pinned ones brought in
            again.
        n_threads
            Threads that read and check.

        Raises
        ------
        CorruptPageError
            If a page of a pinned shard fails its check twice. Its shard is not resident then; it is
            read when it is wanted next.
        """
        with self._demand:
            with self._lock:
                self._complete = False
                self._current, self._ahead = None, set()
                self.pool.release_all()
                self.pool.evict([s for s in changed if self.pool.is_resident[s]])
                self.pool.expect(model.page_crc32)
                self.store.model = model
            self.fill(self.pool.absent_pinned(), n_threads)

    def fill(self, shards: Sequence[int], n_threads: int = 1, label: str = "") -> None:
        """Bring in shards for which there are free frames, while nothing else is brought in.

        Parameters
        ----------
        shards
            The shards.
        n_threads
            Threads that read and check.
        label
            What to write before the progress bar; none without.
        """
        step = self.plan.reserve
        parts = iter([shards[i : i + step] for i in range(0, len(shards), step)])
        lanes = self._lanes[:1]
        lanes += [Lane(self.pool.target, self.pool.frame_bytes) for _ in range(n_threads - 1)]
        with progress_bar(len(shards) * self.pool.frame_bytes, label, bool(label)) as advance:

            def work(lane: Lane) -> None:
                with self._lock:
                    for part in parts:
                        self._load(lane, part)
                        advance(len(part) * self.pool.frame_bytes)

            with ThreadPoolExecutor(n_threads) as threads:
                for done in [threads.submit(work, lane) for lane in lanes]:
                    done.result()
        with self._lock:
            self._complete = self._is_complete()

    # How shards come and go; all with the lock held

    def _begin_use(self, first: int, last: int) -> list[int]:
        n_shards = last - first + 1
        missing = self.pool.touch(first, last)
        self.pool.hold(first, last, +1)
        n_shared = count_shared(first, last, self._current)
        self._end_use()
        self._current = (first, last)
        used = [s for s in self._ahead if first <= s <= last]
        self._ahead.difference_update(used)
        self.pool.hold_each(used, -1)
        late = sum(s in self._loading for s in missing)
        stats = self.stats
        stats.late_prefetches += late
        stats.prefetch_hits += len(used) + late
        stats.demand_misses += len(missing) - late
        stats.reuse_hits += n_shards - n_shared - len(missing) - len(used)
        return missing

    def _end_use(self) -> None:
        if self._current is not None:
            self.pool.hold(*self._current, -1)
        self._current = None

    def _is_complete(self) -> bool:
        """Whether everything is resident and no shard read ahead waits for its first use."""
        if self.plan.n_frames < self._n_cached or self._ahead:
            return False
        return bool(self.pool.is_resident[self._is_cached].all())

    def _is_current(self, shard: int) -> bool:
        return self._current is not None and self._current[0] <= shard <= self._current[1]

    def _await(self, missing: list[int]) -> None:
        """Bring in what is missing; what the prefetcher is at, or has failed at, included."""
        started = time.perf_counter()
        try:
            while absent := [s for s in missing if not self.pool.is_resident[s]]:
                demanded = [s for s in absent if s not in self._loading]
                if demanded:
                    self._load(self._lanes[0], demanded[: self.plan.reserve])
                else:
                    self._lock.wait()
        finally:
            self.stats.wait_seconds += time.perf_counter() - started

    def _load(self, lane: Lane, shards: Sequence[int]) -> list[int]:
        """Load up to `reserve` shards; those of the current band are held from the moment they are
        there. Returns those given up for them."""
        self._loading.update(shards)
        try:
            evicted = self._swapper.load(lane, shards, self._victims_wanted)
        finally:
            self._loading.difference_update(shards)
        self.pool.hold_each([s for s in shards if self._is_current(s)], +1)
        return evicted

    @property
    def _kept_free(self) -> int:
        """Frames that stay free whenever nothing is under way; none where everything fits."""
        return self.plan.reserve if self.plan.n_frames < self._n_cached else 0

    def _victims_wanted(self) -> int:
        return max(0, self._kept_free - self.pool.n_free)

    def _load_all_or_nothing(self, wanted: Sequence[int]) -> None:
        missing = [s for s in wanted if not self.pool.is_resident[s]]
        held = [s for s in wanted if self.pool.is_resident[s]]
        done: list[tuple[list[int], list[int]]] = []
        self.pool.hold_each(held, +1)
        try:
            self._require_room(len(missing))
            for i in range(0, len(missing), self.plan.reserve):
                part = list(missing[i : i + self.plan.reserve])
                done.append((part, self._load(self._lanes[0], part)))
                self.pool.hold_each(part, +1)
                held += part
            self.pool.touch_each(wanted)
        except BaseException:
            for part, evicted in reversed(done):
                self.pool.hold_each(part, -1)
                held = [s for s in held if s not in part]
                self.pool.evict(part)
                # What has gone bad in the meantime comes back no more; it is the next acquire's
                # error, not this one's.
                with suppress(GGUFShardError):
                    self._load(self._lanes[0], evicted)
            raise
        finally:
            self.pool.hold_each(held, -1)

    def _require_room(self, n_missing: int) -> None:
        def room() -> int:
            return self.pool.n_free + self.pool.n_evictable() - self._kept_free

        if n_missing > room():
            self._forget_ahead(self._ahead)
        if n_missing > room():
            raise GGUFShardError(
                f"{n_missing} shards to bring in at once: the pool has room for {room()}"
            )

    # Reading ahead

    def _ask_ahead(self, shard: int) -> None:
        window = self.schedule.after(shard, self.plan.distance)
        if not window:
            return
        self._window = set(window)
        self._forget_ahead(self._ahead - self._window)
        self._wanted = [s for s in window if not self.pool.is_resident[s]]
        self._lock.notify_all()

    def _forget_ahead(self, stale: set[int]) -> None:
        self.pool.hold_each(list(stale), -1)
        self._ahead = self._ahead - stale

    def _fetch_ahead(self) -> bool:
        """Bring in the next shards of the window; whether there was anything to bring.

        Stands back while there is a pause, and for a demand that waits for frames.
        """
        if self._n_pauses or self._swapper.n_waiting:
            return False
        batch = [
            s for s in self._wanted if s not in self._loading and not self.pool.is_resident[s]
        ][: self.plan.reserve]
        self._wanted = [s for s in self._wanted if s not in batch]
        if not batch:
            return False
        try:
            self._load(self._lanes[1], batch)
        except GGUFShardError:
            return True  # whoever needs them reads them again: it is the error of that acquire
        ahead = [s for s in batch if s in self._window and not self._is_current(s)]
        self._ahead.update(ahead)
        self.pool.hold_each(ahead, +1)
        return True
