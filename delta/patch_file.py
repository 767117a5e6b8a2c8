"""The patch file: plan, groups of stored pages, digests. See `delta/FORMAT.md`."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from gguf import GGMLQuantizationType

from delta.byte_cursor import ByteCursor, integer
from delta.byte_planes import element_kind
from delta.page_coding import (
    GROUP_BYTES,
    MODE_NAMES,
    ORDERED,
    SPARSE,
    compress_streams,
    decompress,
    stream_sizes,
)
from delta.page_grid import MAX_RUNS
from delta.patch_plan import MAX_PAGES, PatchPlan, parse_plan, render_plan
from forge.buffers import scratch
from forge.errors import GGUFShardError
from forge.input_file import open_input, read_fully
from forge.pages import PAGE_BYTES

MAGIC = b"SGPATCH\0"
VERSION = 1
#: Directions that a group serves.
FORWARD, REVERSE = 1, 2
BOTH = FORWARD | REVERSE
_REVERSIBLE = 1
_HEAD = struct.Struct("<8sHHII")  # magic, version, flags, page size, bytes of the plan
_GROUP = struct.Struct("<IQ")  # bytes of the body, its xxh3-64
_END = bytes(4)
_DIGEST_BYTES = 32
_HASH_CHUNK = 1 << 20
_MAX_GROUP_CONTENT = GROUP_BYTES + PAGE_BYTES
_MAX_GROUP_BYTES = 4 * _MAX_GROUP_CONTENT  # sparse ones, at worst, take three bytes for one
_SMALL_LEVEL = 19
_LEAST_PAGE_BYTES = 2048  # but for the last one of a run


@dataclass(frozen=True)
class PageGroup:
    """Stored pages of one element type and one mode.

    Attributes
    ----------
    ggml_type
        None for raw bytes.
    mode
        How they are stored (`delta.page_coding`).
    directions
        `FORWARD`, `REVERSE` or `BOTH`.
    pages
        int64 [n], ascending: numbers over the touched runs of the forward direction or, of a group
        that serves the reverse alone, of that one.
    n_bytes
        Bytes of the pages together.
    n_items
        Changed bytes, of a sparse group; pairs of small steps, of an ordered one.
    """

    ggml_type: GGMLQuantizationType | None
    mode: int
    directions: int
    pages: np.ndarray
    n_bytes: int
    n_items: int = 0

    def stream_sizes(self) -> list[int]:
        """Bytes of each stream, decompressed."""
        kind = element_kind(self.ggml_type)
        return stream_sizes(kind, self.mode, self.n_bytes, len(self.pages), self.n_items)


@dataclass(frozen=True)
class StoredGroup:
    """A group's place in the file: offset and bytes of its body."""

    group: PageGroup
    offset: int
    n_bytes: int

    @property
    def whole_bytes(self) -> int:
        """With what stands before the body."""
        return _GROUP.size + self.n_bytes


def render_group(group: PageGroup, streams: Sequence[bytes | memoryview]) -> bytes:
    """A group as it lies in the file, given its compressed streams."""
    type_number = 0 if group.ggml_type is None else int(group.ggml_type) + 1
    gaps = np.diff(group.pages, prepend=-1) - 1
    width = next(w for w in (1, 2, 4, 8) if int(gaps.max()) < 1 << (8 * w))
    (stored,) = compress_streams([gaps.astype(f"<u{width}").view(np.uint8)], _SMALL_LEVEL)
    body: list[bytes | memoryview] = [
        integer(group.mode), integer(group.directions), integer(type_number),
        integer(len(group.pages)), integer(group.n_bytes), integer(group.n_items), integer(width),
        integer(len(stored)), bytes(stored),
    ]  # fmt: skip
    for stream in streams:
        body += [integer(len(stream)), stream]
    digest = xxhash.xxh3_64()
    for piece in body:
        digest.update(piece)
    return b"".join([_GROUP.pack(sum(map(len, body)), digest.intdigest()), *body])


class Writable(Protocol):
    """What a patch is written to; `forge.pending_file.PendingFile` is one."""

    def write(self, data: bytes | np.ndarray, offset: int) -> None: ...

    def settle(self, end: int) -> None: ...


