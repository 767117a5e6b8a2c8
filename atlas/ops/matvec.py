"""Mat-vec on pages: y[r] = sum over c of w[r, c] * x[c], in float32 with x as it is.

Weights are decoded in registers and never stored. The sum of a row runs over at least sixteen
partial sums (lanes, or threads of a block), so its rounding error is below that of a plain loop.
A decode step reads every weight once, so the bound is the memory's bandwidth. On a GPU the kernels
of `matvec_kernels` read the types and layouts they know; the one here reads all, value by value.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numba import config, cuda, prange, types

from atlas.ops.block_values import (
    MATRIX_VALUES,
    matrix_arguments,
    matrix_signature,
    page_offset,
)
from atlas.ops.block_vectors import dot_run
from atlas.ops.checks import MAX_BLOCKS, MAX_THREADS, check_array, check_range
from atlas.ops.dequant import dequantise
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.matvec_kernels import launch_units
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.target import Target
from forge.jit import cached_njit


def _kernel(kind: GGMLQuantizationType) -> Kernel:
    """`matvec_kernel` of one type: a block per row, its threads over the columns."""
    matrix_value = MATRIX_VALUES[kind]

    @kernel(
        types.float32[::1], types.float32[::1], types.int64, types.int64, *matrix_signature(kind)
    )
    def matvec_kernel(
        y, x, begin, end, frames, table, shard_shift, first_page, per_page, elements, places
    ):
        partial = cuda.shared.array(MAX_THREADS, types.float32)
        thread = cuda.threadIdx.x
        n_cols = np.int64(x.size)
        for row in range(begin + cuda.blockIdx.x, end, cuda.gridDim.x):
            total = np.float32(0)
            for column in range(thread, n_cols, cuda.blockDim.x):
                weight = matrix_value(
                    frames, table, shard_shift, first_page, per_page, elements, places,
                    row * n_cols + column,
                )  # fmt: skip
                total += weight * x[column]
            partial[thread] = total
            cuda.syncthreads()
            left = cuda.blockDim.x
            while left > 1:
                half = (left + 1) // 2
                if thread + half < left:
                    partial[thread] += partial[thread + half]
                left = half
                cuda.syncthreads()
            if thread == 0:
                y[row] = partial[0]
            cuda.syncthreads()

    return matvec_kernel


_KERNELS = {kind: _kernel(kind) for kind in MATRIX_VALUES}


#: Weights below which waking other threads costs more than they save.
SERIAL_WEIGHTS = 1 << 17


@functools.cache
def _loop(kind: int, parallel: bool) -> Any:
    """The loop for one type; `kind` is a constant of the compiled code."""

    @cached_njit(parallel=parallel)
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
    """y[begin:end] = w[begin:end] @ x; the rest of y is left alone.

    Parameters
    ----------
    target
        Where to run.
    y
        float32 [at least n_rows].
    cache, w
        The pages, all of these rows resident, and the matrix.
    x
        float32 [n_cols].
    begin, end
        Range of rows; all of them by default.

    Raises
    ------
    GGUFShardError
        If the matrix has a type that cannot be computed with.
    """
    end = w.n_rows if end is None else end
    check_range(w.name, begin, end, w.n_rows)
    _check_vectors(y, w, x, end)
    if target.is_cuda and begin < end and launch_units(target, [y], cache, [w], x, begin, [end]):
        return
    matrix = matrix_arguments(cache, w)
    if begin == end:
        return
    if target.is_cuda:
        blocks = min(end - begin, MAX_BLOCKS)
        _KERNELS[w.ggml_type].launch(target, blocks, target.block, y, x, begin, end, *matrix)
    elif config.DISABLE_JIT:
        rows = np.empty((end - begin, w.n_cols), np.float32)
        dequantise(target, rows, cache, w, begin, end)
        y[begin:end] = rows @ x
    else:
        parallel = (end - begin) * w.n_cols >= SERIAL_WEIGHTS
        _loop(int(w.ggml_type), parallel)(y, x, begin, end, *matrix)


def _check_vectors(y: Any, w: PagedMatrix, x: Any, end: int) -> None:
    """Raise unless x is as wide as a matrix, and y has room for rows up to `end`."""
    check_array("x", x, np.float32, (w.n_cols,))
    check_array("y", y, np.float32, (None,))
    if y.shape[0] < end:
        raise ValueError(f"y has {y.shape[0]} elements, rows go to {end}")


def matvecs(
    target: Target, ys: Sequence[Any], cache: PageCache, matrices: Sequence[PagedMatrix], x: Any
) -> None:
    """y = w @ x for several matrices, by one kernel where that is possible.

    Parameters
    ----------
    target
        Where to run.
    ys
        float32 [at least n_rows] for each.
    cache, matrices
        The pages, all rows of all matrices resident, and the matrices.
    x
        float32 [n_cols].

    Raises
    ------
    GGUFShardError
        If a matrix has a type that cannot be computed with.
    """
    for y, w in zip(ys, matrices, strict=True):
        _check_vectors(y, w, x, w.n_rows)
    ends = [w.n_rows for w in matrices]
    if target.is_cuda and all(ends) and launch_units(target, ys, cache, matrices, x, 0, ends):
        return
    for y, w in zip(ys, matrices, strict=True):
        matvec(target, y, cache, w, x)


KERNELS = {f"matvec_kernel_{kind.name.lower()}": k for kind, k in _KERNELS.items()}
