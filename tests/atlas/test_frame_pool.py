"""The pool and the swapper against a plain model, by random walks over their operations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from atlas.errors import CorruptPageError
from atlas.eviction import MAX_RESERVE
from atlas.frame_pool import FramePool, frame_cost_bytes, pool_overhead_bytes
from atlas.host_tier import PinnedFramePool
from atlas.ops.lru import RANK_COLD, RANK_NORMAL, RANK_PINNED
from atlas.stats import CacheStats
from atlas.swap import Lane, Swapper
from atlas.target import CpuTarget, cuda_is_usable
from experiments.validation import gguf_factory as factory
from forge.errors import GGUFShardError
from forge.sharded_model import ShardedModel
from tests import cache_factory as cache

N_FRAMES = 6
RESERVE = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardedModel]:
    """Shards of two pages, the last one partial."""
    folder: Path = tmp_path_factory.mktemp("model")
    with ShardedModel(cache.shard(folder, factory.small_model(), pages_per_shard=2)) as opened:
        assert opened.map.n_pages % 2 == 1
        yield opened


class PoolMachine(RuleBasedStateMachine):
    """Random loads, uses and faults; beside them a dictionary of what should be resident."""

    target = CpuTarget()
    model: ShardedModel
    pool_class: type[FramePool]

    @initialize(
        newest_first=st.booleans(),
        ranks=st.lists(
            st.sampled_from([RANK_COLD, RANK_NORMAL, RANK_NORMAL, RANK_PINNED]),
            min_size=64,
            max_size=64,
        ),
    )
    def open(self, newest_first: bool, ranks: list[int]) -> None:
        shard_map = self.model.map
        self.ranks = ranks[: shard_map.n_shards]
        self.newest_first = newest_first
        self.pool = self.pool_class(
            self.target, N_FRAMES, shard_map.n_pages, shard_map.shard_shift,
            self.model.page_crc32, np.array(self.ranks, np.uint8),
        )  # fmt: skip
        self.store = cache.FaultyStore(self.model)
        self.changed = threading.Condition()
        self.stats = CacheStats()
        self.swapper = Swapper(self.pool, self.store, self.changed, self.stats, newest_first)
        self.lane = Lane(self.target, self.store.shard_bytes)
        self.last_used: dict[int, int] = {}  # of the resident shards
        self.held: dict[int, int] = {}
        self.now = 0

    @property
    def n_free(self) -> int:
        return N_FRAMES - len(self.last_used)

    def expected_victims(self, count: int) -> list[int]:
        table = self.target.get(self.pool.table)
        sign = -1 if self.newest_first else 1
        candidates = [
            (self.ranks[s], sign * tick, int(table[s]), s)
            for s, tick in self.last_used.items()
            if self.ranks[s] != RANK_PINNED and not self.held.get(s)
        ]
        return [s for *_, s in sorted(candidates)[:count]]

    def absent(self, data: st.DataObject, count: int) -> list[int]:
        choices = [s for s in range(self.model.map.n_shards) if s not in self.last_used]
        return data.draw(st.permutations(choices))[:count]

    def load(self, shards: list[int]) -> list[int]:
        with self.changed:
            return self.swapper.load(self.lane, shards, lambda: max(0, RESERVE - self.pool.n_free))

    @rule(data=st.data(), count=st.integers(1, MAX_RESERVE))
    def bring_in(self, data: st.DataObject, count: int) -> None:
        shards = self.absent(data, count)
        if len(shards) > self.n_free:
            before = self.stats.copy()
            with pytest.raises(GGUFShardError, match=f"no room for {len(shards)} more"):
                self.load(shards)
            assert self.stats == before
            return
        n_victims = max(0, RESERVE - (self.n_free - len(shards)))
        victims = self.expected_victims(n_victims)
        moved = self.stats.bytes_moved
        assert self.load(shards) == victims
        assert self.stats.bytes_moved - moved == sum(map(self.store.pages_of, shards)) * 4096
        for shard in victims:
            del self.last_used[shard]
        self.now += 1
        self.last_used.update(dict.fromkeys(shards, self.now))

    @precondition(lambda self: self.n_free)
    @rule(data=st.data(), count=st.integers(1, MAX_RESERVE))
    def meet_a_fault_that_stays(self, data: st.DataObject, count: int) -> None:
        shards = self.absent(data, min(count, self.n_free))
        bad = data.draw(st.sampled_from(shards))
        before = self.stats.copy()
        self.store.faults = {bad: 2}
        with pytest.raises(CorruptPageError) as caught:
            self.load(shards)
        assert (caught.value.shard, caught.value.page) == (bad, bad * self.store.shard_pages)
        assert self.store.faults == {bad: 0}
        assert self.stats == before

    @precondition(lambda self: self.n_free)
    @rule(data=st.data())
    def meet_a_fault_that_goes_away(self, data: st.DataObject) -> None:
        (shard,) = self.absent(data, 1)
        self.store.faults = {shard: 1}
        victims = self.expected_victims(max(0, RESERVE - (self.n_free - 1)))
        assert self.load([shard]) == victims
        for victim in victims:
            del self.last_used[victim]
        self.now += 1
        self.last_used[shard] = self.now

    @rule(first=st.integers(0, 40), count=st.integers(1, 4))
    def use(self, first: int, count: int) -> None:
        first %= self.model.map.n_shards
        last = min(first + count, self.model.map.n_shards) - 1
        self.now += 1
        shards = range(first, last + 1)
        missing = self.pool.touch(first, last)
        assert missing == [s for s in shards if s not in self.last_used]
        self.last_used.update({s: self.now for s in shards if s in self.last_used})

    @precondition(lambda self: self.last_used)
    @rule(data=st.data())
    def use_some(self, data: st.DataObject) -> None:
        shards = data.draw(st.lists(st.sampled_from(sorted(self.last_used)), unique=True))
        self.now += 1
        self.pool.touch_each(shards)
        self.last_used.update(dict.fromkeys(shards, self.now))

    @precondition(lambda self: self.last_used)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(sorted(self.last_used)))
        self.pool.hold_each([shard], +1)
        self.held[shard] = self.held.get(shard, 0) + 1

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from([s for s, n in self.held.items() if n]))
        self.pool.hold(shard, shard, -1)
        self.held[shard] -= 1

    @rule()
    def let_all_go(self) -> None:
        self.pool.release_all()
        self.held.clear()

    @precondition(lambda self: any(not self.held.get(s) for s in self.last_used))
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        loose = [s for s in sorted(self.last_used) if not self.held.get(s)]
        shards = data.draw(st.lists(st.sampled_from(loose), unique=True))
        self.pool.evict(shards)
        for shard in shards:
            del self.last_used[shard]

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        cache.assert_consistent(pool, self.model)
        assert np.flatnonzero(pool.is_resident).tolist() == sorted(self.last_used)
        assert pool.n_free == self.n_free
        pinned = {s for s, rank in enumerate(self.ranks) if rank == RANK_PINNED}
        assert pool.absent_pinned() == sorted(pinned - self.last_used.keys())
        frames = self.target.get(pool.table)[sorted(self.last_used)]
        ticks = self.target.get(pool.ticks)[frames].tolist()
        assert ticks == [self.last_used[s] for s in sorted(self.last_used)]
        held = self.target.get(pool.held)[frames].tolist()
        assert held == [self.held.get(s, 0) for s in sorted(self.last_used)]
        assert pool.n_evictable() == len(self.expected_victims(N_FRAMES))
        assert self.swapper.in_flight == self.swapper.n_waiting == 0


@pytest.mark.no_cover
@pytest.mark.parametrize("pool_class", [FramePool, PinnedFramePool])
def test_pool_does_what_a_dictionary_does(
    pool_class: type[FramePool], model: ShardedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pool_class is PinnedFramePool and not cuda_is_usable():
        # Memory that is pinned needs a driver; without one, any will do to show the bookkeeping.
        monkeypatch.setattr("atlas.host_tier.MappedArray", cache.UnpinnedArray)
    monkeypatch.setattr("atlas.host_tier._CHUNK_BYTES", 4 * model.map.pages_per_shard * 4096)
    PoolMachine.model, PoolMachine.pool_class = model, pool_class
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def new_pool(target: CpuTarget, n_frames: int, n_pages: int, shift: int) -> FramePool:
    n_shards = -(-n_pages >> shift)
    ranks = np.full(n_shards, RANK_NORMAL, np.uint8)
    return FramePool(target, n_frames, n_pages, shift, np.zeros(n_pages, np.uint32), ranks)


@pytest.mark.parametrize(("n_frames", "n_pages", "shift"), [(0, 1, 0), (1, 5, 1), (7, 64, 3)])
def test_pool_takes_the_memory_it_says(n_frames: int, n_pages: int, shift: int) -> None:
    target = CpuTarget()
    pool = new_pool(target, n_frames, n_pages, shift)
    expected = pool_overhead_bytes(n_pages, pool.n_shards) + n_frames * frame_cost_bytes(shift)
    assert target.allocated_bytes == target.peak_bytes == expected


def test_long_lists_go_to_the_target_in_parts() -> None:
    target = CpuTarget()
    pool = new_pool(target, 1, 10_000, 0)
    settled = target.allocated_bytes
    pool.hold_each(range(10_000), +1)
    pool.touch_each(range(10_000))
    assert target.allocated_bytes == settled
    assert target.peak_bytes - settled <= 2 * 4096  # the next part beside the last one


def test_many_shards_are_given_up_in_parts() -> None:
    target, n = CpuTarget(), 3000
    pool = new_pool(target, n, n, 0)
    shards = list(range(n))
    pool.publish(shards, pool.take_free(n), 0, False)
    settled = target.peak_bytes = target.allocated_bytes
    pool.evict(shards)
    assert target.peak_bytes - settled <= 2 * 4096
    assert pool.n_free == n and not pool.is_resident.any()


def test_pages_are_compared_with_the_table_that_came_last(model: ShardedModel) -> None:
    target, n_pages = CpuTarget(), model.map.n_pages
    pool = new_pool(target, 1, n_pages, model.map.shard_shift)
    faults = np.zeros(model.map.pages_per_shard, np.uint32)
    pool.frame(0)[:] = model.read_checked(0, model.map.pages_per_shard).reshape(-1)
    target.peak_bytes = target.allocated_bytes
    for table, n_faults in ((model.page_crc32, 0), (model.page_crc32 ^ 1, len(faults))):
        pool.expect(table)
        pool.check([0], [0], faults)
        assert np.count_nonzero(faults) == n_faults
    assert target.peak_bytes == target.allocated_bytes  # in the place of the one before


def test_free_frames_run_out() -> None:
    pool = new_pool(CpuTarget(), 3, 4, 0)
    assert sorted(pool.take_free(3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="1 frames wanted, 0 are free"):
        pool.take_free(1)
    pool.give_back([1])
    assert pool.take_free(1) == [1]
