"""The plan of a patch: which models, which headers, which runs are touched, what is copied.

Everything of a patch but the contents of the pages it stores. See `delta/FORMAT.md`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import zstandard
from gguf import GGMLQuantizationType

from delta.byte_cursor import ByteCursor, integer, signed, text
from delta.page_coding import compress_streams, decompress
from delta.page_grid import MAX_RUNS, PADDING, TENSOR, Run
from forge.errors import GGUFShardError
from forge.gguf_file import MAX_NAME_BYTES

MAX_HEADER_BYTES = 256 << 20
MAX_PARTS = 99999
#: Copies in a direction; what more there are is stored, and compresses as well.
MAX_COPIES = 1 << 18
MAX_PAGES = 1 << 40
_MAX_TABLE_BYTES = 1 << 25
#: A header may be so many times what it is made of, and 1 MiB: more is no model's.
_MAX_HEADER_GROWTH = 64
_MAX_FILE_NAME_BYTES = 255
_FILE_NAME = re.compile(r"[^/\\\x00]+", re.DOTALL)
_LEVEL = 19  # of what is small
_LARGE_HEADER, _LARGE_HEADER_LEVEL = 1 << 20, 9


@dataclass(frozen=True)
class FileRecord:
    """One file of a model: bare name, bytes, SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TouchedRun:
    """A run of the target that differs from its namesake in the base, or has none.

    Attributes
    ----------
    kind, name, index, type_id
        Which run it is (`delta.page_grid.Run`); the type is None where it is not known.
    n_pages, n_paired
        Its pages, and how many of them, from the first on, have a counterpart.
    """

    kind: int
    name: str
    index: int
    type_id: int | None
    n_pages: int
    n_paired: int

    @classmethod
    def of(cls, run: Run, n_paired: int) -> TouchedRun:
        """The record of a run."""
        type_id = None if run.ggml_type is None else int(run.ggml_type)
        return cls(run.kind, run.name, run.index, type_id, run.n_pages, n_paired)

    @property
    def key(self) -> tuple[int, str, int]:
        return self.kind, self.name, self.index


@dataclass(frozen=True)
class LostRun:
    """Pages of a run of the base that have no counterpart in the target."""

    name: str
    index: int
    n_pages: int


@dataclass(frozen=True)
class PageCopy:
    """`count` pages from `first` on that equal others from `source` on.

    `first` counts over the touched runs; `source` over all runs of the base or, with `from_target`,
    over the touched runs, all before `first`.
    """

    first: int
    count: int
    from_target: bool
    source: int


@dataclass(frozen=True)
class HeaderEdit:
    """A file's header: as in the base, or compressed with the base's as its dictionary.

    Attributes
    ----------
    n_bytes
        Its size; 0 for that of the base's file of the same number, unchanged.
    data
        One Zstandard frame.
    """

    n_bytes: int = 0
    data: bytes = b""


@dataclass(frozen=True)
class Direction:
    """One way through a patch.

    Attributes
    ----------
    headers
        One for each file of the target.
    runs
        In the order of the files; their pages, counted through, are what groups and copies name.
    lost
        What the target has no more.
    copies
        By `first`, apart from each other.
    """

    headers: tuple[HeaderEdit, ...]
    runs: tuple[TouchedRun, ...]
    lost: tuple[LostRun, ...]
    copies: tuple[PageCopy, ...]

    @property
    def n_pages(self) -> int:
        return sum(run.n_pages for run in self.runs)


@dataclass(frozen=True)
class PatchPlan:
    """The files of both models, and the way from one to the other; back, too, if reversible."""

    base: tuple[FileRecord, ...]
    target: tuple[FileRecord, ...]
    forward: Direction
    reverse: Direction | None


