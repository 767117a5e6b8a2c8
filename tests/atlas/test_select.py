"""Planning swaps on the device, against lists and dictionaries; and planning anew after a fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import config

import atlas.ops.select as operation
from atlas.ops.lru import RANK_COLD, RANK_NORMAL, RANK_PINNED, choose_victims
from atlas.ops.select import AHEAD, DEMAND, UNCOUNTED, select
from atlas.ops.swap_state import (
    FAULT_KIND,
    FAULT_NUMBER,
    FAULT_ROOM,
    FREE_HEAD,
    GATHERED,
    HITS,
    MAX_INCOMING,
    MISSES,
    N_COUNTS,
    N_FAULT,
    N_FREE,
    N_IN,
    N_OUT,
    N_RECORDS,
    N_STATE,
    PAGES_IN,
    TICK,
    SwapState,
    new_swap_state,
    replan,
    swap_state_bytes,
)
from atlas.ops.victims import MAX_CONTENDERS
from atlas.target import CpuTarget, CudaTarget
from tests import naive

pytestmark = pytest.mark.cuda

POISON = -9
RANKS = [RANK_COLD, RANK_NORMAL, RANK_NORMAL, RANK_PINNED]


def new_state(target: CudaTarget, n_frames: int, ranks: Any) -> SwapState:
    """The state of an empty cache; shard s lies at address 1000 + s."""
    address = target.put(1000 + np.arange(len(ranks), dtype=np.uint64))
    fault = target.mapped(N_FAULT, np.uint32)
    fault.host[:] = 0
    return new_swap_state(target, n_frames, np.array(ranks, np.uint8), address, fault)


class Both:
    """Selects on the device and in the plain model, compared after each in all they leave."""

    def __init__(self, n_frames: int, ranks: list[int]) -> None:
        self.target = CudaTarget()
        self.n_frames = n_frames
        self.swap = new_state(self.target, n_frames, ranks)
        self.model = naive.SwapPlanner(n_frames, ranks, [1000 + s for s in range(len(ranks))])
        entries = N_RECORDS * MAX_INCOMING
        self.records = {
            "incoming": np.full(entries, POISON, np.int32),
            "frames": np.full(entries, POISON, np.int32),
            "outgoing": np.full(entries, POISON, np.int32),
            "sources": np.full(entries, 99, np.uint64),
            "counts": np.full(N_RECORDS * N_COUNTS, POISON, np.int32),
        }
        for name, expected in self.records.items():
            self.target.write(getattr(self.swap, name), expected)

    def select(
        self, wanted: list[int], lag: int, n_kept_free: int, newest_first: bool, kind: int = DEMAND
    ) -> None:
        shards = self.target.put(np.array(wanted, np.int32))
        record = self.model.tick % N_RECORDS
        select(self.target, self.swap, shards, lag, n_kept_free, newest_first, kind)
        if self.model.select(wanted, lag, n_kept_free, newest_first, kind):
            self.write_down(record)
        self.compare()

    def write_down(self, record: int) -> None:
        """Enter what the model has planned into the records that are expected."""
        incoming, outgoing = self.model.incoming, self.model.outgoing
        first = record * MAX_INCOMING
        for i, entry in enumerate(incoming):
            for name, value in zip(("incoming", "frames", "sources"), entry, strict=True):
                self.records[name][first + i] = value
        self.records["outgoing"][first : first + len(outgoing)] = outgoing
        self.records["counts"][record * N_COUNTS + N_IN] = len(incoming)
        self.records["counts"][record * N_COUNTS + N_OUT] = len(outgoing)

    def compare(self) -> None:
        model, swap, get = self.model, self.swap, self.target.get
        for name, expected in self.records.items():
            np.testing.assert_array_equal(get(getattr(swap, name)), expected, err_msg=name)
        planned = dict(enumerate(get(swap.planned).tolist()))
        assert {shard: frame for shard, frame in planned.items() if frame >= 0} == model.frame_of
        holders = dict(enumerate(get(swap.frame_shard).tolist()))
        held = {shard: frame for frame, shard in holders.items() if shard >= 0}
        assert held == model.frame_of
        assert get(swap.ticks).tolist() == model.last_wanted
        state = get(swap.state).tolist()
        ring = get(swap.free_frames)
        places = (state[FREE_HEAD] + np.arange(state[N_FREE])) % self.n_frames
        assert ring[places].tolist() == model.free
        assert 0 <= state[FREE_HEAD] < self.n_frames
        assert state[TICK] == model.tick
        assert state[HITS : HITS + 2] == model.hits[:2]
        assert state[MISSES : MISSES + 2] == model.misses[:2]
        assert [state[i] for i in (GATHERED, *range(PAGES_IN, N_STATE))] == [0] * (N_STATE - 7)
        lost = model.without_room
        assert get(swap.failed).tolist() == [0 if lost is None else 1]
        expected_fault = [0] * N_FAULT
        if lost is not None:
            expected_fault[FAULT_KIND], expected_fault[FAULT_NUMBER] = FAULT_ROOM, lost
        assert swap.fault.host.tolist() == expected_fault


@settings(max_examples=25 if config.ENABLE_CUDASIM else 100)
@given(data=st.data(), n_frames=st.integers(1, 24), newest_first=st.booleans())
def test_selects_plan_as_the_model_does(
    data: st.DataObject, n_frames: int, newest_first: bool
) -> None:
    n_shards = data.draw(st.integers(1, 2 * n_frames))
    ranks = data.draw(st.lists(st.sampled_from(RANKS), min_size=n_shards, max_size=n_shards))
    both = Both(n_frames, ranks)
    for _ in range(data.draw(st.integers(1, 10))):
        largest = min(n_shards, max(n_frames // 2, 1))
        wanted = data.draw(st.permutations(range(n_shards)))[: data.draw(st.integers(0, largest))]
        both.select(
            list(wanted),
            data.draw(st.integers(0, 3)),
            data.draw(st.integers(0, n_frames // 2)),
            newest_first,
            data.draw(st.sampled_from([DEMAND, AHEAD, UNCOUNTED])),
        )


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_scan_through_a_small_pool_goes_round_the_ring(newest_first: bool) -> None:
    """Four at a time through eleven frames, of which four are kept free: the ring is passed some
    times, and records are used again."""
    both = Both(11, [RANK_NORMAL] * 26)
    for step in range(2 * N_RECORDS + 3):
        wanted = [(4 * step + i) % 26 for i in range(4)]
        both.select(wanted, 0, 4, newest_first)
    assert both.model.without_room is None
    assert sum(both.model.misses) > 3 * 11


@pytest.mark.parametrize("threads", [32, 96, operation.SELECT_THREADS])
@pytest.mark.parametrize("n", [31, 32, 33, 63, 64])
def test_long_lists(n: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits and misses mixed on both sides of a warp's edge, and as many victims as a record has."""
    monkeypatch.setattr(operation, "SELECT_THREADS", threads)
    rng = np.random.default_rng(n)
    both = Both(3 * MAX_INCOMING, [RANK_NORMAL] * 200)
    both.select(rng.permutation(200)[:n].tolist(), 0, 0, False)
    both.select(rng.permutation(200)[:n].tolist(), 0, 0, False)
    n_free = len(both.model.free)
    both.select(rng.permutation(200)[: min(n, n_free)].tolist(), 0, MAX_INCOMING, False)
    assert both.model.without_room is None


