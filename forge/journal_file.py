"""The file of a journal (`forge.journal`): its layout, and reading it without trusting it.

Integers are little-endian.

    head      magic `SGJOURNL`, u32 version 1, u32 number of files; for each file u64 its size
              before, u64 its size afterwards, u32 bytes of its name, the name
    data      what the records write, in the order it was recorded
    records   u64 [n, 3]: offset in the file, bytes, where they begin in the data; for each file in
              turn, in ascending order of offset, disjoint; together they take up the data
    samples   u64 [m, 3]: offset, bytes and xxh3-64 of bytes that the change leaves alone; likewise
    counts    u64 [files, 2]: records, samples
    footer    u64 bytes of the data; xxh3-128 of all before it (16 bytes, the highest first)

The digest is compared first, so all other checks only meet what somebody made on purpose.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from forge.errors import GGUFShardError
from forge.input_file import read_fully

_MAGIC = b"SGJOURNL"
_VERSION = 1
_START = struct.Struct("<8sII")
_FILE = struct.Struct("<QQI")
_DIGEST_BYTES = 16
_MAX_NAME_BYTES = 255
_MAX_FILE_BYTES = (1 << 63) - 1
_ROW_BYTES = 24
_COUNTS_BYTES = 16
_TABLE_ROWS = 4096
_KINDS = ("records", "samples")
_RECORDS, _SAMPLES = range(2)
_PIECE_BYTES = 4 << 20

MAX_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Target:
    """A file to change: its bare name, and its bytes before and afterwards."""

    name: str
    size_before: int
    size_after: int

    @property
    def growth(self) -> int:
        return max(0, self.size_after - self.size_before)

    @property
    def kept(self) -> int:
        """Bytes that are in the file before and afterwards."""
        return min(self.size_before, self.size_after)


def head_bytes(targets: Sequence[Target]) -> bytes:
    """The head of a journal."""
    parts = [_START.pack(_MAGIC, _VERSION, len(targets))]
    for target in targets:
        name = os.fsencode(target.name)
        parts += [_FILE.pack(target.size_before, target.size_after, len(name)), name]
    return b"".join(parts)


def tail_bytes(counts: Sequence[tuple[int, int]], data_bytes: int) -> bytes:
    """What stands between the tables and the digest: the counts, the bytes of the data."""
    return np.array(counts, "<u8").tobytes() + struct.pack("<Q", data_bytes)


def _rise(table: np.ndarray, end: int) -> bool:
    """Whether offsets and bytes of a table's rows are ranges in order, apart, and within `end`."""
    offsets, sizes = table[:, 0], table[:, 1]
    if (offsets > end).any() or (sizes > end - offsets).any() or not sizes.all():
        return False
    return bool((offsets[:-1] + sizes[:-1] <= offsets[1:]).all())


