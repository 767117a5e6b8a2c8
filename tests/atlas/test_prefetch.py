"""What comes next, and the thread that fetches it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atlas.errors import CorruptPageError
from atlas.manager import Atlas
from atlas.model_shards import Band
from atlas.prefetch import Prefetcher, Schedule
from atlas.target import CpuTarget
from forge.errors import GGUFShardError
from tests import cache_factory as cache

TIMEOUT = 30


@pytest.fixture(scope="module", autouse=True)
def background() -> Iterator[None]:
    """Read ahead on a thread, however small the shards are: that is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atlas.shard_cache.MIN_BACKGROUND_BYTES", 0)
        yield


@pytest.mark.parametrize(
    ("shard", "distance", "expected"),
    [
        (5, 2, [1, 7]), (1, 2, [7, 2]), (7, 2, [2, 5]), (2, 1, [5]), (2, 0, []),
        (5, 3, [1, 7, 2]), (5, 100, [1, 7, 2]),  # never the shard itself
        (0, 2, []), (8, 2, []),  # not scheduled
    ],
)  # fmt: skip
def test_the_schedule_goes_round(shard: int, distance: int, expected: list[int]) -> None:
    assert Schedule([5, 1, 7, 2], 9).after(shard, distance) == expected


def test_short_schedules_announce_nothing() -> None:
    assert Schedule([], 3).after(1, 8) == []
    assert Schedule([1], 3).after(1, 8) == []


def test_the_thread_runs_until_there_is_nothing_left_and_wakes_again() -> None:
    changed = threading.Condition()
    left = [3]
    idle = threading.Semaphore(0)

    def fetch_next() -> bool:
        if left[0] == 0:
            idle.release()
            return False
        left[0] -= 1
        return True

    prefetcher = Prefetcher(changed, fetch_next)
    assert idle.acquire(timeout=TIMEOUT)
    with changed:
        assert left == [0]
        left[0] = 2
        changed.notify_all()
    assert idle.acquire(timeout=TIMEOUT)
    assert left == [0]
    prefetcher.stop()
    assert not prefetcher.is_alive()


@pytest.fixture
def map_path(tmp_path: Path) -> Path:
    return cache.shard(tmp_path, cache.dense_model(2), pages_per_shard=1)


def open_half(map_path: Path, **options: int) -> Atlas:
    return Atlas.open(map_path, "50%", CpuTarget(), policy="lru", **options)


def wait_for(atlas: Atlas, reached: Callable[[], bool]) -> None:
    """Until something holds that the prefetcher brings about."""
    with atlas.shard_cache._lock:
        assert atlas.shard_cache._lock.wait_for(reached, TIMEOUT)


def use(atlas: Atlas, place: int, n_shards: int = 1) -> None:
    first = atlas.shards.schedule[place]
    atlas.acquire(Band(0, 1, first, first + n_shards - 1))


def test_what_comes_next_is_there_before_it_is_asked_for(map_path: Path) -> None:
    with open_half(map_path, prefetch_distance=2) as atlas:
        order = atlas.shards.schedule
        use(atlas, 0)
        wait_for(atlas, lambda: atlas.shard_cache._ahead == {order[1], order[2]})
        use(atlas, 1)
        wait_for(atlas, lambda: atlas.shard_cache._ahead == {order[2], order[3]})
        stats = atlas.stats
        assert (stats.demand_misses, stats.prefetch_hits, stats.reuse_hits) == (1, 1, 0)
        assert stats.late_prefetches == 0
        cache.assert_at_rest(atlas)


def test_a_jump_lets_go_of_what_was_read_ahead(map_path: Path) -> None:
    with open_half(map_path, prefetch_distance=2) as atlas:
        order, shards = atlas.shards.schedule, atlas.shard_cache
        for place in (0, 12, 5, len(order) - 1):
            use(atlas, place)
            window = {order[(place + i) % len(order)] for i in (1, 2)}
            wait_for(atlas, lambda window=window: shards._ahead <= window and not shards._wanted)
            cache.assert_at_rest(atlas)


