"""Mat-vec kernels that keep the memory busy: plain elements, Q8_0 and Q4_0 in column-major pages.

A *unit* is what a thread loads of a row at once: 8 bytes of plain elements (a page holds 511 such,
and a row may begin at any of them), or 16 bytes of a block's quants with the block's scale. A unit
never crosses a page, so finding it is a division by a constant and a look at the table.

    block    a group of rows. Its threads stride along the columns, so that few rows keep as many
             threads busy as many do; sums meet in shuffles, then in shared memory
    warp     lanes side by side have `row_lanes` different rows and the same columns: they read the
             same x, so fewer lanes meet in one bank of the L1 cache
    thread   `rows` rows times `steps` units: all their loads are issued before the first is used,
             and the x of a unit, 4 bytes for every weight, is loaded once for all rows

Bytes in flight: by Little's law 4.3 TB/s at a latency of 700 ns are 3 MB, 23 KB for each of an
H200's 132 multiprocessors. A thread has `rows * steps` units on their way, 64 bytes, a warp 2 KiB:
twelve warps that wait suffice, and there is room for 32 that wait and compute in turns. With twice
as many units a thread, rows of 2048 leave threads without any, and matrices of 2048 rows leave
multiprocessors without: beside an H100 those took 1.1 to 1.2 times as long, large ones the same.

Quants become floats without a conversion: a byte b under the exponent of 2^23 is the float32
2^23 + b, from which one subtraction, exact as well, takes 2^23 and the quants' offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from numba import config, cuda, types

from atlas.ops.checks import MAX_BLOCKS
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.memory import load2_at, load8_once_at, load16, load16_once_at
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.ops.ptx import (
    FULL_WARP,
    byte_permute,
    half2_to_floats,
    multiply_add_wide,
    shift_left,
    shift_right,
)
from atlas.target import Target
from forge.block_layouts import BlockLayout, block_layout
from forge.pages import PAGE_BYTES

#: Threads of a block: enough for a row of 4096 columns, few enough that several blocks fit.
THREADS = 64 if config.ENABLE_CUDASIM else 256
_WARPS = THREADS // 32
#: Matrices that are multiplied with one x in one launch: those of queries, keys and values. A small
#: one by itself leaves most multiprocessors without work.
MAX_MATRICES = 3

_LOW_NIBBLES = np.uint32(0x0F0F0F0F)
_SIGNS = np.uint32(0x80808080)
#: The exponent of 2^23. Kernels take it as an argument: of a constant the compiler makes an operand
#: of each instruction and moves what changes, the byte's number, to a register every time.
_EXPONENT = 0x4B000000


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


# --- kernels ---


@cuda.jit(device=True)
def _page_address(pool, table, shard_shift, page):
    # A shard that a failed swap did not bring has -1 for a frame. What is computed with it is never
    # looked at, but reading it must not fault.
    frame = np.uint32(max(table[shift_right(page, shard_shift)], np.int32(0)))
    in_shard = np.uint32(page & np.uint32(~shift_left(np.uint32(0xFFFFFFFF), shard_shift)))
    place = np.uint32(shift_left(frame, shard_shift) | in_shard)
    return multiply_add_wide(place, np.uint32(PAGE_BYTES), pool)


def _division(divisor: int) -> Any:
    """Device function: quotient and remainder of an index below 2^31."""
    # By T. Granlund and P. L. Montgomery, "Division by Invariant Integers using Multiplication",
    # 1994. The compiler does the same, but knows no bound and needs more steps for some divisors.
    bits = 31 + (divisor - 1).bit_length()
    reciprocal = -(-(1 << bits) // divisor)

    @cuda.jit(device=True)
    def divide(index):
        product = np.uint64(np.uint64(index) * np.uint64(reciprocal))
        quotient = np.uint32(np.uint64(product >> np.uint64(bits)))
        return quotient, np.uint32(index - np.uint32(quotient * np.uint32(divisor)))

    return divide


@cuda.jit(device=True)
def _sum_of_warps(partial, thread, n_warps, group):
    total = np.float32(0)
    for warp in range(n_warps):
        total += partial[np.uint32(np.uint32(np.uint32(warp) * group) + thread)]
    return total


def _kernel(unit: Unit) -> Kernel:
    """`matvec_units_kernel` of one type."""
    elements, n_words, parts, part_words = unit.elements, unit.n_words, unit.parts, unit.part_words
    load, load_x, add, scaled = unit.load, unit.load_x, unit.add, unit.scaled
    rows, steps, row_lanes, group = unit.rows, unit.steps, unit.row_lanes, np.uint32(unit.group)
    n_raw, n_partial = rows * steps * n_words, _WARPS * unit.group
    divide = _division(unit.per_page)

    @cuda.jit(device=True)
    def groups_of(n_rows):
        return np.uint32(np.uint32(n_rows + np.uint32(group - np.uint32(1))) // group)

    @kernel(
        types.float32[::1], types.uint32, types.uint32, types.uint32,
        types.float32[::1], types.uint32, types.uint32,
        types.float32[::1], types.uint32, types.uint32,
        types.float32[::1], types.uint64, types.int32[::1], types.uint32, types.uint32,
        launch_bounds=(THREADS, unit.resident),
    )  # fmt: skip
    def matvec_units_kernel(
        y0,
        begin0,
        end0,
        first_page0,
        y1,
        end1,
        first_page1,
        y2,
        end2,
        first_page2,
        x,
        pool,
        table,
        shard_shift,
        exponent,
    ):
        partial = cuda.shared.array(n_partial, types.float32)
        # The compiler unrolls what runs over these, so that they are registers.
        raw = cuda.local.array(n_raw, types.uint32)
        xs = cuda.local.array(8, types.float32)
        products = cuda.local.array(rows, types.float32)
        totals = cuda.local.array(rows, types.float32)
        starts = cuda.local.array(rows, types.uint32)
        thread, n_threads = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        lane, warp = np.uint32(thread & np.uint32(31)), np.uint32(thread >> np.uint32(5))
        row_lane = np.uint32(thread % np.uint32(row_lanes))
        n_units = np.uint32(np.uint32(x.size) // np.uint32(elements))
        stride = np.uint32(n_threads // np.uint32(row_lanes))
        # Blocks, by the groups of rows of one matrix after the other.
        second = groups_of(np.uint32(end0 - begin0))
        third = np.uint32(second + groups_of(end1))
        n_groups = np.uint32(third + groups_of(end2))
        number = np.uint32(cuda.blockIdx.x)
        while number < n_groups:
            y, first_page, end = y0, first_page0, end0
            first_row = np.uint32(begin0 + np.uint32(number * group))
            if number >= third:
                y, first_page, end = y2, first_page2, end2
                first_row = np.uint32(np.uint32(number - third) * group)
            elif number >= second:
                y, first_page, end = y1, first_page1, end1
                first_row = np.uint32(np.uint32(number - second) * group)
            for r in range(rows):
                # Behind the last row it is computed again, for all lanes to come to the shuffles.
                row = np.uint32(first_row + np.uint32(row_lane + np.uint32(r * row_lanes)))
                starts[r] = np.uint32(min(row, np.uint32(end - np.uint32(1))) * n_units)
                totals[r] = np.float32(0)
            unit = np.uint32(thread // np.uint32(row_lanes))
            while unit < n_units:
                for s in range(steps):
                    at = np.uint32(unit + np.uint32(np.uint32(s) * stride))
                    if at < n_units:
                        for r in range(rows):
                            page, slot = divide(np.uint32(starts[r] + at))
                            page = np.uint32(first_page + page)
                            address = _page_address(pool, table, shard_shift, page)
                            load(address, slot, raw, (s * rows + r) * n_words)
                for s in range(steps):
                    at = np.uint32(unit + np.uint32(np.uint32(s) * stride))
                    if at < n_units:
                        for r in range(rows):
                            products[r] = np.float32(0)
                        for part in range(parts):
                            load_x(x, np.uint32(at * np.uint32(elements)), part, xs)
                            for r in range(rows):
                                i = (s * rows + r) * n_words + part * part_words
                                products[r] = add(products[r], raw, i, xs, exponent)
                        for r in range(rows):
                            totals[r] += scaled(products[r], raw, (s * rows + r) * n_words)
                unit = np.uint32(unit + np.uint32(np.uint32(steps) * stride))
            for r in range(rows):
                total = totals[r]
                for step in (16, 8, 4, 2, 1):
                    if step >= row_lanes:
                        total += cuda.shfl_xor_sync(FULL_WARP, total, step)
                if lane < np.uint32(row_lanes):
                    place = np.uint32(lane + np.uint32(r * row_lanes))
                    partial[np.uint32(np.uint32(warp * group) + place)] = total
            cuda.syncthreads()
            row = np.uint32(first_row + thread)
            if thread < group and row < end:
                y[row] = _sum_of_warps(partial, thread, n_threads >> np.uint32(5), group)
            cuda.syncthreads()
            number = np.uint32(number + np.uint32(cuda.gridDim.x))

    return matvec_units_kernel


_KERNELS = {kind: _kernel(unit) for kind, unit in UNITS.items()}


def _has_units(layout: BlockLayout) -> bool:
    kind = layout.ggml_type
    return kind in UNITS and layout.fields == block_layout(kind, "column_major").fields


def launch_units(
    target: Target,
    ys: Sequence[Any],
    cache: PageCache,
    matrices: Sequence[PagedMatrix],
    x: Any,
    begin: int,
    ends: Sequence[int],
) -> bool:
    """Queue y[:end] = w[:end] @ x for each matrix, if they and x can be read in units; of the first
    from row `begin` on.

    Parameters
    ----------
    target, ys, cache, matrices, x, begin, ends
        As `matvec` has checked them; `begin` < `ends[0]`.

    Returns
    -------
    bool
        Whether it was queued: not for other types and layouts, rows that are no whole number of
        units, more units than an index can count, an x that is not aligned to 16 bytes, or more
        matrices than `MAX_MATRICES`, or of several types.
    """
    kind = matrices[0].ggml_type
    if len(matrices) > MAX_MATRICES or target.address(x) % 16:
        return False
    if not all(w.ggml_type == kind and _has_units(w.layout) for w in matrices):
        return False
    unit = UNITS[kind]
    n_units, rest = divmod(x.shape[0], unit.elements)
    if rest or any(w.n_rows * n_units >= 1 << 31 for w in matrices):
        return False
    parts = list(zip(ys, ends, (w.first_page for w in matrices), strict=True))
    parts += [(ys[0], 0, 0)] * (MAX_MATRICES - len(parts))
    (y0, end0, page0), *others = parts
    n_groups = sum(-(-n // unit.group) for n in (end0 - begin, *ends[1:]))
    _KERNELS[kind].launch(
        target, min(n_groups, MAX_BLOCKS), THREADS, y0, begin, end0, page0, *chain(*others),
        x, target.address(cache.words), cache.table, cache.shard_shift, _EXPONENT,
    )  # fmt: skip
    return True


KERNELS = {f"matvec_units_kernel_{kind.name.lower()}": k for kind, k in _KERNELS.items()}
