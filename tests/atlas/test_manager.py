"""`Atlas`: what it counts, what it takes, what it gives back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numba import config

from atlas.errors import BudgetError
from atlas.manager import Atlas
from atlas.model_shards import Band
from atlas.stats import CacheStats
from atlas.target import CpuTarget, Target
from experiments.validation import gguf_factory as factory
from forge.errors import GGUFShardError
from forge.sharded_model import ShardedModel
from tests import cache_factory as cache

PASSES = 1 if config.ENABLE_CUDASIM else 3
KINDS = GGMLQuantizationType

# The models are random bytes, so some of their scales are no numbers.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in")


@pytest.fixture(scope="module", autouse=True)
def background() -> Iterator[None]:
    """Read ahead on a thread, however small the shards are: that is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atlas.shard_cache.MIN_BACKGROUND_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model; neighbouring tensors share the shards of two pages."""
    folder = tmp_path_factory.mktemp("dense")
    n_layers = 1 if config.ENABLE_CUDASIM else 4
    return cache.shard(folder, cache.dense_model(n_layers), pages_per_shard=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts, an embedding of its own, an unknown type; a page a shard."""
    return cache.shard(tmp_path_factory.mktemp("small"), factory.small_model(), pages_per_shard=1)


def smallest_budget(map_path: Path, **options: int) -> int:
    """The smallest budget in bytes, as the refusal says."""
    with pytest.raises(BudgetError) as caught:
        Atlas.open(map_path, "1", CpuTarget(), **options)
    return caught.value.smallest_bytes


def steady(
    map_path: Path, target: Target, budget: str, policy: str, distance: int
) -> tuple[Atlas, CacheStats]:
    """Counts of some passes after the first; the closed Atlas."""
    with Atlas.open(map_path, budget, target, policy=policy, prefetch_distance=distance) as atlas:
        cache.walk(atlas)
        before = atlas.stats.copy()
        cache.walk(atlas, PASSES)
        counts = atlas.stats.since(before)
        cache.assert_at_rest(atlas)
    return atlas, counts


@pytest.mark.parametrize("distance", [0, 4])
@pytest.mark.parametrize("budget", ["100%", "50%", "25%"])
@pytest.mark.parametrize("policy", ["lru", "mru", "pin"])
def test_a_cyclic_scan_hits_what_the_closed_form_says(
    target: Target, dense: Path, policy: str, budget: str, distance: int
) -> None:
    atlas, counts = steady(dense, target, budget, policy, distance)
    n_scheduled = atlas.shape.n_scheduled
    # Tensors share shards with their neighbours; each shard is one access of a pass for all that.
    assert counts.accesses == PASSES * n_scheduled
    reuse = counts.reuse_hits / counts.accesses
    if policy == "mru" and budget != "100%":
        assert atlas.expected_reuse_ratio <= reuse < atlas.plan.n_frames / atlas.shape.n_shards
        assert reuse - atlas.expected_reuse_ratio < 4 / n_scheduled + 0.05
    else:
        assert reuse == atlas.expected_reuse_ratio
    # What is read ahead at the end of either stretch was counted in the one and not the other.
    moved = counts.bytes_moved / atlas.shard_bytes
    missed = counts.prefetch_hits + counts.demand_misses
    assert abs(moved - missed) <= atlas.plan.distance
    assert counts.pages_checked == counts.bytes_moved // 4096
    if distance == 0:
        assert counts.prefetch_hits == counts.late_prefetches == 0 and moved == missed


def test_golden_counts(dense: Path) -> None:
    if config.ENABLE_CUDASIM:
        pytest.skip("the simulator's model is smaller")
    golden = {
        ("lru", "50%"): (0, 99), ("pin", "50%"): (39, 60), ("mru", "50%"): (45, 54),
        ("lru", "25%"): (0, 99), ("pin", "25%"): (15, 84), ("mru", "25%"): (20, 79),
        ("lru", "100%"): (99, 0), ("pin", "100%"): (99, 0),
    }  # fmt: skip
    found = {}
    for policy, budget in golden:
        _, counts = steady(dense, CpuTarget(), budget, policy, 0)
        found[policy, budget] = (counts.reuse_hits, counts.demand_misses)
    assert found == golden


def test_reading_ahead_without_a_thread_hits_all_it_announces(small: Path, dense: Path) -> None:
    target = CpuTarget()
    target.has_background = False
    atlas, counts = steady(dense, target, "50%", "pin", 4)
    assert counts.demand_misses == counts.late_prefetches == 0
    assert counts.prefetch_hits == PASSES * (atlas.shape.n_scheduled - atlas.plan.n_pinned)
    assert counts.reuse_hits == PASSES * atlas.plan.n_pinned


