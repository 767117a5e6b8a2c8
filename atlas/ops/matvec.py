"""Mat-vec on pages: y[r] = sum over c of w[r, c] * x[c], in float32 with x as it is.

Weights are decoded in registers and never stored. The sum of a row runs over at least sixteen
partial sums (lanes, or threads of a block), so its rounding error is below that of a plain loop.
A decode step reads every weight once, so the bound is the memory's bandwidth.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import config, cuda, prange, types

from atlas.ops.block_values import (
    MATRIX_VALUES,
    matrix_arguments,
    matrix_signature,
    page_offset,
)
from atlas.ops.block_vectors import dot_run
from atlas.ops.checks import check_array, check_range
from atlas.ops.dequant import dequantise
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.target import Target
from forge.jit import cached_njit


@lru_cache(maxsize=None)
def _loop(kind: int) -> Any:
    """The loop for one type; `kind` is a constant of the compiled code."""

    @cached_njit(parallel=True)
    def matvec_loop(
        y, x, begin, end, frames, table, shard_shift, first_page, per_page, elements, places
    ):
        base = np.uint64(frames.ctypes.data)
        x_base = np.uint64(x.ctypes.data)
        blocks_per_row = x.size // elements
        for row in prange(begin, end):
            x_address = x_base
            block, left = row * blocks_per_row, blocks_per_row
            total = np.float32(0)
            while left > 0:
                slot = block % per_page
                count = min(left, per_page - slot)
                page = page_offset(table, shard_shift, first_page + block // per_page)
                total += dot_run(kind, base + np.uint64(page), places, slot, x_address, count)
                x_address += np.uint64(4 * count * elements)
                block += count
                left -= count
            y[row] = total

    return matvec_loop


def matvec(
    target: Target,
    y: Any,
    cache: PageCache,
    w: PagedMatrix,
    x: Any,
    begin: int = 0,
    end: int | None = None,
) -> None:
    """y[begin:end] = w[begin:end] @ x.
    """
    end = w.n_rows if end is None else end
    check_range(w.name, begin, end, w.n_rows)
    check_array("x", x, np.float32, (w.n_cols,))
    check_array("y", y, np.float32, (None,))
    matrix = matrix_arguments(cache, w)
    if begin == end:
        return
    if config.DISABLE_JIT:
        rows = np.empty((end - begin, w.n_cols), np.float32)
        dequantise(target, rows, cache, w, begin, end)
        y[begin:end] = rows @ x
    else:
        _loop(int(w.ggml_type))(y, x, begin, end, *matrix)
