"""How small patches are: what the table of patches promises, on smaller models, and real pairs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from delta.apply import apply_patch
from delta.apply_in_place import update_in_place
from delta.diff import MAX_LEVEL, create_patch
from delta.page_grid import TENSOR, model_runs
from delta.source_model import open_source
from experiments.delta_cases import DELTA, GENERATED, write_base, write_target
from forge.shard import shard_model

_BASE = "tales7M-f16"
#: Base and target among the real models, and the most that a patch may take of the target.
_REAL_PAIRS = [
    (_BASE, "tales7M-ft-last2-f16", 0.16),
    ("stories260K-f16", "stories260K-ft-last2-f16", 0.2),
    ("stories260K-f16", "stories260K-f32", 1.0),
    (_BASE, "tales7M-Q8_0", 1.0),
    ("tales7M-Q4_0", "tales7M-Q4_K_M", 1.0),
    ("talesMoE-f16", "talesMoE-Q4_K_M", 1.0),
    ("talesMoE-Q4_K_M", _BASE, 1.0),
]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("base", "target", "share"), _REAL_PAIRS)
def test_real_pairs(models: Path, tmp_path: Path, base: str, target: str, share: float) -> None:
    old, new = (models / f"{name}.gguf" for name in (base, target))
    patch, made = tmp_path / "p", tmp_path / "made.gguf"
    create_patch(old, new, patch)
    assert patch.stat().st_size <= share * new.stat().st_size + 2000
    apply_patch(old, patch, made)
    assert sha256(made) == sha256(new)
    sharded = shard_model(old, tmp_path / "sharded")
    update_in_place(sharded, patch)
    fresh = shard_model(new, tmp_path / "fresh")
    same_tensors = "ft-last2" in target
    if same_tensors:
        for name in ("core.gguf", "core.sgmap"):
            assert sha256(sharded.with_name(name)) == sha256(fresh.with_name(name))
    apply_patch(old, patch, made, force=True)
    create_patch(sharded, fresh, patch, force=True)
    assert patch.stat().st_size < 2000  # whatever the shards are, it is the same model


def test_a_fine_tuned_pair_at_the_highest_level(models: Path, tmp_path: Path) -> None:
    old, new = models / f"{_BASE}.gguf", models / "tales7M-ft-last2-f16.gguf"
    facts = create_patch(old, new, tmp_path / "p", level=MAX_LEVEL)
    assert facts.n_bytes <= 0.153 * new.stat().st_size


@pytest.mark.parametrize(
    ("case", "share"),
    [("identical", 0.0), ("metadata", 0.0), ("edits", 5e-4), ("pages", 0.0105), ("noise", 0.32)],
)
def test_generated_pairs(tmp_path: Path, case: str, share: float) -> None:
    """4 MiB with as many edits a byte as the table's 64 MiB; 1,000 bytes beside for the rest."""
    assert case in GENERATED
    base, target = tmp_path / "base.gguf", tmp_path / "target.gguf"
    write_base(base, DELTA["S"], 0)
    write_target(case, base, target, DELTA["S"], 0)
    create_patch(base, target, tmp_path / "p")
    assert (tmp_path / "p").stat().st_size <= share * target.stat().st_size + 1000
    apply_patch(base, tmp_path / "p", tmp_path / "made.gguf")
    assert sha256(tmp_path / "made.gguf") == sha256(target)


def test_pages_of_other_content_among_small_steps(tmp_path: Path) -> None:
    """They take their own size, not what they would scattered among the steps of the others."""
    base, target = tmp_path / "base.gguf", tmp_path / "target.gguf"
    write_base(base, DELTA["S"], 0)
    write_target("noise", base, target, DELTA["S"], 0)
    alone = create_patch(base, target, tmp_path / "p").n_bytes
    data = bytearray(target.read_bytes())
    with open_source(target) as model:
        tensors = [run for run in model_runs(model.headers) if run.kind == TENSOR]
    others = [tensors[i].span(page, 1) for i, page in ((2, 3), (11, 20), (30, 1))]
    for offset, n_bytes in others:
        data[offset : offset + n_bytes] = np.random.default_rng(offset).bytes(n_bytes)
    target.write_bytes(data)
    facts = create_patch(base, target, tmp_path / "p", force=True)
    assert facts.n_bytes < alone + 1.02 * sum(n_bytes for _, n_bytes in others) + 300
    apply_patch(base, tmp_path / "p", tmp_path / "made.gguf")
    assert sha256(tmp_path / "made.gguf") == sha256(target)
