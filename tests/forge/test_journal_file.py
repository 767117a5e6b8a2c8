"""Journals that are damaged, or were made by a stranger: refused in a line, nothing written."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import xxhash

from forge.errors import GGUFShardError
from forge.journal import JournalWriter, finish_journal, journal_path

_PAGES, _MAP = bytes(range(1, 101)), b"the map"


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    """Two files that stand for a sharded model; what is in them is all the same to a journal."""
    (tmp_path / "core.gguf").write_bytes(_PAGES)
    (tmp_path / "core.sgmap").write_bytes(_MAP)
    return tmp_path / "core.sgmap"


def assert_refused(owner: Path, journal: bytes, reason: str = ".") -> None:
    journal_path(owner).write_bytes(journal)
    with pytest.raises(GGUFShardError, match=reason) as refused:
        finish_journal(owner)
    line = str(refused.value)
    assert line.startswith(f"{journal_path(owner)}: ") and "\n" not in line
    assert "cannot be finished; delete it and replace the model" in line
    assert owner.read_bytes() == _MAP and owner.with_name("core.gguf").read_bytes() == _PAGES
    assert journal_path(owner).read_bytes() == journal


def small_journal(owner: Path) -> bytes:
    with JournalWriter(owner, [("core.gguf", 110), ("core.sgmap", 5)], 99) as writer:
        writer.record(0, 90, b"0123456789abcdef")
        writer.record(1, 1, b"HE")
        writer.record(0, 3, b"x")
        writer.commit()
    return journal_path(owner).read_bytes()


@pytest.mark.no_cover
def test_every_flipped_bit_is_found(owner: Path) -> None:
    journal = small_journal(owner)
    for place in range(8 * len(journal)):
        flipped = bytearray(journal)
        flipped[place // 8] ^= 1 << place % 8
        assert_refused(owner, bytes(flipped))


def test_every_length_but_the_right_one_is_found(owner: Path) -> None:
    journal = small_journal(owner)
    for length in range(len(journal)):
        assert_refused(owner, journal[:length])
    for more in (b"\0", b"x", bytes(4096), journal):
        assert_refused(owner, journal + more, "digest does not hold")
        assert_refused(owner, more + journal)


Row = tuple[int, int, int]
PAGES = ("core.gguf", 100, 100)


def made(
    files: Sequence[tuple[str | bytes, int, int]] = (PAGES,),
    records: Sequence[Sequence[Row]] = ([(0, 3, 0)],),
    samples: Sequence[Sequence[Row]] = ([],),
    data: bytes = b"abc",
    **wrong: Any,
) -> bytes:
    """A journal as it is asked for, with the right digest."""
    head = struct.pack(
        "<8sII", wrong.get("magic", b"SGJOURNL"), wrong.get("version", 1),
        wrong.get("n_files", len(files)),
    )  # fmt: skip
    for text, before, after in files:
        name = text.encode() if isinstance(text, str) else text
        head += struct.pack("<QQI", before, after, wrong.get("name_bytes", len(name))) + name
    rows = [row for table in (*records, *samples) for row in table]
    tables = b"".join(struct.pack("<3Q", *row) for row in rows)
    counts = [(len(r), len(s)) for r, s in zip(records, samples, strict=True)]
    tables += b"".join(struct.pack("<2Q", *pair) for pair in wrong.get("counts", counts))
    whole = head + data + tables + struct.pack("<Q", wrong.get("data_bytes", len(data)))
    return whole + xxhash.xxh3_128_digest(whole)


def test_what_is_made_here_is_a_journal(owner: Path) -> None:
    samples = [
        [(0, 3, xxhash.xxh3_64_intdigest(_PAGES[:3]))],
        [(0, 1, xxhash.xxh3_64_intdigest(_MAP[:1]))],
    ]
    assert small_journal(owner) == made(
        [("core.gguf", 100, 110), ("core.sgmap", 7, 5)],
        [[(3, 1, 18), (90, 16, 0)], [(1, 2, 16)]],
        samples,
        b"0123456789abcdefHEx",
    )
    journal_path(owner).write_bytes(made())
    assert finish_journal(owner)
    assert owner.with_name("core.gguf").read_bytes() == b"abc" + _PAGES[3:]


TWO = [PAGES, ("core.sgmap", 7, 7)]
FOREIGN = [
    "", ".", "..", "../core.gguf", "/etc/passwd", "sub/core.gguf", "./core.gguf", "other.gguf",
    "core.sgmap.sgjournal", "core.gguf.sgnew", "core.gguf\n", "core-00002-of-00002.gguf", b"\xff",
]  # fmt: skip
HOSTILE: dict[str, tuple[bytes, str]] = {
    **{
        f"name {name!r}": (made([(name, 100, 100)]), r"is no file of core\.sgmap")
        for name in FOREIGN
    },
    "magic": (made(magic=b"SGJOURNX"), "offset 0: magic: b'SGJOURNX' is not b'SGJOURNL'"),
    "version": (made(version=2), "offset 8: version: 2 is not 1"),
    "no room for the files": (made(n_files=1 << 31), "offset 12: 2147483648 files do not fit"),
    "more files than the head has": (made(n_files=2), "do not fit|given twice|fit"),
    "fewer files than the head has": (made(TWO, [[], []], [[], []], n_files=1), "do not fit"),
    "a long name": (made([("n" * 256, 100, 100)]), "a name of 256 bytes does not fit"),
    "a name past the end": (made(name_bytes=200), "a name of 200 bytes does not fit"),
    "a head past the end": (
        made(n_files=2, name_bytes=69, data=bytes(30), records=[[(0, 30, 0)]]),
        "offset 105: the head does not fit",
    ),
    "a name twice": (made([PAGES, PAGES], [[(0, 3, 0)], []], [[], []]), "a file is given twice"),
    "a large file": (made([("core.gguf", 100, 1 << 63)]), "or too large"),
    "a file that was large": (made([("core.gguf", 1 << 63, 100)]), "or too large"),
    "much data": (made(data_bytes=(1 << 64) - 1), "footer: more data than the file holds"),
    "a byte more data": (made(data_bytes=4), "counts: 1 records and 0 samples do not fit"),
    "a byte less data": (made(data_bytes=2), "counts: 1 records and 0 samples do not fit"),
    "many records": (made(counts=[((1 << 64) - 1, 0)]), r"counts: 18446744073709551615 records"),
    "many samples": (made(counts=[(1, 1 << 62)]), "counts: 1 records and 4611686018427387904 sam"),
    "fewer records than data": (made(records=[[]]), "records: 0 bytes, not the 3 of the data"),
    "data left over": (made(records=[[(0, 2, 0)]]), "records: 2 bytes, not the 3 of the data"),
    "data used twice": (made(records=[[(0, 3, 0), (9, 3, 0)]]), "6 bytes, not the 3"),
    "an empty record": (made(records=[[(0, 3, 0), (9, 0, 0)]]), "records of file 0: not in order"),
    "a record outside": (made(records=[[(98, 3, 0)]]), "records of file 0: not in order, or outs"),
    "a record far outside": (made(records=[[((1 << 64) - 2, 3, 0)]]), "records of file 0: not in"),
    "a long record": (made(records=[[(1, (1 << 64) - 1, 0)]]), "records of file 0: not in order"),
    "records out of order": (made(records=[[(9, 1, 0), (0, 2, 1)]]), "records of file 0: not in o"),
    "records that overlap": (made(records=[[(0, 2, 0), (1, 1, 2)]]), "records of file 0: not in o"),
    "data outside": (made(records=[[(0, 3, 1)]]), "records of file 0: outside the data"),
    "data far outside": (made(records=[[(0, 3, (1 << 64) - 1)]]), "file 0: outside the data"),
    "the second file's record outside": (
        made(TWO, [[], [(5, 3, 0)]], [[], []]), "records of file 1: not in order, or outside it",
    ),
    "a long sample": (
        made([("core.gguf", 9999, 9999)], samples=[[(0, 4097, 0)]]), "file 0: of over 4096 bytes",
    ),
    "a sample outside": (made(samples=[[(99, 2, 0)]]), "samples of file 0: not in order"),
    "a sample of what is new": (
        made([("core.gguf", 100, 200)], samples=[[(100, 1, 0)]]), "samples of file 0: not in order",
    ),
    "an empty sample": (made(samples=[[(9, 0, 0)]]), "samples of file 0: not in order"),
    "samples out of order": (made(samples=[[(9, 1, 0), (3, 1, 0)]]), "samples of file 0: not in"),
    "another sample": (made(samples=[[(9, 1, 0)]]), r"core\.gguf: offset 9: not the file it is fo"),
    "a smaller file": (made([("core.gguf", 101, 101)]), r"core\.gguf has 100 bytes and is not the"),
    "a larger file": (made([("core.gguf", 90, 99)]), r"core\.gguf has 100 bytes and is not the"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_strangers_are_refused(case: str, owner: Path) -> None:
    assert_refused(owner, *HOSTILE[case])


def test_order_is_seen_across_the_pieces_a_table_is_read_in(
    owner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.journal_file._TABLE_ROWS", 1)
    for records in ([(9, 1, 0), (0, 2, 1)], [(0, 2, 0), (1, 1, 2)]):
        assert_refused(owner, made(records=[records]), "records of file 0: not in order")
    assert_refused(owner, made(samples=[[(9, 1, 0), (3, 1, 0)]]), "samples of file 0: not in o")


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_only_a_regular_file_is_a_journal(kind: str, owner: Path) -> None:
    path = journal_path(owner)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.with_name("elsewhere").write_bytes(made())
        path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(
        GGUFShardError, match=r"sgjournal: (is not a regular|Too many levels of sy)"
    ):
        finish_journal(owner)
    assert owner.with_name("core.gguf").read_bytes() == _PAGES
