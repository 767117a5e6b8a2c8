"""Too little of everything: a tool that does not notice is found out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from experiments.validation import scarcity
from experiments.validation.effort import QUICK
from experiments.validation.operations import checked_line, operations, prepared, told
from experiments.validation.probe import Missed, Outcome, Probe, run_probe
from experiments.validation.scene import Scene
from forge import pending_file
from forge.errors import GGUFShardError
from forge.sizes import Size


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), replace(QUICK, every=6))


@pytest.fixture(scope="module")
def probes(scene: Scene) -> list[Probe]:
    return list(scarcity.probes(scene))


def missed(probes: Sequence[Probe], fault: str, place: str) -> list[str]:
    """Reasons of those that are missed, of the probes of a fault whose places say so."""
    chosen = [probe for probe in probes if probe.fault == fault and place in probe.place]
    assert chosen, f"no probes for {fault}, {place}"
    results = [run_probe(probe) for probe in chosen]
    if all(result.outcome is Outcome.UNAVAILABLE for result in results):
        pytest.skip(results[0].reason)
    return [result.reason for result in results if result.outcome is Outcome.MISSED]


def test_every_fault_and_every_operation_occurs(scene: Scene, probes: list[Probe]) -> None:
    names = {operation.name for operation in operations(scene)}
    of_operations = {probe.fault for probe in probes if probe.artefact != "run"}
    assert len(of_operations) == 9
    for row in of_operations:
        assert {probe.artefact for probe in probes if probe.fault == row} == names
    assert len({probe.fault for probe in probes if probe.artefact == "run"}) == 4


def test_nothing_is_missed(probes: list[Probe]) -> None:
    of_operations = [probe for probe in probes if probe.artefact != "run"]
    results = [run_probe(probe) for probe in of_operations[::7]]
    assert [result for result in results if result.outcome is Outcome.MISSED] == []
    assert sum(result.outcome is Outcome.DETECTED for result in results) > len(results) // 3


def test_no_budget_is_missed(probes: list[Probe]) -> None:
    of_run = [probe for probe in probes if probe.artefact == "run"]
    results = [run_probe(probe) for probe in of_run]
    assert [result for result in results if result.outcome is Outcome.MISSED] == []
    outcomes = [result.outcome for result in results]
    assert outcomes.count(Outcome.HARMLESS) == 5 and outcomes.count(Outcome.DETECTED) == 20


def test_no_memory_just_after_the_lock_is_taken(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def future_pages(*_: object) -> None:
        raise MemoryError

    (update,) = (each for each in operations(scene) if each.variant == "sharded")
    with prepared(scene, update) as folder:
        with monkeypatch.context() as patched:
            patched.setattr("delta.sharded_update._FuturePages", future_pages)
            line = told(lambda: update.work(folder))
        assert line == "out of memory"
        assert update.judge(folder, line) is Outcome.DETECTED


# ---- tools that are not right ----


def test_a_full_disk_that_is_not_noticed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(descriptor: int, data: bytes | np.ndarray, offset: int, path: object) -> None:
        with suppress(OSError):
            os.pwrite(descriptor, data, offset)

    (diff,) = (operation for operation in operations(scene) if operation.name == "diff")
    full = Probe("chaos", "", "", "", partial(scarcity._on_full_disk, scene, diff, 0, False))
    before = run_probe(full)
    if before.outcome is Outcome.UNAVAILABLE:
        pytest.skip(before.reason)
    assert before.outcome is Outcome.DETECTED
    monkeypatch.setattr(pending_file, "write_fully", careless)
    assert run_probe(full).outcome is Outcome.MISSED


def test_a_traceback_for_want_of_memory(
    probes: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_command(args: argparse.Namespace) -> int:
        try:
            return int(args.run(args))
        except GGUFShardError:
            return 1

    monkeypatch.setattr("experiments.validation.operations.run_command", run_command)
    reasons = missed(probes, "no memory for the k-th array", "apply")
    assert any("MemoryError" in reason for reason in reasons)


def test_a_size_that_is_none(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.sizes.parse_size", lambda text: Size(fraction=1.0))
    assert len(missed(probes, "budget that is none", "")) == 15


def test_a_refusal_that_names_another_size(
    probes: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from atlas import budget

    real = budget.cache_cost_bytes

    def less(*arguments: object) -> tuple[int, int]:
        fixed, per_frame = real(*arguments)  # type: ignore[arg-type]
        return fixed - 1 - os.urandom(1)[0], per_frame

    monkeypatch.setattr(budget, "cache_cost_bytes", less)
    assert missed(probes, "budget too small", "")


@pytest.mark.parametrize(
    ("code", "text"),
    [(1, ""), (1, "/a\n/b\n"), (1, "no file\n"), (2, "/a\n"), (0, "/a\n"), (1, "/a")],
)
def test_what_is_no_line(code: int, text: str) -> None:
    with pytest.raises(Missed):
        checked_line(code, text)


def test_what_is_a_line() -> None:
    assert checked_line(1, "/a: gone\n") == "/a: gone"
    assert checked_line(1, "out of memory\n") == "out of memory"
    assert checked_line(0, "") is None
