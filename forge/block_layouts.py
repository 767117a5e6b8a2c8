"""Where the fields of a quantisation block lie inside a page.

A ggml block is a C struct: scales, minima and packed quants of 32 or 256 weights. In a
`row_major` page the structs follow each other as in the GGUF file. In a `column_major` page each
field has a plane of its own: the quants of all the page's blocks first, so that they start
16-byte aligned and load coalesced, and the scales last.

The structs are those of ggml's `ggml-common.h`; sizes are checked against the `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from forge.crc32 import CONTENT_BYTES

MEMORY_LAYOUTS = ("column_major", "row_major")

#: Fields in the order of the struct: (name, bytes).
_STRUCTS: dict[str, tuple[tuple[str, int], ...]] = {
    "Q4_0": (("d", 2), ("qs", 16)),
    "Q4_1": (("d", 2), ("m", 2), ("qs", 16)),
    "Q5_0": (("d", 2), ("qh", 4), ("qs", 16)),
    "Q5_1": (("d", 2), ("m", 2), ("qh", 4), ("qs", 16)),
    "Q8_0": (("d", 2), ("qs", 32)),
    "Q2_K": (("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2)),
    "Q3_K": (("qh", 32), ("qs", 64), ("scales", 12), ("d", 2)),
    "Q4_K": (("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128)),
    "Q5_K": (("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128)),
    "Q6_K": (("qs", 128), ("qh", 64), ("scales", 16), ("d", 2)),
    "Q8_K": (("d", 4), ("qs", 256), ("sums", 32)),
    "IQ1_S": (("d", 2), ("qs", 32), ("qh", 16)),
    "IQ1_M": (("qs", 32), ("qh", 16), ("scales", 8)),
    "IQ2_XXS": (("d", 2), ("qs", 64)),
    "IQ2_XS": (("d", 2), ("qs", 64), ("scales", 8)),
    "IQ2_S": (("d", 2), ("qs", 64), ("qh", 8), ("scales", 8)),
    "IQ3_XXS": (("d", 2), ("qs", 96)),
    "IQ3_S": (("d", 2), ("qs", 64), ("qh", 8), ("signs", 32), ("scales", 4)),
    "IQ4_NL": (("d", 2), ("qs", 16)),
    "IQ4_XS": (("d", 2), ("scales_h", 2), ("scales", 4), ("qs", 128)),
    "TQ1_0": (("qs", 48), ("qh", 4), ("d", 2)),
    "TQ2_0": (("qs", 64), ("d", 2)),
    "MXFP4": (("d", 1), ("qs", 16)),
}

#: Order of the planes: quants, their further bits, then sub-scales, minima and scales.
_PLANE_ORDER = ("qs", "qh", "signs", "sums", "scales", "scales_h", "m", "dmin", "d")


@dataclass(frozen=True)
class Field:
    """One field of a block: its place in the struct and in a page.

    The field of the block in slot `s` of a page starts at `page_offset + s * page_stride`.
    """

    name: str
    bytes: int
    struct_offset: int
    page_offset: int
    page_stride: int


@dataclass(frozen=True)
class BlockLayout:
    """How the blocks of one ggml type lie in a page of one memory layout."""

    ggml_type: GGMLQuantizationType
    memory_layout: str
    elements: int
    bytes: int
    per_page: int
    fields: tuple[Field, ...]

    def field(self, name: str) -> Field:
        """The field called `name`; KeyError if the struct has none."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(f"{self.ggml_type.name} has no field {name}")

    def pages_for(self, n_blocks: int) -> int:
        """Number of pages that hold `n_blocks` blocks."""
        return -(-n_blocks // self.per_page)


@cache
def block_layout(
    ggml_type: GGMLQuantizationType, memory_layout: str = "column_major"
) -> BlockLayout:
    """The page layout of a ggml type.

    Types whose struct is not listed here (and plain element types) are a single field, for which
    both layouts are the same.
    """
    if memory_layout not in MEMORY_LAYOUTS:
        raise ValueError(f"memory_layout {memory_layout!r} is none of {', '.join(MEMORY_LAYOUTS)}")
    elements, block_bytes = GGML_QUANT_SIZES[ggml_type]
    per_page = CONTENT_BYTES // block_bytes
    struct = _STRUCTS.get(ggml_type.name, (("qs", block_bytes),))
    if sum(size for _, size in struct) != block_bytes:
        struct = (("qs", block_bytes),)

    planes: dict[str, int] = {}
    plane_start = 0
    for name, size in sorted(struct, key=lambda field: _PLANE_ORDER.index(field[0])):
        planes[name] = plane_start
        plane_start += size * per_page

    fields = []
    struct_offset = 0
    for name, size in struct:
        if memory_layout == "column_major":
            place = (planes[name], size)
        else:
            place = (struct_offset, block_bytes)
        fields.append(Field(name, size, struct_offset, *place))
        struct_offset += size
    return BlockLayout(ggml_type, memory_layout, elements, block_bytes, per_page, tuple(fields))
