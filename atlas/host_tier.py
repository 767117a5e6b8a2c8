"""The tier behind a GPU: shards in pinned host memory, where kernels read them.

If the shards that do not stay on the device fit the memory given, all of them lie here for good,
and the device needs the host no more. If not, this is a cache in front of the file, like the one
that a CPU target has: a pool, a policy, checks (`atlas.shard_cache`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from atlas.errors import BudgetError
from atlas.eviction import MAX_RESERVE, CacheShape, PoolPlan, plan_pool, shard_ranks
from atlas.frame_pool import FramePool
from atlas.host_store import FileStore
from atlas.ops.gather import check_frames
from atlas.ops.lru import RANK_COLD, RANK_PINNED
from atlas.pinned import MappedArray
from atlas.shard_cache import ShardCache
from atlas.target import CpuTarget
from forge.pages import PAGE_BYTES
from forge.sharded_model import ShardedModel
from forge.sizes import Size, format_bytes

_CHUNK_BYTES = 1 << 30  # pinned at once: several threads pin, and no size is rounded up much
_MAX_THREADS = 8
_DEFAULT_SHARE = 0.8  # of the free memory
_LOANS = 2  # that may be out at once, so that reading overlaps gathering


class PinnedFramePool(FramePool):
    """A pool whose frames lie in pinned memory, in chunks, at addresses that the device knows."""

    def _allocate_frames(self) -> None:
        self._per_chunk = max(_CHUNK_BYTES // self.frame_bytes, 1)
        sizes = [
            min(self._per_chunk, self.n_frames - first) * self.frame_bytes
            for first in range(0, self.n_frames, self._per_chunk)
        ]
        with ThreadPoolExecutor(_MAX_THREADS) as threads:
            self._chunks = list(threads.map(lambda n: MappedArray(n, np.dtype(np.uint8)), sizes))

    def frame(self, number: int) -> np.ndarray:
        chunk, place = divmod(number, self._per_chunk)
        start = place * self.frame_bytes
        return self._chunks[chunk].host[start : start + self.frame_bytes]

    def address(self, number: int) -> int:
        """Where the device finds a frame."""
        chunk, place = divmod(number, self._per_chunk)
        return self._chunks[chunk].address + place * self.frame_bytes

    def check(self, shards: Sequence[int], frames: Sequence[int], faults: np.ndarray) -> None:
        first = np.zeros(1, np.int32)
        for shard, frame, part in zip(shards, frames, np.split(faults, len(shards)), strict=True):
            check_frames(
                self.target, self.frame(frame), first, np.array([shard], np.int32),
                self.shard_shift, self.n_pages, self.page_crc32, part,
            )  # fmt: skip


class LendingCache(ShardCache):
    """A cache of shards that another cache takes shards from."""

    def lend(self, shards: Sequence[int]) -> list[int]:
        """Make shards resident and hold them until they are taken back; returns their frames.

        Raises
        ------
        CorruptPageError
            If a page fails its check twice; then none of them is held.
        GGUFShardError
            If the pool cannot hold all of them at once.
        """
        with self._demand, self._lock:
            missing = [s for s in shards if not self.pool.is_resident[s]]
            held = [s for s in shards if self.pool.is_resident[s]]
            self.pool.hold_each(held, +1)
            try:
                self.pool.touch_each(held)
                self._count_lent(held, missing)
                while absent := [s for s in missing if not self.pool.is_resident[s]]:
                    demanded = [s for s in absent if s not in self._loading]
                    if demanded:
                        self._load(self._lanes[0], demanded[: self.plan.reserve])
                    else:
                        self._lock.wait()
                    came = [s for s in absent if self.pool.is_resident[s]]
                    self.pool.hold_each(came, +1)
                    held += came
            except BaseException:
                self.pool.hold_each(held, -1)
                raise
            self._ask_ahead(shards[-1])
            return [self.pool.frame_of(s) for s in shards]

    def take_back(self, shards: Sequence[int]) -> None:
        """End the loan of shards."""
        with self._lock:
            self.pool.hold_each(shards, -1)
            self._lock.notify_all()

    def _count_lent(self, held: list[int], missing: list[int]) -> None:
        used = [s for s in held if s in self._ahead]
        self._ahead.difference_update(used)
        self.pool.hold_each(used, -1)
        late = sum(s in self._loading for s in missing)
        self.stats.late_prefetches += late
        self.stats.prefetch_hits += len(used) + late
        self.stats.demand_misses += len(missing) - late
        self.stats.reuse_hits += len(held) - len(used)


class HostTier:
    """Shards in pinned memory, within a limit.

    Parameters
    ----------
    store
        The file.
    device_plan
        How the pool on the device is used.
    schedule
        Shards in the order in which passes read them.
    is_cached
        bool [n_shards], the shards that the device may ask for.
    device_ranks
        uint8 [n_shards]; the pinned ones stay on the device and take no room here.
    loan
        Most shards that are lent at once.
    memory
        The limit; None for 80 % of what is free, a share for a share of what is free.

    Attributes
    ----------
    addresses
        uint64 [n_shards], where a shard lies for good, or 0.
    n_bytes
        Pinned memory taken.

    Raises
    ------
    BudgetError
        If the memory given is too small; the message says the smallest that works.
    GGUFShardError
        If so much memory cannot be pinned.
    """

    def __init__(
        self,
        store: FileStore,
        device_plan: PoolPlan,
        schedule: Sequence[int],
        is_cached: np.ndarray,
        device_ranks: np.ndarray,
        loan: int,
        memory: Size | None,
    ) -> None:
        n_shards = len(is_cached)
        streamed = [s for s in schedule if device_ranks[s] != RANK_PINNED]
        scheduled = np.zeros(n_shards, np.bool_)
        scheduled[list(schedule)] = True
        others = np.flatnonzero(is_cached & ~scheduled & (device_ranks != RANK_PINNED)).tolist()
        if device_plan.n_frames >= int(is_cached.sum()):
            streamed, others = [], []  # all of it will be on the device: this is only the way there
        room = _limit(memory) // store.shard_bytes
        reserve = min(loan, MAX_RESERVE)
        lent = _LOANS * loan
        ring = lent + reserve
        kept: list[int] = []
        if room >= len(streamed) + len(others) + ring:
            kept = [*streamed, *others]
            n_frames = len(kept) + ring
            plan = PoolPlan("pin", n_frames, reserve, lent, 0, len(kept))
            ranks = np.full(n_shards, RANK_COLD, np.uint8)
            ranks[kept] = RANK_PINNED
        else:
            shape = CacheShape(0, len(streamed), len(others), lent)
            plan = _plan(shape, room, ring, device_plan, store.shard_bytes)
            ranks = shard_ranks(n_shards, [], streamed, plan)
        self.pool = PinnedFramePool(
            CpuTarget(), plan.n_frames, store.n_pages, store.shard_pages.bit_length() - 1,
            store.model.page_crc32, ranks,
        )  # fmt: skip
        self.n_bytes = plan.n_frames * self.pool.frame_bytes
        self.cache = LendingCache(self.pool, plan, store, streamed, is_cached, [])
        self.addresses = np.zeros(n_shards, np.uint64)
        self._kept = kept or np.flatnonzero(ranks == RANK_PINNED).tolist()
        self._store = store

    def fill(self) -> None:
        """Bring in what stays here.

        Raises
        ------
        CorruptPageError
            If a page fails its check twice.
        """
        if self._kept:
            self.cache.fill(self._kept, _n_threads(len(self._kept)), "host memory")
        self._note_addresses()

    def adopt(self, model: ShardedModel, changed: Sequence[int]) -> None:
        """Go over to another version of the model, with no loan out and the device at rest.

        Raises
        ------
        CorruptPageError
            If a page of what stays here fails its check twice. Its shard has no address then; it is
            lent like those that pass through.
        """
        try:
            self.cache.adopt(model, changed, _n_threads(len(changed)))
        finally:
            self._note_addresses()

    def _note_addresses(self) -> None:
        for shard in self._kept:
            frame = self.pool.frame_of(shard)
            self.addresses[shard] = self.pool.address(frame) if frame >= 0 else 0

    def lend(self, shards: Sequence[int]) -> list[int]:
        """Addresses of shards, read from the file if need be, and kept until `take_back`."""
        return [self.pool.address(frame) for frame in self.cache.lend(shards)]

    def take_back(self, shards: Sequence[int]) -> None:
        """End the loan of shards."""
        self.cache.take_back(shards)

    def page(self, number: int) -> np.ndarray | None:
        """A page as it is here now, uint8 [4096], or None if it is not."""
        shard, slot = divmod(number, self._store.shard_pages)
        frame = self.pool.frame_of(shard)
        return None if frame < 0 else self.pool.frame(frame).reshape(-1, PAGE_BYTES)[slot]

    def close(self) -> None:
        """Stop reading ahead."""
        self.cache.close()


def _n_threads(n_shards: int) -> int:
    return min(len(os.sched_getaffinity(0)), _MAX_THREADS, max(n_shards, 1))


def _limit(memory: Size | None) -> int:
    if memory is not None and memory.n_bytes is not None:
        return memory.n_bytes
    share = _DEFAULT_SHARE if memory is None or memory.fraction is None else memory.fraction
    return int(share * _free_bytes())


def _free_bytes() -> int:
    """Memory that could be taken without swapping, as Linux estimates it; else what is unused."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _plan(
    shape: CacheShape, room: int, ring: int, device_plan: PoolPlan, shard_bytes: int
) -> PoolPlan:
    """A plan for a part of the shards; the others, and those on their way to stay on the device,
    pass through. All of them would take `ring` frames more than there are shards."""
    n = shape.n_shards
    try:
        return plan_pool(
            shape, min(room, n - 1), device_plan.policy, device_plan.distance, is_lender=True
        )
    except BudgetError as error:
        n_smallest = error.smallest_bytes if error.smallest_bytes < n else n + ring
        smallest = n_smallest * shard_bytes
        raise BudgetError(
            f"host memory of {room * shard_bytes} bytes: too small, the smallest that works is "
            f"{smallest} bytes ({format_bytes(smallest)})",
            smallest,
        ) from None
