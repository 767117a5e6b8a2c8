"""Targets are made while the base is hashed; nothing is written before both are right."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from delta import apply, rehearsal
from delta.apply import FileSink, apply_patch
from delta.bound_patch import COPIED, BoundPatch, Piece, RunEdits
from delta.checked_patch import CheckedPatch
from delta.diff import create_patch
from delta.patch_file import PatchReader, StoredGroup
from delta.rehearsal import Rehearsal
from delta.source_model import PlainModel, SourceModel, open_source
from delta.target_pages import TargetPages
from experiments.validation.gguf_factory import Tensor, gguf, split_model, tensor
from forge.errors import GGUFShardError
from forge.pending_file import PendingFile
from forge.shard import shard_model
from tests.delta.model_pairs import CASES


@pytest.fixture
def pair(tmp_path: Path) -> Sequence[Path]:
    """Base, target, a patch between them, and a path for what is made."""
    paths = [tmp_path / name for name in ("base.gguf", "target.gguf", "p", "new.gguf")]
    for path, data in zip(paths, CASES["everything"], strict=False):
        path.write_bytes(data)
    create_patch(*paths[:3])
    return paths


@pytest.fixture
def no_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("something is written")

    monkeypatch.setattr(apply, "PendingFile", fail)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stretch_bytes", [1, 10_000])
def test_stretches_do_not_matter(
    case: str, stretch_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, target, patch, new = (tmp_path / name for name in ("base.gguf", "t.gguf", "p", "n.gguf"))
    for path, data in zip((base, target), CASES[case], strict=True):
        path.write_bytes(data)
    create_patch(base, target, patch)
    monkeypatch.setattr(rehearsal, "_STRETCH_BYTES", stretch_bytes)
    done: list[int] = []
    with PatchReader(patch) as reader, PlainModel(base) as model:
        bound = CheckedPatch(reader, model)
        with PendingFile(new, bound.files[0].bytes) as file:
            settled = list[int]()
            monkeypatch.setattr(file, "settle", settled.append)
            bound.build(FileSink([file]), done.append)
            file.commit()
    assert new.read_bytes() == CASES[case][1]
    assert sum(done) == len(CASES[case][1])
    n_bytes = len(CASES[case][1])
    assert settled == sorted(settled)
    assert settled[-1:] == [n_bytes] or bound.headers[0].header_bytes == n_bytes


@pytest.mark.usefixtures("no_writing")
@pytest.mark.parametrize("place", [0, 200, -1])
def test_another_base_of_the_same_size(pair: Sequence[Path], place: int) -> None:
    """Its header may be anything, and what the patch says of it; it is the base that is wrong."""
    base, _, patch, new = pair
    for header in (CASES["tensors reordered"][1], CASES["everything"][1]):
        other = np.frombuffer(header, np.uint8).copy()
        other = np.resize(other, base.stat().st_size)
        if place:
            other[place] ^= 1
        base.write_bytes(other.tobytes())
        with pytest.raises(GGUFShardError) as raised:
            apply_patch(base, patch, new)
        message = str(raised.value)
        assert "not the patch's base" in message or message.startswith(f"{base}: ")


@pytest.mark.usefixtures("no_writing")
def test_a_patch_that_does_not_make_its_target(
    pair: Sequence[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, patch, new = pair
    decode = BoundPatch.decode

    def almost(self: BoundPatch, *arguments: object) -> object:
        pieces = decode(self, *arguments)  # type: ignore[arg-type]
        pieces[0].data[7] ^= 1
        return pieces

    monkeypatch.setattr(BoundPatch, "decode", almost)
    with pytest.raises(GGUFShardError, match=f"{patch}: .*the patch does not make its target"):
        apply_patch(base, patch, new)


@pytest.mark.parametrize("most_stored_bytes", [1 << 30, -1])
@pytest.mark.parametrize("bad", [0, 1])
def test_every_file_has_a_digest(
    tmp_path: Path, bad: int, most_stored_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the target is rehearsed or not."""
    first = []
    for name, seed in (("base", 0), ("target", 10)):
        (tmp_path / name).mkdir()
        parts = [[tensor(f"{i}.weight", GGMLQuantizationType.F16, (64, 90), seed + i)]
                 for i in range(2)]  # fmt: skip
        first.append(split_model(tmp_path / name, parts))
    create_patch(*first, tmp_path / "p")
    decode = BoundPatch.decode

    def almost(self: BoundPatch, stored: StoredGroup) -> list[Piece]:
        pieces = decode(self, stored)
        for piece in pieces:
            if piece.run.part == bad:
                piece.data[7] ^= 1
        return pieces

    monkeypatch.setattr(BoundPatch, "decode", almost)
    monkeypatch.setattr(rehearsal, "_MOST_STORED_BYTES", most_stored_bytes)
    (tmp_path / "new").mkdir()
    with pytest.raises(GGUFShardError, match=f"model-0000{bad + 1}-of-00002.gguf would have SHA"):
        apply_patch(first[0], tmp_path / "p", tmp_path / "new" / "model-00001-of-00002.gguf")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.usefixtures("no_writing")
