"""`Atlas`: a sharded model whose pages are cached on a target within a budget."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from atlas.budget import N_LANES, plan_budget
from atlas.eviction import expected_hit_ratio, shard_ranks
from atlas.frame_pool import FramePool
from atlas.host_store import FileStore
from atlas.model_shards import Band, ModelShards
from atlas.ops.dequant import dequantise
from atlas.ops.lru import RANK_PINNED
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.prefetch import MIN_BACKGROUND_BYTES, Prefetcher, Schedule
from atlas.stats import CacheStats
from atlas.swap import Lane, Swapper
from atlas.target import Target, select_target
from forge.errors import GGUFShardError
from forge.sharded_model import ShardedModel
from forge.sizes import Size, parse_size


class Atlas:
    """A sharded model, opened with a budget of device memory; a context manager.

    Use `Atlas.open` for a model of its own, or the constructor to share an open one.

    Parameters
    ----------
    model
        The open sharded model; closed with the Atlas.
    target
        Where the pages are cached.
    budget
        Device memory for the pool, its tables and `reserved_bytes`; or a fraction of the model's
        cached pages, to which the rest is added.
    policy, prefetch_distance
        None for what the map says.
    reserved_bytes
        Device memory of the caller (activations, keys and values) that counts as spent.
    order
        Tensors in execution order (`ModelShards`).

    Attributes
    ----------
    budget_bytes
        The budget in bytes.
    plan
        How the pool is divided.
    stats
        Counts so far.

    Raises
    ------
    BudgetError
        If the budget is too small; the message says the smallest that works.
    """

    def __init__(
        self,
        model: ShardedModel,
        target: Target,
        budget: Size,
        *,
        policy: str | None = None,
        prefetch_distance: int | None = None,
        reserved_bytes: int = 0,
        order: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.map = model.map
        self.target = target
        self.shards = ModelShards(model.map, order)
        self.shape = self.shards.shape()
        self.stats = CacheStats()
        in_place = target.host_view(target.empty(1, np.uint8)) is not None
        self.plan, self.budget_bytes = plan_budget(
            model.map,
            self.shape,
            budget,
            policy=policy,
            prefetch_distance=prefetch_distance,
            reserved_bytes=reserved_bytes,
            in_place=in_place,
        )
        ranks = shard_ranks(self.map.n_shards, self.shards.high, self.shards.schedule, self.plan)
        self.pool = FramePool(
            target, self.plan.n_frames, self.map.n_pages, self.map.shard_shift,
            model.page_crc32, ranks,
        )  # fmt: skip
        self.schedule = Schedule(self.shards.schedule, self.map.n_shards)
        self._pinned = np.flatnonzero(ranks == RANK_PINNED).tolist()
        self._demand = threading.Lock()  # taken before the other one: loads on demand, in turn
        self._lock = threading.Condition(threading.RLock())
        self._lanes = [Lane(target, self.pool.frame_bytes, in_place) for _ in range(N_LANES)]
        self._store = FileStore(model)
        self._swapper = Swapper(
            self.pool, self._store, self._lock, self.stats, self._victims_wanted,
            self.plan.newest_first,
        )  # fmt: skip
        self._is_cached = np.zeros(self.map.n_shards, np.bool_)
        self._is_cached[[*self.shards.high, *self.shards.schedule, *self.shards.unscheduled]] = True
        self._n_cached = int(self._is_cached.sum())
        self._current: tuple[int, int] | None = None
        self._loading: set[int] = set()
        self._ahead: set[int] = set()  # prefetched, held, not yet used
        self._window: set[int] = set()  # what may be read ahead now
        self._wanted: list[int] = []
        self._swapping = False
        self._bands: dict[tuple[str, int], list[Band]] = {}
        self._complete = False  # for good: everything is resident, nothing moves any more
        self._prefetcher: Prefetcher | None = None
        self._fill()
        is_worth_it = self.pool.frame_bytes >= MIN_BACKGROUND_BYTES
        if target.has_background and is_worth_it and self.plan.distance:
            self._prefetcher = Prefetcher(self._lock, self._fetch_ahead)

    @classmethod
    def open(
        cls,
        map_path: str | os.PathLike[str],
        budget: str = "100%",
        target: str | Target = "auto",
        **options: Any,
    ) -> Atlas:
        """Open a sharded model: `Atlas.open("core.sgmap", budget="2.8GB", target="cuda")`.

        Parameters
        ----------
        map_path
            `core.sgmap`.
        budget
            A size ("2.8GB", "400MiB") or a share of the model's pages ("40%").
        target
            "auto", "cpu", "cuda", or a `Target`.
        **options
            `policy`, `prefetch_distance`, `reserved_bytes`, `order`, as for the constructor.
        """
        size = parse_size(budget)
        where = select_target(target) if isinstance(target, str) else target
        model = ShardedModel(map_path)
        try:
            return cls(model, where, size, **options)
        except BaseException:
            model.close()
            raise

    def __enter__(self) -> Atlas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop prefetching and close the model."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None
        self.model.close()

    # What a caller computes on

    @property
    def cache(self) -> PageCache:
        """Frames and table, as operations take them."""
        return self.pool.cache

    @property
    def expected_reuse_ratio(self) -> float | None:
        """Share of reuse hits that the plan's closed form predicts for passes behind the first;
        None where a pass may choose its shards (experts)."""
        return None if self.shape.n_unscheduled else expected_hit_ratio(self.plan, self.shape)

    def matrix(self, name: str, index: int = 0) -> PagedMatrix:
        """Slice `index` of a tensor as a matrix of rows; GGUFShardError if there is none."""
        return self.shards.matrix(name, index)

    def bands(self, w: PagedMatrix) -> list[Band]:
        """The rows of a matrix, cut so that each band's shards fit the pool at once.

        Raises
        ------
        GGUFShardError
            If the matrix is none of those that are cached (`ModelShards`).
        """
        key = (w.name, w.first_page)
        if key not in self._bands:
            if not self._caches(w):
                raise GGUFShardError(f"tensor {w.name!r}: its pages are not cached")
            self._bands[key] = list(self.shards.cut(w, self.plan.band))
        return self._bands[key]

    def acquire(self, band: Band) -> None:
        """Make a band's shards resident and keep them so until the next call, by one thread.

        Raises
        ------
        CorruptPageError
            If one of the pages fails its check twice; then no band is in use.
        """
        first, last = band.first_shard, band.last_shard
        if self._complete:
            self.stats.reuse_hits += last - first + 1 - self._shared(first, last)
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

    def tensor(self, name: str, index: int = 0) -> Any:
        """A tensor, dequantised: float32 [n_rows, n_cols] on the target (`__cuda_array_interface__`
        on cuda, NumPy on cpu). It takes memory of its own, outside the budget.

        Raises
        ------
        GGUFShardError
            If the model has no such tensor, or its type cannot be dequantised.
        """
        w = self.matrix(name, index)
        out = self.target.empty((w.n_rows, w.n_cols), np.float32)
        if not self._caches(w):
            self.target.write(out, self.rows(w, range(w.n_rows)))
            return out
        for band in self.bands(w):
            self.acquire(band)
            dequantise(self.target, out[band.begin : band.end], self.cache, w, band.begin, band.end)
        self.target.synchronize()
        return out

    def rows(self, w: PagedMatrix, numbers: Iterable[int]) -> np.ndarray:
        """Rows of a matrix, read past the cache and dequantised on the host.

        A lookup in an embedding touches a page or two; bringing in whole shards for it would move
        hundreds of times as much.

        Parameters
        ----------
        w
            The matrix.
        numbers
            Rows wanted.

        Returns
        -------
        numpy.ndarray
            float32 [len(numbers), n_cols].

        Raises
        ------
        CorruptPageError
            If a page fails its check twice.
        GGUFShardError
            If the matrix has no such row, or its type cannot be dequantised.
        """
        wanted = list(numbers)
        out = np.empty((len(wanted), w.n_cols), np.float32)
        for row, number in zip(out, wanted, strict=True):
            row[:] = self._store.read_row(w, number)
            self.stats.pages_checked += len(w.pages_of_rows(number, number + 1))
        return out

    def atomic_swap(self, shard_ids: Sequence[int], stream: Any = None) -> None:
        """Make shards resident: all of them, or nothing changes.

        Parameters
        ----------
        shard_ids
            Shards of the model; those to bring in at most as many as there are frames that are
            neither pinned, nor in use (`acquire`), nor kept free.
        stream
            Ignored where kernels run in launch order on one stream, which is everywhere so far.

        Raises
        ------
        CorruptPageError
            If a page fails its check twice; what was resident is so still.
        GGUFShardError
            If a shard does not exist, or the pool cannot hold all of them at once.
        """
        wanted = list(dict.fromkeys(shard_ids))
        for shard in wanted:
            if not 0 <= shard < self.map.n_shards or not self._is_cached[shard]:
                raise GGUFShardError(f"shard {shard}: the model has no cached shard of this number")
        with self._demand, self._lock:
            self._swapping = True  # no reading ahead begins
            try:
                while self._loading:
                    self._lock.wait()
                self._load_all_or_nothing(wanted)
            finally:
                self._swapping = False
                self._lock.notify_all()

    # How shards come and go; all with the lock held

    def _begin_use(self, first: int, last: int) -> list[int]:
        n_shards = last - first + 1
        if n_shards > self.plan.band:
            raise GGUFShardError(f"{n_shards} shards in a band, {self.plan.band} are planned for")
        missing = self.pool.touch(first, last)
        self.pool.hold(first, last, +1)
        n_shared = self._shared(first, last)
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

    def _caches(self, w: PagedMatrix) -> bool:
        shift = self.map.shard_shift
        last_page = w.first_page + w.n_pages - 1
        return bool(self._is_cached[w.first_page >> shift : (last_page >> shift) + 1].all())

    def _is_complete(self) -> bool:
        """Whether everything is resident and no shard read ahead waits for its first use."""
        if self.plan.n_frames < self._n_cached or self._ahead:
            return False
        return bool(self.pool.is_resident[self._is_cached].all())

    def _is_current(self, shard: int) -> bool:
        return self._current is not None and self._current[0] <= shard <= self._current[1]

    def _shared(self, first: int, last: int) -> int:
        """How many of these shards the step before used, too."""
        if self._current is None:
            return 0
        return max(0, min(last, self._current[1]) - max(first, self._current[0]) + 1)

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
            evicted = self._swapper.load(lane, shards)
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

        Stands back for a swap, and for a demand that waits for frames.
        """
        if self._swapping or self._swapper.n_waiting:
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

    def _fill(self) -> None:
        """Bring in what stays: the high zone and the pinned shards."""
        with self._lock:
            step = self.plan.reserve
            for i in range(0, len(self._pinned), step):
                self._load(self._lanes[0], self._pinned[i : i + step])
            self._complete = self._is_complete()
        self.stats.bytes_filled = self.stats.bytes_moved