def encode_header(new: bytes, base: bytes) -> HeaderEdit:
    """How a header follows from the base's.

    Raises
    ------
    GGUFShardError
        If it is larger than a patch may hold.
    """
    if new == base:
        return HeaderEdit()
    if len(new) > MAX_HEADER_BYTES:
        raise GGUFShardError(f"header of {len(new)} bytes: a patch holds {MAX_HEADER_BYTES}")
    is_large = len(new) > _LARGE_HEADER
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LARGE_HEADER_LEVEL if is_large else _LEVEL,
        source_size=len(new),
        dict_size=len(base),
        window_log=_window_log(len(new) + len(base)),
        enable_ldm=is_large,
        write_content_size=False,
        write_checksum=False,
        write_dict_id=False,
    )
    compressor = zstandard.ZstdCompressor(
        dict_data=_dictionary(base), compression_params=parameters
    )
    edit = HeaderEdit(len(new), compressor.compress(new))
    if len(new) > _most_header_bytes(edit, base):
        raise GGUFShardError(f"header of {len(new)} bytes: repeats itself beyond measure")
    return edit


def _most_header_bytes(edit: HeaderEdit, base: bytes) -> int:
    return (1 << 20) + _MAX_HEADER_GROWTH * (len(base) + len(edit.data))


