"""The cache that kernels drive: what it finds, what it leaves alone, and its tier in host memory.

Runs on a GPU or in the simulator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from atlas.device_cache import DeviceCache
from atlas.device_check import DeviceCheck
from atlas.errors import BudgetError, CorruptPageError
from atlas.manager import Atlas
from atlas.model_shards import Band
from atlas.ops.page_faults import TABLE_FAULT, TAG_FAULT
from atlas.ops.swap_state import FAULT_BITS, FAULT_KIND, FAULT_PAGE
from atlas.stats import CacheStats
from atlas.target import CpuTarget, CudaTarget
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.sizes import Size, parse_size
from forge.verify import verify_model
from tests import cache_factory as cache

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How shards come: read by the kernel that checks them, or copied for it."""
    is_copied = getattr(request, "param", "read") == "copied"
    monkeypatch.setattr("atlas.swap_queue.ARE_COPIED", is_copied)


both_ways = pytest.mark.parametrize("way", ["read", "copied"], indirect=True)


@pytest.fixture
def map_path(tmp_path: Path) -> Path:
    """A model of its own for every test, which may break it; a page a shard."""
    return cache.shard(tmp_path, cache.dense_model(1), pages_per_shard=1)


@pytest.fixture
def atlas(map_path: Path) -> Iterator[Atlas]:
    """Room for one high shard, for five of the twenty-one others, and a free frame."""
    with Atlas.open(map_path, "30%", CudaTarget(), policy="lru", prefetch_distance=0) as opened:
        assert (opened.plan.n_frames, opened.plan.reserve, opened.shape.n_shards) == (7, 1, 22)
        yield opened


def device_cache(atlas: Atlas) -> DeviceCache:
    assert isinstance(atlas.shard_cache, DeviceCache)
    return atlas.shard_cache


def host_page(atlas: Atlas, page: int) -> np.ndarray:
    """A page in host memory, uint8 [4096], to be damaged."""
    found = device_cache(atlas).host.page(page)
    assert found is not None
    return found


def frames(atlas: Atlas) -> np.ndarray:
    return atlas.target.get(atlas.cache.frames)


def flip_bit(atlas: Atlas, page: int, other: int) -> None:
    host_page(atlas, page)[1234] ^= 32


def take_another(atlas: Atlas, page: int, other: int) -> None:
    """Another page of the model, which is valid in itself."""
    host_page(atlas, page)[:] = host_page(atlas, other)


def take_stale(atlas: Atlas, page: int, other: int) -> None:
    """The page of another edition of the model, which is valid in itself."""
    folder = atlas.model.core.path.parent / "other"
    folder.mkdir()
    edition = cache.shard(folder, cache.dense_model(1, seed=100), pages_per_shard=1)
    host_page(atlas, page)[:] = np.frombuffer(cache.read_page(edition, page), np.uint8)


DAMAGE = {flip_bit: TAG_FAULT | TABLE_FAULT, take_another: TABLE_FAULT, take_stale: TABLE_FAULT}


@both_ways
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_page_is_found_by_the_swap_and_nothing_is_published(
    atlas: Atlas, damage: Callable[[Atlas, int, int], None]
) -> None:
    shards = atlas.shards.schedule
    atlas.atomic_swap(shards[:4])
    table, bad = atlas.target.get(atlas.cache.table), shards[7]
    residents = {s: frames(atlas).reshape(7, -1)[table[s]].copy() for s in cache.resident(atlas)}
    damage(atlas, bad, shards[9])
    bits = np.zeros(1, np.uint32)
    check = device_cache(atlas).queue.take_fault

    def look_first() -> GGUFShardError | None:
        if device_cache(atlas).queue._fault.host[FAULT_KIND] == FAULT_PAGE:
            bits[0] = device_cache(atlas).queue._fault.host[FAULT_BITS]
            # Nothing of the swap that failed is published, before anybody has put it right.
            assert atlas.cache.table.copy_to_host()[bad] == -1
        return check()

    device_cache(atlas).queue.take_fault = look_first  # type: ignore[method-assign]
    with pytest.raises(CorruptPageError) as caught:
        atlas.atomic_swap([shards[5], bad, shards[6]])
    assert bits[0] == DAMAGE[damage]
    error = caught.value
    assert (error.page, error.shard) == (bad, bad)
    assert error.tensor == atlas.map.tensor_of_page(bad)
    assert "\n" not in str(error) and f"page {bad} (shard {bad}, {error.tensor})" in str(error)
    assert cache.resident(atlas) == sorted(residents)
    table = atlas.target.get(atlas.cache.table)
    for shard, content in residents.items():
        np.testing.assert_array_equal(frames(atlas).reshape(7, -1)[table[shard]], content)
    cache.assert_at_rest(atlas)
    atlas.atomic_swap([shards[5], shards[6]])  # it works on
    assert {shards[5], shards[6]} <= set(cache.resident(atlas))


