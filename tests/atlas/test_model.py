"""The forward pass on cached pages against the naive one, at every budget and policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numba import config

from atlas.errors import BudgetError
from atlas.infer.activations import Activations
from atlas.infer.generate import generate
from atlas.infer.model import LlamaModel, route
from atlas.infer.sampling import Sampler
from atlas.ops.round_tokens import GROUP, words_of_group
from atlas.target import Target
from forge import page_plan
from forge.errors import GGUFShardError
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.sizes import Size
from tests.llama_factory import LlamaShape, Types, opened, shard_llama, smallest_budget
from tests.naive_llama import NaiveLlama

needs_compiler = pytest.mark.skipif(
    bool(config.DISABLE_JIT), reason="takes minutes without a compiler"
)
PROMPT = [1, 5, 9, 70, 3, 44, 21]
DENSE = LlamaShape()
WIDE = LlamaShape(n_layer=1, n_embd=256, n_ff=256)  # rows of the K types are 256 wide
EXPERTS = LlamaShape(n_ff=64, n_expert=4, n_expert_used=2)
SHAPES = {
    **{
        f"dense {kind.name}": replace(WIDE if "_K" in kind.name else DENSE, ggml_type=kind)
        for kind in (
            Types.F32, Types.F16, Types.BF16, Types.Q8_0, Types.Q4_0, Types.Q5_0,
            Types.Q4_K, Types.Q5_K, Types.Q6_K,
        )
    },
    "experts F32": EXPERTS,
    "experts Q8_0": replace(EXPERTS, ggml_type=Types.Q8_0),
    "experts Q4_K": replace(WIDE, ggml_type=Types.Q4_K, n_expert=3, n_expert_used=2),
    "all experts used": replace(EXPERTS, n_expert=2, n_expert_used=2),
    "one expert": replace(EXPERTS, n_expert=1, n_expert_used=1),
    "tied": replace(DENSE, tied=True),
    "tied experts": replace(EXPERTS, tied=True),
    "one key head a query head": replace(DENSE, n_head_kv=4),
    "one key head for all": replace(DENSE, n_head_kv=1),
    "attention biases": replace(
        DENSE, biases=("attn_q", "attn_k", "attn_v", "attn_output"),
    ),
    "feed-forward biases": replace(DENSE, biases=("ffn_gate", "ffn_up", "ffn_down")),
    "heads wider than the model": replace(DENSE, head_dim=40),
    "heads narrower than the model": replace(DENSE, head_dim=8),
    "linear scaling": replace(
        DENSE,
        metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "no scaling despite a factor": replace(
        DENSE, metadata={"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    ),
    "another base": replace(DENSE, metadata={"llama.rope.freq_base": 500.0}),
    "rope factors": replace(DENSE, rope_factors=True),
    "half of a head rotated": replace(DENSE, metadata={"llama.rope.dimension_count": 8}),
    "mixed types": replace(
        DENSE, ggml_type=Types.Q8_0, tied=False,
        types={"output.weight": Types.F16, "blk.0.ffn_down.weight": Types.BF16,
               "output_norm.weight": Types.F16, "token_embd.weight": Types.Q4_0},
    ),
    "odd sizes": LlamaShape(n_embd=60, n_ff=99, n_head=5, n_head_kv=5, head_dim=14, n_vocab=73),
}  # fmt: skip


def logits_of(model: LlamaModel, tokens: Sequence[int]) -> np.ndarray:
    return model.target.get(model.forward(tokens))


def close(got: np.ndarray, want: np.ndarray) -> bool:
    """Equal but for the rounding of float32 sums over a few hundred terms and layers."""
    return bool(np.abs(got - want).max() <= 2e-6 * np.abs(want).max())


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[NaiveLlama, Path]]:
    """Naive model and map of a shape, made once."""
    made: dict[object, tuple[NaiveLlama, Path]] = {}

    def build(name: str, memory_layout: str = "column_major") -> tuple[NaiveLlama, Path]:
        key = (name, memory_layout)
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            path, map_path = shard_llama(folder, SHAPES[name], memory_layout)
            made[key] = NaiveLlama(path), map_path
        return made[key]

    return build


# ---- against the naive forward pass ----


@needs_compiler
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_naive_forward_pass(
    built: Callable[..., tuple[NaiveLlama, Path]], name: str
) -> None:
    """Logits of the prompt and of every step behind it, and the greedy tokens."""
    naive, map_path = built(name)
    with opened(map_path, "100%") as model:
        tokens = list(PROMPT)
        logits = logits_of(model, PROMPT)
        for _ in range(6):
            assert close(logits, naive.logits(tokens)[-1])
            tokens.append(int(np.argmax(logits)))
            logits = logits_of(model, tokens[-1:])
        assert tokens[len(PROMPT) :] == naive.greedy(PROMPT, 6)
        assert model.target.peak_bytes <= model.atlas.budget_bytes


@needs_compiler
@pytest.mark.parametrize("name", ["dense F32", "dense Q8_0", "dense Q4_K", "experts F32"])
def test_row_major_pages_give_the_same(
    built: Callable[..., tuple[NaiveLlama, Path]], name: str
) -> None:
    naive, map_path = built(name, "row_major")
    assert load_map(map_path).atlas.memory_layout == "row_major"
    with opened(map_path, "60%") as model:
        assert close(logits_of(model, PROMPT), naive.logits(PROMPT)[-1])


@needs_compiler
@pytest.mark.parametrize("name", ["dense F16", "dense Q4_0", "experts Q8_0", "attention biases"])
@pytest.mark.parametrize("n_batch", [1, 2, 3, 7, 64])
def test_batches_of_any_size_agree(
    built: Callable[..., tuple[NaiveLlama, Path]], name: str, n_batch: int
) -> None:
    """The prompt in one pass, token by token, in passes that leave a remainder."""
    naive, map_path = built(name)
    want = naive.logits(PROMPT)[-1]
    with opened(map_path, n_batch=n_batch) as model:
        assert close(logits_of(model, PROMPT), want)
        assert model.n_passes == -(-len(PROMPT) // n_batch)
        assert model.position == len(PROMPT)


@needs_compiler
def test_a_prompt_in_parts_continues_where_it_stood(
    built: Callable[..., tuple[NaiveLlama, Path]],
) -> None:
    naive, map_path = built("dense F32")
    with opened(map_path) as model:
        assert model.forward(PROMPT[:3], want_logits=False) is None
        assert close(logits_of(model, PROMPT[3:]), naive.logits(PROMPT)[-1])


def test_route_weighs_the_best_experts_by_softmax() -> None:
    logits = np.array([[0.0, 2.0, 1.0, 2.0], [-1e4, 1e4, -1e4, -1e4]], np.float32)
    chosen, shares = route(logits, 2)
    assert chosen.tolist() == [[1, 3], [1, 0]]  # of equals the first
    np.testing.assert_allclose(shares, np.array([[0.5, 0.5], [1.0, 0.0]]), atol=1e-7)
    chosen, shares = route(logits[:1], 3)
    powers = np.exp([2.0, 2.0, 1.0])
    assert chosen.tolist() == [[1, 3, 2]]
    np.testing.assert_allclose(shares[0], powers / powers.sum(), rtol=1e-6)


# ---- the same bits at every budget ----


def _run(model: LlamaModel, n_tokens: int = 4) -> list[bytes]:
    """Bits of the logits of the prompt and of each of `n_tokens` greedy steps."""
    logits = [logits_of(model, PROMPT)]
    for _ in range(n_tokens):
        logits.append(logits_of(model, [int(np.argmax(logits[-1]))]))
    return [row.tobytes() for row in logits]


@pytest.mark.no_cover
@needs_compiler
@pytest.mark.parametrize(
    "name", ["dense F32", "dense Q4_0", "dense Q4_K", "experts F32", "tied", "attention biases"]
)
def test_bitwise_equal_at_every_budget_and_policy(
    built: Callable[..., tuple[NaiveLlama, Path]], name: str
) -> None:
    _, map_path = built(name)
    with opened(map_path) as model:
        want = _run(model)
    smallest = Size(n_bytes=smallest_budget(map_path))
    for policy in ("lru", "mru", "pin", "auto"):
        for budget in (smallest, "30%", "60%"):
            with opened(map_path, budget, policy=policy) as model:
                assert _run(model) == want, (policy, budget)
                assert model.target.peak_bytes <= model.atlas.budget_bytes, (policy, budget)
    for distance in (0, 1, 64):
        with opened(map_path, "60%", policy="pin", prefetch_distance=distance) as model:
            assert _run(model) == want, distance


@needs_compiler
def test_shards_of_many_pages_give_the_same_bits(tmp_path: Path) -> None:
    path, map_path = shard_llama(tmp_path, replace(EXPERTS, n_vocab=300), per_shard=1)
    with opened(map_path) as model:
        want = _run(model)
    wider = shard_model(path, tmp_path / "wider", ShardOptions(pages_per_shard=8))
    for budget in (Size(n_bytes=smallest_budget(wider)), "70%", "100%"):
        with opened(wider, budget) as model:
            assert _run(model) == want


@needs_compiler
def test_large_vectors_and_gates_outside_the_high_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Router gates of large mixtures are streamed like any other matrix."""
    monkeypatch.setattr(page_plan, "_MAX_HIGH_BYTES", 100)
    path, map_path = shard_llama(tmp_path, replace(EXPERTS, biases=("attn_q",)))
    assert {s.zone for t in load_map(map_path).tensors for s in t.slices} == {"normal", "cold"}
    want = NaiveLlama(path).logits(PROMPT)[-1]
    for budget in ("100%", "50%", Size(n_bytes=smallest_budget(map_path))):
        with opened(map_path, budget) as model:
            assert close(logits_of(model, PROMPT), want), budget


