"""`Atlas`: a sharded model whose pages are cached on a target within a budget."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from atlas.budget import plan_budget
from atlas.device_cache import DeviceCache
from atlas.eviction import expected_hit_ratio, shard_ranks
from atlas.frame_pool import FramePool
from atlas.host_store import FileStore
from atlas.live_update import LiveModel
from atlas.model_shards import Band, ModelShards
from atlas.ops.dequant import dequantise
from atlas.ops.lru import RANK_PINNED
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.shard_cache import ShardCache
from atlas.stats import CacheStats
from atlas.target import CudaTarget, Target, select_target
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.sharded_model import ShardedModel
from forge.sizes import Size, parse_size


class Atlas(LiveModel):
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
    host_memory
        On a GPU: pinned host memory for the shards that do not stay on the device; None for 80 % of
        what is free. Shards beyond it are read from the file again and again.

    Attributes
    ----------
    budget_bytes
        The budget in bytes.
    plan
        How the pool is divided.
    shard_cache
        What brings shards in: driven by the host, or by kernels on a GPU.

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
        host_memory: Size | None = None,
    ) -> None:
        super().__init__(FileStore(model))
        self.target = target
        self.shards = ModelShards(model.map, order)
        self.shape = self.shards.shape()
        self.plan, self.budget_bytes = plan_budget(
            model.map,
            self.shape,
            budget,
            policy=policy,
            prefetch_distance=prefetch_distance,
            reserved_bytes=reserved_bytes,
            on_device=target.is_cuda,
        )
        self._is_cached = np.zeros(self.map.n_shards, np.bool_)
        self._is_cached[[*self.shards.high, *self.shards.schedule, *self.shards.unscheduled]] = True
        self._bands: dict[tuple[str, int], list[Band]] = {}
        ranks = shard_ranks(self.map.n_shards, self.shards.high, self.shards.schedule, self.plan)
        self.shard_cache: ShardCache | DeviceCache
        if isinstance(target, CudaTarget):
            self.shard_cache = DeviceCache(
                target, self._store, self.plan, self.shards.schedule, self._is_cached, ranks,
                host_memory,
            )  # fmt: skip
        else:
            pool = FramePool(
                target, self.plan.n_frames, self.map.n_pages, self.map.shard_shift,
                model.page_crc32, ranks,
            )  # fmt: skip
            self.shard_cache = ShardCache(
                pool, self.plan, self._store, self.shards.schedule, self._is_cached,
                np.flatnonzero(ranks == RANK_PINNED).tolist(),
            )  # fmt: skip

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
            `policy`, `prefetch_distance`, `reserved_bytes`, `order`, `host_memory`, as for the
            constructor.
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
        self.followers.clear()  # which have this Atlas in turn, and memory on a GPU
        self.shard_cache.close()
        self.model.close()

    # What a caller computes on

    @property
    def cache(self) -> PageCache:
        """Frames and table, as operations take them."""
        return self.shard_cache.pages

    @property
    def is_complete(self) -> bool:
        """Whether all shards are on a GPU, and stay there."""
        return isinstance(self.shard_cache, DeviceCache) and self.shard_cache.is_complete

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard, and of a frame."""
        return self.map.pages_per_shard * PAGE_BYTES

    @property
    def stats(self) -> CacheStats:
        """Counts so far; on a GPU they are fetched from the device, a copy each time."""
        with self._use:
            return self.shard_cache.stats

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
        """Make a band's shards resident and keep them so until the next call, by one thread, or an
        update of the model, which `in_use` holds off.

        Raises
        ------
        CorruptPageError
            If one of the pages fails its check twice; then no band is in use.
        """
        n_shards = band.last_shard - band.first_shard + 1
        if n_shards > self.plan.band:
            raise GGUFShardError(f"{n_shards} shards in a band, {self.plan.band} are planned for")
        self.shard_cache.acquire(band.first_shard, band.last_shard)

    def tensor(self, name: str, index: int = 0, out: Any = None) -> Any:
        """A tensor, dequantised: float32 [n_rows, n_cols] on the target (`__cuda_array_interface__`
        on cuda, NumPy on cpu).

        Parameters
        ----------
        name, index
            The tensor, and which slice of it.
        out
            The array to fill; None for one whose memory is outside the budget.

        Raises
        ------
        CorruptPageError
            If one of its pages fails its check twice.
        GGUFShardError
            If the model has no such tensor, or its type cannot be dequantised.
        """
        w = self.matrix(name, index)
        if out is None:
            out = self.target.empty((w.n_rows, w.n_cols), np.float32)
        if not self._caches(w):
            self.target.write(out, self.rows(w, range(w.n_rows)))
            return out
        with self._use:
            for band in self.bands(w):
                self.acquire(band)
                rows = out[band.begin : band.end]
                dequantise(self.target, rows, self.cache, w, band.begin, band.end)
            self.target.synchronize()
            if isinstance(self.shard_cache, DeviceCache):
                self.shard_cache.check()  # others may take what is returned as it lies there
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
        with self._use:
            rows = self._store.read_rows(w, wanted)
            self.shard_cache.count_checked(sum(len(w.pages_of_rows(n, n + 1)) for n in wanted))
        return rows

    def atomic_swap(self, shard_ids: Sequence[int], stream: Any = None) -> None:
        """Make shards resident: all of them, or nothing changes.

        Parameters
        ----------
        shard_ids
            Shards of the model; those to bring in at most as many as there are frames that are
            neither pinned, nor in use (`acquire`), nor kept free.
        stream
            Not needed: the shards are there when this returns, for every stream.

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
        with self._use:
            self.shard_cache.swap(wanted)

    def scrub(self, n_pages: int) -> None:
        """Check the next resident pages again, for memory that forgets.

        Parameters
        ----------
        n_pages
            How many; every page comes up in turn.

        Raises
        ------
        CorruptPageError
            If one does not hold any more; on a GPU with a value that is fetched once that has been
            found. Its shard is given up, and brought in again when it is wanted next.
        """
        if n_pages:
            with self._use:
                self.shard_cache.scrub(n_pages)

    def _caches(self, w: PagedMatrix) -> bool:
        shift = self.map.shard_shift
        last_page = w.first_page + w.n_pages - 1
        return bool(self._is_cached[w.first_page >> shift : (last_page >> shift) + 1].all())
