"""Order of execution, device memory of vectors, products band by band."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas.errors import BudgetError
from atlas.infer.config import LlamaConfig
from atlas.infer.weights import Weights, execution_order, vector_bytes
from atlas.manager import Atlas
from atlas.target import CpuTarget, CudaTarget
from forge.errors import GGUFShardError
from forge.sgmap_reader import load_map
from forge.sharded_model import ShardedModel
from forge.sizes import parse_size
from tests.llama_factory import LlamaShape, Types, shard_llama
from tests.naive_llama import NaiveLlama

DENSE = LlamaShape(n_layer=1, biases=("attn_k",), ggml_type=Types.F16, rope_factors=True)
MIXTURE = LlamaShape(n_layer=1, n_expert=4, n_expert_used=2)


def config_of(map_path: Path) -> LlamaConfig:
    with ShardedModel(map_path) as model:
        return LlamaConfig.from_metadata(model.source_header().metadata)


def order_of(folder: Path, shape: LlamaShape) -> list[str]:
    _, map_path = shard_llama(folder, shape)
    return execution_order(load_map(map_path), config_of(map_path))


def test_execution_order(tmp_path: Path) -> None:
    attention = [f"blk.0.{stem}.weight" for stem in ("attn_q", "attn_k", "attn_v", "attn_output")]
    feed_forward = [f"blk.0.{stem}.weight" for stem in ("ffn_gate", "ffn_up", "ffn_down")]
    assert order_of(tmp_path / "dense", DENSE) == [*attention, *feed_forward, "output.weight"]
    tied = order_of(tmp_path / "tied", replace(DENSE, tied=True))
    assert tied == [*attention, *feed_forward, "token_embd.weight"]
    router = "blk.0.ffn_gate_inp.weight"
    assert order_of(tmp_path / "mixture", MIXTURE) == [*attention, router, "output.weight"]
    alone = order_of(tmp_path / "alone", replace(MIXTURE, n_expert=1, n_expert_used=1))
    experts = [f"blk.0.{stem}_exps.weight" for stem in ("ffn_gate", "ffn_up", "ffn_down")]
    assert alone == [*attention, router, *experts, "output.weight"]


def test_an_incomplete_model_has_no_order(tmp_path: Path) -> None:
    for name in ("blk.0.attn_v.weight", "token_embd.weight", "blk.0.ffn_down.weight"):
        with pytest.raises(GGUFShardError, match=f"tensor '{name}': the model has none"):
            order_of(tmp_path / name, replace(DENSE, shapes={name: None}))


def test_vector_bytes(tmp_path: Path) -> None:
    """Three norms, a bias, the factors of the rotation; 4 bytes an element whatever the type."""
    types = {"output_norm.weight": Types.F16}
    _, map_path = shard_llama(tmp_path, replace(DENSE, types=types))
    assert vector_bytes(load_map(map_path)) == 4 * (3 * 64 + 32 + 8)


@pytest.fixture(params=["all", "smallest"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Weights, NaiveLlama]]:
    """Everything resident, or as little as works."""
    path, map_path = shard_llama(tmp_path, DENSE)
    config, target = config_of(map_path), CpuTarget()
    order = execution_order(load_map(map_path), config)

    def opened(budget: str) -> Atlas:
        return Atlas(ShardedModel(map_path), target, parse_size(budget), order=order)

    budget = "100%"
    if request.param == "smallest":
        with pytest.raises(BudgetError) as caught:
            opened("1")
        budget = str(caught.value.smallest_bytes)
    with opened(budget) as atlas:
        yield Weights(atlas, config, target.full(1 << 12, np.nan, np.float32)), NaiveLlama(path)


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
def test_products(weights: tuple[Weights, NaiveLlama], n_tokens: int) -> None:
    of_pages, naive = weights
    rng = np.random.default_rng(n_tokens)
    for stem, w in (("ffn_up", of_pages.layers[0]["ffn_up"]), ("output", of_pages.output)):
        name = "output.weight" if stem == "output" else f"blk.0.{stem}.weight"
        x = rng.standard_normal((n_tokens, w.n_cols), dtype=np.float32)
        y = np.full((n_tokens, w.n_rows), np.nan, np.float32)
        of_pages.multiply(y, w, x)
        want = x.astype(np.float64) @ naive.tensors[name].T
        np.testing.assert_allclose(y, want, atol=1e-5)


QKV = ("attn_q", "attn_k", "attn_v")


@pytest.mark.parametrize(
    ("budget", "types", "n_launches"),
    [
        pytest.param("100%", {}, 1, id="resident"),
        pytest.param("100%", {"blk.0.attn_v.weight": Types.F32}, 3, id="of two types"),
        pytest.param("60%", {}, None, id="within a budget"),
    ],
)
def test_matrices_with_one_x_are_one_launch_where_all_is_resident(
    cuda_target: CudaTarget,
    tmp_path: Path,
    budget: str,
    types: dict[str, Types],
    n_launches: int | None,
) -> None:
    path, map_path = shard_llama(tmp_path, replace(DENSE, types=types))
    config, order = config_of(map_path), execution_order(load_map(map_path), config_of(map_path))
    naive = NaiveLlama(path)
    rng = np.random.default_rng(0)
    with Atlas(ShardedModel(map_path), cuda_target, parse_size(budget), order=order) as atlas:
        weights = Weights(atlas, config, cuda_target.full(1 << 12, np.nan, np.float32))
        matrices = [weights.layers[0][stem] for stem in QKV]
        x = rng.standard_normal((1, config.n_embd), dtype=np.float32)
        device_x = cuda_target.put(x)

        def products(multiply: Callable[[list[Any]], None]) -> tuple[list[np.ndarray], int, int]:
            """The products, the kernels launched for them, and the shards found resident."""
            ys = [cuda_target.full((1, w.n_rows), np.nan, np.float32) for w in matrices]
            weights.multiply(ys[0], matrices[0], device_x)  # of which the last band is in use
            hits, launched = atlas.stats.reuse_hits, cuda_target.n_launches
            multiply(ys)
            launched = cuda_target.n_launches - launched
            return [cuda_target.get(y) for y in ys], launched, atlas.stats.reuse_hits - hits

        def one_by_one(ys: list[Any]) -> None:
            for y, w in zip(ys, matrices, strict=True):
                weights.multiply(y, w, device_x)

        together, n_together, hits = products(
            lambda ys: weights.multiply_all(ys, matrices, device_x)
        )
        apart, n_apart, hits_apart = products(one_by_one)
        for stem, y, other in zip(QKV, together, apart, strict=True):
            want = x.astype(np.float64) @ naive.tensors[f"blk.0.{stem}.weight"].T
            np.testing.assert_allclose(y, want, atol=1e-5)
            np.testing.assert_array_equal(y, other)
    if n_launches is None:
        assert n_together >= 3
    else:
        assert (n_together, n_apart, hits) == (n_launches, 3, hits_apart)


def test_rows_and_vectors(weights: tuple[Weights, NaiveLlama]) -> None:
    of_pages, naive = weights
    tokens = [95, 0, 40, 40]
    np.testing.assert_array_equal(
        of_pages.embed(tokens), naive.tensors["token_embd.weight"][tokens]
    )
    layer = of_pages.layers[0]
    np.testing.assert_array_equal(layer["attn_norm"], naive.tensors["blk.0.attn_norm.weight"])
    np.testing.assert_array_equal(layer["attn_k.bias"], naive.tensors["blk.0.attn_k.bias"])
    factors = of_pages.rope_factors()
    assert factors is not None
    np.testing.assert_array_equal(factors, naive.tensors["rope_freqs.weight"])
    assert of_pages.n_vocab == 96


def test_vectors_are_read_again_where_they_are(weights: tuple[Weights, NaiveLlama]) -> None:
    of_pages, naive = weights
    target, layer = of_pages.atlas.target, of_pages.layers[0]
    vectors = {
        "blk.0.attn_norm.weight": layer["attn_norm"],
        "blk.0.ffn_norm.weight": layer["ffn_norm"],
        "blk.0.attn_k.bias": layer["attn_k.bias"],
        "output_norm.weight": of_pages.output_norm,
    }
    for vector in vectors.values():
        vector[:] = np.nan
    target.peak_bytes = target.allocated_bytes
    of_pages.read_vectors_again()
    for name, vector in vectors.items():
        np.testing.assert_array_equal(vector, naive.tensors[name])
    assert target.peak_bytes == target.allocated_bytes


def test_absurd_hyperparameters_have_no_order(tmp_path: Path) -> None:
    """Nothing of the size that they claim is made."""
    _, path = shard_llama(tmp_path, LlamaShape())
    with ShardedModel(path) as model:
        config = LlamaConfig.from_metadata(model.source_header().metadata)
        for field, says in (("n_layer", "blk.2.attn_q.weight"), ("n_embd", "token_embd.weight"),
                            ("n_ff", "blk.0.ffn_down.weight")):  # fmt: skip
            with pytest.raises(GGUFShardError, match=says):
                execution_order(model.map, replace(config, **{field: 1 << 30}))
