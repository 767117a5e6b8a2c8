"""The process that times one warm call."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from experiments import delta_worker
from forge.errors import GGUFShardError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of a `delta` that only writes; each takes ten seconds less than the one before."""
    made: list[tuple[Any, ...]] = []
    clock = [0.0]

    def write(action: str, base: Path, source: Path, output: Path, **options: int) -> None:
        assert not output.exists()
        output.write_bytes(b"x")
        made.append((action, base.name, source.name, options))
        clock[0] += 30 - 10 * len(made)

    diff, apply = types.ModuleType("delta.diff"), types.ModuleType("delta.apply")
    diff.DEFAULT_LEVEL = 5  # type: ignore[attr-defined]
    diff.create_patch = lambda *a, **k: write("create", *a, **k)  # type: ignore[attr-defined]
    apply.apply_patch = lambda *a, **k: write("apply", *a, **k)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "delta.diff", diff)
    monkeypatch.setitem(sys.modules, "delta.apply", apply)
    monkeypatch.setattr(delta_worker.time, "perf_counter", lambda: clock[0])
    return made


@pytest.mark.parametrize(
    ("action", "options", "expected"),
    [
        ("create", [], {"level": 5}),
        ("create", ["--level", "9"], {"level": 9}),
        ("apply", [], {}),
    ],
)
def test_the_second_call_is_timed(
    action: str, options: list[str], expected: dict[str, int], calls: list[tuple[Any, ...]],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert delta_worker.main([action, "a", "b", str(tmp_path / "c"), *options]) == 0
    assert calls == [(action, "a", "b", expected)] * 2
    assert json.loads(capsys.readouterr().out) == {"seconds": 10.0}


def test_a_failure_is_one_line(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise GGUFShardError("base.gguf: no model")

    monkeypatch.setattr(sys.modules["delta.diff"], "create_patch", fail)
    assert delta_worker.main(["create", "a", "b", str(tmp_path / "c")]) == 1
    assert capsys.readouterr() == ("", "base.gguf: no model\n")
