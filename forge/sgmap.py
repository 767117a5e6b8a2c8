"""The map `core.sgmap`: what each page of `core.gguf` holds, as canonical JSON.

The file is for people to read and for programs to trust: `render_map` writes one canonical form
with a digest of every section, and `forge.sgmap_reader` accepts nothing else. See
`forge/FORMAT.md` for the rules.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from gguf import GGMLQuantizationType

from forge.block_layouts import BlockLayout, block_layout
from forge.crc32 import CONTENT_BYTES
from forge.pages import PAGE_BYTES

FORMAT_NAME = "gguf-shard"
FORMAT_VERSION = 1
CACHE_POLICIES = ("auto", "lru", "mru", "pin")
MAX_PREFETCH_DISTANCE = 1 << 16
SECTIONS = ("format", "source", "pages", "atlas", "tensors", "raw")


@dataclass(frozen=True)
class SourcePart:
    """One source file: bare name, bytes, SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Slice:
    """Consecutive pages of one slice of a tensor (an expert, or the whole tensor)."""

    first_page: int
    pages: int
    zone: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor and its pages.

    Attributes
    ----------
    shape
        Elements per dimension, ggml's order.
    part, offset
        Place in the source: number of the file and byte in it.
    """

    name: str
    ggml_type: GGMLQuantizationType
    shape: tuple[int, ...]
    part: int
    offset: int
    slices: tuple[Slice, ...]

    def layout(self, memory_layout: str) -> BlockLayout:
        """How its blocks lie in a page."""
        return block_layout(self.ggml_type, memory_layout)

    @property
    def n_blocks(self) -> int:
        elements = 1
        for extent in self.shape:
            elements *= extent
        return elements // self.layout("row_major").elements

    @property
    def slice_bytes(self) -> int:
        """Bytes of one slice in the source."""
        return self.n_blocks * self.layout("row_major").bytes // len(self.slices)


@dataclass(frozen=True)
class RawSegment:
    """Source bytes kept as they are, 4088 to a page."""

    part: int
    offset: int
    bytes: int
    first_page: int

    @property
    def pages(self) -> int:
        return -(-self.bytes // CONTENT_BYTES)


@dataclass(frozen=True)
class AtlasSettings:
    """How the model asks to be cached.

    `priority_zones` are (zone, first page, pages) in page order.
    """

    memory_layout: str
    cache_policy: str
    prefetch_distance: int
    priority_zones: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class ShardMap:
    """The whole map. `source` has one entry a file of the model."""

    source: tuple[SourcePart, ...]
    n_pages: int
    pages_per_shard: int
    atlas: AtlasSettings
    tensors: tuple[TensorEntry, ...]
    raw: tuple[RawSegment, ...]
    page_crc32_xxh3_128: str
    shard_xxh3_64: tuple[str, ...]

    @property
    def n_shards(self) -> int:
        return -(-self.n_pages // self.pages_per_shard)

    @property
    def shard_shift(self) -> int:
        return self.pages_per_shard.bit_length() - 1

    def tensor_of_page(self, page: int) -> str:
        """What a page belongs to: a tensor's name, `raw` source bytes, or `padding`."""
        for tensor in self.tensors:
            for number, piece in enumerate(tensor.slices):
                if piece.first_page <= page < piece.first_page + piece.pages:
                    return tensor.name if len(tensor.slices) == 1 else f"{tensor.name}[{number}]"
        for segment in self.raw:
            if segment.first_page <= page < segment.first_page + segment.pages:
                return f"raw bytes of {self.source[segment.part].name}"
        return "padding"


def core_path(map_path: str | os.PathLike[str]) -> Path:
    """Where the pages of a map are: the same name, ending in `.gguf`."""
    return Path(map_path).with_suffix(".gguf")


def _document(m: ShardMap) -> dict[str, Any]:
    return {
        "format": {"name": FORMAT_NAME, "version": FORMAT_VERSION},
        "source": [{"name": p.name, "bytes": p.bytes, "sha256": p.sha256} for p in m.source],
        "pages": {
            "count": m.n_pages,
            "bytes": PAGE_BYTES,
            "content_bytes": CONTENT_BYTES,
            "per_shard": m.pages_per_shard,
        },
        "atlas": {
            "memory_layout": m.atlas.memory_layout,
            "cache_policy": m.atlas.cache_policy,
            "prefetch_distance": m.atlas.prefetch_distance,
            "priority_zones": [
                {"zone": zone, "first_page": first, "pages": pages}
                for zone, first, pages in m.atlas.priority_zones
            ],
        },
        "tensors": [
            {
                "name": t.name,
                "ggml_type": t.ggml_type.name,
                "shape": list(t.shape),
                "blocks_per_page": t.layout("row_major").per_page,
                "part": t.part,
                "offset": t.offset,
                "slices": [
                    {"first_page": s.first_page, "pages": s.pages, "zone": s.zone} for s in t.slices
                ],
            }
            for t in m.tensors
        ],
        "raw": [
            {"part": r.part, "offset": r.offset, "bytes": r.bytes, "first_page": r.first_page}
            for r in m.raw
        ],
    }


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(", ", ": "), ensure_ascii=True)


def section_digest(value: Any) -> str:
    """xxh3-128 of a section's compact JSON; hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(_compact(value).encode("ascii")))


def _render(document: dict[str, Any]) -> bytes:
    """Canonical bytes: one line a section, one line an item where a section is a list."""
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(_compact(item) for item in value) + "\n ]"
        else:
            text = _compact(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def render_map(m: ShardMap) -> bytes:
    """The canonical bytes of a map."""
    document = _document(m)
    document["digests"] = {
        "page_crc32_xxh3_128": m.page_crc32_xxh3_128,
        "map_xxh3_128": {name: section_digest(document[name]) for name in SECTIONS},
        "shard_xxh3_64": list(m.shard_xxh3_64),
    }
    return _render(document)
