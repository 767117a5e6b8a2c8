"""Damage of maps: nothing missed, and each protection that is switched off is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.validation import damaged_model, map_damage
from experiments.validation.damaged_model import small_model
from experiments.validation.effort import Effort
from experiments.validation.map_damage import adapt_digests, render
from experiments.validation.probe import Outcome, Probe, run_probe
from experiments.validation.scene import Scene
from forge import restore, sgmap_reader, sharded_model
from forge.sgmap_reader import parse_map

TINY = Effort("tiny", flips=40, random_flips=1, every=50, kills=1, fuzz_seconds=0,
              throughput_bytes=1 << 20, repeats=1)  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), TINY)


@pytest.fixture(scope="module")
def probes(scene: Scene) -> list[Probe]:
    return list(map_damage.probes(scene))


def is_missed(probes: list[Probe], reason: str) -> bool:
    """Whether one of them is, for that reason."""
    assert probes
    results = [run_probe(probe) for probe in probes]
    return any(r.outcome is Outcome.MISSED and reason in r.reason for r in results)


def test_nothing_is_missed(probes: list[Probe]) -> None:
    results = [run_probe(probe) for probe in probes[::4]]
    assert [r for r in results if r.outcome is Outcome.MISSED] == []
    assert sum(r.outcome is Outcome.DETECTED for r in results) > 40
    assert {p.artefact for p in probes} == {"core.sgmap"}


def test_every_edit_is_tried(scene: Scene) -> None:
    """Each member of each object, with each kind of edit that its type allows."""
    document = json.loads(small_model(scene).text)
    edits = [*map_damage._all_edits(document)]
    places = {place for _, place, _, _ in edits}
    assert {("pages", "count"), ("tensors", 0, "slices", 0, "zone"), ("raw", 2, "bytes"),
            ("digests", "shard_xxh3_64", 7), ("source", 0, "sha256")} <= places  # fmt: skip
    of_count = [row for row, place, _, _ in edits if place == ("pages", "count")]
    assert {row.removeprefix("map field ") for row in of_count} == {
        "of a wrong type", "negative", "huge", "off by one", "missing", "twice", "unknown",
    }  # fmt: skip


def test_the_text_is_written_as_the_format_says(scene: Scene) -> None:
    text = small_model(scene).text
    document = json.loads(text)
    document["atlas"]["prefetch_distance"] = 9
    with pytest.raises(Exception, match="does not match its digest"):
        parse_map(render(document), "edited")
    adapt_digests(document)
    assert parse_map(render(document), "edited").atlas.prefetch_distance == 9
    document["atlas"]["cache_policy@twice"] = "lru"
    with pytest.raises(Exception, match="is given twice"):
        parse_map(render(document), "edited")


def test_a_reader_that_does_not_compare(
    scene: Scene, probes: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes any text for the map that was meant."""
    right = small_model(scene).map
    monkeypatch.setattr(sharded_model, "load_map", lambda _: right)
    flips = [probe for probe in probes if probe.fault == "bit flip"]
    assert is_missed(flips[:5], "verify finds nothing")


def test_a_reader_without_bounds_or_digests(
    probes: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def any_integer(_: object, value: Any, *__: object) -> Any:
        return value

    monkeypatch.setattr(sgmap_reader._Reader, "integer", any_integer)
    edits = [p for p in probes if p.fault == "map field of a wrong type, digests adapted"]
    assert is_missed(edits, "Error: ")


def test_a_restore_that_does_not_look_at_the_result(
    scene: Scene, probes: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore_anything(_: object, output: Path) -> None:
        output.write_bytes(b"anything")

    monkeypatch.setattr(damaged_model, "restore_model", restore_anything)
    assert restore.restore_model is not restore_anything
    others = [p for p in probes if p.fault == "map of another model"]
    assert is_missed(others, "restored: another file")
