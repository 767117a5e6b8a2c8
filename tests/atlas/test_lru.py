"""Ticks, misses and victims of pools that the host manages, against a sort and an `OrderedDict`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import config

from atlas.ops.gather import publish
from atlas.ops.lru import RANK_COLD, RANK_NORMAL, RANK_PINNED, choose_victims, hold, touch
from atlas.target import CpuTarget, CudaTarget
from tests import naive

POISON = -7
searched = settings(max_examples=100)


def int32(values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def victims_of(
    frame_shard: list[int],
    ticks: list[int],
    shard_rank: list[int],
    held: list[int],
    count: int,
    newest_first: bool,
) -> list[int]:
    """What `choose_victims` finds, checked to leave the rest of `victims` alone."""
    victims = np.full(count + 2, POISON, np.int32)
    found = choose_victims(
        CpuTarget(),
        int32(frame_shard),
        np.array(ticks, np.int64),
        np.array(shard_rank, np.uint8),
        int32(held),
        count,
        newest_first,
        victims,
    )
    assert victims[found:].tolist() == [POISON] * (count + 2 - found)
    return [int(frame) for frame in victims[:found]]


@pytest.mark.parametrize("m", [0, 1, 7, 8, 9, 20])
def test_touch_splits_hits_from_misses(m: int) -> None:
    rng = np.random.default_rng(m)
    table = np.full(32, -1, np.int32)
    table[::3] = rng.permutation(11)
    shards = rng.permutation(32)[:m].astype(np.int32)
    ticks = np.full(11, 5, np.int64)
    missing = np.full(m + 1, POISON, np.int32)

    n_missing = touch(CpuTarget(), table, ticks, shards, 6, missing)

    expected = [shard for shard in shards.tolist() if table[shard] < 0]
    assert n_missing == len(expected)
    assert missing.tolist() == expected + [POISON] * (m + 1 - len(expected))
    touched = {int(table[shard]) for shard in shards if table[shard] >= 0}
    assert ticks.tolist() == [6 if frame in touched else 5 for frame in range(11)]


@searched
@given(data=st.data(), n_frames=st.integers(0, 20), newest_first=st.booleans())
def test_victims_are_those_of_a_full_sort(
    data: st.DataObject, n_frames: int, newest_first: bool
) -> None:
    def per_frame(values: st.SearchStrategy[int]) -> list[int]:
        return data.draw(st.lists(values, min_size=n_frames, max_size=n_frames))

    shard_rank = [*per_frame(st.sampled_from([RANK_COLD, RANK_NORMAL, RANK_PINNED])), 1]
    shards = data.draw(st.permutations(range(n_frames)))
    is_filled = per_frame(st.booleans())
    frame_shard = [s if filled else -1 for s, filled in zip(shards, is_filled, strict=True)]
    ticks = per_frame(st.integers(0, 4))  # few values: ties are broken by the frame
    held = per_frame(st.sampled_from([0, 0, 0, 1, 2]))
    count = data.draw(st.integers(0, n_frames + 1))
    arguments = (frame_shard, ticks, shard_rank, held, count, newest_first)
    assert victims_of(*arguments) == naive.victims(*arguments)


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
def test_victims_of_a_large_pool(order: str, newest_first: bool) -> None:
    n = 100 if config.DISABLE_JIT else 10_000
    ticks = np.arange(n)
    if order == "falling":
        ticks = ticks[::-1]
    elif order == "random":
        ticks = np.random.default_rng(0).permutation(n)
    arguments = (list(range(n)), ticks.tolist(), [1] * n, [0] * n, 64, newest_first)
    assert victims_of(*arguments) == naive.victims(*arguments)


class Cache:
    """A cache of `capacity` shards out of ten, kept with the operations alone."""

    def __init__(self, capacity: int, newest_first: bool) -> None:
        self.target = CpuTarget()
        self.newest_first = newest_first
        self.table, self.frame_shard = int32([-1] * 10), int32([-1] * capacity)
        self.ticks, self.held = np.zeros(capacity, np.int64), int32([0] * capacity)
        self.rank = np.full(10, RANK_NORMAL, np.uint8)
        self.place = int32([0])
        self.tick = 0

    def access(self, shard: int) -> bool:
        """Use a shard, evicting another where there is no room; whether it was resident."""
        shards = int32([shard])
        self.tick += 1
        if touch(self.target, self.table, self.ticks, shards, self.tick, self.place) == 0:
            return True
        holders = self.frame_shard.tolist()
        if -1 in holders:
            victims, frames = int32([]), int32([holders.index(-1)])
        else:
            found = choose_victims(
                self.target, self.frame_shard, self.ticks, self.rank, self.held, 1,
                self.newest_first, self.place,
            )  # fmt: skip
            assert found == 1
            victims = frames = self.place
        publish(
            self.target, self.table, self.frame_shard, self.ticks, victims, frames, shards,
            self.tick,
        )  # fmt: skip
        return False

    def resident(self) -> set[int]:
        """The shards held, on which table and frames must agree."""
        in_table = {shard: frame for shard, frame in enumerate(self.table.tolist()) if frame >= 0}
        holders = enumerate(self.frame_shard.tolist())
        assert in_table == {shard: frame for frame, shard in holders if shard >= 0}
        return set(in_table)


@searched
@given(accesses=st.lists(st.integers(0, 9), max_size=30), newest_first=st.booleans())
def test_cache_behaves_like_an_ordered_dict(accesses: list[int], newest_first: bool) -> None:
    cache, model = Cache(4, newest_first), naive.LruCache(4, newest_first)
    for shard in accesses:
        assert cache.access(shard) == model.access(shard)
        assert cache.resident() == set(model.resident)


@pytest.mark.parametrize(
    ("capacity", "newest_first", "expected_hits"),
    [(4, False, [0, 0, 0]), (7, False, [0, 0, 0]), (8, False, [8, 8, 8]), (4, True, [4, 4, 4])],
)
def test_golden_hits_of_a_cyclic_scan(
    capacity: int, newest_first: bool, expected_hits: list[int]
) -> None:
    """Eight shards again and again: LRU hits nothing until all of them fit."""
    cache = Cache(capacity, newest_first)
    hits = [sum(cache.access(shard) for shard in range(8)) for _ in range(4)]
    assert hits == [0, *expected_hits]


def test_hold_counts_uses_of_resident_shards() -> None:
    table, held = int32([1, -1, 0, -1, 2]), int32([0, 5, 1])
    hold(CpuTarget(), table, held, int32([0, 1, 4]), +1)
    assert held.tolist() == [0, 6, 2]
    hold(CpuTarget(), table, held, int32([4, 3, 2]), -1)
    assert held.tolist() == [-1, 6, 1]


def test_too_little_room_is_refused() -> None:
    target, table, ticks = CpuTarget(), int32([0, 1]), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="1 entries cannot list 2 shards"):
        touch(target, table, ticks, table, 1, int32([0]))
    rank = np.full(2, RANK_NORMAL, np.uint8)
    with pytest.raises(ValueError, match="2 entries cannot list 3 frames"):
        choose_victims(target, table, ticks, rank, table, 3, False, int32([0, 0]))
    with pytest.raises(TypeError, match="ticks has dtype int32"):
        touch(target, table, table, table, 1, table)


@pytest.mark.cuda
def test_pools_of_a_gpu_are_refused() -> None:
    target, table, ticks = CudaTarget(), int32([0, 1]), np.zeros(2, np.int64)
    with pytest.raises(TypeError, match="touch is for pools of the host's, not for target cuda"):
        touch(target, table, ticks, table, 1, table)
    with pytest.raises(TypeError, match="hold is for pools of the host's"):
        hold(target, table, table, table, 1)
    with pytest.raises(TypeError, match="choose_victims is for pools of the host's"):
        choose_victims(target, table, ticks, table, table, 1, False, table)


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="times compiled code")
def test_bookkeeping_is_cheap() -> None:
    """It runs some hundred times per token: about ten times what it should take is allowed."""
    n = 100_000
    target = CpuTarget()
    frame_shard, ticks = np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int64)[::-1].copy()
    rank, held = np.full(n, RANK_NORMAL, np.uint8), np.zeros(n, np.int32)
    victims = np.empty(64, np.int32)

    def choose() -> None:
        choose_victims(target, frame_shard, ticks, rank, held, 64, False, victims)

    def look() -> None:
        touch(target, frame_shard, ticks, frame_shard[:4], 1, victims)

    assert _best_seconds(choose) < 10e-3
    assert _best_seconds(look) < 50e-6


def _best_seconds(call: Any) -> float:
    call()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
