"""The script about patches, with tools that copy."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import exp_delta
from experiments.delta_cases import DELTA, FINE_TUNED, GENERATED, DeltaCases, Pair
from experiments.delta_peers import Tool, file_sha256
from experiments.exp_delta import Capacities, race

TINY = DeltaCases(n_tensors=4, side=64, edits=3, peers=(), repeats=2)


def copying(name: str, source: str = "target", seconds: float = 0.0) -> Tool:
    """A tool whose patch is the target, or the base, and which takes its time."""
    code = (
        f"import shutil, sys, time; shutil.copyfile(*sys.argv[1:]); time.sleep({seconds});"
        f"print('{{\"seconds\": {seconds}}}')"
    )
    copy = (sys.executable, "-I", "-S", "-c", code)
    return Tool(
        name,
        lambda base, target, patch: (*copy, target if source == "target" else base, patch),
        lambda base, patch, output: (*copy, patch, output),
        has_clock=bool(seconds),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(DELTA, "S", TINY)
    monkeypatch.setattr(exp_delta, "hash_bandwidth", lambda: 2e9)
    monkeypatch.setattr(exp_delta, "write_bandwidth", lambda folder: 1e9)
    monkeypatch.setattr(exp_delta, "our_library", lambda level=None: copying("gguf-shard"))
    monkeypatch.setattr(exp_delta, "our_command", lambda: copying("gguf-shard command"))
    monkeypatch.setenv("GGUF_SHARD_MODELS", str(tmp_path / "models"))


def run(results: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    code = exp_delta.main(
        ["--preset", "S", "--results", str(results), "--machine", "box", *options]
    )
    files = sorted((results / "box").glob("*.json"))
    return code, [row for path in files for row in json.loads(path.read_text())]


def test_every_pair_gives_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "plot.png"
    code, rows = run(tmp_path, "--plot", str(image), "--folder", str(tmp_path))
    assert code == 0
    captured = capsys.readouterr()
    assert "tales7M-ft-last2-f16: not in the folder of models: left out" in captured.err
    assert {row["params"]["pair"] for row in rows} == set(GENERATED)
    assert {row["case"] for row in rows} == {
        "delta-patch", "delta-create", "delta-apply", "delta-create-memory", "delta-apply-memory",
    }  # fmt: skip
    assert len(rows) == 5 * 2 * len(GENERATED)
    for row in rows:
        assert row["validated"] and row["n"] == TINY.repeats and row["median"] > 0
        assert row["better"] == "lower"
        if row["case"] in ("delta-create", "delta-apply"):
            assert row["limit"] > 0 and row["limit_by"] in ("SHA-256", "reading", "disk")
        if row["case"] == "delta-patch":
            assert row["median"] == row["params"]["bytes"]  # a copy
            assert (row["limit"] is None) == (row["params"]["pair"] == "identical")
    for name in GENERATED:
        assert f"\n{name}, " in captured.out
    assert "goal at most 1.05: missed" in captured.out
    assert image.stat().st_size > 1000
    assert not list(tmp_path.glob("gguf-shard-*"))


def test_fine_tuned_pairs_are_made_at_the_highest_level_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[int | None] = []

    def library(level: int | None = None) -> Tool:
        levels.append(level)
        return copying("gguf-shard" if level is None else f"gguf-shard level {level}")

    monkeypatch.setattr(exp_delta, "our_library", library)
    (tmp_path / "models").mkdir()
    for target, base in FINE_TUNED.items():
        (tmp_path / "models" / f"{base}.gguf").write_bytes(b"base")
        (tmp_path / "models" / f"{target}.gguf").write_bytes(b"target")
    code, rows = run(tmp_path, "--only", *FINE_TUNED)
    assert code == 0
    assert levels == [None, 22]
    sizes = [row for row in rows if row["case"] == "delta-patch"]
    assert [row["variant"] for row in sizes] == [
        "gguf-shard", "gguf-shard command", "gguf-shard level 22",
    ]  # fmt: skip
    assert {row["limit"] for row in sizes} == {None}


def test_a_wrong_result_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exp_delta, "our_command", lambda: copying("gguf-shard command", "base"))
    code, rows = run(tmp_path, "--only", "edits")
    assert code == 1
    captured = capsys.readouterr()
    assert "gguf-shard command, edits: the output is not the target" in captured.err
    assert "no result" in captured.out
    for row in rows:
        assert row["validated"] == (row["variant"] == "gguf-shard")
        assert (row["median"] is None) != row["validated"]


def test_peers_take_part_where_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = copying("zstd -1")
    monkeypatch.setattr(exp_delta, "installed_peers", lambda names: ([peer], ["bsdiff"]))
    code, rows = run(tmp_path, "--only", "edits")
    assert code == 0
    captured = capsys.readouterr()
    assert "bsdiff is not installed: it does not take part" in captured.err
    assert "as fast as by zstd -1" in captured.out
    limits = {row["case"]: row["limit"] for row in rows if row["variant"] == "zstd -1"}
    assert limits["delta-patch"] is not None and limits["delta-create"] is None


def made_pair(folder: Path) -> tuple[Pair, str]:
    (folder / "base").write_bytes(b"base")
    (folder / "target").write_bytes(b"target")
    return Pair("p", folder / "base", folder / "target"), file_sha256(folder / "target")


def test_slow_tools_have_one_turn(tmp_path: Path) -> None:
    pair, _ = made_pair(tmp_path)
    tools = [copying("slow", seconds=0.3), copying("quick", seconds=0.01)]
    turns = race(pair, tools, tmp_path, 3, slow_seconds=0.2)
    assert [len(turns[name]) for name in ("slow", "quick")] == [1, 3]


def test_tools_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, sha256 = made_pair(tmp_path)
    order: list[str] = []
    real = exp_delta.take_turn

    def noted(tool: Tool, *rest: Any) -> Any:
        assert rest[2] == sha256
        order.append(tool.name)
        return real(tool, *rest)

    monkeypatch.setattr(exp_delta, "take_turn", noted)
    wrong = copying("wrong", "base")
    turns = race(pair, [copying("a"), wrong, copying("b")], tmp_path, 2, math.inf)
    assert order == ["a", "wrong", "b", "a", "b", "a", "b"]
    assert {name: len(done) for name, done in turns.items()} == {"a": 2, "wrong": 0, "b": 2}


@pytest.mark.parametrize(
    ("cores", "hash_bytes", "create", "apply"),
    [
        # 3,000 and 1,000 bytes, read at 100 bytes a second, written at 50; a patch of 500.
        (2, 10.0, (300.0, "SHA-256"), (320.0, "SHA-256, then disk")),
        (1, 10.0, (400.0, "SHA-256"), (400.0, "SHA-256")),
        (2, 1e6, (40.0, "reading"), (35.0, "reading")),
    ],
)
def test_limits(
    cores: int, hash_bytes: float, create: tuple[float, str], apply: tuple[float, str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base, target = tmp_path / "base", tmp_path / "target"
    base.write_bytes(bytes(3000))
    target.write_bytes(bytes(1000))
    monkeypatch.setattr(exp_delta.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(exp_delta, "hash_bandwidth", lambda: hash_bytes)
    monkeypatch.setattr(exp_delta, "write_bandwidth", lambda folder: 50.0)
    monkeypatch.setattr(exp_delta, "file_read_seconds", lambda path, threads: 30.0)
    least = Capacities(tmp_path).seconds(Pair("p", base, target), 500)
    assert least == {"create": create, "apply": apply}
    monkeypatch.setattr(exp_delta, "write_bandwidth", lambda folder: 1.0)
    if cores == 2:
        least = Capacities(tmp_path).seconds(Pair("p", base, target), 500)
        assert least["apply"] == (3000 / hash_bytes + 1000, "SHA-256, then disk")
        assert least["create"] == (500.0, "disk")


def test_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run(tmp_path, "--large", "1MB", "--folder", str(tmp_path))
    assert code == 0
    assert {(row["params"]["pair"], row["variant"]) for row in rows} == {
        ("large", "gguf-shard command")
    }
    assert all(row["n"] == 1 for row in rows)
    out = capsys.readouterr().out
    assert "large, 1.01 MB, gguf-shard command: peak memory" in out
    assert "goal at most 400: reached" in out


def test_foreseeable_trouble_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, reason in (
        (("--large", "40%"), "--large 40%: want a size"),
        (("--large", "many"), "size 'many'"),
        (("--only", *FINE_TUNED), "none of the pairs is here"),
    ):
        assert run(tmp_path, *options)[0] == 1
        assert reason in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--only", "edits,nothing")
    assert stop.value.code == 2
