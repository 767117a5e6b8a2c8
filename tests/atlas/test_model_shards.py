"""Which shards a pass reads, and bands of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from atlas.model_shards import ModelShards
from atlas.ops.paged import PagedMatrix
from experiments.validation import gguf_factory as factory
from forge.block_layouts import block_layout
from forge.errors import GGUFShardError
from forge.sgmap import ShardMap
from forge.sgmap_reader import load_map
from tests import cache_factory as cache

KINDS = GGMLQuantizationType


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ShardMap:
    folder = tmp_path_factory.mktemp("small")
    return load_map(cache.shard(folder, factory.small_model(), pages_per_shard=2))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ShardMap:
    folder = tmp_path_factory.mktemp("dense")
    return load_map(cache.shard(folder, cache.dense_model(2), pages_per_shard=2))


def pages_of(shard_map: ShardMap, name: str) -> list[int]:
    """Pages of a tensor, by the map."""
    tensor = next(t for t in shard_map.tensors if t.name == name)
    return [page for s in tensor.slices for page in range(s.first_page, s.first_page + s.pages)]


def shards_of(shard_map: ShardMap, name: str) -> list[int]:
    per_shard = shard_map.pages_per_shard
    return list(dict.fromkeys(page // per_shard for page in pages_of(shard_map, name)))


def test_zones_and_experts_are_told_apart(small: ShardMap) -> None:
    shards = ModelShards(small)
    assert shards.high == shards_of(small, "blk.0.attn_norm.weight")
    layers = shards_of(small, "blk.0.attn_q.weight") + shards_of(small, "output.weight")
    assert shards.schedule == list(dict.fromkeys(layers))
    assert shards.unscheduled == shards_of(small, "blk.0.ffn_gate_exps.weight")
    looked_up = set(shards_of(small, "token_embd.weight"))
    assert not looked_up & {*shards.high, *shards.schedule, *shards.unscheduled}
    shape = shards.shape()
    assert (shape.n_high, shape.n_scheduled, shape.n_unscheduled) == (
        len(shards.high), len(shards.schedule), len(shards.unscheduled),
    )  # fmt: skip


def test_a_tied_embedding_is_scheduled(tmp_path: Path) -> None:
    tensors = [
        factory.tensor("blk.0.attn_q.weight", KINDS.F16, (64, 90)),
        factory.tensor("token_embd.weight", KINDS.F16, (64, 90)),
    ]
    shard_map = load_map(cache.shard(tmp_path, factory.gguf(tensors), pages_per_shard=1))
    expected = shards_of(shard_map, "blk.0.attn_q.weight") + shards_of(
        shard_map, "token_embd.weight"
    )
    assert ModelShards(shard_map).schedule == expected


def test_a_given_order_is_kept_and_names_each_shard_once(dense: ShardMap) -> None:
    order = ["output.weight", "blk.0.ffn_down.weight", "blk.0.attn_q.weight"]
    shards = ModelShards(dense, order)
    expected = [s for name in order for s in shards_of(dense, name)]
    assert shards.schedule == list(dict.fromkeys(expected))
    assert len(set(expected)) < len(expected)
    assert shards.unscheduled == []


def test_slices_of_experts_are_matrices_of_their_own(small: ShardMap) -> None:
    shards = ModelShards(small)
    name = "blk.0.ffn_gate_exps.weight"
    for index in range(2):
        w = shards.matrix(name, index)
        assert (w.n_rows, w.n_cols) == (4, 32)
        assert w.first_page % small.pages_per_shard == 0
        assert w.first_page in pages_of(small, name)
    with pytest.raises(GGUFShardError, match=f"tensor '{name}': slice 2 of 2"):
        shards.matrix(name, 2)


def test_what_one_row_spans_must_fit(tmp_path: Path) -> None:
    wide = factory.tensor("output.weight", KINDS.F32, (5 * 1022, 3))
    shard_map = load_map(cache.shard(tmp_path, factory.gguf([wide]), pages_per_shard=2))
    shards = ModelShards(shard_map)
    spans = [
        len({page // 2 for page in shards.matrix("output.weight").pages_of_rows(i, i + 1)})
        for i in range(3)
    ]
    assert max(spans) == 3 <= shards.shape().min_band <= 4


@given(
    n_rows=st.integers(1, 60),
    blocks_per_row=st.integers(1, 700),
    first_page=st.integers(0, 9),
    kind=st.sampled_from([KINDS.F16, KINDS.Q8_0, KINDS.Q6_K]),
    extra=st.integers(0, 6),
)
def test_bands_cover_all_rows_and_are_as_long_as_they_may(
    dense: ShardMap, n_rows: int, blocks_per_row: int, first_page: int,
    kind: GGMLQuantizationType, extra: int,
) -> None:  # fmt: skip
    layout = block_layout(kind, "column_major")
    w = PagedMatrix("w", n_rows, blocks_per_row * layout.elements, first_page, layout)

    def shards(begin: int, end: int) -> range:
        first, last = begin * blocks_per_row, end * blocks_per_row - 1
        page, last_page = (
            first_page + first // layout.per_page,
            first_page + last // layout.per_page,
        )
        return range(page // 2, last_page // 2 + 1)

    widest = max(len(shards(row, row + 1)) for row in range(n_rows))
    longest = widest + extra
    begin = 0
    for band in ModelShards(dense).cut(w, longest):
        assert band.begin == begin < band.end
        used = shards(band.begin, band.end)
        assert (band.first_shard, band.last_shard) == (used[0], used[-1])
        assert len(used) <= longest
        assert band.end == n_rows or len(shards(band.begin, band.end + 1)) > longest
        begin = band.end
    assert begin == n_rows


def test_unknown_names_are_refused(dense: ShardMap) -> None:
    message = "^tensor 'nonsense': the model has none of this name$"
    with pytest.raises(GGUFShardError, match=message):
        ModelShards(dense, ["nonsense"])
    with pytest.raises(GGUFShardError, match=message):
        ModelShards(dense).matrix("nonsense")
