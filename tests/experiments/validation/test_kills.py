"""Kills, races and disturbed files: a tool that is not right is found out."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from experiments.validation import kills
from experiments.validation.children import Child, check_in_child
from experiments.validation.effort import QUICK
from experiments.validation.operations import operations, prepared, told
from experiments.validation.probe import Missed, Outcome, Probe, Unavailable, run_probe
from experiments.validation.scene import Scene
from forge import gguf_file, pending_file
from forge.errors import GGUFShardError
from forge.source_file import SourceFile

_CALLS, _MOMENTS = "kill -9 at the k-th call", "kill -9 at a random moment"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), replace(QUICK, every=5, kills=2))


@pytest.fixture(scope="module")
def probes(scene: Scene) -> list[Probe]:
    return list(kills.probes(scene))


def missed(probes: Sequence[Probe], fault: str, place: str) -> list[str]:
    """Reasons of those that are missed, of the probes of a fault of an operation."""
    chosen = [probe for probe in probes if probe.fault == fault and place in probe.place]
    assert chosen, f"no probes for {fault}, {place}"
    results = [run_probe(probe) for probe in chosen]
    return [result.reason for result in results if result.outcome is Outcome.MISSED]


def test_every_fault_and_every_operation_occurs(scene: Scene, probes: list[Probe]) -> None:
    names = {operation.name for operation in operations(scene)}
    for row in (_CALLS, _MOMENTS, "SIGINT at the k-th call", "two processes at once"):
        assert {probe.artefact for probe in probes if probe.fault == row} == names
    changed = {probe.fault.split()[0] for probe in probes if "while it is read" in probe.fault}
    assert changed == {"overwritten", "replaced", "cut", "extended"}


def test_nothing_is_missed(probes: list[Probe]) -> None:
    results = [run_probe(probe) for probe in probes[::8]]
    assert [result for result in results if result.outcome is Outcome.MISSED] == []


def test_a_folder_that_another_process_builds_in_is_left_alone(scene: Scene) -> None:
    (update,) = (each for each in operations(scene) if each.variant == "sharded, written anew")
    with prepared(scene, update) as folder:
        other = folder / "model" / "core.target.sgnew"
        other.mkdir()
        (other / "half.gguf").touch()
        descriptor = os.open(other, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        line = told(lambda: update.work(folder))
        assert line == f"{other}: another process is writing it"
        assert (other / "half.gguf").exists()
        os.close(descriptor)
        assert update.judge(folder, line) is Outcome.DETECTED


# ---- tools that are not right ----


def test_writing_in_the_file_itself(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_file, "pending_path", lambda path: path)
    assert any("third state" in reason for reason in missed(probes, _CALLS, "restore"))


def test_a_half_written_model_that_can_be_read(
    probes: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "journal_path", lambda owner: owner.with_name("none"))
    reasons = missed(probes, _CALLS, "apply in place (plain):")
    assert any("can be read" in reason for reason in reasons)


def test_a_file_that_may_change(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not missed(probes, "overwritten while it is read", "shard: small.gguf, read")
    monkeypatch.setattr(SourceFile, "check_unchanged", lambda file: None)
    reasons = missed(probes, "overwritten while it is read", "shard: small.gguf, read")
    assert any("two states" in reason for reason in reasons)


def test_an_interrupt_that_is_no_line(probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_command(args: object) -> int:
        args.run(args)  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr("experiments.validation.children.run_command", run_command)
    reasons = missed(probes, "SIGINT at the k-th call", "diff")
    assert any("KeyboardInterrupt" in reason for reason in reasons)


# ---- children ----


def test_how_a_child_ends() -> None:
    def fail() -> None:
        raise GGUFShardError("/file: no\ngood")

    assert vars(Child(lambda: None).wait()) == {"status": 0, "said": ""}
    assert vars(Child(fail).wait()) == {"status": 1, "said": "/file: no good\n"}
    assert vars(Child(lambda: os._exit(3)).wait()) == {"status": 3, "said": ""}
    traceback = Child(lambda: 1 // 0).wait()
    assert traceback.status == 70 and "ZeroDivisionError" in traceback.said


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGKILL, -signal.SIGKILL, ""), (signal.SIGINT, 1, "interrupted\n")],
)
def test_a_child_that_gets_a_signal(number: signal.Signals, status: int, said: str) -> None:
    child = Child(lambda: os.kill(os.getpid(), number) or time.sleep(60))
    assert vars(child.wait()) == {"status": status, "said": said}


def test_a_check_in_a_child() -> None:
    def unavailable() -> Outcome:
        raise Unavailable("not here")

    def missed() -> Outcome:
        raise Missed("how")

    assert check_in_child(lambda: Outcome.DETECTED) is Outcome.DETECTED
    with pytest.raises(Unavailable, match="not here"):
        check_in_child(unavailable)
    with pytest.raises(Missed, match="how"):
        check_in_child(missed)
    with pytest.raises(Missed, match="ZeroDivisionError"):
        check_in_child(lambda: Outcome(1 // 0))
    with pytest.raises(Missed, match="-9"):
        check_in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[arg-type]