class JournalFile:
    """A journal opened for reading; a context manager. Nothing of it is used before `verify`.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    path, bytes
        The same, and its size.
    targets
        What it changes, once it is verified.

    Raises
    ------
    GGUFShardError
        If it is not a regular file.
    OSError
        If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.targets: tuple[Target, ...] = ()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        status = os.fstat(self._descriptor)
        self.bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise GGUFShardError(f"{path}: is not a regular file")

    def __enter__(self) -> JournalFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def fileno(self) -> int:
        """The descriptor of the open file."""
        return self._descriptor

    def damaged(self, reason: str) -> GGUFShardError:
        """One line for a journal that can never be finished."""
        return GGUFShardError(
            f"{self.path}: {reason}: the update in place that it holds cannot be finished; "
            "delete it and replace the model"
        )

    def verify(self, advance: Callable[[int], None] = lambda n_bytes: None) -> None:
        """Check all of it, in bounded memory; `advance` is told of the bytes that were read.

        Raises
        ------
        GGUFShardError
            If anything does not hold.
        """
        self._verify_digest(advance)
        (self._data_bytes,) = struct.unpack("<Q", self._read(self.bytes - _DIGEST_BYTES - 8, 8))
        self._data_begin = self._read_head()
        n_files = len(self.targets)
        counts_begin = self.bytes - _DIGEST_BYTES - 8 - n_files * _COUNTS_BYTES
        tables_begin = self._data_begin + self._data_bytes
        if counts_begin < tables_begin:
            raise self.damaged("footer: more data than the file holds")
        counts = np.frombuffer(self._read(counts_begin, n_files * _COUNTS_BYTES), "<u8")
        self._counts = [(int(n), int(m)) for n, m in counts.reshape(-1, 2)]
        n_records = sum(n for n, _ in self._counts)
        n_samples = sum(m for _, m in self._counts)
        if tables_begin + (n_records + n_samples) * _ROW_BYTES != counts_begin:
            raise self.damaged(f"counts: {n_records} records and {n_samples} samples do not fit")
        self._table_begins = (tables_begin, tables_begin + n_records * _ROW_BYTES)
        self._verify_tables()

    def _verify_digest(self, advance: Callable[[int], None]) -> None:
        if self.bytes < _START.size + 8 + _DIGEST_BYTES:
            raise self.damaged(f"has {self.bytes} bytes")
        magic, version, _ = _START.unpack(self._read(0, _START.size))
        if magic != _MAGIC:
            raise self.damaged(f"offset 0: magic: {magic!r} is not {_MAGIC!r}")
        if version != _VERSION:
            raise self.damaged(f"offset 8: version: {version} is not {_VERSION}")
        digest = xxhash.xxh3_128()
        end = self.bytes - _DIGEST_BYTES
        buffer = np.empty(min(end, _PIECE_BYTES), np.uint8)
        for offset in range(0, end, _PIECE_BYTES):
            part = buffer[: min(_PIECE_BYTES, end - offset)]
            read_fully(self._descriptor, part.data, offset, self.path)
            digest.update(part)
            advance(part.size)
        if digest.digest() != self._read(end, _DIGEST_BYTES):
            raise self.damaged("its digest does not hold")

    def _read_head(self) -> int:
        """Set the targets; returns where the head ends."""
        _, _, n_files = _START.unpack(self._read(0, _START.size))
        end = self.bytes - _DIGEST_BYTES - 8
        offset = _START.size
        if n_files * (_FILE.size + 1 + _COUNTS_BYTES) > end - offset:
            raise self.damaged(f"offset 12: {n_files} files do not fit")
        targets: dict[str, Target] = {}
        for _ in range(n_files):
            if offset + _FILE.size > end:
                raise self.damaged(f"offset {offset}: the head does not fit")
            before, after, length = _FILE.unpack(self._read(offset, _FILE.size))
            offset += _FILE.size
            if length > min(_MAX_NAME_BYTES, end - offset):
                raise self.damaged(f"offset {offset}: a name of {length} bytes does not fit")
            name = os.fsdecode(self._read(offset, length))
            if name in targets or max(before, after) > _MAX_FILE_BYTES:
                raise self.damaged(f"offset {offset}: a file is given twice, or too large")
            targets[name] = Target(name, before, after)
            offset += length
        self.targets = tuple(targets.values())
        return offset

    def _verify_tables(self) -> None:
        total = 0
        for file, target in enumerate(self.targets):
            for table in self._ascending(_RECORDS, file, target.size_after):
                sizes, positions = table[:, 1], table[:, 2]
                outside = positions > self._data_bytes
                if outside.any() or (sizes > self._data_bytes - positions).any():
                    raise self.damaged(f"records of file {file}: outside the data")
                total += int(sizes.sum())
            for table in self._ascending(_SAMPLES, file, target.kept):
                if (table[:, 1] > MAX_SAMPLE_BYTES).any():
                    raise self.damaged(f"samples of file {file}: of over {MAX_SAMPLE_BYTES} bytes")
        if total != self._data_bytes:
            raise self.damaged(f"records: {total} bytes, not the {self._data_bytes} of the data")

    def _ascending(self, kind: int, file: int, end: int) -> Iterator[np.ndarray]:
        """The table of a file, once its rows are seen to be ranges in order, apart, up to `end`."""
        end_before = 0
        for table in self._tables(kind, file):
            if not _rise(table, end) or table[0, 0] < end_before:
                raise self.damaged(f"{_KINDS[kind]} of file {file}: not in order, or outside it")
            end_before = int(table[-1, 0] + table[-1, 1])
            yield table

    def pieces(self, file: int) -> Iterator[tuple[int, np.ndarray]]:
        """What is written into a file, in order of (offset, uint8 [n] until the next is asked)."""
        buffer = np.empty(_PIECE_BYTES, np.uint8)
        begin = end = 0  # what the buffer holds of the data
        for offset, size, position in self._rows(_RECORDS, file):
            last = position + size
            while position < last:
                if not begin <= position < end:
                    # Where short records follow each other in the data, ever more are read at once.
                    wanted = last - position if position != end else max(size, 2 * (end - begin))
                    begin = position
                    end = min(begin + wanted, begin + _PIECE_BYTES, self._data_bytes)
                    part = buffer[: end - begin]
                    read_fully(self._descriptor, part.data, self._data_begin + begin, self.path)
                n_bytes = min(end, last) - position
                yield offset, buffer[position - begin :][:n_bytes]
                position += n_bytes
                offset += n_bytes

    def samples(self, file: int) -> Iterator[list[int]]:
        """What the change leaves alone of a file, here and there: [offset, bytes, xxh3-64]."""
        return self._rows(_SAMPLES, file)

    def _rows(self, kind: int, file: int) -> Iterator[list[int]]:
        for table in self._tables(kind, file):
            yield from table.tolist()

    def _tables(self, kind: int, file: int) -> Iterator[np.ndarray]:
        """Records or samples of a file, uint64 [n, 3] at a time."""
        first = sum(counts[kind] for counts in self._counts[:file])
        n_rows = self._counts[file][kind]
        for row in range(first, first + n_rows, _TABLE_ROWS):
            n_bytes = min(_TABLE_ROWS, first + n_rows - row) * _ROW_BYTES
            data = self._read(self._table_begins[kind] + row * _ROW_BYTES, n_bytes)
            yield np.frombuffer(data, "<u8").reshape(-1, 3)

    def _read(self, offset: int, n_bytes: int) -> bytes:
        data = bytearray(n_bytes)
        read_fully(self._descriptor, memoryview(data), offset, self.path)
        return bytes(data)
