"""The soak part: rounds of all that it does, and what it notices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from numba import config

from experiments.validation import soak
from experiments.validation.effort import QUICK
from experiments.validation.probe import Outcome, Probe, Unavailable, run_probe
from experiments.validation.scene import Scene
from forge.repair import RepairResult
from forge.verify import VerifyResult

pytestmark = pytest.mark.skipif(
    bool(config.ENABLE_CUDASIM), reason="the simulator has no compiled loops: too slow"
)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, QUICK)


@pytest.fixture
def two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round to warm up, and one more."""
    monkeypatch.setattr(soak, "_WARM_UP_ROUNDS", 1)
    monkeypatch.setattr(soak, "_LEAST_ROUNDS", 2)


@pytest.mark.usefixtures("two_rounds")
def test_nothing_is_missed(scene: Scene) -> None:
    results = [run_probe(probe) for probe in soak.probes(scene, 0)]
    assert [result.reason for result in results] == [""] * len(results)
    found = [(r.probe.fault, r.probe.artefact, r.probe.place, r.outcome.name) for r in results]
    a_round = [
        ("none: run again", "run", "HARMLESS"),
        ("corrupted, repaired", "core.gguf", "DETECTED"),
        ("updated, reversed", "apply in place", "HARMLESS"),
        ("updated, reversed", "run", "HARMLESS"),
    ]
    assert found == [
        *[(fault, artefact, "round 0", outcome) for fault, artefact, outcome in a_round],
        ("memory grows", "run", "warmed up", "HARMLESS"),
        *[(fault, artefact, "round 1", outcome) for fault, artefact, outcome in a_round],
        ("memory grows", "run", "2 rounds", "HARMLESS"),
    ]


def test_it_lasts_as_long_as_it_is_told(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 7))  # the first three rounds do not look
    monkeypatch.setattr(soak.time, "monotonic", lambda: next(now))
    places = [probe.place for probe in soak.probes(scene, 1)]
    assert places[-1] == "11 rounds" and len(places) == 4 * 11 + 2


Find = Callable[[str, str], Probe]


@pytest.fixture
def find(scene: Scene) -> Find:
    """The first probe of a fault and an artefact."""

    def found(fault: str, artefact: str) -> Probe:
        probes: Iterator[Probe] = soak.probes(scene, 0)
        return next(p for p in probes if (p.fault, p.artefact) == (fault, artefact))

    return found


def reason(probe: Probe) -> str:
    result = run_probe(probe)
    assert result.outcome is Outcome.MISSED
    return result.reason


def test_wrong_tokens_are_missed(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    right = soak.answer
    monkeypatch.setattr(soak, "answer", lambda *args: [*right(*args)[:-1], 5])
    assert "other tokens" in reason(find("none: run again", "run"))
    assert "other tokens" in reason(find("updated, reversed", "apply in place"))
    assert "other tokens" in reason(find("updated, reversed", "run"))


def test_damage_that_is_not_found_or_not_mended_is_missed(
    find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(soak, "verify_model", lambda path: VerifyResult())
        assert "verify names []" in reason(find("corrupted, repaired", "core.gguf"))
    with monkeypatch.context() as patch:
        patch.setattr(soak, "repair_model", lambda path, source: RepairResult())
        assert "repair has mended []" in reason(find("corrupted, repaired", "core.gguf"))


def test_an_update_that_does_nothing_is_missed(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "update_in_place", lambda *args, **options: None)
    assert "other bytes" in reason(find("updated, reversed", "apply in place"))
    monkeypatch.setattr("atlas.manager.Atlas.apply_delta", lambda *args, **options: None)
    assert "not the new version's tokens" in reason(find("updated, reversed", "run"))


def test_what_grows_is_missed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    before = soak.Footprint(memory=100 << 20, threads=4, files=9)
    room = (5 << 20) + (16 << 20)
    for change, told in (
        ({"memory": (100 << 20) + room}, ""),
        ({"memory": (100 << 20) + room + 1}, "memory has grown"),
        ({"threads": 5}, "threads: 4 before, 5 after"),
        ({"files": 10}, "files: 9 before, 10 after"),
        ({"threads": 3, "files": 8, "memory": 1}, ""),
    ):
        held: dict[str, Any] = {**vars(before), **change}
        both = iter([before, soak.Footprint(**held)])
        monkeypatch.setattr(soak, "footprint", lambda both=both: next(both))
        work = soak.Soak(scene)
        work.remember()
        result = run_probe(Probe("soak", "memory grows", "run", "", work.compare))
        expected = Outcome.MISSED if told else Outcome.HARMLESS
        assert result.outcome is expected and result.reason.startswith(told)


def test_the_footprint_is_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = soak.footprint()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with open(tmp_path / "file", "w"):
        held = bytearray(64 << 20)
        held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
        after = soak.footprint()
    stop.set()
    thread.join()
    assert (after.threads, after.files) == (before.threads + 1, before.files + 1)
    assert after.memory - before.memory > 60 << 20
    monkeypatch.setattr(soak, "_PROCESS", tmp_path)
    with pytest.raises(Unavailable, match="no /proc/self"):
        soak.footprint()