@pytest.mark.parametrize("policy", ["lru", "pin"])
def test_a_full_pool_moves_everything_once(dense: Path, policy: str) -> None:
    with Atlas.open(dense, "100%", CpuTarget(), policy=policy, prefetch_distance=8) as atlas:
        cache.walk(atlas, 2)
        assert atlas.stats.bytes_moved == atlas.shape.n_shards * atlas.shard_bytes
        first_pass = 0 if policy == "pin" else atlas.shape.n_scheduled
        assert atlas.stats.prefetch_hits + atlas.stats.demand_misses == first_pass
        assert atlas.stats.accesses == 2 * atlas.shape.n_scheduled
        cache.assert_at_rest(atlas)


def test_the_same_shard_in_the_next_step_is_the_same_access(target: Target, dense: Path) -> None:
    with Atlas.open(dense, "50%", target, policy="lru", prefetch_distance=0) as atlas:
        first = atlas.shards.schedule[0]
        for last_shard, accesses in ((0, 1), (0, 1), (1, 2), (1, 2)):
            atlas.acquire(Band(0, 1, first, first + last_shard))
            assert (atlas.stats.demand_misses, atlas.stats.reuse_hits) == (accesses, 0)
        atlas.acquire(Band(0, 1, first, first))
        assert atlas.stats.accesses == 2  # it was among those of the step before
        atlas.acquire(Band(0, 1, first + 1, first + 1))
        assert (atlas.stats.demand_misses, atlas.stats.reuse_hits) == (2, 1)


def test_a_band_in_use_is_never_given_up(target: Target, dense: Path) -> None:
    with Atlas.open(dense, "25%", target, policy="mru", prefetch_distance=2) as atlas:
        for tensor in ("blk.0.ffn_down.weight", "output.weight"):
            for band in atlas.bands(atlas.matrix(tensor)):
                atlas.acquire(band)
                needed = set(range(band.first_shard, band.last_shard + 1))
                with atlas.shard_cache._lock:
                    assert needed <= set(cache.resident(atlas))
        cache.assert_at_rest(atlas)


def test_a_band_wider_than_planned_is_refused(dense: Path) -> None:
    with Atlas.open(dense, "25%", CpuTarget(), policy="lru") as atlas:
        first, n = atlas.shards.schedule[0], atlas.plan.band + 1
        with pytest.raises(GGUFShardError, match=f"{n} shards in a band, {n - 1} are planned for"):
            atlas.acquire(Band(0, 1, first, first + n - 1))
        cache.walk(atlas)
        cache.assert_at_rest(atlas)


@pytest.mark.parametrize("reserved", [0, 12345])
def test_the_budget_is_kept(dense: Path, reserved: int) -> None:
    smallest = smallest_budget(dense, reserved_bytes=reserved)
    for budget in [smallest, smallest + 1, smallest + 40_000, 2 * smallest, 10 * smallest]:
        for policy in ("lru", "pin"):
            target = CpuTarget()
            of_caller = target.empty(reserved, np.uint8)
            with Atlas.open(
                dense, str(budget), target, policy=policy, reserved_bytes=reserved
            ) as atlas:
                cache.walk(atlas, 2)
                assert atlas.budget_bytes == budget
                assert target.peak_bytes <= budget, (policy, budget)
            del of_caller
    # Nothing of it is left unused, either: there is no room for another frame.
    assert atlas.plan.n_frames == atlas.shape.n_shards
    with Atlas.open(dense, str(smallest), CpuTarget(), reserved_bytes=reserved) as atlas:
        assert atlas.plan.n_frames == atlas.shape.smallest_pool


@pytest.mark.parametrize("percent", [1, 5, 7.5, 30, 50, 99, 100])
def test_a_share_of_the_pages_is_kept(dense: Path, percent: float) -> None:
    target = CpuTarget()
    try:
        atlas = Atlas.open(dense, f"{percent}%", target)
    except BudgetError as error:
        assert percent < 100 * 3 / 33
        assert str(error).startswith(f"budget {percent / 100:.3%}: too small")
        assert error.smallest_bytes == smallest_budget(dense)
        return
    with atlas:
        cache.walk(atlas, 2)
        streamed = atlas.plan.n_frames - atlas.shape.n_high
        assert streamed == round(percent / 100 * atlas.shape.n_scheduled)
        assert target.peak_bytes <= atlas.budget_bytes