class PatchWriter:
    """Writes a patch front to back.

    Parameters
    ----------
    file
        What becomes the patch.
    plan
        All but the groups.
    """

    def __init__(self, file: Writable, plan: PatchPlan) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.n_bytes = 0
        data = render_plan(plan)
        flags = 0 if plan.reverse is None else _REVERSIBLE
        self._write(_HEAD.pack(MAGIC, VERSION, flags, PAGE_BYTES, len(data)) + data)

    def write_group(self, rendered: bytes) -> None:
        """Append a group (`render_group`)."""
        self._write(rendered)
        self._file.settle(self.n_bytes)

    def finish(self) -> None:
        """Write the end and the digest; the file is complete then, but not yet in its place."""
        self._write(_END)
        self._file.write(self._digest.digest(), self.n_bytes)
        self.n_bytes += _DIGEST_BYTES

    def _write(self, data: bytes) -> None:
        self._file.write(data, self.n_bytes)
        self._digest.update(data)
        self.n_bytes += len(data)


class PatchReader:
    """An open patch, whole and undamaged; a context manager.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    plan
        What it says of the models.
    n_bytes
        Its size.

    Raises
    ------
    GGUFShardError
        If it is no patch, is of another version, is damaged or cut short, or claims what cannot be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = open_input(self.path)
        except OSError as error:
            raise GGUFShardError(f"{self.path}: {error.strerror}") from None
        try:
            self.n_bytes = os.fstat(self._file.fileno()).st_size
            flags, plan_bytes = self._read_head()
            self._check_digest()
            data = self._read(_HEAD.size, plan_bytes)
            self.plan = parse_plan(data, self.path, _HEAD.size, bool(flags & _REVERSIBLE))
            self._groups_begin = _HEAD.size + plan_bytes
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> PatchReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def groups(self) -> Iterator[StoredGroup]:
        """Where its pages are stored, in the order of the file.

        None is kept: a small patch can name more pages than fit in memory.

        Raises
        ------
        GGUFShardError
            If a group makes no sense, or what should be one is none.
        """
        return self._walk(self._groups_begin)

    def streams(self, stored: StoredGroup) -> list[np.ndarray]:
        """The streams of a group, decompressed, uint8 each; may be called by several threads.

        Raises
        ------
        GGUFShardError
            If they do not hold what the group says.
        """
        data = self._body(stored.offset, stored.n_bytes)
        read = ByteCursor(data, self.path, stored.offset)
        self._parse_group(read)
        streams = []
        for size in stored.group.stream_sizes():
            packed = read.view(read.integer("stream length", read.remaining), "stream")
            streams.append(self._decompress(read, packed, size, "stream"))
        read.end("group")
        return streams

    def _fail(self, offset: int, field: str, reason: str) -> GGUFShardError:
        return GGUFShardError(f"{self.path}: offset {offset}: {field}: {reason}")

    def _read(self, offset: int, n_bytes: int) -> bytes:
        buffer = bytearray(n_bytes)
        read_fully(self._file.fileno(), memoryview(buffer), offset, self.path)
        return bytes(buffer)

    def _read_head(self) -> tuple[int, int]:
        smallest = _HEAD.size + len(_END) + _DIGEST_BYTES
        magic = self._read(0, min(len(MAGIC), self.n_bytes))
        if magic != MAGIC:
            raise self._fail(0, "magic", f"{magic!r} is not that of a patch, {MAGIC!r}")
        if self.n_bytes < smallest:
            raise self._fail(self.n_bytes, "end", "the patch is cut short")
        _, version, flags, page_bytes, plan_bytes = _HEAD.unpack(self._read(0, _HEAD.size))
        if version != VERSION:
            raise self._fail(8, "version", f"{version} is not supported: only {VERSION} is")
        if flags & ~_REVERSIBLE:
            raise self._fail(10, "flags", f"{flags:#x} has bits that are not known")
        if page_bytes != PAGE_BYTES:
            raise self._fail(12, "page size", f"{page_bytes} is not {PAGE_BYTES}")
        if plan_bytes > self.n_bytes - smallest:
            raise self._fail(16, "plan", f"{plan_bytes} bytes do not fit: the patch is cut short")
        return flags, plan_bytes

    def _check_digest(self) -> None:
        digest = hashlib.sha256()
        end = self.n_bytes - _DIGEST_BYTES
        buffer = memoryview(bytearray(min(_HASH_CHUNK, end)))
        for offset in range(0, end, _HASH_CHUNK):
            piece = buffer[: min(_HASH_CHUNK, end - offset)]
            read_fully(self._file.fileno(), piece, offset, self.path)
            digest.update(piece)
        if digest.digest() != self._read(end, _DIGEST_BYTES):
            raise self._fail(end, "SHA-256", "the patch is damaged or cut short")

    def _walk(self, offset: int) -> Iterator[StoredGroup]:
        end = self.n_bytes - _DIGEST_BYTES
        while True:
            if offset + len(_END) > end:
                raise self._fail(offset, "group", "the patch ends where one should begin")
            if self._read(offset, len(_END)) == _END:
                break
            if offset + _GROUP.size > end:
                raise self._fail(offset, "group", "the patch ends within one")
            (n_bytes, _) = _GROUP.unpack(self._read(offset, _GROUP.size))
            body = offset + _GROUP.size
            if n_bytes > min(end - body, _MAX_GROUP_BYTES):
                raise self._fail(offset, "group", f"{n_bytes} bytes do not fit in the patch")
            read = ByteCursor(self._body(body, n_bytes), self.path, body)
            yield StoredGroup(self._parse_group(read), body, n_bytes)
            offset = body + n_bytes
        if offset + len(_END) != end:
            raise self._fail(offset, "end", f"{end - offset - len(_END)} bytes too many")

    def _body(self, offset: int, n_bytes: int) -> memoryview:
        """The body of a group, good until this thread asks for another."""
        (_, expected) = _GROUP.unpack(self._read(offset - _GROUP.size, _GROUP.size))
        data = scratch("group", n_bytes, offset).data
        read_fully(self._file.fileno(), data, offset, self.path)
        if xxhash.xxh3_64_intdigest(data) != expected:
            raise self._fail(offset, "group", "its xxh3-64 is not the one written before it")
        return data

    def _parse_group(self, read: ByteCursor) -> PageGroup:
        mode = read.integer("mode", len(MODE_NAMES) - 1)
        directions = read.integer("directions", BOTH)
        type_id = read.integer("element type") - 1
        if directions == 0:
            raise read.fail("directions", "a group serves none")
        if type_id >= 0 and type_id not in {int(t) for t in GGMLQuantizationType}:
            raise read.fail("element type", f"ggml type {type_id} is not known")
        n_pages = read.integer("pages", _MAX_GROUP_CONTENT)
        n_bytes = read.integer("content bytes", _MAX_GROUP_CONTENT)
        if not 1 <= n_pages <= min(n_bytes, n_bytes // _LEAST_PAGE_BYTES + MAX_RUNS):
            raise read.fail("pages", f"{n_pages} of {n_bytes} bytes together")
        n_items = read.integer("items", n_bytes if mode in (SPARSE, ORDERED) else 0)
        width = read.integer("width of page numbers", 8)
        if width not in (1, 2, 4, 8):
            raise read.fail("width of page numbers", f"{width} is none of 1, 2, 4, 8")
        packed = read.take(read.integer("page numbers", read.remaining), "page numbers")
        gaps = self._decompress(read, packed, n_pages * width, "page numbers")
        steps = gaps.view(f"<u{width}").astype(np.uint64)
        if int(steps.max()) >= MAX_PAGES:
            raise read.fail("page numbers", "a page is too far away")
        pages = np.cumsum(steps.astype(np.int64) + 1) - 1
        ggml_type = None if type_id < 0 else GGMLQuantizationType(type_id)
        group = PageGroup(ggml_type, mode, directions, pages, n_bytes, n_items)
        try:
            group.stream_sizes()
        except GGUFShardError as error:
            raise read.fail("mode", str(error)) from None
        return group

    def _decompress(
        self, read: ByteCursor, packed: bytes | memoryview, size: int, field: str
    ) -> np.ndarray:
        try:
            return decompress(packed, size)
        except GGUFShardError as error:
            raise read.fail(field, str(error)) from None
