"""Reading `core.sgmap`: bounded, strict, and every error names the field.

A map is accepted only if it is exactly the bytes that `forge.sgmap.render_map` would write: each
section must match its digest, each number must fit the others, no page and no source byte may
belong to two, and even the spacing must be as written. So no single flipped bit goes unnoticed.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gguf import GGMLQuantizationType

from forge.block_layouts import MEMORY_LAYOUTS
from forge.crc32 import CONTENT_BYTES
from forge.errors import GGUFShardError
from forge.input_file import open_input
from forge.page_plan import MAX_PAGES_PER_SHARD, ZONES
from forge.pages import PAGE_BYTES
from forge.sgmap import (
    CACHE_POLICIES,
    FORMAT_NAME,
    FORMAT_VERSION,
    MAX_PREFETCH_DISTANCE,
    SECTIONS,
    AtlasSettings,
    RawSegment,
    ShardMap,
    Slice,
    SourcePart,
    TensorEntry,
    render_map,
    section_digest,
)

MAX_MAP_BYTES = 64 << 20
# Of which each takes dozens of bytes when parsed: more than the largest map holds of them.
_MOST_CONTAINERS = 1 << 18
_MOST_VALUES = 1 << 22
_MAX_INT = 1 << 62
_SHOWN_TEXT = 80
# Surrogates but those that stand for bytes that are not UTF-8.
_NO_TEXT = r"\ud800-\udc7f\udd00-\udfff"


def _shown(value: Any) -> str:
    """A value or a name from the file, short and on one line."""
    return ascii(value)[:_SHOWN_TEXT]


class _Reader:
    """Typed access to parsed JSON; errors name the file and the field."""

    def __init__(self, path: object) -> None:
        self.path = path

    def fail(self, field: str, reason: str) -> GGUFShardError:
        return GGUFShardError(f"{self.path}: field {field}: {reason}")

    def members(self, value: Any, field: str, names: Sequence[str]) -> list[Any]:
        if not isinstance(value, dict):
            raise self.fail(field or "(top)", "is not an object")
        for name in names:
            if name not in value:
                raise self.fail(f"{field}.{name}".lstrip("."), "is missing")
        for name in value:
            if name not in names:
                raise self.fail(f"{field}.{_shown(name)}".lstrip("."), "is not known")
        return [value[name] for name in names]

    def items(self, value: Any, field: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(field, "is not a list")
        return value

    def integer(self, value: Any, field: str, low: int = 0, high: int = _MAX_INT) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.fail(field, f"{_shown(value)} is not an integer within {low}..{high}")
        return value

    def choice(self, value: Any, field: str, allowed: Sequence[str]) -> str:
        if value not in allowed:
            raise self.fail(field, f"{_shown(value)} is none of {', '.join(allowed)}")
        return str(value)

    def text(self, value: Any, field: str, pattern: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.DOTALL):
            raise self.fail(field, f"{_shown(value)} is not of the form {pattern}")
        return value


def _parse_json(data: bytes, path: object) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise GGUFShardError(f"{path}: field {_shown(twice)}: is given twice")
        return members

    for characters, most in (((b"[", b"{"), _MOST_CONTAINERS), ((b",",), _MOST_VALUES)):
        if sum(map(data.count, characters)) > most:
            raise GGUFShardError(f"{path}: more lists, objects or values than a map has")
    try:
        return json.loads(data.decode("ascii"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise GGUFShardError(f"{path}: byte {error.start}: not ASCII") from None
    except RecursionError:
        raise GGUFShardError(f"{path}: nested too deep") from None
    except GGUFShardError:
        raise
    except ValueError as error:
        raise GGUFShardError(f"{path}: not JSON: {error}") from None


def load_map(path: str | os.PathLike[str]) -> ShardMap:
    """Read a map, checked.

    Raises
    ------
    GGUFShardError
        If the file is missing or anything in it is not as `render_map` would write it; the
        message names the field.
    """
    try:
        with io.BufferedReader(open_input(path)) as file:
            data = file.read(MAX_MAP_BYTES + 1)
    except OSError as error:
        raise GGUFShardError(f"{path}: {error.strerror}") from None
    return parse_map(data, path)


def parse_map(data: bytes, path: object) -> ShardMap:
    """`load_map` of bytes already read; `path` is what errors call them."""
    if len(data) > MAX_MAP_BYTES:
        raise GGUFShardError(f"{path}: a map has at most {MAX_MAP_BYTES} bytes")
    read = _Reader(path)
    document = _parse_json(data, path)
    *sections, digests = read.members(document, "", (*SECTIONS, "digests"))
    table, of_sections, of_shards = read.members(
        digests, "digests", ("page_crc32_xxh3_128", "map_xxh3_128", "shard_xxh3_64")
    )
    read.members(of_sections, "digests.map_xxh3_128", SECTIONS)
    for name, value in zip(SECTIONS, sections, strict=True):
        if of_sections[name] != _digest(read, name, value):
            raise read.fail(name, f"does not match its digest (digests.map_xxh3_128.{name})")
    shard_map = _build(read, dict(zip(SECTIONS, sections, strict=True)), table, of_shards)
    _check_ownership(read, shard_map)
    canonical = render_map(shard_map)
    if canonical != data:
        at = next((i for i, (a, b) in enumerate(zip(canonical, data, strict=False)) if a != b),
                  min(len(canonical), len(data)))  # fmt: skip
        raise GGUFShardError(f"{path}: byte {at}: not as written (spacing, order or spelling)")
    return shard_map


def _digest(read: _Reader, name: str, value: Any) -> str:
    try:
        return section_digest(value)
    except RecursionError:  # which writing JSON may reach a level before reading it does
        raise read.fail(name, "nested too deep") from None


def _build(read: _Reader, sections: dict[str, Any], table: Any, of_shards: Any) -> ShardMap:
    name, version = read.members(sections["format"], "format", ("name", "version"))
    read.choice(name, "format.name", (FORMAT_NAME,))
    read.integer(version, "format.version", FORMAT_VERSION, FORMAT_VERSION)
    count, page_bytes, content_bytes, per_shard = read.members(
        sections["pages"], "pages", ("count", "bytes", "content_bytes", "per_shard")
    )
    read.integer(page_bytes, "pages.bytes", PAGE_BYTES, PAGE_BYTES)
    read.integer(content_bytes, "pages.content_bytes", CONTENT_BYTES, CONTENT_BYTES)
    n_pages = read.integer(count, "pages.count", 1, 1 << 40)
    read.integer(per_shard, "pages.per_shard", 1, MAX_PAGES_PER_SHARD)
    if per_shard & (per_shard - 1):
        raise read.fail("pages.per_shard", f"{per_shard} is not a power of two")
    source = _build_source(read, sections["source"])
    digests = [
        read.text(d, f"digests.shard_xxh3_64[{i}]", "[0-9a-f]{16}")
        for i, d in enumerate(read.items(of_shards, "digests.shard_xxh3_64"))
    ]
    if len(digests) != -(-n_pages // per_shard):
        raise read.fail("digests.shard_xxh3_64", f"{len(digests)} digests for {n_pages} pages")
    return ShardMap(
        source,
        n_pages,
        per_shard,
        _build_atlas(read, sections["atlas"], n_pages),
        tuple(
            _build_tensor(read, item, f"tensors[{i}]", len(source), n_pages)
            for i, item in enumerate(read.items(sections["tensors"], "tensors"))
        ),
        tuple(
            _build_raw(read, item, f"raw[{i}]", len(source), n_pages)
            for i, item in enumerate(read.items(sections["raw"], "raw"))
        ),
        read.text(table, "digests.page_crc32_xxh3_128", "[0-9a-f]{32}"),
        tuple(digests),
    )


def _build_source(read: _Reader, value: Any) -> tuple[SourcePart, ...]:
    parts = []
    for i, item in enumerate(read.items(value, "source")):
        field = f"source[{i}]"
        name, n_bytes, sha256 = read.members(item, field, ("name", "bytes", "sha256"))
        # A bare file name: a map must not lead a program out of the folder it writes to.
        read.text(name, f"{field}.name", rf"[^/\\\x00{_NO_TEXT}]{{1,255}}")
        if name in (".", ".."):
            raise read.fail(f"{field}.name", f"{name!r} is no file name")
        read.text(sha256, f"{field}.sha256", "[0-9a-f]{64}")
        parts.append(SourcePart(name, read.integer(n_bytes, f"{field}.bytes", 1), sha256))
    if not parts:
        raise read.fail("source", "is empty")
    return tuple(parts)


def _build_atlas(read: _Reader, value: Any, n_pages: int) -> AtlasSettings:
    layout, policy, distance, zones = read.members(
        value, "atlas", ("memory_layout", "cache_policy", "prefetch_distance", "priority_zones")
    )
    ranges = []
    for i, item in enumerate(read.items(zones, "atlas.priority_zones")):
        field = f"atlas.priority_zones[{i}]"
        zone, first, pages = read.members(item, field, ("zone", "first_page", "pages"))
        read.choice(zone, f"{field}.zone", ZONES)
        _check_run(read, first, pages, field, n_pages)
        ranges.append((zone, first, pages))
    return AtlasSettings(
        read.choice(layout, "atlas.memory_layout", MEMORY_LAYOUTS),
        read.choice(policy, "atlas.cache_policy", CACHE_POLICIES),
        read.integer(distance, "atlas.prefetch_distance", 0, MAX_PREFETCH_DISTANCE),
        tuple(ranges),
    )


def _check_run(read: _Reader, first: Any, pages: Any, field: str, n_pages: int) -> None:
    read.integer(first, f"{field}.first_page", 0, n_pages - 1)
    read.integer(pages, f"{field}.pages", 1, n_pages - first)


def _build_tensor(read: _Reader, item: Any, field: str, n_parts: int, n_pages: int) -> TensorEntry:
    name, type_name, shape, per_page, part, offset, slices = read.members(
        item,
        field,
        ("name", "ggml_type", "shape", "blocks_per_page", "part", "offset", "slices"),
    )
    read.text(name, f"{field}.name", f"[^{_NO_TEXT}]{{1,63}}")
    read.choice(type_name, f"{field}.ggml_type", [t.name for t in GGMLQuantizationType])
    extents = tuple(
        read.integer(e, f"{field}.shape", 1) for e in read.items(shape, f"{field}.shape")
    )
    if not 1 <= len(extents) <= 4:
        raise read.fail(f"{field}.shape", f"{len(extents)} dimensions are not within 1..4")
    pieces = []
    for i, piece in enumerate(read.items(slices, f"{field}.slices")):
        place = f"{field}.slices[{i}]"
        first, pages, zone = read.members(piece, place, ("first_page", "pages", "zone"))
        _check_run(read, first, pages, place, n_pages)
        pieces.append(Slice(first, pages, read.choice(zone, f"{place}.zone", ZONES)))
    entry = TensorEntry(
        name,
        GGMLQuantizationType[type_name],
        extents,
        read.integer(part, f"{field}.part", 0, n_parts - 1),
        read.integer(offset, f"{field}.offset"),
        tuple(pieces),
    )
    layout = entry.layout("row_major")
    read.integer(per_page, f"{field}.blocks_per_page", layout.per_page, layout.per_page)
    if not pieces or extents[0] % layout.elements or entry.n_blocks % len(pieces):
        raise read.fail(f"{field}.shape", f"{list(extents)} are not whole blocks and slices")
    expected = layout.pages_for(entry.n_blocks // len(pieces))
    for i, piece in enumerate(pieces):
        read.integer(piece.pages, f"{field}.slices[{i}].pages", expected, expected)
    return entry


def _build_raw(read: _Reader, item: Any, field: str, n_parts: int, n_pages: int) -> RawSegment:
    part, offset, n_bytes, first_page = read.members(
        item, field, ("part", "offset", "bytes", "first_page")
    )
    segment = RawSegment(
        read.integer(part, f"{field}.part", 0, n_parts - 1),
        read.integer(offset, f"{field}.offset"),
        read.integer(n_bytes, f"{field}.bytes", 1),
        read.integer(first_page, f"{field}.first_page", 0, n_pages - 1),
    )
    read.integer(segment.pages, f"{field}.bytes / {CONTENT_BYTES}", 1, n_pages - first_page)
    return segment


def _check_ownership(read: _Reader, m: ShardMap) -> None:
    """No page and no source byte belongs to two, and every source byte lies in its file."""
    if len({t.name for t in m.tensors}) != len(m.tensors):
        raise read.fail("tensors", "two have the same name")
    pages = [(r.first_page, r.pages, f"raw[{i}]") for i, r in enumerate(m.raw)]
    places = [(r.part, r.offset, r.bytes, f"raw[{i}]") for i, r in enumerate(m.raw)]
    for i, tensor in enumerate(m.tensors):
        pages += [(s.first_page, s.pages, f"tensors[{i}].slices") for s in tensor.slices]
        n_bytes = tensor.slice_bytes * len(tensor.slices)
        places.append((tensor.part, tensor.offset, n_bytes, f"tensors[{i}].offset"))
    end = 0
    for first, count, field in sorted(pages):
        if first < end:
            raise read.fail(field, f"page {first} belongs to two")
        end = first + count
    before = (0, 0)
    for part, offset, n_bytes, field in sorted(places):
        if (part, offset) < before or offset + n_bytes > m.source[part].bytes:
            raise read.fail(field, f"{n_bytes} bytes at {offset} overlap or leave the source")
        before = (part, offset + n_bytes)
