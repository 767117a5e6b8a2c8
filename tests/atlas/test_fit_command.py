"""`gguf-shard fit` against the run it speaks of, and against arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atlas.cli import main
from atlas.infer.model import LlamaModel
from atlas.target import CpuTarget
from experiments.make_model import write_model
from forge.pages import PAGE_BYTES
from forge.shard import shard_model
from forge.sharded_model import ShardedModel
from forge.sizes import parse_size

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def map_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    return shard_model(write_model(folder / "m.gguf", "tiny", "F16"), folder)


def fit(capsys: Capture, *arguments: object) -> dict[str, object]:
    assert main(["fit", *map(str, arguments), "--json"]) == 0
    facts: dict[str, object] = json.loads(capsys.readouterr().out)
    return facts


@pytest.mark.parametrize("policy", ["lru", "pin"])
@pytest.mark.parametrize("budget", ["100%", "60%", "30%"])
def test_foretells_the_run(map_path: Path, capsys: Capture, budget: str, policy: str) -> None:
    facts = fit(
        capsys, map_path, "--target", "cpu", "--budget", budget, "--policy", policy, "-c", 32
    )
    with LlamaModel(
        ShardedModel(map_path), CpuTarget(), parse_size(budget), n_context=32, policy=policy
    ) as model:
        assert facts["budget_bytes"] == model.atlas.budget_bytes
        assert facts["frames"] == model.atlas.plan.n_frames
        model.forward([1, 5])
        before = model.atlas.stats.copy()
        for token in (7, 8, 9):
            model.forward([token])
        spent = model.atlas.stats.since(before)
    assert facts["expected_reuse_ratio"] == pytest.approx(
        spent.reuse_hits / spent.accesses, abs=0.02
    )
    assert facts["bytes_per_token"] == pytest.approx(
        spent.bytes_moved / 3, abs=0.02 * spent.accesses / 3 * PAGE_BYTES
    )


def test_limits_are_those_of_the_slower_of_link_and_memory(map_path: Path, capsys: Capture) -> None:
    arguments = (map_path, "--budget", "50%", "--policy", "lru", "--link", 2, "--memory", 3)
    facts = fit(capsys, *arguments)
    moved = facts["bytes_per_token"]
    assert isinstance(moved, float) and moved > 0
    assert facts["limit_tokens_per_second"] == pytest.approx(2e9 / moved)
    # LRU moves all that it reads: natively the same bytes come from memory.
    assert facts["native_limit_tokens_per_second"] == pytest.approx(3e9 / moved)
    assert facts["fraction_of_native"] == pytest.approx(2 / 3)


def test_text_names_budget_reuse_and_limit(map_path: Path, capsys: Capture) -> None:
    assert main(["fit", str(map_path), "--budget", "50%", "--policy", "auto"]) == 0
    assert main(["fit", str(map_path), "--budget", "50%", "-q"]) == 0
    budget, reuse, limit = capsys.readouterr().out.splitlines()
    assert budget.startswith("budget ") and "frames hold" in budget
    assert reuse.startswith("policy pin: ") and "Belady's bound" in reuse
    assert "at most" in limit and "of the native limit" in limit


@pytest.mark.parametrize("option", ["--link", "--memory"])
@pytest.mark.parametrize("value", ["0", "-1", "fast", "inf"])
def test_bandwidths_must_be_numbers(map_path: Path, option: str, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", str(map_path), "--budget", "50%", f"{option}={value}"])


def test_a_budget_too_small_is_refused(map_path: Path, capsys: Capture) -> None:
    assert main(["fit", str(map_path), "--budget", "1KB"]) == 1
    assert "the smallest that works is" in capsys.readouterr().err
