"""Malformed files: a sample of each kind is refused as promised, and a broken promise is seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.validation import (
    hostile,
    hostile_gguf,
    hostile_llama,
    hostile_maps,
    hostile_worker,
    lying_patches,
    unbound_patches,
)
from experiments.validation.effort import QUICK
from experiments.validation.hostile import Examiner, Step
from experiments.validation.probe import Missed, Outcome, run_probe
from experiments.validation.scene import Scene


@pytest.fixture(scope="module")
def examiner() -> Iterator[Examiner]:
    with Examiner() as examiner:
        yield examiner


def test_there_are_enough_kinds() -> None:
    """And no two of a fault have one name."""
    assert len(hostile_gguf.kinds()) >= 70
    assert len(hostile_maps.kinds()) >= 30
    tables = [*lying_patches.ALL.values(), *unbound_patches.ALL.values()]
    assert sum(map(len, tables)) >= 40
    for kinds in (hostile_gguf.kinds(), hostile_llama.kinds(), hostile_maps.kinds()):
        names = Counter((kind.fault, kind.name) for kind in kinds)
        assert [name for name, n in names.items() if n > 1] == []


def test_a_sample_is_refused(
    tmp_path: Path, examiner: Examiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each fault."""
    monkeypatch.setattr(hostile, "_QUICK_OF_A_FAULT", 1)
    results = [run_probe(p) for p in hostile.file_probes(Scene(tmp_path, QUICK), examiner)]
    assert [(r.probe.place, r.reason) for r in results if r.outcome is Outcome.MISSED] == []
    outcomes = Counter((r.probe.artefact, r.outcome) for r in results)
    for artefact in ("model.gguf", "run", "core.sgmap", "patch"):
        assert outcomes[artefact, Outcome.DETECTED]
    assert outcomes["model.gguf", Outcome.HARMLESS] and outcomes["run", Outcome.HARMLESS]


def test_a_full_run_tries_all(tmp_path: Path) -> None:
    full = Scene(tmp_path, replace(QUICK, flips=0))
    n_kinds = sum(len(m.kinds()) for m in (hostile_gguf, hostile_llama, hostile_maps))
    n_patches = sum(map(len, [*lying_patches.ALL.values(), *unbound_patches.ALL.values()]))
    with Examiner() as examiner:  # whose server is never started
        assert len(list(hostile.file_probes(full, examiner))) == n_kinds + n_patches


_RIGHT = {"code": 1, "seconds": 0.1, "grown_bytes": 9, "out": "", "err": "no\n", "changed": []}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"err": ""}, "not one line"),
        ({"err": "a\nb\n"}, "not one line"),
        ({"err": "\x1b[31m\n"}, "prints"),
        ({"out": "\x07\n"}, "prints"),
        ({"err": "x" * 9000}, "a line of 9000"),
        ({"err": "out of memory\n"}, "out of memory"),
        ({"code": 70, "err": "Traceback\nKeyError: 1\n"}, "exit code 70"),
        ({"code": 2}, "exit code 2"),
        ({"code": 0}, "goes through"),
        ({"seconds": 1.1}, "took 1.10 s"),
        ({"grown_bytes": 201 << 20}, "took 201 MiB"),
        ({"changed": ["new.gguf"]}, "changes"),
        ({"died": 11}, "signal 11"),
    ],
)
def test_broken_promises_are_seen(tmp_path: Path, wrong: dict[str, Any], says: str) -> None:
    step = Step(["info", "x"], must_refuse=True)
    hostile._judge(tmp_path, step, _RIGHT)
    with pytest.raises(Missed, match=says):
        hostile._judge(tmp_path, step, _RIGHT | wrong)


def test_what_is_taken_must_be_right(tmp_path: Path) -> None:
    for name, data in (("a", b"x"), ("b", b"y")):
        (tmp_path / name).write_bytes(data)
    taken = _RIGHT | {"code": 0, "err": ""}
    hostile._judge(tmp_path, Step(["restore"], same=("a", "a")), taken)
    with pytest.raises(Missed, match="a is not b"):
        hostile._judge(tmp_path, Step(["restore"], same=("a", "b")), taken)


def _broken(name: str) -> Any:
    """A command that does something wrong, or none."""

    def command(arguments: list[str]) -> int:
        if name == "grows":
            len(b"x" * (300 << 20))
            return 1
        if name == "works":
            sum(range(10**6))
        elif name == "raises":
            raise KeyError(1)
        elif name == "writes":
            Path("left.sgnew").write_bytes(b"")
        elif name == "dies":
            raise SystemExit(3)
        return 0

    return command


@pytest.mark.parametrize("name", ["grows", "works", "raises", "writes", "dies"])
def test_the_worker_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(hostile_worker, "command", _broken(name))
    request = {"folder": str(tmp_path), "steps": [{"arguments": [name], "needs": None},
                                                  {"arguments": [name], "needs": 0}]}  # fmt: skip
    first, second = hostile_worker.serve_one(request)
    assert first is not None
    codes = {"grows": 1, "works": 0, "raises": 70, "writes": 0, "dies": 3}
    assert first["code"] == codes[name]
    assert (second is None) == (first["code"] != 0)
    assert (first["grown_bytes"] > 250 << 20) == (name == "grows")
    assert first["changed"] == (["left.sgnew"] if name == "writes" else [])