def test_exactly_the_smallest_budget_works(target: Target, dense: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        Atlas.open(dense, "1", target)
    smallest = caught.value.smallest_bytes
    assert f"the smallest that works is {smallest} bytes" in str(caught.value)
    assert target.is_cuda != (smallest == smallest_budget(dense))
    with pytest.raises(BudgetError) as caught:
        Atlas.open(dense, str(smallest - 1), target)
    assert caught.value.smallest_bytes == smallest
    fresh = type(target)()
    with Atlas.open(dense, str(smallest), fresh) as atlas:
        for tensor in ("blk.0.attn_q.weight", "output.weight"):
            for band in atlas.bands(atlas.matrix(tensor)):
                atlas.acquire(band)
        assert fresh.peak_bytes <= smallest


def source_values(map_path: Path, name: str, index: int = 0) -> np.ndarray:
    """A slice of a tensor as the gguf package dequantises it from the source file."""
    with ShardedModel(map_path) as model:
        tensor = next(t for t in model.map.tensors if t.name == name)
        data = (map_path.parent / model.map.source[0].name).read_bytes()
    start = tensor.offset + index * tensor.slice_bytes
    raw = np.frombuffer(data[start : start + tensor.slice_bytes], np.uint8)
    return dequantize(raw, tensor.ggml_type).reshape(-1, tensor.shape[0])


@pytest.mark.parametrize("budget", ["100%", "smallest"])
def test_tensors_are_those_of_the_source(target: Target, small: Path, budget: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Atlas.open(small, "1", target)
    size = budget if budget == "100%" else str(caught.value.smallest_bytes)
    with Atlas.open(small, size, target, policy="lru") as atlas:
        for tensor in atlas.map.tensors:
            for index in range(len(tensor.slices)):
                values = atlas.target.get(atlas.tensor(tensor.name, index))
                assert values.dtype == np.float32
                expected = source_values(small, tensor.name, index)
                np.testing.assert_array_equal(values, expected, tensor.name)


def test_tensors_of_several_bands_are_those_of_the_source(target: Target, dense: Path) -> None:
    with Atlas.open(dense, "25%", target, policy="lru") as atlas:
        for name in ("blk.0.ffn_down.weight", "output.weight"):
            assert len(atlas.bands(atlas.matrix(name))) > 1
            values = target.get(atlas.tensor(name))
            np.testing.assert_array_equal(values, source_values(dense, name))


@pytest.mark.parametrize("at_once", [1, 20_000, 8 << 20])
def test_rows_are_looked_up_past_the_cache(
    small: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("atlas.host_store._ROWS_BYTES", at_once)
    with Atlas.open(small, "100%", CpuTarget()) as atlas:
        before = atlas.stats.copy()
        expected = source_values(small, "token_embd.weight")
        w = atlas.matrix("token_embd.weight")
        for numbers in ([], [0], [129, 0, 0, 64, 128], range(130)):
            rows = atlas.rows(w, numbers)
            assert rows.dtype == np.float32
            np.testing.assert_array_equal(rows, expected[list(numbers)])
        added = atlas.stats.since(before)
        assert added.accesses == added.bytes_moved == 0 < added.pages_checked
        for number in (-1, 130):
            with pytest.raises(GGUFShardError, match=f"'token_embd.weight': row {number} of 130"):
                atlas.rows(w, [number])
        with pytest.raises(GGUFShardError, match=r"'token_embd.weight': its pages are not cached"):
            atlas.bands(w)


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("blk.7.attn_q.weight", 0, "the model has none of this name"),
        ("unknown.weight", 0, "the model has none of this name"),
        ("blk.0.ffn_gate_exps.weight", 2, "slice 2 of 2"),
        ("blk.0.ffn_gate_exps.weight", -1, "slice -1 of 2"),
        ("output.weight", 1, "slice 1 of 1"),
    ],
)
def test_what_the_model_lacks_is_refused(small: Path, name: str, index: int, message: str) -> None:
    with Atlas.open(small, "100%", CpuTarget()) as atlas:
        for ask in (atlas.matrix, atlas.tensor):
            with pytest.raises(GGUFShardError, match=f"^tensor '{name}': {message}$"):
                ask(name, index)


def test_a_type_that_nobody_dequantises_is_refused(tmp_path: Path) -> None:
    tensors = [
        factory.tensor("token_embd.weight", KINDS.I32, (8, 4)),
        factory.tensor("output.weight", KINDS.I32, (8, 4)),
    ]
    with Atlas.open(cache.shard(tmp_path, factory.gguf(tensors)), "100%", CpuTarget()) as atlas:
        for tensor in tensors:
            with pytest.raises(GGUFShardError, match=f"{tensor.name}.*I32"):
                atlas.tensor(str(tensor.name))
        cache.assert_at_rest(atlas)


def test_a_tensor_outside_the_order_is_read_past_the_cache(dense: Path) -> None:
    # attn_q ends in the shard in which ffn_down begins: that one is cached in part.
    with Atlas.open(dense, "100%", CpuTarget(), order=["blk.0.attn_q.weight"]) as atlas:
        for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "output.weight"):
            np.testing.assert_array_equal(atlas.tensor(name), source_values(dense, name))
        cache.assert_at_rest(atlas)
    with pytest.raises(GGUFShardError, match="tensor 'nonsense': the model has none of this name"):
        Atlas.open(dense, "100%", CpuTarget(), order=["nonsense"])


