"""Groups decoded while the base is hashed: as many as there is time and room for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from delta import decode_ahead, rehearsal
from delta.apply import apply_patch
from delta.bound_patch import BoundPatch, Piece
from delta.decode_ahead import DecodedAhead
from delta.diff import create_patch
from delta.patch_file import PatchReader, StoredGroup
from delta.source_model import open_source
from delta.target_builder import groups_in_order
from experiments.validation import gguf_factory as factory
from forge.errors import GGUFShardError

TYPES = (T.F16, T.BF16, T.F32, T.Q8_0, T.Q4_0)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, target and patch; all is stored."""
    base, target = (
        factory.write(tmp_path / f"{name}.gguf", factory.gguf(
            [factory.tensor(f"{t.name}.weight", t, (64, 300), seed) for t in TYPES]
        ))
        for name, seed in (("base", 1), ("target", 2))
    )  # fmt: skip
    create_patch(base, target, tmp_path / "p")
    return base, target, tmp_path / "p"


@pytest.fixture
def bound(files: tuple[Path, Path, Path]) -> Iterator[BoundPatch]:
    with PatchReader(files[2]) as reader, open_source(files[0]) as base:
        yield BoundPatch(reader, base)


class Decoded:
    """Counts what is decoded, and does something then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offsets: list[int] = []
        self.fail_at = -1
        decode = BoundPatch.decode

        def counted(bound: BoundPatch, stored: StoredGroup) -> list[Piece]:
            self.offsets.append(stored.offset)
            if len(self.offsets) - 1 == self.fail_at:
                raise GGUFShardError("of another base")
            return decode(bound, stored)

        monkeypatch.setattr(BoundPatch, "decode", counted)


def test_each_group_is_decoded_once(bound: BoundPatch, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = list(groups_in_order(bound))
    assert sorted(groups) == list(range(len(bound.groups))) and len(groups) > 3
    expected = {group: bound.decode(bound.groups[group]) for group in groups}
    decoded = Decoded(monkeypatch)
    sizes = [bound.groups[group].group.n_bytes for group in groups]
    monkeypatch.setattr(decode_ahead, "_MOST_BYTES", sum(sizes[:3]))
    ahead = DecodedAhead(bound, groups).run(threading.Event())
    assert decoded.offsets == [bound.groups[group].offset for group in groups[:3]]
    for group in groups:
        found = ahead.take(group)
        for a, b in zip(found, expected[group], strict=True):
            assert (a.run, a.first_page) == (b.run, b.first_page)
            np.testing.assert_array_equal(a.data, b.data)
    assert len(decoded.offsets) == len(set(decoded.offsets)) == len(groups)


def test_it_ends_when_told(bound: BoundPatch, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    stop.set()
    decoded = Decoded(monkeypatch)
    ahead = DecodedAhead(bound, groups_in_order(bound)).run(stop)
    assert not decoded.offsets and ahead.take(0) and len(decoded.offsets) == 1


def test_what_fails_ahead_counts_when_it_is_needed(
    files: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a wrong base it is the base that is wrong; what fails once may do the next time."""
    base, target, patch = files
    monkeypatch.setattr(rehearsal, "_MOST_STORED_BYTES", -1)
    run = DecodedAhead.run  # as if hashing took long
    monkeypatch.setattr(DecodedAhead, "run", lambda ahead, _: run(ahead, threading.Event()))
    decoded = Decoded(monkeypatch)
    decoded.fail_at = 0
    apply_patch(base, patch, tmp_path / "new.gguf")
    assert (tmp_path / "new.gguf").read_bytes() == target.read_bytes()
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.write_bytes(data)
    decoded.offsets.clear()
    with pytest.raises(GGUFShardError, match="not the patch's base"):
        apply_patch(base, patch, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()
