"""What mat-vec kernels read of a row at once, by type: how it is loaded and multiplied.

A *unit* is what a thread loads of a row at once: 8 bytes of plain elements (a page holds 511 such,
and a row may begin at any of them), or 16 bytes of a block's quants with the block's scale. A unit
never crosses a page, so finding it is a division by a constant and a look at the table.

Quants become floats without a conversion: a byte b under the exponent of 2^23 is the float32
2^23 + b, from which one subtraction, exact as well, takes 2^23 and the quants' offset.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from numba import cuda

from atlas.ops.memory import load2_at, load8_once_at, load16, load16_once_at
from atlas.ops.ptx import byte_permute, half2_to_floats, multiply_add_wide
from forge.block_layouts import block_layout

_LOW_NIBBLES = np.uint32(0x0F0F0F0F)
_SIGNS = np.uint32(0x80808080)
#: The exponent of 2^23. Kernels take it as an argument: of a constant the compiler makes an operand
#: of each instruction and moves what changes, the byte's number, to a register every time.
EXPONENT = 0x4B000000


class Unit(NamedTuple):
    """The unit of a type, and how a kernel shares units out.

    Attributes
    ----------
    elements
        Weights of a unit.
    per_page
        Units of a page.
    n_words
        Words of a unit as it is loaded.
    parts, part_words
        In how many parts it is multiplied, so that little of x is held at a time, and their words.
    load
        `(page, slot, raw, at)` fetches a unit to `raw[at:]`; `page` is the address of the page.
        Loaded words are not touched, for the next loads not to wait for them.
    load_x
        `(x, first, part, xs)` fetches to `xs` what a part is multiplied with; `first` is the unit's
        first column.
    add
        `(total, raw, at, xs, exponent) -> total` with the products of a part.
    scaled
        `(total, raw, at) -> total` as the unit's scale has it.
    rows, steps
        Rows and units of a row that a thread has at a time.
    row_lanes
        Lanes of a warp with different rows.
    resident
        Blocks that must fit a multiprocessor: bounds the registers.
    """

    elements: int
    per_page: int
    n_words: int
    parts: int
    part_words: int
    load: Any
    load_x: Any
    add: Any
    scaled: Any
    rows: int
    steps: int
    row_lanes: int
    resident: int

    @property
    def group(self) -> int:
        """Rows of a block."""
        return self.rows * self.row_lanes


# --- loads ---


@cuda.jit(device=True)
def _load_8_bytes(page, slot, raw, at):
    raw[at], raw[at + 1] = load8_once_at(multiply_add_wide(slot, np.uint32(8), page))


def _load_16_bytes(units_per_block: int, scales: int) -> Any:
    """The `load` of a block type whose scales begin at byte `scales` of a page."""

    @cuda.jit(device=True)
    def load(page, slot, raw, at):
        raw[at], raw[at + 1], raw[at + 2], raw[at + 3] = load16_once_at(
            multiply_add_wide(slot, np.uint32(16), page)
        )
        block = np.uint32(slot // np.uint32(units_per_block))
        raw[at + 4] = load2_at(multiply_add_wide(block, np.uint32(2), page) + np.uint64(scales))

    return load


@cuda.jit(device=True)
def _load_2_of_x(x, first, part, xs):
    xs[0], xs[1] = x[first], x[np.uint32(first + np.uint32(1))]


@cuda.jit(device=True)
def _load_4_of_x(x, first, part, xs):
    xs[0], xs[1], xs[2], xs[3] = load16(x, np.uint32(first + np.uint32(4 * part)))


@cuda.jit(device=True)
def _load_x_of_nibbles(x, first, part, xs):
    # The low nibbles of a block are its first sixteen weights.
    at = np.uint32(first + np.uint32(4 * part))
    xs[0], xs[1], xs[2], xs[3] = load16(x, at)
    xs[4], xs[5], xs[6], xs[7] = load16(x, np.uint32(at + np.uint32(16)))


# --- products ---


@cuda.jit(device=True)
def _add_f32(total, raw, at, xs, exponent):
    total += raw[at].view(np.float32) * xs[0]
    return total + raw[at + 1].view(np.float32) * xs[1]


@cuda.jit(device=True)
def _add_f16(total, raw, at, xs, exponent):
    for i in range(2):
        first, second = half2_to_floats(raw[at + i])
        total += first * xs[2 * i]
        total += second * xs[2 * i + 1]
    return total


@cuda.jit(device=True)
def _add_bf16(total, raw, at, xs, exponent):
    for i in range(2):
        total += np.uint32(raw[at + i] << np.uint32(16)).view(np.float32) * xs[2 * i]
        total += np.uint32(raw[at + i] & np.uint32(0xFFFF0000)).view(np.float32) * xs[2 * i + 1]
    return total


@cuda.jit(device=True)
def _byte(word, i, offset, exponent):
    """Byte i of a word, less `offset`, as float32."""
    shifted = byte_permute(word, exponent, np.uint32(0x7440 | i)).view(np.float32)
    return np.float32(shifted - np.float32(8388608 + offset))


@cuda.jit(device=True)
def _add_q8_0(total, raw, at, xs, exponent):
    word = np.uint32(raw[at] ^ _SIGNS)  # from -128..127 to 0..255
    for i in range(4):
        total += _byte(word, i, 128, exponent) * xs[i]
    return total


@cuda.jit(device=True)
def _add_q4_0(total, raw, at, xs, exponent):
    low = np.uint32(raw[at] & _LOW_NIBBLES)
    high = np.uint32(np.uint32(raw[at] >> np.uint32(4)) & _LOW_NIBBLES)
    for i in range(4):
        total += _byte(low, i, 8, exponent) * xs[i]
        total += _byte(high, i, 8, exponent) * xs[4 + i]
    return total


@cuda.jit(device=True)
def _not_scaled(total, raw, at):
    return total


@cuda.jit(device=True)
def _scaled(total, raw, at):
    scale, _ = half2_to_floats(raw[at + 4])
    return np.float32(scale * total)


# --- units ---


def _plain_unit(kind: GGMLQuantizationType, load_x: Any, add: Any) -> Unit:
    layout = block_layout(kind)
    elements = 8 // layout.bytes
    return Unit(
        elements, layout.per_page // elements, 2, 1, 2, _load_8_bytes, load_x, add, _not_scaled,
        rows=4, steps=2, row_lanes=1, resident=4,
    )  # fmt: skip


def _block_unit(
    kind: GGMLQuantizationType, load_x: Any, add: Any, rows: int, steps: int, row_lanes: int
) -> Unit:
    layout = block_layout(kind)
    units = layout.field("qs").bytes // 16
    load = _load_16_bytes(units, layout.field("d").page_offset)
    return Unit(
        layout.elements // units, layout.per_page * units, 5, 4, 1, load, load_x, add, _scaled,
        rows, steps, row_lanes, resident=4,
    )  # fmt: skip


_Q = GGMLQuantizationType
UNITS: dict[GGMLQuantizationType, Unit] = {
    _Q.F32: _plain_unit(_Q.F32, _load_2_of_x, _add_f32),
    _Q.F16: _plain_unit(_Q.F16, _load_4_of_x, _add_f16),
    _Q.BF16: _plain_unit(_Q.BF16, _load_4_of_x, _add_bf16),
    _Q.Q8_0: _block_unit(_Q.Q8_0, _load_4_of_x, _add_q8_0, rows=4, steps=1, row_lanes=2),
    _Q.Q4_0: _block_unit(_Q.Q4_0, _load_x_of_nibbles, _add_q4_0, rows=2, steps=2, row_lanes=4),
}