def test_no_room_changes_nothing_and_stops_everything() -> None:
    both = Both(5, [RANK_NORMAL] * 12)
    both.select([3, 1, 4], 0, 0, False)
    both.select([4, 0, 1, 5, 9, 2], 0, 2, False)  # two fit, the third that is missing does not
    assert both.model.without_room == 9
    both.select([3], 0, 5, False)
    both.select([], 0, 5, True)
    assert both.model.tick == 1


def test_a_failed_gather_stops_selects() -> None:
    both = Both(5, [RANK_NORMAL] * 12)
    both.select([3, 1], 0, 0, False)
    both.target.write(both.swap.failed, np.ones(1, np.int32))
    before = [both.target.get(array) for array in device_arrays(both.swap)]
    select(both.target, both.swap, both.target.put(np.array([3, 7], np.int32)), 0, 4, False)
    for array, old in zip(device_arrays(both.swap), before, strict=True):
        np.testing.assert_array_equal(both.target.get(array), old)
    assert not both.swap.fault.host.any()


def device_arrays(swap: SwapState) -> list[Any]:
    return [getattr(swap, name) for name in swap._fields if name not in ("fault", "keys")]


def test_what_lag_protects_stays() -> None:
    both = Both(8, [RANK_NORMAL] * 8)
    for shard in range(6):
        both.select([shard], 0, 0, False)
    both.select([], 4, 8, False)  # tick 6: shards wanted at ticks 2 to 5 stay
    assert both.model.outgoing == [0, 1]


