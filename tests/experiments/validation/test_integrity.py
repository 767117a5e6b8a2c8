"""The integrity part: nothing missed, and each protection that is switched off is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import config

from atlas.host_store import FileStore
from atlas.manager import Atlas
from atlas.ops import gather
from atlas.ops.page_faults import MAGIC_FAULT, TABLE_FAULT, TAG_FAULT
from experiments.validation import cached_pages, integrity
from experiments.validation import patch_pairs as pairs
from experiments.validation.effort import Effort
from experiments.validation.probe import Matrix, Outcome, Probe, run_probe
from experiments.validation.scene import Scene
from forge.core_file import CoreFile
from forge.pages import tag_pages
from forge.shard_scan import faulty_pages
from forge.verify import VerifyResult

TINY = Effort("tiny", flips=8, random_flips=1, every=50, kills=1, fuzz_seconds=0,
              throughput_bytes=1 << 20, repeats=1)  # fmt: skip


def every_probe(scene: Scene) -> Iterator[Probe]:
    """All of the section."""
    for part in (integrity, pairs, cached_pages):
        yield from part.probes(scene)


by_loops = pytest.mark.skipif(
    bool(config.ENABLE_CUDASIM), reason="the simulator has no compiled loops: too slow"
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), TINY)


@pytest.fixture(scope="module")
def probes(scene: Scene) -> list[Probe]:
    return list(every_probe(scene))


Find = Callable[..., Iterator[Probe]]


@pytest.fixture
def find(probes: list[Probe]) -> Find:
    """Probes of a fault and an artefact whose place holds a text."""

    def found(fault: str, artefact: str, place: str = "") -> Iterator[Probe]:
        chosen = [
            probe for probe in probes
            if (probe.fault, probe.artefact) == (fault, artefact) and place in probe.place
        ]  # fmt: skip
        assert chosen
        return iter(chosen)

    return found


def is_missed(probe: Probe, reason: str) -> bool:
    result = run_probe(probe)
    return result.outcome is Outcome.MISSED and reason in result.reason


@by_loops
def test_nothing_is_missed(probes: list[Probe]) -> None:
    matrix = Matrix()
    kinds = itertools.groupby(probes, key=lambda probe: (probe.fault, probe.artefact))
    for _, group in kinds:
        on_cpu = [probe for probe in group if not probe.place.startswith("cuda")]
        for probe in on_cpu[::11]:
            matrix.add(run_probe(probe))
    assert matrix.misses == []
    assert matrix.total(Outcome.DETECTED) > 20 < matrix.total(Outcome.HARMLESS)
    assert {probe.section for probe in probes} == {"integrity"}


@pytest.mark.cuda
def test_nothing_is_missed_on_a_gpu(probes: list[Probe]) -> None:
    matrix = Matrix()
    for probe in probes:
        # In the simulator all elements of a page take their time.
        if probe.place.startswith("cuda") and "values" not in probe.fault:
            matrix.add(run_probe(probe))
    assert matrix.misses == [] and not matrix.unavailable
    assert matrix.total(Outcome.DETECTED) > 20


def test_what_is_tried_is_told_apart(probes: list[Probe]) -> None:
    keys = [(probe.fault, probe.artefact, probe.place) for probe in probes]
    assert len(set(keys)) == len(keys)


def test_full_tries_every_combination(tmp_path: Path) -> None:
    full = Effort("full", flips=0, random_flips=1, every=1, kills=1, fuzz_seconds=0,
                  throughput_bytes=1 << 20, repeats=1)  # fmt: skip
    kinds = [(probe.fault, probe.artefact) for probe in every_probe(Scene(tmp_path, full))]
    assert kinds.count(("bit flip", "frames")) > 2 * 4096
    assert kinds.count(("none: every pair", "apply in place")) == 28
    assert kinds.count(("torn write", "core.gguf")) == 5


@pytest.mark.parametrize(
    ("mark", "fault"),
    [
        (TAG_FAULT, "tag of another page"),
        (MAGIC_FAULT, "bit flip"),
        (TABLE_FAULT, "page of another place"),
    ],
)
def test_a_mark_that_is_not_compared_is_missed(
    find: Find, monkeypatch: pytest.MonkeyPatch, mark: np.uint32, fault: str
) -> None:
    loop = gather.check_frames_loop

    def lenient(*arguments: Any) -> None:
        loop(*arguments)
        arguments[-1][:] &= ~mark

    monkeypatch.setattr(gather, "check_frames_loop", lenient)
    place = "cpu, byte 4095" if mark == MAGIC_FAULT else "cpu, "
    assert is_missed(next(find(fault, "frames", place)), "faults are")


def test_files_whose_tags_are_not_compared_are_missed(
    find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lenient(pages: np.ndarray, table: np.ndarray) -> np.ndarray:
        tagged = pages.copy()
        tag_pages(tagged)
        return faulty_pages(tagged, table)

    monkeypatch.setattr(integrity, "faulty_pages", lenient)
    assert is_missed(next(find("tag of another page", "frames", "files")), "faults are")


def test_a_wrong_checksum_is_missed(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    right = integrity.crc32.crc32_pages

    def wrong(pages: np.ndarray, out: np.ndarray) -> np.ndarray:
        right(pages, out)
        out[-1:] ^= 1
        return out

    monkeypatch.setattr(integrity.crc32, "crc32_pages", wrong)
    probe = next(find("none: CRC32 is zlib's", "frames", "files, 65 pages at byte 8"))
    assert is_missed(probe, "not zlib's")


def flip_bit_of(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_wrong_restoration_is_missed(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    right = integrity.restore_model

    def wrong(map_path: Path, output: Path) -> list[Path]:
        paths = right(map_path, output)
        flip_bit_of(paths[-1])
        return paths

    monkeypatch.setattr(integrity, "restore_model", wrong)
    for fault, place in (("every type", "IQ2_S, row"), ("every shape", "split in three")):
        assert is_missed(next(find(f"none: {fault}", "model.gguf", place)), "bytes differ")


@by_loops
def test_other_values_are_missed(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Atlas.tensor

    def wrong(self: Atlas, name: str, index: int = 0) -> Any:
        out = right(self, name, index)
        out[-1, -1] += 1
        return out

    monkeypatch.setattr(Atlas, "tensor", wrong)
    assert is_missed(next(find("none: values are gguf's", "frames", "cpu")), "other values")


@pytest.mark.parametrize(
    ("artefact", "reason"),
    [
        ("apply", "other bytes"),
        ("apply in place", "other bytes"),
        ("apply in place, pages", "core.gguf is not what sharding the target gives"),
        ("diff", "other bytes"),
    ],
)
def test_a_wrong_update_is_missed(
    find: Find, monkeypatch: pytest.MonkeyPatch, artefact: str, reason: str
) -> None:
    apply, in_place = pairs.apply_patch, pairs.update_in_place

    def wrong(base: Path, patch: Path, output: Path, **options: bool) -> list[Path]:
        paths = apply(base, patch, output, **options)
        flip_bit_of(paths[0])
        return paths

    def wrong_in_place(path: Path, patch: Path, **options: bool) -> None:
        in_place(path, patch, **options)
        flip_bit_of(path.with_suffix(".gguf"))

    monkeypatch.setattr(pairs, "apply_patch", wrong)
    monkeypatch.setattr(pairs, "update_in_place", wrong_in_place)
    assert is_missed(next(find("none: every pair", artefact, "one tensor")), reason)


def test_a_table_that_is_not_held_against_the_map_is_missed(
    find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CoreFile.read_crc_table

    def lenient(self: CoreFile, digest: str) -> np.ndarray:
        table = np.empty(self.n_pages, np.uint32)
        self.read_bytes(4096 * (1 + self.n_pages), table.view(np.uint8))
        return table

    exchange = next(find("page and table entry exchanged", "core.gguf"))
    assert run_probe(exchange).outcome is Outcome.DETECTED
    monkeypatch.setattr(CoreFile, "read_crc_table", lenient)
    assert is_missed(exchange, "opened, or not")
    monkeypatch.setattr(CoreFile, "read_crc_table", right)
    monkeypatch.setattr(integrity, "verify_model", lambda *_: VerifyResult())
    for fault in integrity._EXCHANGES:
        assert is_missed(next(find(fault, "core.gguf")), "verify finds nothing")


@by_loops
def test_a_page_that_is_not_checked_is_missed(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(*arguments: Any) -> None:
        arguments[-1][:] = 0

    monkeypatch.setattr(gather, "check_frames_loop", blind)
    assert is_missed(next(find("page zeroed", "frames", "cpu, in a swap")), "is resident")
    opened = [p for p in find("page zeroed", "core.gguf") if "norm" not in p.place]
    assert is_missed(opened[0], "")
    assert is_missed(next(find("tag changed", "frames", "resident")), "scrubbing has not found")


@by_loops
def test_an_error_that_names_another_page_is_missed(
    find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FileStore.corrupt_page
    monkeypatch.setattr(FileStore, "corrupt_page", lambda self, page, at: right(self, page - 1, at))
    assert is_missed(next(find("bit flip", "frames", "cpu, in a swap")), "names (")


@by_loops
def test_trouble_beside_compute_is_missed(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = next(find("none: swaps beside compute", "run", "shards of 64"))
    with monkeypatch.context() as patch:
        patch.setattr(Atlas, "scrub", lambda self, n: n and 1 // 0)
        assert is_missed(beside, "scrub: ")
    with monkeypatch.context() as patch:
        right = Atlas.rows
        patch.setattr(Atlas, "rows", lambda self, w, numbers: right(self, w, numbers) + 1)
        assert is_missed(beside, "other tokens")
