"""The quick start: everything it promises, in-process and with few tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import quickstart
from experiments.budget_runs import best_machine, decode_within, format_table, table_rows
from experiments.make_model import write_model
from forge.shard import shard_model

COMMAND = ["--target", "cpu", "-n", "6"]


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert quickstart.main([*COMMAND, "-o", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.count(quickstart.PROMPT) == 1
    assert "the same 6 tokens from all 6 runs on target cpu" in out
    rows = [line.split()[:2] for line in out.splitlines() if line.startswith(("lru", "pin"))]
    assert rows == [[p, b] for p in ("lru", "pin") for b in ("100", "50", "25")]
    pixels = imread(folder / "quickstart.png")
    height, width, _ = pixels.shape
    assert width > 1000 and height > 400
    third = width // 3
    for panel in range(3):  # each panel has been drawn in, in many colours
        part = pixels[:, panel * third : (panel + 1) * third, :3].reshape(-1, 3)
        assert len(np.unique(part, axis=0)) > 50


def test_runs_match_the_closed_forms(tmp_path: Path) -> None:
    runs = quickstart.quickstart(tmp_path, 4, "cpu")
    assert len({run.tokens for run in runs}) == 1 and len(runs[0].tokens) == 4
    full = runs[0].pool_bytes
    for run in runs:
        assert run.reuse == pytest.approx(run.expected_reuse, abs=0.02)
        assert run.reuse + run.prefetch + run.demand == pytest.approx(1)
        assert run.pool_bytes == pytest.approx(run.budget * full, rel=0.05)
    at = {(run.policy, run.budget): run for run in runs}
    assert at["lru", 0.5].reuse == 0
    assert at["pin", 0.5].reuse == pytest.approx(0.5, abs=0.02)
    assert at["pin", 1.0].bytes_per_token == at["lru", 1.0].bytes_per_token == 0


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    assert quickstart.main([*COMMAND, "-o", str(tmp_path)]) == 0
    assert quickstart.main([*COMMAND, "-o", str(tmp_path)]) == 0


def test_another_model_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    map_path = shard_model(write_model(tmp_path / "m.gguf", "tiny", "Q8_0"), tmp_path)
    before = map_path.read_bytes()
    assert quickstart.main([*COMMAND, "-o", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "core.sgmap" in error
    assert map_path.read_bytes() == before


def test_different_tokens_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shortened(*args: object) -> object:
        run, scan = decode_within(*args)  # type: ignore[arg-type]
        if run.policy == "pin":
            object.__setattr__(run, "tokens", (*run.tokens[:-1], 0))
        return run, scan

    monkeypatch.setattr(quickstart, "decode_within", shortened)
    assert quickstart.main([*COMMAND, "-o", str(tmp_path)]) == 1
    assert "differ in their tokens" in capsys.readouterr().err
    assert not (tmp_path / "quickstart.png").exists()


def test_theory_and_table(tmp_path: Path) -> None:
    from atlas.target import CpuTarget

    map_path = shard_model(write_model(tmp_path / "m.gguf", "tiny", "Q8_0"), tmp_path)
    run, scan = decode_within(map_path, CpuTarget(), "pin", 0.5, [1, 300, 301], 3)
    machine = best_machine([run])
    lru, pin = (scan.theory(policy, machine) for policy in ("lru", "pin"))
    assert np.all(lru.reuse[:-1] == 0) and lru.reuse[-1] == 1
    assert np.all(np.diff(pin.reuse) >= 0) and np.all(pin.reuse <= pin.belady + 1e-9)
    np.testing.assert_allclose(pin.bytes_per_token, scan.weight_bytes * (1 - pin.reuse))
    assert pin.limit[-1] >= pin.limit[0]
    (row,) = table_rows([run], scan)
    assert row["fraction_of_limit"] == pytest.approx(
        row["tokens_per_second"] / row["limit_tokens_per_second"]
    )
    assert "pin" in format_table([row]).splitlines()[1]


def test_bad_number_of_tokens_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        quickstart.main(["-n", "1"])
    assert stop.value.code == 2