def one_layer(*names: str) -> bytes:
    return factory.gguf([factory.tensor(name, KINDS.Q8_0, (64, 20), 3) for name in names])


ODD_MODELS = {
    "one shard": one_layer("output.weight"),
    "high zone only": factory.gguf([factory.tensor("output_norm.weight", KINDS.F32, (3000,))]),
    "looked up only": one_layer("token_embd.weight"),
    "experts only": factory.gguf(
        [factory.tensor("blk.0.ffn_up_exps.weight", KINDS.F16, (8, 4, 3))]
    ),
    "no tensors": factory.gguf(),
}


@pytest.mark.parametrize("policy", ["lru", "mru", "pin"])
@pytest.mark.parametrize("kind", list(ODD_MODELS))
def test_odd_models(target: Target, tmp_path: Path, kind: str, policy: str) -> None:
    map_path = cache.shard(tmp_path, ODD_MODELS[kind], pages_per_shard=1)
    with Atlas.open(map_path, "100%", target, policy=policy, prefetch_distance=8) as atlas:
        cache.walk(atlas, 2)
        for tensor in atlas.map.tensors:
            for index in range(len(tensor.slices)):
                np.testing.assert_array_equal(
                    target.get(atlas.tensor(tensor.name, index)),
                    source_values(map_path, tensor.name, index),
                )
        cache.assert_at_rest(atlas)
        assert atlas.stats.bytes_moved == atlas.shape.n_shards * 4096


def test_close_stops_the_thread(dense: Path) -> None:
    before = set(threading.enumerate())
    atlas = Atlas.open(dense, "50%", CpuTarget(), prefetch_distance=4)
    started = set(threading.enumerate()) - before
    assert [thread.name for thread in started] == ["atlas-prefetch"]
    cache.walk(atlas)
    atlas.close()
    assert not started & set(threading.enumerate())
    atlas.close()  # once more is no error
    with pytest.raises(ValueError, match="closed file"):
        atlas.model.core.read_pages(0, np.empty((1, 4096), np.uint8))


def test_no_thread_without_anything_to_read_ahead(dense: Path) -> None:
    before = threading.active_count()
    with Atlas.open(dense, "50%", CpuTarget(), prefetch_distance=0):
        assert threading.active_count() == before


def test_defaults_are_those_of_the_map(tmp_path: Path) -> None:
    map_path = cache.shard(
        tmp_path, cache.dense_model(), pages_per_shard=1, cache_policy="mru", prefetch_distance=1
    )
    with Atlas.open(map_path, "50%", CpuTarget()) as atlas:
        assert (atlas.plan.policy, atlas.plan.distance) == ("mru", 1)


@pytest.mark.parametrize("name", ["atlas", "atlas.Atlas"])
def test_importing_is_quick_and_needs_no_driver(name: str) -> None:
    code = (
        "import sys, time; started = time.perf_counter(); import atlas; "
        "print(time.perf_counter() - started, 'numba' in sys.modules, 'numba.cuda' in sys.modules)"
    )
    if name == "atlas.Atlas":
        code = "from atlas import Atlas, BudgetError, select_target; print(0, False, False)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parents[2], env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    seconds, *loaded = run.stdout.split()
    assert float(seconds) < 0.5
    assert loaded == ["False", "False"]


def test_unknown_names_of_the_package() -> None:
    import atlas as package

    assert package.Atlas is Atlas
    with pytest.raises(AttributeError, match="module 'atlas' has no attribute 'Atlantis'"):
        _ = package.Atlantis


def test_stats_are_plain_data() -> None:
    early = CacheStats(reuse_hits=1, demand_misses=2, wait_seconds=0.5)
    late = dataclasses.replace(early, reuse_hits=5, prefetch_hits=3, wait_seconds=0.75)
    assert late.accesses == 10
    assert late.since(early) == CacheStats(reuse_hits=4, prefetch_hits=3, wait_seconds=0.25)
    copy = late.copy()
    late.reuse_hits += 1
    assert copy.reuse_hits == 5