# ---- what may not be asked ----


@needs_compiler
@pytest.mark.parametrize("n_batch", [1, 16])
def test_the_smallest_budget_is_the_smallest(
    built: Callable[..., tuple[NaiveLlama, Path]], n_batch: int
) -> None:
    _, map_path = built("dense F32")
    smallest = smallest_budget(map_path, n_batch=n_batch)
    with opened(map_path, Size(n_bytes=smallest), n_batch=n_batch) as model:
        model.forward(PROMPT)
        assert model.target.peak_bytes <= model.atlas.budget_bytes == smallest
    with pytest.raises(BudgetError, match=f"smallest that works is {smallest} bytes"):
        opened(map_path, Size(n_bytes=smallest - 1), n_batch=n_batch)


def test_tokens_and_context_are_checked_before_anything_runs(
    built: Callable[..., tuple[NaiveLlama, Path]],
) -> None:
    _, map_path = built("dense F32")
    with opened(map_path, n_context=4) as model:
        for tokens, message in [
            ([], "no tokens to run: the prompt is empty"),
            ([1, 96], r"token 96: not within 0\.\.95"),
            ([-1], r"token -1: not within 0\.\.95"),
            ([1] * 5, "context of 4 is full: 0 positions are taken, 5 more wanted"),
        ]:
            with pytest.raises(GGUFShardError, match=message):
                model.forward(tokens)
        assert (model.position, model.n_passes) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": {"blk.1.attn_k.weight": None}}, "'blk.1.attn_k.weight': the model has none"),
        ({"shapes": {"blk.0.ffn_norm.weight": None}}, "'blk.0.ffn_norm.weight': the model has no"),
        ({"shapes": {"output_norm.weight": None}}, "'output_norm.weight': the model has none"),
        ({"shapes": {"token_embd.weight": None}}, "'token_embd.weight': the model has none"),
        (
            {"shapes": {"blk.0.attn_q.weight": (60, 64)}},
            r"'blk.0.attn_q.weight': has \(60, 64\) rows and columns, not \(64, 64\)",
        ),
        (
            {"shapes": {"blk.1.attn_norm.weight": (63,)}},
            r"'blk.1.attn_norm.weight': has \(1, 63\) rows and columns, not \(1, 64\)",
        ),
        (
            {"types": {"blk.1.ffn_up.weight": Types.IQ4_NL}},
            "'blk.1.ffn_up.weight': type IQ4_NL cannot be computed with",
        ),
        ({"metadata": {"general.architecture": "mamba"}}, "'mamba' cannot be run"),
        (
            {"metadata": {"llama.block_count": 3}},
            "'blk.2.attn_q.weight': the model has none of this name",
        ),
    ],
)
def test_models_that_cannot_run(
    tmp_path: Path, change: dict[str, dict[str, object]], message: str
) -> None:
    _, map_path = shard_llama(tmp_path, replace(DENSE, **change))  # type: ignore[arg-type]
    with pytest.raises(GGUFShardError, match=message):
        opened(map_path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"blk.0.ffn_up_exps.weight": (3, 64, 64)}, "3 slices, not 4"),
        ({"blk.1.ffn_down_exps.weight": None}, "'blk.1.ffn_down_exps.weight': the model has no"),
        ({"blk.1.ffn_gate_inp.weight": None}, "'blk.1.ffn_gate_inp.weight': the model has none"),
    ],
)
def test_mixtures_that_cannot_run(
    tmp_path: Path, shapes: dict[str, tuple[int, ...] | None], message: str
) -> None:
    _, map_path = shard_llama(tmp_path, replace(EXPERTS, shapes=shapes))
    with pytest.raises(GGUFShardError, match=message):
        opened(map_path)


