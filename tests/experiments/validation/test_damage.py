"""Damage of pages: nothing missed, and each protection that is switched off is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.validation import damage, damaged_model
from experiments.validation.damage import cut_points, spread
from experiments.validation.effort import Effort
from experiments.validation.probe import Outcome, Probe, run_probe
from experiments.validation.scene import Scene
from forge import repair, restore, shard_scan, sharded_model, verify
from forge.core_file import CoreFile
from forge.repair import RepairResult
from forge.verify import VerifyResult

TINY = Effort("tiny", flips=8, random_flips=1, every=50, kills=1, fuzz_seconds=0,
              throughput_bytes=1 << 20, repeats=1)  # fmt: skip
Find = Callable[..., list[Probe]]


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> list[Probe]:
    return list(damage.probes(Scene(tmp_path_factory.mktemp("scene"), TINY)))


@pytest.fixture
def find(probes: list[Probe]) -> Find:
    """Probes of a fault in the pages' file whose place holds a text."""

    def found(fault: str, place: str = "", artefact: str = "core.gguf") -> list[Probe]:
        chosen = [p for p in probes if (p.fault, p.artefact) == (fault, artefact)]
        chosen = [p for p in chosen if place in p.place]
        assert chosen
        return chosen

    return found


def some_of_each(probes: list[Probe], count: int) -> Iterator[Probe]:
    """The first of every kind."""
    seen: Counter[tuple[str, str]] = Counter()
    for probe in probes:
        seen[probe.fault, probe.artefact] += 1
        if seen[probe.fault, probe.artefact] <= count:
            yield probe


def is_missed(probes: list[Probe], reason: str) -> bool:
    """Whether one of them is, for that reason."""
    results = [run_probe(probe) for probe in probes]
    return any(r.outcome is Outcome.MISSED and reason in r.reason for r in results)


def test_nothing_is_missed(probes: list[Probe]) -> None:
    results = [run_probe(probe) for probe in some_of_each(probes, 3)]
    assert [r for r in results if r.outcome is Outcome.MISSED] == []
    assert sum(r.outcome is Outcome.DETECTED for r in results) > 40
    kinds = {(p.fault, p.artefact) for p in probes}
    assert len(kinds) == 19 and {p.section for p in probes} == {"chaos"}


def test_a_verify_that_sees_no_header(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoreFile, "header_faults", lambda _: [])
    assert is_missed(find("bit flip", "byte 300 "), "verify finds nothing")


def test_a_verify_without_digests_of_shards(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(core: Any, *arguments: Any, **options: Any) -> list[str]:
        shard_scan.scan_shards(core, *arguments, **options)
        return []

    monkeypatch.setattr(verify, "scan_shards", scan)
    monkeypatch.setattr(verify, "zip", lambda *_, **__: [], raising=False)
    assert is_missed(find("page with a forged CRC32"), "verify finds nothing")


def test_a_verify_that_names_another_page(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verify.verify_model

    def wrong(*arguments: Any, **options: Any) -> VerifyResult:
        result = found(*arguments, **options)
        bad = [f if f.page is None else verify.Fault(0, 0, "", f.reason) for f in result.bad]
        return VerifyResult(result.pages, bad)

    monkeypatch.setattr(damaged_model, "verify_model", wrong)
    assert is_missed(find("page zeroed", "page 5"), "verify names pages [0], wrong are [5]")


def test_a_reader_that_does_not_check(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_model, "check_pages", lambda *_: None)
    for fault in ("page zeroed", "pages swapped", "page of another version"):
        assert is_missed(find(fault), "is wrong and handed out")


def test_a_reader_that_takes_any_table(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def any_table(core: CoreFile, _: str) -> np.ndarray:
        return core._read_table()[: core.n_pages * 4].view("<u4").astype(np.uint32)

    monkeypatch.setattr(CoreFile, "read_crc_table", any_table)
    fault = "page of another model, table adapted"
    assert is_missed(find(fault), "is wrong and handed out")


def test_a_restore_that_does_not_look_at_the_result(
    find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AnyDigest:
        def sha256(self) -> AnyDigest:
            return self

        def update(self, _: object) -> None: ...

        def hexdigest(self) -> object:
            return _EqualsAll()

    monkeypatch.setattr(restore, "hashlib", AnyDigest())
    assert is_missed(find("page with a forged CRC32"), "restored: another file")


class _EqualsAll:
    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False


def test_a_repair_that_trusts_its_source(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "check_pages", lambda *_: None)
    monkeypatch.setattr(repair._Mender, "shard_fault", lambda *_: None)
    monkeypatch.setattr(repair, "_check_table", lambda *_: None)
    for fault in ("page zeroed", "truncation"):
        assert is_missed(find(fault), "repaired: another core.gguf")


def test_a_repair_that_does_nothing(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damaged_model, "repair_model", lambda *_: RepairResult())
    assert is_missed(find("table zeroed"), "repaired: another core.gguf")


def test_a_reader_that_takes_what_is_not_finished(
    find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(path: Path, _: object) -> None:
        pending = path.with_name(path.name + ".sgnew")
        if pending.exists():
            pending.replace(path)

    opened = sharded_model._open_core

    def careless(path: Path, shard_map: Any) -> Any:
        take(path, shard_map)
        return opened(path, shard_map)

    monkeypatch.setattr(sharded_model, "_open_core", careless)
    assert is_missed(find("remains of a dead writer"), "verify finds ")


def test_places_are_spread_evenly() -> None:
    assert spread(10, 0) == spread(10, 10) == spread(10, 99) == [*range(10)]
    assert spread(10, 2) == [0, 9] and spread(10, 1) == [0] and spread(0, 5) == []
    assert spread(101, 5) == [0, 25, 50, 75, 100]
    assert cut_points(1500, [0, 700, 1500], 0) == [0, 1, 512, 699, 700, 701, 1024, 1499]