class Pool:
    """A pool with given shards, ranks and ticks, as of tick `tick`."""

    def __init__(self, n_frames: int, seed: int, tick: int, n_ticks: int, ranks: list[int]) -> None:
        rng = np.random.default_rng(seed)
        self.target, self.tick, self.n_frames = CudaTarget(), tick, n_frames
        self.shard_rank = rng.choice(ranks, 2 * n_frames).astype(np.uint8)
        self.frame_shard = rng.permutation(2 * n_frames)[:n_frames].astype(np.int32)
        is_free = rng.random(n_frames) < 0.1
        self.frame_shard[is_free] = -1
        free = np.flatnonzero(is_free)
        self.ticks = tick - 1 - rng.integers(0, n_ticks, n_frames)
        self.swap = new_state(self.target, n_frames, self.shard_rank)
        self.planned = np.full(2 * n_frames, -1, np.int32)
        self.planned[self.frame_shard[~is_free]] = np.flatnonzero(~is_free)
        state, ring = np.zeros(N_STATE, np.int64), np.full(n_frames, POISON, np.int32)
        state[TICK], state[N_FREE], state[FREE_HEAD] = tick, len(free), n_frames - 1
        ring[(n_frames - 1 + np.arange(len(free))) % n_frames] = free
        for name, value in {
            "planned": self.planned, "frame_shard": self.frame_shard, "ticks": self.ticks,
            "state": state, "free_frames": ring,
        }.items():  # fmt: skip
            self.target.write(getattr(self.swap, name), value)
        self.n_free = len(free)

    def check_victims(self, n_victims: int, lag: int, newest_first: bool) -> int:
        """Compare what a select of nothing gives up with `choose_victims`; returns how many."""
        held = (self.ticks >= self.tick - lag).astype(np.int32)
        victims = np.full(n_victims, POISON, np.int32)
        found = choose_victims(
            CpuTarget(), self.frame_shard, self.ticks, self.shard_rank, held, n_victims,
            newest_first, victims,
        )  # fmt: skip
        # More than `MAX_INCOMING` cannot be kept free: leave only as many as that allows.
        state = self.target.get(self.swap.state)
        state[N_FREE] = n_left = min(self.n_free, MAX_INCOMING - n_victims)
        self.target.write(self.swap.state, state)
        nothing = self.target.empty(0, np.int32)
        select(self.target, self.swap, nothing, lag, n_left + n_victims, newest_first)
        get, frames = self.target.get, victims[:found]
        shards = self.frame_shard[frames]
        outgoing = get(self.swap.outgoing)[self.tick % N_RECORDS * MAX_INCOMING :]
        assert outgoing[: found + 1].tolist() == [*shards.tolist(), -1]
        assert get(self.swap.counts)[self.tick % N_RECORDS * N_COUNTS + N_OUT] == found
        tail = self.n_frames - 1 + n_left + np.arange(found)
        assert get(self.swap.free_frames)[tail % self.n_frames].tolist() == frames.tolist()
        self.planned[shards] = self.frame_shard[frames] = -1
        np.testing.assert_array_equal(get(self.swap.planned), self.planned)
        np.testing.assert_array_equal(get(self.swap.frame_shard), self.frame_shard)
        return found


#: A few more candidates than are ranked at once, one block's share of four frames a thread, ...
POOL_SIZES = (MAX_CONTENDERS + 30, 4 * 64, 301) if config.ENABLE_CUDASIM else (301, 4096, 10_001)


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("n_frames", POOL_SIZES)
@pytest.mark.parametrize(
    ("n_ticks", "ranks", "n_victims"),
    [
        (1000, [RANK_NORMAL], 4),
        (1000, [RANK_COLD, RANK_NORMAL], 63),
        (3, [RANK_NORMAL, RANK_PINNED], 17),  # many alike: the frame decides
        (1, [RANK_COLD], 1),
        (1, [RANK_PINNED], 5),  # no candidate
    ],
)
def test_victims_are_those_of_the_cpu(
    n_frames: int, n_ticks: int, ranks: list[int], n_victims: int, newest_first: bool
) -> None:
    pool = Pool(n_frames, n_frames + n_ticks, 5000, n_ticks, ranks)
    found = pool.check_victims(n_victims, 0, newest_first)
    assert found == (0 if ranks == [RANK_PINNED] else n_victims)


@pytest.mark.parametrize("n_frames", range(1, 10))
def test_everything_goes_if_there_is_too_little(n_frames: int) -> None:
    """Pools that are no multiple of the four frames that a thread looks at."""
    pool = Pool(n_frames, n_frames, 50, 3, [RANK_NORMAL])
    assert pool.check_victims(n_frames + 1, 0, False) == n_frames - pool.n_free