def decode_header(edit: HeaderEdit, base: bytes, name: object) -> bytes:
    """The header, given the base's; GGUFShardError if the edit makes none."""
    if edit.n_bytes == 0:
        return base
    if edit.n_bytes > _most_header_bytes(edit, base):
        raise GGUFShardError(
            f"{name}: header: {edit.n_bytes} bytes of {len(edit.data)} and {len(base)} of the base"
        )
    limit = 1 << _window_log(edit.n_bytes + len(base))
    try:
        # A size that the frame claims would be allocated whatever the limit.
        claimed = zstandard.frame_content_size(edit.data)
        if claimed not in (-1, edit.n_bytes):
            raise GGUFShardError(f"{name}: header: claims {claimed} bytes, not {edit.n_bytes}")
        decompressor = zstandard.ZstdDecompressor(
            dict_data=_dictionary(base), max_window_size=limit
        )
        header = decompressor.decompress(
            edit.data, max_output_size=edit.n_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise GGUFShardError(f"{name}: header: {error}") from None
    if len(header) != edit.n_bytes:
        raise GGUFShardError(f"{name}: header: has {len(header)} bytes, not {edit.n_bytes}")
    return bytes(header)


def _dictionary(base: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _window_log(n_bytes: int) -> int:
    return min(max(n_bytes.bit_length(), 17), 29)


def render_plan(plan: PatchPlan) -> bytes:
    """The plan as bytes."""
    out = [_render_files(plan.base), _render_files(plan.target)]
    for way in (plan.forward, plan.reverse):
        if way is None:
            continue
        for edit in way.headers:
            out += [integer(edit.n_bytes)]
            if edit.n_bytes:
                out += [integer(len(edit.data)), edit.data]
        tables = _render_tables(way)
        (stored,) = compress_streams([tables], _LEVEL)
        out += [integer(len(tables)), integer(len(stored)), bytes(stored)]
    return b"".join(out)


def _render_files(files: Sequence[FileRecord]) -> bytes:
    out = [integer(len(files))]
    for file in files:
        out += [text(file.name), integer(file.bytes), bytes.fromhex(file.sha256)]
    return b"".join(out)


def _render_tables(way: Direction) -> bytes:
    if not (way.runs or way.lost):
        return b""
    out = [integer(len(way.runs))]
    for run in way.runs:
        type_number = 0 if run.type_id is None else run.type_id + 1
        out += [integer(run.kind), text(run.name), integer(run.index), integer(type_number),
                integer(run.n_pages), integer(run.n_pages - run.n_paired)]  # fmt: skip
    out += [integer(len(way.lost))]
    for lost in way.lost:
        out += [text(lost.name), integer(lost.index), integer(lost.n_pages)]
    out += [integer(len(way.copies))]
    end = source = 0
    for copy in way.copies:
        out += [integer(copy.first - end), integer(copy.count), integer(copy.from_target),
                signed(copy.source - source)]  # fmt: skip
        end, source = copy.first + copy.count, copy.source + copy.count
    return b"".join(out)


def parse_plan(data: bytes, name: object, origin: int, is_reversible: bool) -> PatchPlan:
    """The inverse of `render_plan`.

    Raises
    ------
    GGUFShardError
        If the bytes are no plan, or claim more than they can hold.
    """
    read = ByteCursor(data, name, origin)
    base, target = _parse_files(read, "base"), _parse_files(read, "target")
    forward = _parse_direction(read, len(target))
    reverse = _parse_direction(read, len(base)) if is_reversible else None
    read.end("plan")
    return PatchPlan(base, target, forward, reverse)


def _parse_files(read: ByteCursor, role: str) -> tuple[FileRecord, ...]:
    count = read.integer(f"{role} files", MAX_PARTS)
    files = []
    for i in range(count):
        field = f"{role} file {i}"
        name = read.text(f"{field} name", _MAX_FILE_NAME_BYTES)
        if not _FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise read.fail(f"{field} name", f"{name!r} is no bare file name")
        n_bytes = read.integer(f"{field} bytes")
        files.append(FileRecord(name, n_bytes, read.take(32, f"{field} SHA-256").hex()))
    if not files:
        raise read.fail(f"{role} files", "there are none")
    return tuple(files)


def _parse_direction(read: ByteCursor, n_parts: int) -> Direction:
    headers = []
    for part in range(n_parts):
        field = f"header {part}"
        n_bytes = read.integer(field, MAX_HEADER_BYTES)
        stored = read.take(read.integer(field, read.remaining), field) if n_bytes else b""
        headers.append(HeaderEdit(n_bytes, stored))
    n_bytes = read.integer("tables", _MAX_TABLE_BYTES)
    origin = read.origin + read.offset
    stored = read.take(read.integer("tables", read.remaining), "tables")
    try:
        data = bytes(decompress(stored, n_bytes))
    except GGUFShardError as error:
        raise read.fail("tables", str(error)) from None
    return Direction(tuple(headers), *_parse_tables(ByteCursor(data, read.name, origin)))


def _parse_tables(
    read: ByteCursor,
) -> tuple[tuple[TouchedRun, ...], tuple[LostRun, ...], tuple[PageCopy, ...]]:
    if not read.remaining:
        return (), (), ()
    runs = [_parse_run(read) for _ in range(read.count("runs", 6, MAX_RUNS))]
    if len({run.key for run in runs}) != len(runs):
        raise read.fail("runs", "one is named twice")
    lost = [
        LostRun(
            read.text("lost name", MAX_NAME_BYTES),
            read.integer("lost index"),
            read.integer("lost pages", MAX_PAGES),
        )
        for _ in range(read.count("lost runs", 3, MAX_RUNS))
    ]
    copies = []
    n_pages = sum(run.n_pages for run in runs)
    end = source = 0
    for _ in range(read.count("copies", 4, MAX_COPIES)):
        first = end + read.integer("copy")
        count = read.integer("copy length", n_pages)
        from_target = bool(read.integer("copy kind", 1))
        source += read.signed("copy source")
        end = first + count
        most = first - count if from_target else MAX_PAGES
        if count == 0 or end > n_pages or not 0 <= source <= most:
            raise read.fail("copy", f"pages {first}..{end - 1} from {source} on: out of place")
        copies.append(PageCopy(first, count, from_target, source))
        source += count
    read.end("tables")
    return tuple(runs), tuple(lost), tuple(copies)


def _parse_run(read: ByteCursor) -> TouchedRun:
    kind = read.integer("run kind", max(TENSOR, PADDING))
    name = read.text("run name", MAX_NAME_BYTES)
    index = read.integer("run index")
    type_id = read.integer("run type") - 1
    if type_id >= 0 and type_id not in {int(t) for t in GGMLQuantizationType}:
        raise read.fail("run type", f"ggml type {type_id} is not known")
    n_pages = read.integer("run pages", MAX_PAGES)
    n_paired = n_pages - read.integer("unpaired pages", n_pages)
    return TouchedRun(kind, name, index, None if type_id < 0 else type_id, n_pages, n_paired)