@both_ways
def test_a_damaged_page_stops_the_value_that_needs_it(atlas: Atlas) -> None:
    target, shards = atlas.target, atlas.shards.schedule
    result = target.full(1, 7.0, np.float32)
    atlas.acquire(Band(0, 1, shards[0], shards[1]))
    assert target.get(result)[0] == 7
    before = cache.resident(atlas)
    flip_bit(atlas, shards[5], 0)
    atlas.acquire(Band(0, 1, shards[4], shards[5]))  # queued, and nobody has waited
    atlas.acquire(Band(0, 1, shards[6], shards[7]))  # does nothing any more
    with pytest.raises(CorruptPageError, match=f"page {shards[5]} "):
        target.get(result)
    assert set(cache.resident(atlas)) == {*before, shards[4]}  # the part before the bad one
    assert target.get(result)[0] == 7  # said once
    cache.assert_at_rest(atlas)


def test_a_tensor_with_a_damaged_page_is_not_handed_out(atlas: Atlas) -> None:
    bad = atlas.shards.schedule[5]
    flip_bit(atlas, bad, 0)
    name = atlas.map.tensor_of_page(bad)
    assert name is not None
    with pytest.raises(CorruptPageError, match=f"page {bad} "):
        atlas.tensor(name)
    host_page(atlas, bad)[1234] ^= 32
    expected = atlas.rows(atlas.matrix(name), range(atlas.matrix(name).n_rows))
    np.testing.assert_array_equal(atlas.target.get(atlas.tensor(name)), expected)
    cache.assert_at_rest(atlas)


