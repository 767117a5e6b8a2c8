"""Single values of quantisation blocks: scalar bodies for kernels and for runs without a compiler.

A body takes the bytes of the pool, the byte address of a page in it, the places of the block's
fields, the block's slot and the number `i` of a value in the block, and returns that value as
float32. The formulas are those of ggml's `ggml-quants.c`.

A field lies at `page + places[2 f] + slot * places[2 f + 1]`, fields in the order of the struct
in `forge.block_layouts`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numba import types

from atlas.ops.paged import PageCache, PagedMatrix
from forge.block_layouts import BlockLayout, block_layout
from forge.errors import GGUFShardError
from forge.jit import cached_njit
from forge.pages import PAGE_BYTES

_TWO_TO_112 = np.float32(2.0**112)


@cache
def field_places(layout: BlockLayout) -> tuple[int, ...]:
    """Offset and stride of each field, one after the other, as compiled code takes them."""
    return tuple(n for field in layout.fields for n in (field.page_offset, field.page_stride))


@cached_njit()
def page_offset(table, shard_shift, page):
    """Byte offset of a page in the pool's frames."""
    shift = np.int64(shard_shift)
    in_shard = np.int64(page) & ((np.int64(1) << shift) - np.int64(1))
    # A shard that a failed swap did not bring has -1 for a frame. What is computed with it is never
    # looked at, but reading it must not fault.
    frame = max(np.int64(table[page >> shift]), np.int64(0))
    return ((frame << shift) | in_shard) * np.int64(PAGE_BYTES)


@cached_njit()
def _field(page, places, f, slot):
    return np.int64(page) + np.int64(places[2 * f]) + np.int64(slot) * np.int64(places[2 * f + 1])


@cached_njit()
def _word16(frames, address):
    low, high = np.uint32(frames[address]), np.uint32(frames[address + 1])
    return np.uint32(low | np.uint32(high << np.uint32(8)))


@cached_njit()
def half_to_float(bits):
    """The float32 with the value of a float16 given as an integer."""
    # Exponent and mantissa moved into place, then the exponent's bias corrected by a
    # multiplication, which is exact for subnormal numbers as well.
    shifted = np.uint32((np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13))
    magnitude = np.float32(shifted.view(np.float32) * _TWO_TO_112)
    if shifted >= np.uint32(0x0F800000):  # infinity or not a number
        magnitude = np.uint32(shifted | np.uint32(0x7F800000)).view(np.float32)
    return np.float32(-magnitude) if np.uint32(bits) & np.uint32(0x8000) else magnitude


@cached_njit()
def _half(frames, address):
    return half_to_float(_word16(frames, address))


@cached_njit()
def _nibble(byte, high):
    return np.int32((np.int32(byte) >> np.int32(4 * high)) & np.int32(15))


@cached_njit()
def _bit(byte, i):
    return np.int32((np.int32(byte) >> np.int32(i)) & np.int32(1))


@cached_njit()
def value_f32(frames, page, places, slot, i):
    address = _field(page, places, 0, slot)
    high = np.uint32(_word16(frames, address + 2) << np.uint32(16))
    return np.uint32(high | _word16(frames, address)).view(np.float32)


@cached_njit()
def value_f16(frames, page, places, slot, i):
    return _half(frames, _field(page, places, 0, slot))


@cached_njit()
def value_bf16(frames, page, places, slot, i):
    bits = _word16(frames, _field(page, places, 0, slot))
    return np.uint32(bits << np.uint32(16)).view(np.float32)


@cached_njit()
def value_q8_0(frames, page, places, slot, i):
    d = _half(frames, _field(page, places, 0, slot))
    quant = np.int8(np.uint8(frames[_field(page, places, 1, slot) + i]).view(np.int8))
    return np.float32(d * np.float32(quant))


