"""The cache that kernels drive under plans of every kind: experts, smallest pools, several at once.

Runs on a GPU or in the simulator.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from atlas import shard_cache, swap_queue
from atlas.budget import cache_cost_bytes
from atlas.device_cache import DeviceCache
from atlas.errors import BudgetError, CorruptPageError
from atlas.infer.config import LlamaConfig
from atlas.infer.weights import execution_order
from atlas.manager import Atlas
from atlas.model_shards import Band
from atlas.stats import CacheStats
from atlas.target import CpuTarget, CudaTarget, Target
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.sharded_model import ShardedModel
from forge.sizes import Size
from tests import cache_factory as cache
from tests.llama_factory import LlamaShape, Types, opened, shard_llama

pytestmark = pytest.mark.cuda

EXPERTS = LlamaShape(
    n_layer=1, n_ff=96, n_expert=6, n_expert_used=2, ggml_type=Types.Q8_0, n_vocab=64
)
TINY = LlamaShape(n_layer=1, n_embd=32, n_ff=32, n_head=2, n_head_kv=1, n_vocab=40)


def opened_experts(
    folder: Path, target: Target, n_frames: int, per_shard: int, policy: str, distance: int
) -> Atlas:
    """A mixture of experts with room for so many frames."""
    _, map_path = shard_llama(folder, EXPERTS, per_shard=per_shard)
    model = ShardedModel(map_path)
    fixed, per_frame = cache_cost_bytes(model.map, target.is_cuda)
    config = LlamaConfig.from_metadata(model.source_header().metadata)
    return Atlas(
        model, target, Size(n_bytes=fixed + n_frames * per_frame), policy=policy,
        prefetch_distance=distance, order=execution_order(model.map, config),
    )  # fmt: skip


def bands_of_a_pass(atlas: Atlas, draw: random.Random) -> Iterator[Band]:
    """Those that a token sent to two experts needs, in order."""
    names = [(f"blk.0.{stem}.weight", 0) for stem in
             ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp")]  # fmt: skip
    for expert in draw.sample(range(EXPERTS.n_expert), EXPERTS.n_expert_used):
        names += [(f"blk.0.ffn_{stem}_exps.weight", expert) for stem in ("gate", "up", "down")]
    for name, index in [*names, ("output.weight", 0)]:
        yield from atlas.bands(atlas.matrix(name, index))


def walk(atlas: Atlas, n_passes: int, seed: int = 0) -> None:
    draw = random.Random(seed)
    for _ in range(n_passes):
        for band in bands_of_a_pass(atlas, draw):
            atlas.acquire(band)


@pytest.mark.parametrize("policy", ["lru", "mru", "pin"])
@pytest.mark.parametrize("extra", [1, 3])
def test_experts_find_room_beside_what_is_read_ahead(
    tmp_path: Path, policy: str, extra: int
) -> None:
    target = CudaTarget()
    with opened_experts(tmp_path, target, 7 + extra, 1, policy, 8) as atlas:
        assert atlas.shape.smallest_pool == 7
        draw = random.Random(extra)
        for _ in range(2):
            for band in bands_of_a_pass(atlas, draw):
                atlas.acquire(band)
                found = target.get(atlas.cache.table)[band.first_shard : band.last_shard + 1]
                assert (found >= 0).all()
        cache.assert_at_rest(atlas)
        assert target.peak_bytes <= atlas.budget_bytes


def counts(folder: Path, target: Target, distance: int) -> CacheStats:
    with opened_experts(folder, target, 11, 4, "lru", distance) as atlas:
        assert (atlas.shape.n_scheduled, atlas.shape.n_unscheduled) == (2, 12)
        walk(atlas, 2)
        before = atlas.stats.copy()
        walk(atlas, 3, seed=1)
        return atlas.stats.since(before)


@pytest.mark.parametrize("distance", [0, 1])
def test_uses_are_counted_of_shards_that_never_leave_the_window(
    tmp_path: Path, distance: int
) -> None:
    """Two scheduled shards, of which the other one is always the next."""
    on_device = counts(tmp_path / "device", CudaTarget(), distance)
    on_cpu = counts(tmp_path / "cpu", CpuTarget(), distance)
    assert on_device.accesses == on_cpu.accesses > 0
    assert on_device.reuse_hits == on_cpu.reuse_hits


def test_a_swap_is_no_access(tmp_path: Path) -> None:
    map_path = cache.shard(tmp_path, cache.dense_model(1), pages_per_shard=1)
    stats = []
    for target in (CpuTarget(), CudaTarget()):
        with Atlas.open(map_path, "50%", target, policy="lru", prefetch_distance=0) as atlas:
            first, *others = atlas.shards.schedule[:4]
            before = atlas.stats.copy()
            atlas.atomic_swap([first, *others])
            assert atlas.stats.since(before).accesses == 0
            atlas.acquire(Band(0, 1, first, first))
            stats.append(atlas.stats.since(before))
    assert (stats[0].reuse_hits, stats[0].demand_misses) == (1, 0)
    assert (stats[1].reuse_hits, stats[1].demand_misses) == (1, 0)
    assert stats[0].bytes_moved == stats[1].bytes_moved


def test_lists_of_shards_take_no_more_than_they_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap_queue, "_LIST_NUMBERS", 7)
    map_path = cache.shard(tmp_path, cache.dense_model(1), pages_per_shard=1)
    target = CudaTarget()
    with Atlas.open(map_path, "60%", target, policy="lru", prefetch_distance=0) as atlas:
        shards = atlas.shards.schedule
        atlas.atomic_swap(shards[:12])
        assert len(cache.resident(atlas)) == 13  # with the one of the high zone
        taken = target.allocated_bytes
        for first in (0, 1, 6, 0):  # the third list takes the place of the first
            atlas.atomic_swap(shards[first : first + 5 : 2])
        assert target.allocated_bytes == taken
        atlas.atomic_swap(shards[12:16])
        given_up = {*shards[:12]} - {*cache.resident(atlas)}
        assert given_up == {shards[7], shards[9], shards[11], shards[1]}
        cache.assert_at_rest(atlas)


@pytest.mark.parametrize("n_pages", [7, 12])
def test_loans_find_room_beside_what_host_memory_reads_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_pages: int
) -> None:
    """By a thread, as if shards were large."""
    monkeypatch.setattr(shard_cache, "MIN_BACKGROUND_BYTES", 1)
    map_path = cache.shard(tmp_path, cache.dense_model(1), pages_per_shard=1)
    with Atlas.open(
        map_path, "60%", CudaTarget(), policy="pin", prefetch_distance=2,
        host_memory=Size(n_bytes=n_pages * PAGE_BYTES),
    ) as atlas:  # fmt: skip
        plan = device_cache(atlas).host.cache.plan
        assert 0 < plan.n_pinned < n_pages and plan.distance > 0
        cache.walk(atlas, 2)
        cache.assert_at_rest(atlas)


def test_long_swaps_of_hits_and_misses(tmp_path: Path) -> None:
    map_path = cache.shard(tmp_path, cache.dense_model(1), pages_per_shard=1)
    with Atlas.open(map_path, "90%", CudaTarget(), policy="lru", prefetch_distance=0) as atlas:
        assert (atlas.plan.n_frames, atlas.plan.reserve) == (20, 1)
        shards, host = atlas.shards.schedule, device_cache(atlas).host
        atlas.atomic_swap(shards[:6])
        atlas.atomic_swap([*shards[5:15], *shards[:9], shards[7]])  # some twice
        before = cache.resident(atlas)
        assert set(shards[:15]) <= set(before)
        for bad in (shards[15], shards[17], shards[19]):  # the first, one between, the last
            page = host.page(bad)
            assert page is not None
            page[0] ^= 1
            with pytest.raises(CorruptPageError, match=f"page {bad} "):
                atlas.atomic_swap([shards[0], *shards[15:20], shards[3]])
            page[0] ^= 1
            assert cache.resident(atlas) == before
            cache.assert_at_rest(atlas)
        atlas.atomic_swap(shards[2:20])
        with pytest.raises(GGUFShardError, match=r"^2 shards to .* has room for 0$"):
            atlas.atomic_swap(shards[:20])


def device_cache(atlas: Atlas) -> DeviceCache:
    assert isinstance(atlas.shard_cache, DeviceCache)
    return atlas.shard_cache


# Several on one target


def test_caches_that_find_faults_at_once_are_both_put_right(tmp_path: Path) -> None:
    target = CudaTarget()
    map_path = cache.shard(tmp_path, cache.dense_model(1), pages_per_shard=1)
    options = {"policy": "lru", "prefetch_distance": 0}
    with (
        Atlas.open(map_path, "50%", target, **options) as one,
        Atlas.open(map_path, "50%", target, **options) as other,
    ):
        bad = one.shards.schedule[4]
        pages = [device_cache(atlas).host.page(bad) for atlas in (one, other)]
        for atlas, page in zip((one, other), pages, strict=True):
            assert page is not None
            page[5] ^= 2
            atlas.acquire(Band(0, 1, bad, bad))
        for _ in range(2):  # one error each
            with pytest.raises(CorruptPageError, match=f"page {bad} "):
                target.get(one.cache.table)
        for atlas, page in zip((one, other), pages, strict=True):
            assert page is not None
            page[5] ^= 2
            atlas.acquire(Band(0, 1, bad, bad))
            assert bad in cache.resident(atlas)
            cache.assert_at_rest(atlas)
    assert not target.guards


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Closed models give their memory back at once, not when garbage is collected."""
    _, map_path = shard_llama(tmp_path, TINY)
    target = CudaTarget()
    with opened(map_path, Size(fraction=0.6), target) as model:
        model.forward([1])  # compiles: errors that the compiler catches have cycles of frames
    del model
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            model = opened(map_path, Size(fraction=0.6), target)
            model.forward([1])
            assert isinstance(model.atlas.shard_cache, DeviceCache)
            pinned = weakref.ref(model.atlas.shard_cache.host.pool)
            model.close()
            model.close()
            del model
            assert pinned() is None and not target.guards
            assert target.allocated_bytes < 1 << 16  # the target's own: tables
    finally:
        gc.enable()


def test_a_model_that_cannot_be_opened_leaves_no_guard(tmp_path: Path) -> None:
    shape = LlamaShape(**{**vars(TINY), "shapes": {"output_norm.weight": (31,)}})
    _, map_path = shard_llama(tmp_path, shape)
    target = CudaTarget()
    with pytest.raises(GGUFShardError, match="output_norm"):
        opened(map_path, target=target)
    with pytest.raises(BudgetError):
        opened(map_path, "1", target)
    assert not target.guards
