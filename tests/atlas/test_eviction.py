"""The arithmetic of a pool, over all small shapes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from atlas.errors import BudgetError
from atlas.eviction import (
    MAX_RESERVE,
    CacheShape,
    PoolPlan,
    expected_hit_ratio,
    plan_pool,
    shard_ranks,
    spread,
)
from atlas.ops.lru import RANK_COLD, RANK_NORMAL, RANK_PINNED
from forge.errors import GGUFShardError
from forge.sgmap import CACHE_POLICIES

SIZES = (0, 1, 2, 3, 7, 40, 151, 601)
SHAPES = [
    CacheShape(n_high, n_scheduled, n_unscheduled, min_band)
    for n_high, n_scheduled, n_unscheduled, min_band in product(
        (0, 1, 3), SIZES, (0, 1, 30), (1, 2, 5)
    )
]


def pools(shape: CacheShape) -> Iterator[int]:
    """Numbers of frames to plan for: all that are refused or tight, and some of the others."""
    smallest, n = shape.smallest_pool, shape.n_shards
    yield from range(smallest, min(smallest + 12, n + 3))
    yield from range(smallest + 12, n + 3, 1 + n // 23)
    yield from range(max(smallest, n - 4), n + 2)


def worst_window(plan: PoolPlan, shape: CacheShape, length: int) -> int:
    """Most shards that are not pinned among `length` in a row, round the corner, by counting."""
    n = shape.n_scheduled
    if n == 0:
        return 0
    streamed = np.ones(n, np.int64)
    streamed[spread(plan.n_pinned, n)] = 0
    length = min(length, n)
    sums = np.cumsum(np.concatenate([[0], streamed, streamed]))
    return int((sums[length : length + n] - sums[:n]).max())


@pytest.mark.parametrize("policy", ["lru", "mru", "pin"])
@pytest.mark.parametrize("prefetch_distance", [0, 1, 8, 1000])
@pytest.mark.parametrize(
    ("by_kernels", "is_lender"), [(False, False), (False, True), (True, False)]
)
def test_every_plan_leaves_room_for_what_is_in_use(
    policy: str, prefetch_distance: int, by_kernels: bool, is_lender: bool
) -> None:
    for shape in SHAPES:
        for n_frames in pools(shape):
            plan = plan_pool(
                shape, n_frames, policy, prefetch_distance,
                by_kernels=by_kernels, is_lender=is_lender,
            )  # fmt: skip
            at = (shape, n_frames, plan)
            assert plan.policy == policy and plan.n_frames == min(n_frames, shape.n_shards), at
            assert plan.band >= min(shape.min_band, shape.n_shards), at
            reaches_a_band = by_kernels and prefetch_distance > 0
            farthest = max(prefetch_distance, plan.band) if reaches_a_band else prefetch_distance
            max_reserve = 32 if by_kernels else MAX_RESERVE
            assert 1 <= plan.reserve <= max_reserve and 0 <= plan.distance <= farthest, at
            assert 0 <= plan.n_pinned <= shape.n_scheduled, at
            assert plan.newest_first == (policy == "mru")
            if n_frames >= shape.n_shards:
                continue
            room = n_frames - shape.n_high - plan.n_pinned
            # A band in use and what is read ahead behind it; or experts, or what is on loan, and
            # what is read ahead.
            held = worst_window(plan, shape, plan.band + plan.distance)
            if shape.n_unscheduled or is_lender:
                held = max(held, plan.band + worst_window(plan, shape, plan.distance))
            assert held + plan.reserve <= room, at
            assert (plan.n_pinned == 0) or policy == "pin", at


@pytest.mark.parametrize("policy", CACHE_POLICIES)
def test_one_frame_less_than_the_smallest_pool_is_refused(policy: str) -> None:
    for shape in SHAPES:
        for n_frames in {shape.smallest_pool - 1, shape.smallest_pool // 2, 0, -5}:
            if n_frames >= shape.smallest_pool:
                continue
            with pytest.raises(BudgetError) as caught:
                plan_pool(shape, n_frames, policy, 8)
            assert caught.value.smallest_bytes == shape.smallest_pool
        assert plan_pool(shape, shape.smallest_pool, policy, 8).n_frames == shape.smallest_pool


def test_kernels_bring_in_a_large_band_at_a_time() -> None:
    shape = CacheShape(20, 12_600, 0, 2)  # 7B in F16
    of_kernels = plan_pool(shape, 2600, "pin", 8, by_kernels=True)
    assert (of_kernels.reserve, of_kernels.band, of_kernels.distance) == (32, 32, 32)
    assert plan_pool(shape, 2600, "pin", 64, by_kernels=True).distance == 64
    assert plan_pool(shape, 2600, "pin", 0, by_kernels=True).distance == 0
    of_the_host = plan_pool(shape, 2600, "pin", 8)
    assert (of_the_host.reserve, of_the_host.band, of_the_host.distance) == (4, 8, 8)


def test_more_frames_never_pin_less() -> None:
    for shape in SHAPES:
        sizes = range(shape.smallest_pool, shape.n_shards + 1)
        plans = [plan_pool(shape, n, "pin", 0) for n in sizes]
        pinned = [plan.n_pinned for plan in plans]
        assert pinned == sorted(pinned), shape
        ratios = [expected_hit_ratio(plan, shape) for plan in plans]
        assert ratios == sorted(ratios) and all(0 <= ratio <= 1 for ratio in ratios), shape


def test_pinning_comes_close_to_the_best_possible() -> None:
    shape = CacheShape(3, 1000, 0, 2)
    for n_frames in (100, 300, 500, 900):
        plan = plan_pool(shape, n_frames, "pin", 8)
        best = n_frames / shape.n_shards  # of any policy on a cyclic scan, Belady's included
        assert best - 0.02 < expected_hit_ratio(plan, shape) < best


def test_auto_pins() -> None:
    shape = CacheShape(1, 100, 0, 1)
    assert plan_pool(shape, 50, "auto", 8) == plan_pool(shape, 50, "pin", 8)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(GGUFShardError, match="policy 'fifo' is none of auto, lru, mru, pin"):
        plan_pool(CacheShape(1, 100, 0, 1), 50, "fifo", 8)


@pytest.mark.parametrize("n_total", [1, 2, 7, 30])
def test_spread_is_even(n_total: int) -> None:
    assert spread(0, n_total).size == 0
    for n_chosen in range(1, n_total + 1):
        chosen = spread(n_chosen, n_total)
        assert len(set(chosen.tolist())) == n_chosen and 0 <= chosen.min() <= chosen.max() < n_total
        gaps = np.diff(np.append(chosen, chosen[0] + n_total))
        assert gaps.max() - gaps.min() <= 1


def test_ranks_say_what_goes_first() -> None:
    plan = PoolPlan("pin", 6, 1, 1, 0, n_pinned=2)
    ranks = shard_ranks(9, [0, 1], [5, 4, 3, 2], plan)
    assert ranks.dtype == np.uint8
    assert ranks.tolist() == [
        RANK_PINNED, RANK_PINNED, RANK_NORMAL, RANK_PINNED, RANK_NORMAL, RANK_PINNED,
        RANK_COLD, RANK_COLD, RANK_COLD,
    ]  # fmt: skip


def test_closed_forms() -> None:
    shape = CacheShape(n_high=2, n_scheduled=40, n_unscheduled=0, min_band=1)
    assert expected_hit_ratio(PoolPlan("lru", 20, 1, 1, 2, 0), shape) == 0
    assert expected_hit_ratio(PoolPlan("pin", 20, 1, 1, 2, 10), shape) == 0.25
    assert expected_hit_ratio(PoolPlan("mru", 20, 1, 1, 2, 0), shape) == (20 - 2 - 4) / 40
    assert expected_hit_ratio(PoolPlan("mru", 4, 1, 1, 2, 0), shape) == 0
    assert expected_hit_ratio(PoolPlan("lru", 42, 4, 64, 8, 0), shape) == 1
    no_passes = CacheShape(2, 0, 5, 1)
    assert expected_hit_ratio(PoolPlan("pin", 4, 1, 1, 0, 0), no_passes) == 0


def test_a_row_wider_than_any_band_gets_its_band() -> None:
    shape = CacheShape(n_high=0, n_scheduled=200, n_unscheduled=0, min_band=90)
    assert plan_pool(shape, 200, "lru", 8).band == 90