# ---- on every target ----


# In the simulator every thread of a kernel is one of the host: each weight counts.
TINY = LlamaShape(
    n_layer=1, n_embd=16, n_ff=8, n_head=2, n_head_kv=1, n_vocab=24, ggml_type=Types.F16
)


@pytest.mark.parametrize(
    "shape",
    [
        replace(TINY, biases=("attn_q",)),
        replace(TINY, tied=True, n_expert=2, n_expert_used=1),
    ],
    ids=["dense", "experts"],
)
def test_generates_the_same_on_every_target(
    target: Target, tmp_path: Path, shape: LlamaShape
) -> None:
    """A prompt in two passes, two tokens; the pages do not all fit."""
    path, map_path = shard_llama(tmp_path, shape)
    naive, prompt = NaiveLlama(path), [1, 7, 20]
    with opened(map_path, "60%", target, n_context=8, n_batch=2) as model:
        result = generate(model, prompt, 2, Sampler(0))
        assert close(result.prompt_logits, naive.logits(prompt)[-1])
        assert result.tokens == naive.greedy(prompt, 2)
        assert result.decode_stats.bytes_moved > 0
        assert target.peak_bytes <= model.atlas.budget_bytes


def test_all_tokens_of_a_pass_have_room_rounded(tmp_path: Path) -> None:
    """Else its weights are read once for each part of them."""
    _, map_path = shard_llama(tmp_path, DENSE)
    with opened(map_path) as model:
        config, target = replace(model.config, n_ff=4096), model.target
        for n_batch in (1, 16, 17, 100):
            scratch = Activations(target, config, 128, n_batch, 10).scratch
            assert scratch.size >= -(-n_batch // GROUP) * words_of_group(4096)
