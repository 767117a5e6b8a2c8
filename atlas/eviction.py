"""Which shards stay: policies and the arithmetic of a pool.

A dense model reads its shards in the same order for every token. On such a cyclic scan of N shards
over a pool of C frames the least recently used shard is exactly the next one wanted: LRU hits
nothing until everything fits. Belady's MIN (L. Belady, "A study of replacement algorithms for a
virtual-storage computer", 1966) hits about C/N, and so does the policy `pin`, which knows the scan:
keep C shards for good and stream the others through a small ring. MRU comes close by itself.

A policy is a rank for every shard (`atlas.ops.lru`) and a direction of time; it holds no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from atlas.errors import BudgetError
from atlas.ops.lru import RANK_COLD, RANK_NORMAL, RANK_PINNED
from forge.errors import GGUFShardError
from forge.sgmap import CACHE_POLICIES

MAX_RESERVE = 4  # where a thread reads shards one after the other
_MAX_BAND = 8
# Where kernels bring in shards, all of a load come at once; and each band takes the host a quarter
# of a millisecond (beside an H100), in which a band of 8 MiB would have come over the link already.
_MAX_RESERVE_OF_KERNELS = _MAX_BAND_OF_KERNELS = 32
_COMPLETE_BAND = 64


@dataclass(frozen=True)
class CacheShape:
    """What a pool is to serve.

    Attributes
    ----------
    n_high
        Shards of the high zone: always resident.
    n_scheduled
        Shards that every pass reads, in the same order.
    n_unscheduled
        Shards that a pass may read (experts).
    min_band
        Shards that must be resident at once: the most that one row of a matrix spans.
    """

    n_high: int
    n_scheduled: int
    n_unscheduled: int
    min_band: int

    @property
    def n_shards(self) -> int:
        return self.n_high + self.n_scheduled + self.n_unscheduled

    @property
    def smallest_pool(self) -> int:
        """Fewest frames that work: the high zone, one band, and a free frame to read into."""
        return min(self.n_shards, self.n_high + self.min_band + 1)


@dataclass(frozen=True)
class PoolPlan:
    """How a pool is used.

    Attributes
    ----------
    policy
        "lru", "mru" or "pin" (`auto` has been decided).
    n_frames
        Frames of the pool.
    reserve
        Frames kept free, to read into before anything is given up; also the most shards that one
        load brings in.
    band
        Shards that one step of compute may use at once.
    distance
        Scheduled shards to read ahead.
    n_pinned
        Scheduled shards that stay for good.
    """

    policy: str
    n_frames: int
    reserve: int
    band: int
    distance: int
    n_pinned: int

    @property
    def newest_first(self) -> bool:
        """Whether the most recently used shard is given up first."""
        return self.policy == "mru"


def plan_pool(
    shape: CacheShape,
    n_frames: int,
    policy: str,
    prefetch_distance: int,
    *,
    by_kernels: bool = False,
    is_lender: bool = False,
) -> PoolPlan:
    """Divide a pool into what stays, what streams and what is free.

    Parameters
    ----------
    shape
        The shards to serve.
    n_frames
        Frames there is room for; more than there are shards are not taken.
    policy
        One of `CACHE_POLICIES`; "auto" pins what is read by every pass.
    prefetch_distance
        Shards to read ahead, at most; a small pool reads less far ahead, so that the ring of
        streamed shards stays a small part of it.
    by_kernels
        Whether kernels bring in the shards. Loads and bands are larger then, and unless it is 0 the
        distance is at least a band: one load brings in what the next band needs.
    is_lender
        Whether a band is what is on loan to another pool (`atlas.host_tier`): any shards but those
        that stay, and not a run of consecutive ones, some of which do.

    Raises
    ------
    BudgetError
        If there is room for fewer than `shape.smallest_pool` frames; its `smallest_bytes` is that
        number of frames.
    GGUFShardError
        If the policy is not known.
    """
    if policy not in CACHE_POLICIES:
        raise GGUFShardError(f"policy {policy!r} is none of {', '.join(CACHE_POLICIES)}")
    decided = "pin" if policy == "auto" else policy
    max_reserve = _MAX_RESERVE_OF_KERNELS if by_kernels else MAX_RESERVE
    max_band = _MAX_BAND_OF_KERNELS if by_kernels else _MAX_BAND
    n = shape.n_shards
    if n_frames >= n:
        n_pinned = shape.n_scheduled if decided == "pin" else 0
        band = max(_COMPLETE_BAND, shape.min_band)
        return PoolPlan(decided, n, max_reserve, band, prefetch_distance, n_pinned)
    room = n_frames - shape.n_high
    if n_frames < shape.smallest_pool:
        raise BudgetError(
            f"room for {max(n_frames, 0)} frames, {shape.smallest_pool} are needed",
            shape.smallest_pool,
        )
    reserve = min(max(n // 150, 1), max_reserve, room - shape.min_band)
    band = min(max(n // 200, shape.min_band), max(max_band, shape.min_band), room - reserve)
    if by_kernels and prefetch_distance:
        prefetch_distance = max(prefetch_distance, band)
    distance = min(prefetch_distance, max(n // 64, 2), room - reserve - band)
    n_pinned = 0
    if decided == "pin":
        # A kernel brings in several shards at once, and what came with them is kept as long.
        together = reserve if by_kernels else 0
        n_pinned = _pinned(shape, room - reserve, band, distance + together, is_lender)
    return PoolPlan(decided, n_frames, reserve, band, distance, n_pinned)


def _pinned(shape: CacheShape, room: int, band: int, distance: int, is_lender: bool) -> int:
    """Most scheduled shards that can stay with a ring left for the others.

    The pinned ones are spread evenly, so of `band + distance` consecutive shards at most
    ceil((band + distance) * (1 - n_pinned / n_scheduled)) are streamed.
    """
    total = shape.n_scheduled
    consecutive = distance if is_lender else band + distance
    for n_pinned in range(min(room, total), 0, -1):
        ring = ceil(consecutive * (total - n_pinned) / total)
        if shape.n_unscheduled or is_lender:
            ring += band  # experts come at times of their own, and none of a loan stays
        if n_pinned + max(ring, 0 if n_pinned == total else shape.min_band) <= room:
            return n_pinned
    return 0


def spread(n_chosen: int, n_total: int) -> np.ndarray:
    """Indices of `n_chosen` out of `n_total`, evenly spread: between pinned shards there is always
    compute to hide the streamed ones behind."""
    return np.arange(n_chosen, dtype=np.int64) * n_total // max(n_chosen, 1)


def shard_ranks(
    n_shards: int, high: Sequence[int], schedule: Sequence[int], plan: PoolPlan
) -> np.ndarray:
    """uint8 [n_shards]: high and pinned shards never go, unscheduled ones go first."""
    ranks = np.full(n_shards, RANK_COLD, np.uint8)
    order = np.asarray(schedule, np.int64)
    ranks[order] = RANK_NORMAL
    ranks[order[spread(plan.n_pinned, len(order))]] = RANK_PINNED
    ranks[np.asarray(high, np.int64)] = RANK_PINNED
    return ranks


def expected_hit_ratio(plan: PoolPlan, shape: CacheShape) -> float:
    """Share of a dense pass's accesses that find a shard left by an earlier pass.

    The closed form for a cyclic scan: LRU hits nothing until everything fits, `pin` its pinned
    share. For MRU a lower bound: the share of the pool that does not serve as ring.
    """
    if plan.n_frames >= shape.n_shards:
        return 1.0
    if plan.policy == "lru" or shape.n_scheduled == 0:
        return 0.0
    if plan.policy == "pin":
        return plan.n_pinned / shape.n_scheduled
    ring = plan.reserve + plan.band + plan.distance
    return max(plan.n_frames - shape.n_high - ring, 0) / shape.n_scheduled
