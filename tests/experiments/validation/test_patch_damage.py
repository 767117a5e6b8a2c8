"""Damage of patches, GGUF files and journals: nothing missed, and each protection that is switched
off is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from delta import checked_patch
from delta.patch_file import PatchReader
from experiments.validation import patch_damage
from experiments.validation.damaged_model import small_model
from experiments.validation.effort import Effort
from experiments.validation.probe import Outcome, Probe, run_probe
from experiments.validation.scene import Scene
from forge import journal, repair
from forge.journal_file import JournalFile

TINY = Effort("tiny", flips=10, random_flips=1, every=50, kills=1, fuzz_seconds=0,
              throughput_bytes=1 << 20, repeats=1)  # fmt: skip
Find = Callable[..., list[Probe]]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), TINY)


@pytest.fixture(scope="module")
def probes(scene: Scene) -> list[Probe]:
    return list(patch_damage.probes(scene))


@pytest.fixture
def find(probes: list[Probe]) -> Find:
    """Probes of a fault and an artefact."""

    def found(fault: str, artefact: str) -> list[Probe]:
        chosen = [p for p in probes if (p.fault, p.artefact) == (fault, artefact)]
        assert chosen
        return chosen

    return found


def is_missed(probes: list[Probe], reason: str) -> bool:
    """Whether one of them is, for that reason."""
    results = [run_probe(probe) for probe in probes]
    return any(r.outcome is Outcome.MISSED and reason in r.reason for r in results)


def test_nothing_is_missed(probes: list[Probe]) -> None:
    results = [run_probe(probe) for probe in probes]
    assert [r for r in results if r.outcome is Outcome.MISSED] == []
    assert {p.artefact for p in probes} >= {"patch", "model.gguf", "journal"}
    assert sum(r.outcome is Outcome.HARMLESS for r in results) == 1


def test_a_patch_without_its_digest(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchReader, "_check_digest", lambda _: None)
    assert is_missed(find("bit flip", "patch"), "apply goes through")


def test_any_base(scene: Scene, probes: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage where the target takes nothing from the base: only the base's own digest tells."""
    monkeypatch.setattr(checked_patch, "require", lambda *_: None)
    small = small_model(scene)
    tensor = small.map.tensors[-1]
    assert tensor.name == "output.weight"
    patch = scene.folder / "forward.patch"
    left = bytearray(small.source_bytes)
    left[tensor.offset + 100] ^= 8
    check = functools.partial(patch_damage.check_model, scene, small, patch, bytes(left))
    probe = Probe("chaos", "bit flip", "model.gguf", "", check)
    assert is_missed([probe], "apply goes through")
    monkeypatch.undo()
    assert run_probe(probe).outcome is Outcome.DETECTED


def test_a_journal_without_its_digest(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JournalFile, "_verify_digest", lambda *_: None)
    assert is_missed(find("bit flip", "journal"), "goes through")


def test_a_journal_that_knows_no_files(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_check_samples", lambda *_: None)
    assert is_missed(find("journal of another model", "journal"), "files have changed")


def test_a_repair_that_trusts_its_source(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def anything(*_: Any) -> None: ...

    monkeypatch.setattr(repair._Mender, "shard_fault", anything)
    monkeypatch.setattr(repair, "_check_table", anything)
    assert is_missed(find("sector zeroed", "model.gguf"), "repaired, and does not hold")