def test_a_late_read_is_waited_for_and_counted(map_path: Path) -> None:
    with open_half(map_path, prefetch_distance=2) as atlas:
        store = cache.install_faulty_store(atlas)
        read, begun, go_on = store.read_shard, threading.Event(), threading.Event()
        slow = atlas.shards.schedule[1]

        def read_slowly(shard: int, buffer: object) -> int:
            if shard == slow:
                begun.set()
                assert go_on.wait(TIMEOUT)
            return read(shard, buffer)  # type: ignore[arg-type]

        store.read_shard = read_slowly  # type: ignore[method-assign]
        use(atlas, 0)
        assert begun.wait(TIMEOUT)
        threading.Timer(0.05, go_on.set).start()
        use(atlas, 1)
        assert atlas.stats.late_prefetches == atlas.stats.prefetch_hits == 1
        assert atlas.stats.wait_seconds > 0.02
        assert slow in cache.resident(atlas)


@pytest.mark.parametrize("has_thread", [True, False])
def test_a_corrupt_page_is_the_error_of_the_acquire_that_needs_it(
    map_path: Path, has_thread: bool
) -> None:
    target = CpuTarget()
    target.has_background = has_thread
    with Atlas.open(map_path, "50%", target, policy="lru", prefetch_distance=2) as atlas:
        order, shards = atlas.shards.schedule, atlas.shard_cache
        cache.flip_bit(map_path, order[4])
        for place in range(4):
            use(atlas, place)
            wait_for(atlas, lambda: not shards._wanted and not shards._loading)
        assert order[4] not in cache.resident(atlas)
        for _ in range(2):
            with pytest.raises(CorruptPageError) as caught:
                use(atlas, 4)
            assert caught.value.page == order[4]
        use(atlas, 5)  # a neighbour, read ahead in one batch or not, is not to blame
        cache.flip_bit(map_path, order[4])
        use(atlas, 4)
        cache.assert_at_rest(atlas)


def test_the_thread_survives_what_it_cannot_read(map_path: Path) -> None:
    with open_half(map_path, prefetch_distance=2) as atlas:
        store = cache.install_faulty_store(atlas)
        order = atlas.shards.schedule
        store.faults = {order[1]: 2}
        use(atlas, 0)
        shards = atlas.shard_cache
        wait_for(atlas, lambda: order[2] in shards._ahead and not shards._wanted)
        assert shards._prefetcher is not None and shards._prefetcher.is_alive()
        use(atlas, 1)
        assert atlas.stats.demand_misses == 2


def test_more_ahead_than_there_are_shards(map_path: Path) -> None:
    with Atlas.open(map_path, "100%", CpuTarget(), policy="lru", prefetch_distance=999) as atlas:
        n = len(atlas.shards.schedule)
        use(atlas, 3, 2)  # the window ends in the band itself
        wait_for(atlas, lambda: len(atlas.shard_cache._ahead) == n - 2)
        cache.assert_at_rest(atlas)
        cache.walk(atlas, 2)
        cache.assert_at_rest(atlas)
        assert atlas.stats.bytes_moved == atlas.shape.n_shards * 4096
        assert atlas.stats.demand_misses + atlas.stats.prefetch_hits == n


def test_reading_ahead_gives_way_to_a_demand_that_waits_for_frames(map_path: Path) -> None:
    with open_half(map_path, prefetch_distance=2) as atlas:
        shards, order = atlas.shard_cache, atlas.shards.schedule
        with shards._lock:
            shards._wanted = order[5:8]
            shards._swapper.n_waiting = 1
            assert not shards._fetch_ahead()
            shards._swapper.n_waiting = 0
            assert len(shards._wanted) == 3
            shards._wanted = []
        with (
            pytest.raises(GGUFShardError, match=r"no room for \d+ more shards at once"),
            shards._lock,
        ):
            shards._load(shards._lanes[0], order[: shards.pool.n_free + 1])
        cache.assert_at_rest(atlas)