def test_a_wrong_base_counts_more_than_what_is_made_of_it(
    pair: Sequence[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, patch, new = pair
    data = bytearray(base.read_bytes())
    data[-5] ^= 1
    base.write_bytes(data)

    def fail(*_: object) -> None:
        raise GGUFShardError("made of it")

    monkeypatch.setattr(Rehearsal, "run", fail)
    with pytest.raises(GGUFShardError, match=f"{base}: .*not the patch's base"):
        apply_patch(base, patch, new)


@pytest.mark.parametrize("bad", [10, 12_345])
def test_what_was_written_is_read_back(pair: Sequence[Path], bad: int) -> None:
    """The header, and all else."""

    class BadDisk(FileSink):
        def read_into(self, part: int, offset: int, buffer: np.ndarray) -> None:
            super().read_into(part, offset, buffer)
            if offset <= bad < offset + len(buffer):
                buffer[bad - offset] ^= 8

    base, _, patch, new = pair
    with PatchReader(patch) as reader, PlainModel(base) as model:
        bound = CheckedPatch(reader, model)
        assert 10 < len(bound.header_bytes[0]) < 12_345
        with (
            PendingFile(new, bound.files[0].bytes) as file,
            pytest.raises(GGUFShardError, match=r"target.gguf: offset \d+: what was written"),
        ):
            bound.build(BadDisk([file]), lambda n_bytes: None)


def test_a_base_that_changes_in_between(pair: Sequence[Path]) -> None:
    """Even if nobody looks at its times."""
    base, target, patch, new = pair
    data = bytearray(CASES["everything"][0])
    target.write_bytes(data[:-100] + bytes(100))  # most is kept
    create_patch(base, target, patch, force=True)
    with PatchReader(patch) as reader, PlainModel(base) as model:
        bound = CheckedPatch(reader, model)
        with base.open("r+b") as file:
            file.seek(-5000, 2)
            file.write(b"changed")
        with (
            PendingFile(new, bound.files[0].bytes) as pending,
            pytest.raises(GGUFShardError, match="what was written is not what the base gave"),
        ):
            bound.build(FileSink([pending]), lambda n_bytes: None)


def _with_bytes(data: bytes, places: Sequence[int], values: bytes) -> bytes:
    changed = bytearray(data)
    for place, value in zip(places, values, strict=True):
        changed[place] ^= value
    return bytes(changed)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n_edits", [3, 900])
def test_single_bytes_and_copies_of_such_pages(tmp_path: Path, n_edits: int, reverse: bool) -> None:
    """Few changed bytes need no pages of their own; many take less memory as pages."""
    page = 4088
    random = np.random.default_rng(5)
    weights = random.bytes(40 * page)
    edits = [7 * page + i * 4 for i in range(n_edits)]
    changed = _with_bytes(weights, edits, bytes([9]) * n_edits)
    changed = changed[: 20 * page] + changed[7 * page : 8 * page] + changed[21 * page :]
    paths = [tmp_path / name for name in ("base.gguf", "target.gguf", "p", "new.gguf")]
    for path, data in zip(paths, (weights, changed), strict=False):
        weight = Tensor("w", int(GGMLQuantizationType.F16), (page // 2, 40), data)
        path.write_bytes(gguf([weight]))
    base, target, patch, new = paths
    create_patch(base, target, patch, reversible=True)
    if reverse:
        base, target = target, base
    with PatchReader(patch) as reader, PlainModel(base) as model:
        bound = BoundPatch(reader, model, reverse)
        pages = TargetPages(bound)
        kinds = {type(part) for group in range(len(bound.groups)) for part in pages.decode(group)}
        if not reverse:
            index = [run.name for run in bound.runs].index("w")
            sources = bound.sources[index]
            assert sources[20] == COPIED and sources[7] >= 0
            assert pages.groups_of(index, 20, 1) == [sources[7]]
            assert kinds == {RunEdits if n_edits == 3 else Piece}
    apply_patch(base, patch, new, reverse=reverse)
    assert new.read_bytes() == target.read_bytes()


def _is_worthwhile(base: SourceModel, patch: Path) -> bool:
    with PatchReader(patch) as reader:
        return Rehearsal.is_worthwhile(BoundPatch(reader, base))


def test_what_is_rehearsed(
    pair: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, patch, _ = pair
    sharded = shard_model(base, tmp_path / "sharded")
    with open_source(base) as plain, open_source(sharded) as pages:
        assert not _is_worthwhile(pages, patch)  # its map says what it is
        assert _is_worthwhile(plain, patch)
        with PatchReader(patch) as reader:
            stored = sum(group.group.n_bytes for group in reader.groups)
        monkeypatch.setattr("delta.rehearsal._MOST_STORED_BYTES", stored)
        assert _is_worthwhile(plain, patch)
        monkeypatch.setattr("delta.rehearsal._MOST_STORED_BYTES", stored - 1)
        assert not _is_worthwhile(plain, patch)
        monkeypatch.setattr("delta.rehearsal._MOST_STORED_BYTES", 1 << 40)
        monkeypatch.setattr("delta.rehearsal._FEW_STORED_BYTES", stored - 1)
        share = stored / plain.n_bytes  # as large as the target
        for most, is_worthwhile in ((share * 1.001, True), (share * 0.999, False)):
            monkeypatch.setattr("delta.rehearsal._MOST_STORED_SHARE", most)
            assert _is_worthwhile(plain, patch) == is_worthwhile


def test_who_does_not_wait_ends_it(pair: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, patch, new = pair
    ended: list[BaseException] = []
    run = Rehearsal.run

    def slowly(self: Rehearsal, stop: threading.Event) -> Rehearsal:
        assert stop.wait(60), "nobody has ended it"
        try:
            return run(self, stop)
        except CancelledError as error:
            ended.append(error)
            raise

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Rehearsal, "run", slowly)
    monkeypatch.setattr(PlainModel, "sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_patch(base, patch, new)
    assert len(ended) == 1 and not new.exists()
