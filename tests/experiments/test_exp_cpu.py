"""The speed table's script, on a model of a few hundred kilobytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import exp_cpu
from experiments.cases import CPU, CpuCases

TINY = CpuCases("tiny", ("Q8_0",), 4, 8, "900kB", 3, 1 << 20, (1, 2), 1)


def test_every_case_gives_validated_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CPU, "S", TINY)
    monkeypatch.setattr(exp_cpu, "has_llama_cpp", lambda python: False)
    command = ["--preset", "S", "--results", str(tmp_path), "--machine", "box", "--threads", "1"]
    assert exp_cpu.main(command) == 0
    captured = capsys.readouterr()
    assert "llama.cpp does not take part" in captured.err
    files = (tmp_path / "box").glob("*.json")
    rows = [row for path in files for row in json.loads(path.read_text())]
    assert {row["case"].partition("-")[0] for row in rows} == set(exp_cpu.CASES)
    for row in rows:
        assert row["validated"] and row["n"] >= 1
        assert row["median"] >= 0
        assert row["case"] in captured.out
    reuse = [row for row in rows if row["case"] == "budget-reuse"]
    assert [row["variant"] for row in reuse] == ["lru", "pin"]
    for row in reuse:
        assert row["median"] == pytest.approx(row["limit"], abs=2)


def test_an_interpreter_without_llama_cpp_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--preset", "S", "--only", "decode", "--results", str(tmp_path)]
    assert exp_cpu.main([*command, "--llama-python", "/bin/false"]) == 1
    assert "/bin/false: cannot import llama_cpp" in capsys.readouterr().err


def test_unknown_cases_are_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        exp_cpu.main(["--only", "decode,nothing"])
    assert stop.value.code == 2
