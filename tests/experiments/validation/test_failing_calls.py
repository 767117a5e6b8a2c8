"""Failing system calls: a tool that is right comes through, and one that is not is found out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.validation import failing_calls
from experiments.validation.effort import QUICK
from experiments.validation.failing_calls import FAULTS, sampled
from experiments.validation.operations import operations
from experiments.validation.probe import Outcome, Probe, Result, run_probe
from experiments.validation.scene import Scene
from experiments.validation.system_calls import Counted, Failing, intercepted
from forge import pending_file
from forge.pending_file import PendingFile


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), replace(QUICK, every=9))


@pytest.fixture(scope="module")
def probes(scene: Scene) -> list[Probe]:
    return list(failing_calls.probes(scene))


def results(probes: Sequence[Probe], fault: str, artefact: str) -> list[Result]:
    """What comes of the probes of one cell of the table."""
    chosen = [probe for probe in probes if (probe.fault, probe.artefact) == (fault, artefact)]
    assert chosen, f"no probes for {fault}, {artefact}"
    return [run_probe(probe) for probe in chosen]


def missed(probes: Sequence[Probe], fault: str, artefact: str) -> list[str]:
    of_cell = results(probes, fault, artefact)
    return [result.reason for result in of_cell if result.outcome is Outcome.MISSED]


def test_every_fault_and_every_operation_occurs(scene: Scene, probes: list[Probe]) -> None:
    assert {probe.fault for probe in probes} == {fault.row for fault in FAULTS}
    assert {probe.artefact for probe in probes} == {each.name for each in operations(scene)}


def test_nothing_is_missed(probes: list[Probe]) -> None:
    outcomes = [run_probe(probe) for probe in probes[::4]]
    assert [result for result in outcomes if result.outcome is Outcome.MISSED] == []
    assert sum(result.outcome is Outcome.DETECTED for result in outcomes) > len(outcomes) // 3


@pytest.mark.parametrize(
    ("n", "every", "expected"),
    [(0, 7, []), (1, 7, [0]), (7, 7, [6]), (8, 7, [0, 7]), (9, 7, [1, 8]), (3, 1, [0, 1, 2])],
)
def test_the_last_call_is_always_tried(n: int, every: int, expected: list[int]) -> None:
    assert [*sampled(n, every)] == expected


# ---- tools that are not right ----


def test_writing_in_the_file_itself(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_file, "pending_path", lambda path: path)
    assert missed(probes, "disk full from the k-th write on", "restore")


def test_fsync_that_fails_unheard(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    real = pending_file.sync_folder

    def deaf(folder: Path) -> None:
        with suppress(OSError):
            real(folder)

    monkeypatch.setattr(pending_file, "sync_folder", deaf)
    assert any("fsync" in reason for reason in missed(probes, "k-th fsync fails", "diff"))


def test_writes_that_are_not_finished(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(descriptor: int, data: bytes | np.ndarray, offset: int, path: object) -> None:
        os.pwrite(descriptor, data, offset)

    assert not missed(probes, "writes do half from the k-th on", "restore")
    monkeypatch.setattr(pending_file, "write_fully", careless)
    assert missed(probes, "writes do half from the k-th on", "restore")


def test_a_lock_that_stays(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    def discard(file: PendingFile) -> None:
        file.pending.unlink()
        file._close()

    monkeypatch.setattr(PendingFile, "_discard", discard)
    reasons = missed(probes, "disk dies at the k-th call", "apply in place")
    assert any("another process is writing" in reason for reason in reasons)


# ---- the hooks ----


def test_only_files_of_the_folder_are_watched(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-not"
    inside.mkdir()
    outside.mkdir()
    hook = Counted()
    with intercepted(inside, hook):
        for folder in (inside, outside):
            descriptor = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
            assert os.pwrite(descriptor, b"abcd", 0) == 4
            os.fsync(descriptor)
            os.close(descriptor)
            with open(folder / "file", "rb") as file:
                assert file.read() == b"abcd"
    assert hook.calls == {"open": 2, "write": 1, "fsync": 1}
    assert hook.on_files["open", "file"] == 2
    assert os.open.__module__ == "posix"


def test_a_call_fails_once_or_from_then_on(tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for lasting, expected in ((False, [0, 2]), (True, [0])):
        hook = Failing(("write", "fsync"), 1, lasting=lasting)
        done = []
        with intercepted(tmp_path, hook):
            for i in range(3):
                with suppress(OSError):
                    os.pwrite(file, b"x", i)
                    done.append(i)
        assert done == expected
        assert [kind for kind, _ in hook.failed] == ["write"] * (1 + lasting)
    os.close(file)


def test_half_of_a_call(tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with intercepted(tmp_path, Failing(("write", "read"), 0, code=None, lasting=True)):
        assert os.pwrite(file, b"abcdef", 0) == 3
        assert os.pwrite(file, b"d", 3) == 1
        buffer = bytearray(4)
        assert os.preadv(file, [buffer], 0) == 2
    assert buffer == b"ab\0\0"
    os.close(file)