@pytest.mark.parametrize("newest_first", [False, True])
def test_victims_when_few_cold_frames_are_not_enough(newest_first: bool) -> None:
    """All cold ones and some normal ones go."""
    ranks = [RANK_COLD] + [RANK_NORMAL] * 30
    pool = Pool(POOL_SIZES[0], 1, 5000, 1000, ranks)
    n_cold = int((pool.shard_rank[pool.frame_shard[pool.frame_shard >= 0]] == RANK_COLD).sum())
    assert 0 < n_cold < 20
    assert pool.check_victims(20, 5, newest_first) == 20


@pytest.mark.parametrize("newest_first", [False, True])
def test_victims_when_ticks_lie_in_clusters(newest_first: bool) -> None:
    """The middle of the range has too few candidates before it, again and again."""
    pool = Pool(301, 3, 5000, 10, [RANK_NORMAL])
    pool.ticks -= 1000
    pool.ticks[::15], pool.ticks[1::15] = 0, 4999
    pool.target.write(pool.swap.ticks, pool.ticks)
    assert pool.check_victims(63, 0, newest_first) == 63


@pytest.mark.parametrize("newest_first", [False, True])
def test_ages_beyond_31_bits_are_alike(newest_first: bool) -> None:
    pool = Pool(POOL_SIZES[0], 2, 1 << 40, 1, [RANK_NORMAL])
    pool.ticks[:] = np.arange(len(pool.ticks))[::-1]
    pool.target.write(pool.swap.ticks, pool.ticks)
    pool.ticks[:] = 0  # as select sees them
    assert pool.check_victims(40, 0, newest_first) == 40


@pytest.mark.parametrize(("n_shards", "n_frames"), [(1, 1), (7, 3), (20, 33)])
def test_bytes_are_what_is_allocated(n_shards: int, n_frames: int) -> None:
    target = CudaTarget()
    address = target.put(np.zeros(n_shards, np.uint64))
    fault = target.mapped(N_FAULT, np.uint32)
    before = target.allocated_bytes
    swap = new_swap_state(target, n_frames, np.zeros(n_shards, np.uint8), address, fault)
    assert target.allocated_bytes - before == swap_state_bytes(n_shards, n_frames)
    assert len(swap.planned) == n_shards


def test_replan_goes_on_from_what_is_published() -> None:
    both = Both(6, [RANK_NORMAL] * 20)
    both.select([10, 11, 12], 0, 0, False, AHEAD)
    both.select([11, 13], 0, 4, False)  # gives up 10 and 12: not published, the gather failed
    table = np.full(20, -1, np.int32)
    table[[10, 11, 12]] = [0, 1, 2]
    both.target.write(both.swap.failed, np.ones(1, np.int32))
    both.swap.fault.host[:] = 7

    def refuse() -> None:
        raise AssertionError("a guard was asked while all was being put right")

    both.target.guards.append(refuse)
    replan(both.target, both.swap, both.target.put(table))
    both.target.guards.clear()

    assert not both.swap.fault.host.any()
    both.model.replan(table.tolist())
    state = both.target.get(both.swap.state)
    assert state[GATHERED] == state[TICK] == 2
    state[GATHERED] = 0
    both.target.write(both.swap.state, state)
    both.records["counts"][:] = 0
    both.compare()
    assert both.model.free == [3, 4, 5]
    both.select([1, 10, 2], 0, 3, False)
    both.select([2, 3], 0, 3, True)


def test_what_the_kernel_would_trust_is_checked() -> None:
    target = CudaTarget()
    swap = new_state(target, 4, [RANK_NORMAL] * 100)
    few = target.put(np.arange(3, dtype=np.int32))
    with pytest.raises(ValueError, match="shards: 65 are wanted at once, at most 64 can be"):
        select(target, swap, target.put(np.arange(65, dtype=np.int32)), 0, 0, False)
    with pytest.raises(TypeError, match="select needs a CUDA target, not cpu"):
        select(CpuTarget(), swap, few, 0, 0, False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="shards has dtype int64"):
        select(target, swap, target.put(np.arange(3)), 0, 0, False)
    with pytest.raises(ValueError, match=r"n_kept_free: 65 is not within 0\.\.64"):
        select(target, swap, few, 0, 65, False)
    with pytest.raises(ValueError, match="lag: -1 is negative"):
        select(target, swap, few, -1, 0, False)
    with pytest.raises(ValueError, match="kind: 3 is none of"):
        select(target, swap, few, 0, 0, False, 3)
    with pytest.raises(ValueError, match="shard_rank: shard 1 has rank 7"):
        new_state(target, 4, [RANK_COLD, 7])
    with pytest.raises(ValueError, match="n_frames: 0 is not positive"):
        new_state(target, 0, [RANK_COLD])
