"""`atomic_swap`: all of it or nothing, whatever is wrong with the pages and whoever else swaps."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numba import config

from atlas.errors import CorruptPageError
from atlas.manager import Atlas
from atlas.model_shards import Band
from atlas.target import CpuTarget, Target
from forge.errors import GGUFShardError
from tests import cache_factory as cache
from tests import naive

TIMEOUT = 60  # seconds; a deadlock, not a slow machine


@pytest.fixture
def map_path(tmp_path: Path) -> Path:
    """A model of its own for every test, which may break it; a page a shard."""
    return cache.shard(tmp_path, cache.dense_model(1), pages_per_shard=1)


@pytest.fixture
def atlas(map_path: Path) -> Iterator[Atlas]:
    """Room for one high shard, for five of the twenty-one others, and a free frame."""
    with Atlas.open(map_path, "30%", CpuTarget(), policy="lru", prefetch_distance=0) as opened:
        assert (opened.plan.n_frames, opened.plan.reserve, opened.shape.n_shards) == (7, 1, 22)
        yield opened


def state(atlas: Atlas) -> tuple[list[int], int, list[int]]:
    """What must not change when a swap fails."""
    atlas_held = atlas.target.get(atlas.shard_cache.pool.held)
    return cache.resident(atlas), atlas.shard_cache.pool.n_free, sorted(atlas_held.tolist())


def cached(atlas: Atlas) -> list[int]:
    """Shards that come and go, in the order of their numbers."""
    return sorted([*atlas.shards.schedule, *atlas.shards.unscheduled])


def test_swap_makes_resident_and_gives_up_the_oldest(atlas: Atlas) -> None:
    a, b, c, d, e, f, *_ = cached(atlas)
    (high,) = atlas.shards.high
    atlas.atomic_swap([a, b])
    atlas.atomic_swap([np.int64(c), d, d, c])
    assert cache.resident(atlas) == sorted([high, a, b, c, d])
    atlas.atomic_swap([a])  # a hit: b is the oldest now
    assert atlas.stats.swaps == 1 + 4
    atlas.atomic_swap([e, high])
    assert atlas.shard_cache.pool.n_free == 1
    atlas.atomic_swap([f])
    assert cache.resident(atlas) == sorted([high, a, c, d, e, f])
    atlas.atomic_swap([])
    cache.assert_at_rest(atlas)
    assert atlas.stats.pages_checked == atlas.stats.swaps == 1 + 6


def test_swap_of_all_that_the_pool_can_hold(atlas: Atlas) -> None:
    shards = cached(atlas)
    atlas.atomic_swap(shards[:5])
    atlas.atomic_swap(shards[4:9])
    assert set(cache.resident(atlas)) == {*atlas.shards.high, *shards[4:9]}
    cache.assert_at_rest(atlas)
    before = state(atlas)
    for wanted, n, room in ((shards[9:15], 6, 5), (shards[:6], 4, 3)):
        with pytest.raises(GGUFShardError, match=rf"^{n} shards to .* has room for {room}$"):
            atlas.atomic_swap(wanted)
    assert state(atlas) == before
    cache.assert_at_rest(atlas)
    for band in atlas.bands(atlas.matrix("blk.0.attn_q.weight")):
        atlas.acquire(band)  # there are frames to read into after the largest of swaps
    cache.assert_at_rest(atlas)


def test_a_band_in_use_is_kept_by_a_swap(atlas: Atlas) -> None:
    shards = cached(atlas)
    atlas.acquire(Band(0, 1, shards[0], shards[1]))
    with pytest.raises(GGUFShardError, match=r"^4 shards to bring in at once: .* room for 3$"):
        atlas.atomic_swap(shards[2:6])
    atlas.atomic_swap(shards[2:5])
    atlas.atomic_swap(shards[5:8])
    assert set(shards[:2]) | set(shards[5:8]) <= set(cache.resident(atlas))
    cache.assert_at_rest(atlas)


def test_unknown_shards_are_refused(atlas: Atlas) -> None:
    before = state(atlas)
    n = atlas.map.n_shards
    raw = atlas.map.raw[0].first_page
    for shard in (-1, n, 1 << 40, raw):
        with pytest.raises(GGUFShardError, match=f"^shard {shard}: the model has no cached shard"):
            atlas.atomic_swap([cached(atlas)[0], shard])
    assert state(atlas) == before


def flip(map_path: Path, page: int, other: int) -> None:
    cache.flip_bit(map_path, page)


def flip_tag(map_path: Path, page: int, other: int) -> None:
    cache.flip_bit(map_path, page, 4090)


def flip_magic(map_path: Path, page: int, other: int) -> None:
    cache.flip_bit(map_path, page, 4095)


def swap_with_another(map_path: Path, page: int, other: int) -> None:
    content = cache.read_page(map_path, page)
    cache.write_page(map_path, page, cache.read_page(map_path, other))
    cache.write_page(map_path, other, content)


def replace_by_stale(map_path: Path, page: int, other: int) -> None:
    """The page of another edition of the model, valid in itself."""
    folder = map_path.parent / "other"
    folder.mkdir()
    edition = cache.shard(folder, cache.dense_model(1, seed=100), pages_per_shard=1)
    cache.write_page(map_path, page, cache.read_page(edition, page))


DAMAGE = {
    flip: "its tag says",
    flip_tag: "its tag says",
    flip_magic: "magic is",
    swap_with_another: "page is valid but not the one that belongs here",
    replace_by_stale: "page is valid but not the one that belongs here",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_page_is_named_and_nothing_changes(
    atlas: Atlas, map_path: Path, damage: Callable[[Path, int, int], None]
) -> None:
    shards = cached(atlas)
    atlas.atomic_swap(shards[:4])
    before, counts = state(atlas), atlas.stats.copy()
    bad = shards[6]
    damage(map_path, bad, shards[8])
    with pytest.raises(CorruptPageError) as caught:
        atlas.atomic_swap([shards[4], bad, shards[5]])
    error = caught.value
    tensor = atlas.map.tensor_of_page(bad)
    found = np.frombuffer(cache.read_page(map_path, bad), np.uint8)
    assert (error.page, error.shard, error.tensor) == (bad, bad, tensor)
    assert error.expected == atlas.model.page_crc32[bad]
    assert error.got == naive.crc32_pages(found[None])[0]
    assert str(error).startswith(f"{atlas.model.core.path}: page {bad} (shard {bad}, {tensor}): ")
    assert DAMAGE[damage] in str(error) and "\n" not in str(error)
    assert state(atlas) == before
    assert atlas.stats.pages_checked - counts.pages_checked <= 3  # of what went in and out again
    with pytest.raises(CorruptPageError):
        atlas.acquire(Band(0, 1, bad, bad))
    assert not set(cache.resident(atlas)) & {bad}
    atlas.atomic_swap([shards[4], shards[5]])


def test_a_file_that_has_shrunk_is_named_and_nothing_changes(atlas: Atlas, map_path: Path) -> None:
    shards = cached(atlas)
    atlas.atomic_swap(shards[:4])
    before = state(atlas)
    core = map_path.with_suffix(".gguf")
    with open(core, "r+b") as file:
        file.truncate(4096 * (1 + shards[6]) + 1000)
    with pytest.raises(GGUFShardError, match=rf"^{core}: offset \d+: the file ends, 3096 bytes"):
        atlas.atomic_swap(shards[5:7])
    assert set(state(atlas)[0]) == set(before[0]) and state(atlas) == before


@pytest.mark.parametrize("n_faults", [1, 2])
def test_a_fault_is_retried_once(atlas: Atlas, n_faults: int) -> None:
    shards = cached(atlas)
    store = cache.install_faulty_store(atlas)
    store.faults = {shards[1]: n_faults}
    before = state(atlas)
    if n_faults == 1:
        atlas.atomic_swap(shards[:3])
        assert set(shards[:3]) <= set(cache.resident(atlas))
    else:
        with pytest.raises(CorruptPageError):
            atlas.atomic_swap(shards[:3])
        assert state(atlas) == before
    assert store.faults == {shards[1]: 0}
    cache.assert_at_rest(atlas)


def test_parts_that_came_first_go_again(atlas: Atlas) -> None:
    shards = cached(atlas)
    store = cache.install_faulty_store(atlas)
    atlas.atomic_swap(shards[:5])
    before = state(atlas)
    store.faults = {shards[8]: 2}
    with pytest.raises(CorruptPageError) as caught:
        atlas.atomic_swap([shards[4], *shards[5:9]])  # three parts had replaced three residents
    assert caught.value.shard == shards[8]
    assert state(atlas) == before
    cache.assert_at_rest(atlas)


def test_what_cannot_come_back_does_not_hide_the_first_error(atlas: Atlas) -> None:
    shards = cached(atlas)
    store = cache.install_faulty_store(atlas)
    atlas.atomic_swap(shards[:5])
    store.faults = {shards[7]: 2, shards[0]: 2}
    with pytest.raises(CorruptPageError) as caught:
        atlas.atomic_swap(shards[5:8])
    assert caught.value.shard == shards[7]
    assert set(cache.resident(atlas)) == {*atlas.shards.high, *shards[1:5]}
    cache.assert_at_rest(atlas)


def test_after_a_failed_acquire_no_band_is_in_use(atlas: Atlas) -> None:
    first, second = cached(atlas)[:2]
    store = cache.install_faulty_store(atlas)
    for _ in range(3):
        store.faults = {second: 2}
        with pytest.raises(CorruptPageError):
            atlas.acquire(Band(0, 1, first, second))
        cache.assert_at_rest(atlas)
        assert not atlas.target.get(atlas.shard_cache.pool.held).any()
    atlas.acquire(Band(0, 1, first, second))
    assert atlas.stats.reuse_hits == 3 and atlas.stats.demand_misses == 5
    cache.assert_at_rest(atlas)


def test_a_fault_while_filling_closes_the_model(target: Target, map_path: Path) -> None:
    cache.flip_bit(map_path, 0)
    with pytest.raises(CorruptPageError, match="page 0 "):
        Atlas.open(map_path, "100%", target, policy="pin")


def run_together(work: list[Callable[[], None]]) -> None:
    """Run on a thread each; re-raise what goes wrong, and fail if they do not end."""
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "deadlock"
    if errors:
        raise errors[0]


@pytest.mark.skipif(bool(config.ENABLE_CUDASIM), reason="the simulator runs one thread at a time")
@pytest.mark.parametrize("policy", ["lru", "mru", "pin"])
@pytest.mark.parametrize("budget", ["25%", "60%", "100%"])
def test_many_swaps_beside_compute_and_prefetch(tmp_path: Path, policy: str, budget: str) -> None:
    map_path = cache.shard(tmp_path, cache.dense_model(2), pages_per_shard=1)
    with Atlas.open(map_path, budget, CpuTarget(), policy=policy, prefetch_distance=4) as atlas:
        store = cache.install_faulty_store(atlas)
        shards = cached(atlas)
        n_loose = atlas.plan.n_frames - atlas.shape.n_high - atlas.plan.n_pinned
        n_done = []

        def swap(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(60):
                wanted = draw.sample(shards, draw.randint(1, min(n_loose, 6) or 6))
                if draw.random() < 0.2:
                    store.faults[wanted[-1]] = 1
                try:
                    atlas.atomic_swap(wanted)
                except GGUFShardError as error:
                    # Too many beside the band in use, or two threads' faults met in one shard.
                    assert "at once" in str(error) or isinstance(error, CorruptPageError)
                else:
                    n_done.append(len(wanted))

        def compute() -> None:
            for _ in range(4):
                cache.walk(atlas)

        run_together([lambda: swap(1), lambda: swap(2), lambda: swap(3), compute])
        assert len(n_done) > 20
        store.faults = {}
        cache.assert_at_rest(atlas)
        cache.walk(atlas, 2)
        cache.assert_at_rest(atlas)
        stats = atlas.stats
        assert min(stats.reuse_hits, stats.prefetch_hits, stats.demand_misses) >= 0
        assert stats.accesses == 6 * atlas.shape.n_scheduled


def test_scrubbing_finds_resident_pages_that_have_changed(atlas: Atlas) -> None:
    shards = cached(atlas)
    atlas.atomic_swap(shards[:4])
    for _ in range(3):
        atlas.scrub(5)
    bad = shards[2]
    pool = atlas.shard_cache.pool
    pool.frame(pool.frame_of(bad))[77] ^= 4
    with pytest.raises(CorruptPageError) as caught:
        for _ in range(2):
            atlas.scrub(4)
    assert (caught.value.page, caught.value.shard) == (bad, bad)
    assert set(cache.resident(atlas)) == {*atlas.shards.high, *shards[:2], shards[3]}
    atlas.acquire(Band(0, 1, bad, bad))  # read again
    cache.assert_at_rest(atlas)
    pool.frame(pool.frame_of(bad))[77] ^= 4
    with pytest.raises(CorruptPageError):
        atlas.scrub(7)  # in use: it stays, and is found again
    assert bad in cache.resident(atlas)