@cached_njit()
def value_q4_0(frames, page, places, slot, i):
    d = _half(frames, _field(page, places, 0, slot))
    quant = _nibble(frames[_field(page, places, 1, slot) + i % 16], i // 16)
    return np.float32(d * np.float32(quant - np.int32(8)))


@cached_njit()
def value_q5_0(frames, page, places, slot, i):
    d = _half(frames, _field(page, places, 0, slot))
    fifth = _bit(frames[_field(page, places, 1, slot) + i // 8], i % 8)
    quant = _nibble(frames[_field(page, places, 2, slot) + i % 16], i // 16)
    return np.float32(d * np.float32((quant | (fifth << np.int32(4))) - np.int32(16)))


@cached_njit()
def _k_scale(frames, scales, sub, which):
    """Six-bit scale (`which` 0) or minimum (1) of sub-block `sub`, packed in twelve bytes."""
    low = np.int32(frames[scales + 4 * which + sub % 4])
    if sub < 4:
        return np.int32(low & np.int32(63))
    nibble = _nibble(frames[scales + 8 + sub % 4], which)
    return np.int32(nibble | ((low >> np.int32(6)) << np.int32(4)))


@cached_njit()
def _k_value(frames, page, places, slot, sub, quant):
    d = _half(frames, _field(page, places, 0, slot))
    dmin = _half(frames, _field(page, places, 1, slot))
    scales = _field(page, places, 2, slot)
    scale = np.float32(d * np.float32(_k_scale(frames, scales, sub, 0)))
    minimum = np.float32(dmin * np.float32(_k_scale(frames, scales, sub, 1)))
    return np.float32(np.float32(scale * np.float32(quant)) - minimum)


@cached_njit()
def value_q4_k(frames, page, places, slot, i):
    sub = i // 32
    quant = _nibble(frames[_field(page, places, 3, slot) + sub // 2 * 32 + i % 32], sub % 2)
    return _k_value(frames, page, places, slot, sub, quant)


@cached_njit()
def value_q5_k(frames, page, places, slot, i):
    sub = i // 32
    quant = _nibble(frames[_field(page, places, 4, slot) + sub // 2 * 32 + i % 32], sub % 2)
    fifth = _bit(frames[_field(page, places, 3, slot) + i % 32], sub)
    return _k_value(frames, page, places, slot, sub, quant | (fifth << np.int32(4)))


@cached_njit()
def value_q6_k(frames, page, places, slot, i):
    half, run = i // 128, i % 128 // 32
    low = _nibble(
        frames[_field(page, places, 0, slot) + half * 64 + run % 2 * 32 + i % 32], run // 2
    )
    high = np.int32(frames[_field(page, places, 1, slot) + half * 32 + i % 32]) >> np.int32(2 * run)
    quant = (low | ((high & np.int32(3)) << np.int32(4))) - np.int32(32)
    sub_scale = np.uint8(frames[_field(page, places, 2, slot) + i // 16]).view(np.int8)
    d = _half(frames, _field(page, places, 3, slot))
    return np.float32(np.float32(d * np.float32(sub_scale)) * np.float32(quant))


def _matrix_value(block_value: Any) -> Any:
    """From "value i of a block" to "element `index` of a matrix, counted row by row"."""

    @cached_njit()
    def matrix_value(frames, table, shard_shift, first_page, per_page, elements, places, index):
        block = index // elements
        page = page_offset(table, shard_shift, first_page + block // per_page)
        return block_value(frames, page, places, block % per_page, index % elements)

    return matrix_value


_BLOCK_VALUES: dict[GGMLQuantizationType, Any] = {
    GGMLQuantizationType.F32: value_f32,
    GGMLQuantizationType.F16: value_f16,
    GGMLQuantizationType.BF16: value_bf16,
    GGMLQuantizationType.Q8_0: value_q8_0,
    GGMLQuantizationType.Q4_0: value_q4_0,
    GGMLQuantizationType.Q5_0: value_q5_0,
    GGMLQuantizationType.Q4_K: value_q4_k,
    GGMLQuantizationType.Q5_K: value_q5_k,
    GGMLQuantizationType.Q6_K: value_q6_k,
}

#: The types that operations can read, with the scalar body
#: `(frames, table, shard_shift, first_page, per_page, elements, places, index) -> float32`.
MATRIX_VALUES = {kind: _matrix_value(body) for kind, body in _BLOCK_VALUES.items()}


def matrix_arguments(page_cache: PageCache, w: PagedMatrix) -> tuple[Any, ...]:
    """What loops and kernels take to find a matrix, in the order of `MATRIX_VALUES`.

    Raises
    ------
    GGUFShardError
        If the matrix has a type that operations cannot read.
    """
    layout = w.layout
    if layout.ggml_type not in MATRIX_VALUES:
        names = ", ".join(kind.name for kind in MATRIX_VALUES)
        raise GGUFShardError(
            f"tensor {w.name}: cannot compute with {layout.ggml_type.name}, only with {names}"
        )
    return (
        page_cache.frames,
        page_cache.table,
        page_cache.shard_shift,
        w.first_page,
        layout.per_page,
        layout.elements,
        field_places(layout),
    )


def matrix_signature(ggml_type: GGMLQuantizationType) -> tuple[Any, ...]:
    """Numba types of `matrix_arguments`, for the compile gate."""
    places = types.UniTuple(types.int64, len(field_places(block_layout(ggml_type))))
    return (types.uint8[::1], types.int32[::1], *[types.int64] * 4, places)
