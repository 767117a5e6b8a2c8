"""Power cuts: what is not made durable in time is found out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.validation import power_cuts
from experiments.validation.effort import QUICK
from experiments.validation.operations import operations
from experiments.validation.power_cuts import _WAYS, _Disk
from experiments.validation.probe import Outcome, Probe, run_probe
from experiments.validation.scene import Scene
from experiments.validation.system_calls import intercepted
from forge import journal, pending_file
from forge.pending_file import PendingFile, sync_folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), replace(QUICK, every=9))


@pytest.fixture(scope="module")
def probes(scene: Scene) -> list[Probe]:
    return list(power_cuts.probes(scene))


def missed(probes: Sequence[Probe], place: str) -> list[str]:
    """Reasons of those that are missed, of the probes of an operation."""
    chosen = [probe for probe in probes if probe.place.startswith(place)]
    assert chosen, f"no probes for {place}"
    results = [run_probe(probe) for probe in chosen]
    return [result.reason for result in results if result.outcome is Outcome.MISSED]


def test_every_operation_occurs(scene: Scene, probes: list[Probe]) -> None:
    assert {probe.artefact for probe in probes} == {each.name for each in operations(scene)}


def test_nothing_is_missed(probes: list[Probe]) -> None:
    results = [run_probe(probe) for probe in probes[::3]]
    assert {result.outcome for result in results} == {Outcome.HARMLESS}, results


def test_no_fsync_before_the_rename(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PendingFile, "sync", lambda file: None)
    assert any("third state" in reason for reason in missed(probes, "restore"))


def test_no_fsync_of_the_folder(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_file, "sync_folder", lambda folder: None)
    assert any("claims success, and is old" in reason for reason in missed(probes, "diff"))


def test_no_fsync_of_what_a_journal_writes(
    probes: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    class System:
        """Like `os`, but for a file that it does not make durable."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def fsync(self, descriptor: int) -> None:
            if not os.readlink(f"/proc/self/fd/{descriptor}").endswith("model.gguf"):
                os.fsync(descriptor)

    monkeypatch.setattr(journal, "os", System())
    assert missed(probes, "apply in place (plain):")


# ---- the model of a disk ----


def test_what_is_durable(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    disk = _Disk(tmp_path, 1000)
    with intercepted(tmp_path, disk):
        file = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT)
        os.pwrite(file, b"one", 0)
        os.fsync(file)
        os.pwrite(file, b"two", 0)
        with open(tmp_path / "old", "r+b", buffering=0) as old:
            os.pwrite(old.fileno(), b"new", 0)
        os.replace(tmp_path / "new", tmp_path / "newer")
    disk.stop()
    assert disk.cut is not None and len(disk.cut) == len(_WAYS) == 7
    for way, files in disk.cut.items():
        old_now = b"new" if way.old_data else b"old"
        new_now = b"two" if way.new_data else b"one"
        assert files == {"old": old_now} | ({"newer": new_now} if way.names else {})
    with intercepted(tmp_path, disk):
        sync_folder(tmp_path)
    disk.stop()
    assert all("newer" in files for files in disk.cut.values())
    os.close(file)


def test_time_stops_at_the_call(tmp_path: Path) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    disk = _Disk(tmp_path, 1)
    with intercepted(tmp_path, disk):
        for i in range(3):
            os.pwrite(file, b"%d" % i, i)
    os.close(file)
    assert disk.cut is not None
    assert {files["file"] for files in disk.cut.values()} == {b"", b"0"}