def test_pages_that_reading_again_mends_are_no_fault(
    atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flips on the way: the second reading is right. In the simulator only."""
    if atlas.target.name != "cuda-simulator":
        pytest.skip("a bus cannot be made to fail")
    import atlas.ops.warp_page as reading

    shards = atlas.shards.schedule
    loads = {"n": 0}
    load = reading.load16_once_at

    def flaky(address: int) -> tuple[np.uint32, ...]:
        loads["n"] += 1
        words = load(address)
        return (words[0] ^ np.uint32(1), *words[1:]) if loads["n"] == 3 else words

    monkeypatch.setattr(reading, "load16_once_at", flaky)
    atlas.atomic_swap(shards[:1])
    assert loads["n"] == 256 and shards[0] in cache.resident(atlas)
    cache.assert_at_rest(atlas)


def test_fault_while_filling(map_path: Path) -> None:
    cache.flip_bit(map_path, 3)
    target = CudaTarget()
    with pytest.raises(CorruptPageError, match="page 3 "):
        Atlas.open(map_path, "100%", target)
    assert not target.guards


def test_rooms_and_bands(atlas: Atlas) -> None:
    shards = atlas.shards.schedule
    atlas.atomic_swap(shards[:5])
    with pytest.raises(GGUFShardError, match=r"^6 shards to .* has room for 5$"):
        atlas.atomic_swap(shards[9:15])
    atlas.acquire(Band(0, 1, shards[0], shards[1]))
    with pytest.raises(GGUFShardError, match=r"^4 shards to bring in at once: .* room for 3$"):
        atlas.atomic_swap(shards[5:9])
    atlas.atomic_swap(shards[5:8])
    assert {*shards[:2], *shards[5:8]} <= set(cache.resident(atlas))
    cache.assert_at_rest(atlas)
    with pytest.raises(GGUFShardError, match="no cached shard of this number"):
        atlas.atomic_swap([1 << 40])


@both_ways
def test_parts_that_came_first_go_again(atlas: Atlas) -> None:
    shards = atlas.shards.schedule
    atlas.atomic_swap(shards[:5])
    before = cache.resident(atlas)
    flip_bit(atlas, shards[8], 0)
    with pytest.raises(CorruptPageError) as caught:
        atlas.atomic_swap([shards[4], *shards[5:9]])  # three parts had replaced three residents
    assert caught.value.shard == shards[8]
    assert cache.resident(atlas) == before
    cache.assert_at_rest(atlas)


@both_ways
@pytest.mark.parametrize("step", ["_help", "_bring"])
def test_an_interrupt_before_the_gather_is_got_over(
    map_path: Path, monkeypatch: pytest.MonkeyPatch, way: None, step: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    small = Size(n_bytes=8 * PAGE_BYTES)  # so that shards are lent, and have to come back
    with Atlas.open(map_path, "50%", CudaTarget(), policy="lru", host_memory=small) as atlas:
        shards = atlas.shards.schedule
        for first in range(0, 12, 2):
            band = Band(0, 1, shards[first], shards[first + 1])
            with monkeypatch.context() as patch:
                patch.setattr(device_cache(atlas).queue, step, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    atlas.acquire(band)
            cache.assert_at_rest(atlas)
            atlas.acquire(band)
            atlas.target.synchronize()
            assert {shards[first], shards[first + 1]} <= set(cache.resident(atlas))


@both_ways
def test_the_way_shards_come_is_not_changed_behind_a_fault(atlas: Atlas) -> None:
    shards, queue = atlas.shards.schedule, device_cache(atlas).queue
    other_way = not queue.are_copied
    flip_bit(atlas, shards[3], 0)
    atlas.acquire(Band(0, 1, shards[2], shards[3]))
    atlas.target.synchronize()
    with pytest.raises(GGUFShardError, match="which nobody has been told yet"):
        queue.copy_shards(other_way)
    with pytest.raises(CorruptPageError):
        device_cache(atlas).check()
    queue.copy_shards(other_way)
    assert queue.are_copied == other_way
    atlas.atomic_swap(shards[4:8])
    cache.assert_at_rest(atlas)


def test_the_host_waits_for_no_select_where_all_is_in_memory(
    map_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    awaited: list[int] = []
    with Atlas.open(map_path, "50%", CudaTarget(), policy="pin") as atlas:
        queue = device_cache(atlas).queue
        monkeypatch.setattr(queue, "_await_record", awaited.append)
        cache.walk(atlas)
        assert queue.is_settled.any() and not queue.is_settled.all()
        assert awaited == []


def steady(
    map_path: Path, target: CpuTarget | CudaTarget, policy: str, distance: int,
    host_memory: Size | None = None,
) -> tuple[CacheStats, int]:  # fmt: skip
    """Counts of two passes behind the first, and how many times host memory was read into."""
    options = {} if host_memory is None else {"host_memory": host_memory}
    with Atlas.open(
        map_path, "50%", target, policy=policy, prefetch_distance=distance, **options
    ) as atlas:
        cache.walk(atlas)
        before = atlas.stats.copy()
        cache.walk(atlas, 2)
        cache.assert_at_rest(atlas)
        reads = 0
        if isinstance(atlas.shard_cache, DeviceCache):
            reads = atlas.shard_cache.host.cache.stats.swaps
        return atlas.stats.since(before), reads


@pytest.mark.parametrize(("policy", "distance"), [("lru", 0), ("lru", 4), ("mru", 0), ("pin", 0)])
def test_hits_and_misses_are_those_of_the_cpu_target(
    map_path: Path, policy: str, distance: int
) -> None:
    on_cpu, _ = steady(map_path, CpuTarget(), policy, distance)
    on_device, _ = steady(map_path, CudaTarget(), policy, distance)
    assert on_device.reuse_hits == on_cpu.reuse_hits
    assert on_device.accesses == on_cpu.accesses
    assert on_device.bytes_moved == on_cpu.bytes_moved


@pytest.mark.parametrize("policy", ["lru", "mru", "pin"])
def test_a_small_host_memory_is_a_cache_before_the_file(map_path: Path, policy: str) -> None:
    size = parse_size(str(8 * PAGE_BYTES))
    small, small_reads = steady(map_path, CudaTarget(), policy, 2, size)
    large, large_reads = steady(map_path, CudaTarget(), policy, 2)
    assert (small.reuse_hits, small.bytes_moved) == (large.reuse_hits, large.bytes_moved)
    assert small_reads > large_reads  # the file is read in every pass


def test_host_memory_that_is_too_small_says_what_works(map_path: Path) -> None:
    with pytest.raises(BudgetError, match="host memory of 4096 bytes: too small") as caught:
        steady(map_path, CudaTarget(), "lru", 0, Size(n_bytes=4096))
    steady(map_path, CudaTarget(), "lru", 0, Size(n_bytes=caught.value.smallest_bytes))
    with pytest.raises(BudgetError):
        steady(map_path, CudaTarget(), "lru", 0, Size(n_bytes=caught.value.smallest_bytes - 1))


@pytest.mark.parametrize("budget", ["95%", "100%"])
def test_host_memory_for_few_shards_says_what_works(map_path: Path, budget: str) -> None:
    """Where what streams is less than a ring, or nothing."""

    def open_and_walk(n_bytes: int) -> None:
        memory = Size(n_bytes=n_bytes)
        with Atlas.open(map_path, budget, CudaTarget(), policy="pin", host_memory=memory) as atlas:
            cache.walk(atlas)
            cache.assert_at_rest(atlas)

    with pytest.raises(BudgetError) as caught:
        open_and_walk(1)
    open_and_walk(caught.value.smallest_bytes)
    with pytest.raises(BudgetError):
        open_and_walk(caught.value.smallest_bytes - 1)


def test_a_fault_of_the_file_behind_a_small_host_memory(map_path: Path) -> None:
    with Atlas.open(
        map_path, "30%", CudaTarget(), policy="lru", prefetch_distance=0,
        host_memory=Size(n_bytes=6 * PAGE_BYTES),
    ) as atlas:  # fmt: skip
        shards = atlas.shards.schedule
        atlas.acquire(Band(0, 1, shards[0], shards[1]))
        before = cache.resident(atlas)
        cache.flip_bit(map_path, shards[6])
        with pytest.raises(CorruptPageError, match=f"page {shards[6]} "):
            atlas.acquire(Band(0, 1, shards[5], shards[6]))
        assert set(before) <= set(cache.resident(atlas))
        cache.assert_at_rest(atlas)
        atlas.acquire(Band(0, 1, shards[7], shards[8]))
        cache.assert_at_rest(atlas)


@both_ways
@pytest.mark.parametrize("policy", ["lru", "mru", "pin"])
def test_any_order_of_bands_and_swaps(map_path: Path, policy: str) -> None:
    with Atlas.open(map_path, "60%", CudaTarget(), policy=policy, prefetch_distance=3) as atlas:
        draw = random.Random(5)
        shards = atlas.shards.schedule
        for _ in range(40):
            if draw.random() < 0.3:
                try:
                    atlas.atomic_swap(draw.sample(shards, draw.randint(1, 3)))
                except GGUFShardError as error:
                    assert "at once" in str(error)
            else:
                place = draw.randrange(len(shards) - 1)
                band = Band(0, 1, shards[place], shards[place + 1])
                atlas.acquire(band)
                assert {shards[place], shards[place + 1]} <= set(cache.resident(atlas))
        cache.assert_at_rest(atlas)


def test_the_budget_is_kept(map_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        Atlas.open(map_path, "1", CudaTarget())
    for extra in (0, 1, 9000):
        target = CudaTarget()
        budget = caught.value.smallest_bytes + extra
        with Atlas.open(map_path, str(budget), target, policy="pin") as atlas:
            cache.walk(atlas, 2)
            assert target.peak_bytes <= atlas.budget_bytes == budget


@both_ways
def test_scrubbing_finds_resident_pages_that_have_changed(atlas: Atlas) -> None:
    target, shards = atlas.target, atlas.shards.schedule
    atlas.atomic_swap(shards[:5])
    n_checked = atlas.stats.pages_checked
    for _ in range(3):
        atlas.scrub(5)
    assert atlas.stats.pages_checked == n_checked + 15
    target.synchronize()
    target.get(target.full(1, 0, np.uint8))  # nothing is wrong
    bad = shards[4]
    frame = int(target.get(atlas.cache.table)[bad])
    assert frame == 5  # the first five pages are not enough
    place = frame * PAGE_BYTES + 77
    was = target.get(atlas.cache.frames[place : place + 1])
    target.write(atlas.cache.frames[place : place + 1], was ^ np.uint8(4))
    with pytest.raises(CorruptPageError) as caught:
        for _ in range(2):  # every page of the pool has its turn
            atlas.scrub(5)
            target.synchronize()
            target.get(target.full(1, 0, np.uint8))
    assert (caught.value.page, caught.value.shard) == (bad, bad)
    assert bad not in cache.resident(atlas) and set(shards[:2]) <= set(cache.resident(atlas))
    cache.assert_at_rest(atlas)
    atlas.atomic_swap([bad])  # from host memory, where it is whole
    cache.assert_at_rest(atlas)


def test_scrubbing_a_full_pool_brings_the_shard_in_again(map_path: Path) -> None:
    with Atlas.open(map_path, "100%", CudaTarget()) as atlas:
        target, bad = atlas.target, atlas.shards.schedule[3]
        place = int(target.get(atlas.cache.table)[bad]) * PAGE_BYTES
        target.write(atlas.cache.frames[place : place + 1], np.array([171], np.uint8))
        atlas.scrub(100)
        target.synchronize()
        with pytest.raises(CorruptPageError, match=f"page {bad} "):
            target.get(atlas.cache.table)
        atlas.acquire(Band(0, 1, bad, bad))
        cache.assert_at_rest(atlas)
        assert bad in cache.resident(atlas)


def test_verify_checks_pages_with_the_kernel(map_path: Path) -> None:
    check = DeviceCheck(CudaTarget())
    found = verify_model(map_path, find_faulty=check, threads=1)
    assert found.ok and found.pages > 20
    cache.flip_bit(map_path, 5)
    cache.flip_bit(map_path, 9, 4090)
    on_device = verify_model(map_path, find_faulty=check, threads=1)
    assert on_device == verify_model(map_path) and not on_device.ok
