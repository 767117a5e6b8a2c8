"""Rows of a paged matrix as float32.

Values are exactly those of ggml's dequantisation (`d * q`, `d * sc * q - dmin * m`), see
`atlas.ops.block_values`; kernels may fuse the last multiplication and subtraction.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numba import config, cuda, literally, prange, types

from atlas.ops.block_values import (
    MATRIX_VALUES,
    matrix_arguments,
    matrix_signature,
    page_offset,
)
from atlas.ops.block_vectors import decode_run
from atlas.ops.checks import check_array, check_range, grid_size
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.target import Target
from forge.jit import cached_njit


def _kernel(kind: GGMLQuantizationType) -> Kernel:
    """`dequantise_kernel` of one type: a thread per element, grid-stride."""
    matrix_value = MATRIX_VALUES[kind]

    @kernel(types.float32[:, ::1], types.int64, *matrix_signature(kind))
    def dequantise_kernel(
        out, begin, frames, table, shard_shift, first_page, per_page, elements, places
    ):
        n_cols = np.int64(out.shape[1])
        for i in range(cuda.grid(1), np.int64(out.shape[0]) * n_cols, cuda.gridsize(1)):
            out[i // n_cols, i % n_cols] = matrix_value(
                frames, table, shard_shift, first_page, per_page, elements, places,
                begin * n_cols + i,
            )  # fmt: skip

    return dequantise_kernel


_KERNELS = {kind: _kernel(kind) for kind in MATRIX_VALUES}


@cached_njit()
def decode_blocks(
    kind, out, block, left, base, table, shard_shift, first_page, per_page, elements, places
):
    """Store `left` blocks of a matrix, from `block` on, as float32 at address `out`.

    `kind` is a literal, `base` the address of the pool's frames.
    """
    while left > 0:
        slot = block % per_page
        count = min(left, per_page - slot)
        page = page_offset(table, shard_shift, first_page + block // per_page)
        decode_run(literally(kind), base + np.uint64(page), places, slot, out, count)
        out += np.uint64(4 * count * elements)
        block += count
        left -= count


@functools.cache
def _loop(kind: int) -> Any:
    """The loop for one type; `kind` is a constant of the compiled code."""

    @cached_njit(parallel=True)
    def dequantise_loop(
        out, begin, frames, table, shard_shift, first_page, per_page, elements, places
    ):
        base = np.uint64(frames.ctypes.data)
        blocks_per_row = out.shape[1] // elements
        for r in prange(out.shape[0]):
            decode_blocks(
                kind, np.uint64(out[r].ctypes.data), (begin + r) * blocks_per_row, blocks_per_row,
                base, table, shard_shift, first_page, per_page, elements, places,
            )  # fmt: skip

    return dequantise_loop


def _dequantise_interpreted(out: np.ndarray, begin: int, w: PagedMatrix, matrix: tuple) -> None:
    """The loop's twin without a compiler."""
    matrix_value = MATRIX_VALUES[w.ggml_type]
    for r, row in enumerate(out):
        row[:] = [matrix_value(*matrix, (begin + r) * w.n_cols + c) for c in range(w.n_cols)]


def dequantise(
    target: Target, out: Any, cache: PageCache, w: PagedMatrix, begin: int, end: int
) -> None:
    """Write rows `begin` to `end` - 1 of a matrix as float32.

    Parameters
    ----------
    target
        Where to run.
    out
        float32 [end - begin, n_cols] to fill.
    cache, w
        The pages, all of these rows resident, and the matrix.
    begin, end
        Range of rows.

    Raises
    ------
    GGUFShardError
        If the matrix has a type that cannot be computed with.
    """
    check_range(w.name, begin, end, w.n_rows)
    check_array("out", out, np.float32, (end - begin, w.n_cols))
    matrix = matrix_arguments(cache, w)
    if begin == end:
        return
    if target.is_cuda:
        blocks = grid_size(target, out.size)
        _KERNELS[w.ggml_type].launch(target, blocks, target.block, out, begin, *matrix)
    elif config.DISABLE_JIT:
        _dequantise_interpreted(out, begin, w, matrix)
    else:
        _loop(int(w.ggml_type))(out, begin, *matrix)


KERNELS = {f"dequantise_kernel_{kind.name.lower()}": k for kind, k in _KERNELS.items()}
