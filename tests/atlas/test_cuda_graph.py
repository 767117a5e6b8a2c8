"""Graphs: captured passes do what passes do, and are captured only when they can be.

On a GPU these are real graphs; in the simulator launches are recorded and repeated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numba import types

from atlas.cuda_graph import CudaGraph, GraphUnavailableError
from atlas.infer.generate import generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.ops.kernel import kernel
from atlas.target import CpuTarget, CudaTarget, Target
from forge.sharded_model import ShardedModel
from forge.sizes import Size
from tests.llama_factory import LlamaShape, shard_llama

pytestmark = pytest.mark.cuda

TINY = LlamaShape(n_layer=1, n_embd=32, n_ff=32, n_head=2, n_head_kv=1, n_vocab=40)


@kernel(types.float32[::1], types.float32)
def count_kernel(x, step):
    x[0] += step


def test_nothing_runs_while_it_is_captured_and_all_of_it_when_it_is_launched() -> None:
    target = CudaTarget()
    x = target.full(1, 1, np.float32)

    def work() -> None:
        count_kernel.launch(target, 1, 1, x, 0.5)
        count_kernel.launch(target, 1, 1, x, 2.0)

    work()
    assert target.get(x)[0] == 3.5
    graph = CudaGraph(target, work)
    assert target.get(x)[0] == 3.5
    graph.launch()
    graph.launch()
    assert target.get(x)[0] == 8.5


def test_a_graph_keeps_the_arguments_that_it_was_captured_with() -> None:
    target = CudaTarget()
    x, y = (target.full(1, 0, np.float32) for _ in range(2))
    count_kernel.launch(target, 1, 1, x, 1.0)
    graph = CudaGraph(target, lambda: count_kernel.launch(target, 1, 1, x, 8.0))
    count_kernel.launch(target, 1, 1, y, 64.0)
    graph.launch()
    assert (target.get(x)[0], target.get(y)[0]) == (9, 64)


def test_what_cannot_be_captured_is_launched_one_by_one() -> None:
    target = CudaTarget()
    x = target.full(1, 0, np.float32)

    def work() -> None:
        count_kernel.launch(target, 1, 1, x, 1.0)
        raise RuntimeError("not while it is captured")

    with pytest.raises(GraphUnavailableError, match="capture failed: not while it is captured"):
        CudaGraph(target, work)
    count_kernel.launch(target, 1, 1, x, 1.0)
    assert target.get(x)[0] == 1


def run(
    map_path: Path, target: Target, budget: float, n_tokens: int = 4
) -> tuple[list[int], LlamaModel, int]:
    """Tokens, the closed model, and the shards that decoding found resident."""
    with LlamaModel(
        ShardedModel(map_path), target, Size(fraction=budget), n_context=16, policy="pin"
    ) as model:
        result = generate(model, [1, 2, 3], n_tokens, Sampler(temperature=0))
        return result.tokens, model, result.decode_stats.reuse_hits


def test_passes_are_replayed_once_everything_is_resident(tmp_path: Path) -> None:
    _, map_path = shard_llama(tmp_path, TINY, per_shard=1)
    expected, _, hits = run(map_path, CpuTarget(), 1.0)
    target = CudaTarget()
    tokens, model, replayed_hits = run(map_path, target, 1.0)
    assert tokens == expected
    assert model.decode_graph is not None and model.decode_graph.reason == ""
    assert replayed_hits == hits  # replayed uses are counted like the others
    n_launches = target.n_launches
    target = CudaTarget()
    tokens, model, _ = run(map_path, target, 0.5)
    assert tokens == expected
    assert model.decode_graph is not None and model.decode_graph.reason != ""
    assert n_launches < target.n_launches
