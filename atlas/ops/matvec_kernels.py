"""Mat-vec kernels that keep the memory busy: plain elements, Q8_0 and Q4_0 in column-major pages.

What a thread loads at once is a unit (`matvec_units`):

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
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numba import config, cuda, types

from atlas.ops.checks import MAX_BLOCKS
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.matvec_units import EXPONENT, UNITS, Unit
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.ops.ptx import FULL_WARP, multiply_add_wide, shift_left, shift_right
from atlas.target import Target
from forge.block_layouts import BlockLayout, block_layout
from forge.pages import PAGE_BYTES

#: Threads of a block: enough for a row of 4096 columns, few enough that several blocks fit.
THREADS = 64 if config.ENABLE_CUDASIM else 256
_WARPS = THREADS // 32
#: Matrices that are multiplied with one x in one launch: those of queries, keys and values. A small
#: one by itself leaves most multiprocessors without work.
MAX_MATRICES = 3


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
        x, target.address(cache.words), cache.table, cache.shard_shift, EXPONENT,
    )  # fmt: skip
    return True


KERNELS = {f"matvec_units_kernel_{kind.name.lower()}": k for kind, k in _KERNELS.items()}
