"""Whole models against what llama.cpp recorded for them: greedy tokens and logits.

A `.deq` record was made from the file's weights dequantised to float32, because llama.cpp rounds
activations when it multiplies by quantised weights and this project does not.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas.infer.generate import generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.target import CpuTarget, CudaTarget, Target
from forge.gguf_file import read_gguf
from forge.shard import shard_model
from forge.sharded_model import ShardedModel
from forge.sizes import parse_size

# Below this distance of the two best logits, rounding decides.
_NARROW_MARGIN = 5e-3

FILES = (
    "stories260K-f32",
    "stories260K-f16",
    "stories260K-ft-last2-f16",
    "stories260K-Q8_0.deq",
    "stories260K-Q4_0.deq",
    "stories260K-Q4_K_M.deq",
    "tales7M-f16",
    "tales7M-ft-last2-f16",
    "tales7M-Q8_0.deq",
    "tales7M-Q4_0.deq",
    "tales7M-Q4_K_M.deq",
    "talesMoE-f16",
    "talesMoE-Q4_K_M.deq",
)
# Files whose small budgets are run as well; each is of another kind.
STREAMED = (
    "stories260K-f32", "stories260K-f16", "stories260K-Q8_0.deq", "stories260K-Q4_0.deq",
    "tales7M-f16", "tales7M-Q8_0.deq", "tales7M-Q4_0.deq", "tales7M-Q4_K_M.deq", "talesMoE-f16",
)  # fmt: skip

Record = dict[str, Any]


@pytest.fixture(scope="module")
def sharded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The map of a model file, cut once."""
    maps: dict[str, Path] = {}

    def cut(name: str) -> Path:
        stem = name.removesuffix(".deq")
        if stem not in maps:
            if not (models / f"{stem}.gguf").exists():
                pytest.skip(f"no {stem}.gguf in {models}")
            folder = tmp_path_factory.mktemp(stem)
            maps[stem] = shard_model(models / f"{stem}.gguf", folder)
        return maps[stem]

    return cut


def records(reference: Path, name: str) -> list[Record]:
    runs: list[Record] = json.loads((reference / f"{name}.json").read_text())["runs"]
    assert len(runs) == 3
    return runs


def is_as_recorded(tokens: list[int], run: Record, narrow: float = _NARROW_MARGIN) -> bool:
    """Whether greedy tokens are the recorded ones, up to where rounding could decide."""
    margins = run["margins"][: len(tokens)]
    certain = next((i for i, m in enumerate(margins) if m < narrow), len(tokens))
    return tokens[:certain] == run["greedy_ids"][:certain]


def opened(
    map_path: Path, budget: str, policy: str, n_context: int, target: Target | None = None
) -> LlamaModel:
    return LlamaModel(
        ShardedModel(map_path), target or CpuTarget(), parse_size(budget), n_context=n_context,
        policy=policy,
    )  # fmt: skip


def check(
    map_path: Path, reference: Path, name: str, budget: str, policy: str, run: Record, n: int
) -> None:
    prompt = run["prompt_ids"]
    with opened(map_path, budget, policy, len(prompt) + n) as model:
        result = generate(model, prompt, n, Sampler(0))
        assert model.target.peak_bytes <= model.atlas.budget_bytes
    want = np.load(reference / run["logits_file"])
    bound = 1e-3 if name.endswith("-f32") else 5e-3 * np.abs(want).max()
    assert np.abs(result.prompt_logits - want).max() <= bound
    assert len(result.tokens) == n
    assert is_as_recorded(result.tokens, run)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("budget", ["100%", "40%"])
def test_they_are_on_a_device(
    sharded: Callable[[str], Path], reference: Path, name: str, budget: str
) -> None:
    """Prompts go through tensor cores there, whose operands have 16 bits: of the best logits, more
    must lie between them."""
    map_path = sharded(name)
    for run in records(reference, name):
        prompt, target = run["prompt_ids"], CudaTarget()
        with opened(map_path, budget, "pin", len(prompt) + 64, target) as model:
            result = generate(model, prompt, 64, Sampler(0))
            assert target.peak_bytes <= model.atlas.budget_bytes
        want = np.load(reference / run["logits_file"])
        assert np.abs(result.prompt_logits - want).max() <= 1e-2 * np.abs(want).max()
        assert is_as_recorded(result.tokens, run, narrow=0.1)


@pytest.mark.parametrize("name", FILES)
def test_tokens_and_logits_are_llama_cpps(
    sharded: Callable[[str], Path], reference: Path, name: str
) -> None:
    """Every prompt, all 64 tokens, with everything resident."""
    for run in records(reference, name):
        check(sharded(name), reference, name, "100%", "auto", run, 64)


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("policy", ["lru", "pin"])
@pytest.mark.parametrize("budget", ["60%", "30%"])
def test_they_are_at_small_budgets(
    sharded: Callable[[str], Path], reference: Path, name: str, policy: str, budget: str
) -> None:
    check(sharded(name), reference, name, budget, policy, records(reference, name)[0], 12)


def test_records_leave_enough_to_compare(reference: Path) -> None:
    """Narrow margins must not empty the tests above."""
    certain = [
        min(i for i, m in enumerate([*run["margins"], 0.0]) if m < _NARROW_MARGIN)
        for name in FILES
        for run in records(reference, name)
    ]
    assert np.mean(certain) > 55
    for name in STREAMED:
        assert min(records(reference, name)[0]["margins"][:12]) >= _NARROW_MARGIN


def test_one_changed_page_changes_the_tokens(models: Path, reference: Path, tmp_path: Path) -> None:
    """A page of other weights under right checksums: nothing objects, and the tokens differ."""
    source = models / "stories260K-f32.gguf"
    data = bytearray(source.read_bytes())
    tensor = next(t for t in read_gguf(source).tensors if t.name == "blk.0.attn_v.weight")
    values = np.frombuffer(data, "<f4", 1022, tensor.offset)  # the floats of one page
    data[tensor.offset : tensor.offset + 4088] = struct.pack("<1022f", *(-3 * values))
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(data)
    map_path = shard_model(changed, tmp_path / "sharded")
    run = records(reference, "stories260K-f32")[0]
    with opened(map_path, "60%", "pin", 40) as model:
        result = generate(model, run["prompt_ids"], 16, Sampler(0))
    assert not is_as_recorded(result.tokens, run)
