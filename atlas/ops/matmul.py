"""Products of a few tokens with a paged matrix: y[t, r] = sum over c of x[t, c] * w[r, c].

On the CPU a thread dequantises a band of rows into its part of the scratch memory, small enough to
stay in the second-level cache, and multiplies it with all tokens tile by tile. On the GPU a block
computes a tile of y, and decodes a weight once for all tokens of the tile: on tensor cores with
operands of 16 bits where there are such (`matmul_tensor` says what that costs), else here, in
float32.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import config, cuda, get_num_threads, prange, types

from atlas.ops.block_values import MATRIX_VALUES, matrix_arguments, matrix_signature
from atlas.ops.checks import MAX_BLOCKS, check_array, check_range
from atlas.ops.dequant import decode_blocks, dequantise
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.matmul_tensor import fits_tensor_cores, matmul_tensor
from atlas.ops.matvec import matvec
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.ops.tile_product import TILE_ROWS, TILE_TOKENS, tile_product
from atlas.target import CudaTarget, Target
from forge.jit import cached_njit

BAND_ELEMENTS = 131072  # most decoded weights of a thread: 512 KiB

# The plain kernel: 16 by 16 threads with 4 by 4 sums each, so that a load from shared memory serves
# two multiplications, over slices of 16 columns, as many as 64 bytes of a row have.
_SIDE = 4 if config.ENABLE_CUDASIM else 16
_TILE = 4 * _SIDE
_DEPTH = 16


def _kernel(kind: Any) -> Kernel:
    """`matmul_kernel` of one type."""
    matrix_value = MATRIX_VALUES[kind]
    pitch = _TILE + 1  # so that a column's stores meet in no bank

    @kernel(
        types.float32[:, ::1], types.float32[:, ::1], types.int64, types.int64,
        *matrix_signature(kind), launch_bounds=_SIDE * _SIDE,
    )  # fmt: skip
    def matmul_kernel(
        y, x, begin, end, frames, table, shard_shift, first_page, per_page, elements, places
    ):
        """A block per tile of y; a thread has the sums of every `_SIDE`-th row and token of it."""
        weights = cuda.shared.array((_DEPTH, pitch), np.float32)
        tokens = cuda.shared.array((_DEPTH, pitch), np.float32)
        sums = cuda.local.array(16, np.float32)
        thread = cuda.threadIdx.x
        n_tokens, n_cols = np.int64(x.shape[0]), np.int64(x.shape[1])
        token_tiles = (n_tokens + _TILE - 1) // _TILE
        n_tiles = (end - begin + _TILE - 1) // _TILE * token_tiles
        for tile in range(cuda.blockIdx.x, n_tiles, cuda.gridDim.x):
            first_row = begin + tile // token_tiles * _TILE
            first_token = tile % token_tiles * _TILE
            for k in range(16):
                sums[k] = np.float32(0)
            for start in range(0, n_cols, _DEPTH):
                for item in range(thread, _TILE * _DEPTH, _SIDE * _SIDE):
                    depth, i = item % _DEPTH, item // _DEPTH
                    column, row, token = start + depth, first_row + i, first_token + i
                    weight = value = np.float32(0)
                    if column < n_cols and row < end:
                        weight = matrix_value(
                            frames, table, shard_shift, first_page, per_page, elements, places,
                            row * n_cols + column,
                        )  # fmt: skip
                    if column < n_cols and token < n_tokens:
                        value = x[token, column]
                    weights[depth, i], tokens[depth, i] = weight, value
                cuda.syncthreads()
                for depth in range(_DEPTH):
                    for i in range(4):
                        weight = weights[depth, thread % _SIDE + i * _SIDE]
                        for j in range(4):
                            sums[4 * i + j] += weight * tokens[depth, thread // _SIDE + j * _SIDE]
                cuda.syncthreads()
            for i in range(4):
                row = first_row + thread % _SIDE + i * _SIDE
                for j in range(4):
                    token = first_token + thread // _SIDE + j * _SIDE
                    if row < end and token < n_tokens:
                        y[token, row] = sums[4 * i + j]

    return matmul_kernel


_KERNELS = {kind: _kernel(kind) for kind in MATRIX_VALUES}


@functools.cache
def _loop(kind: int) -> Any:
    """The loop for one type; `kind` is a constant of the compiled code."""

    @cached_njit(parallel=True)
    def matmul_loop(
        y, x, begin, end, scratch, n_workers,
        frames, table, shard_shift, first_page, per_page, elements, places,
    ):  # fmt: skip
        n_cols = x.shape[1]
        blocks_per_row = n_cols // elements
        band = max(1, min(BAND_ELEMENTS, scratch.size // n_workers) // n_cols)
        if band > TILE_ROWS:
            band -= band % TILE_ROWS
        base = np.uint64(frames.ctypes.data)
        for worker in prange(n_workers):
            weights = scratch[worker * band * n_cols : (worker + 1) * band * n_cols]
            address = np.uint64(weights.ctypes.data)
            stop = begin + (end - begin) * (worker + 1) // n_workers
            for first in range(begin + (end - begin) * worker // n_workers, stop, band):
                count = min(band, stop - first)
                decode_blocks(
                    kind, address, first * blocks_per_row, count * blocks_per_row,
                    base, table, shard_shift, first_page, per_page, elements, places,
                )  # fmt: skip
                _multiply_band(y, x, weights, first, count)

    return matmul_loop


@cached_njit()
def _multiply_band(y, x, weights, first, n_rows):
    """y[:, first : first + n_rows] = x @ weights.T, in tiles; weights [n_rows * n_cols]."""
    n_tokens, n_cols = x.shape
    stride = np.int64(y.shape[1])
    y_base, x_base = np.uint64(y.ctypes.data), np.uint64(x.ctypes.data)
    w_base = np.uint64(weights.ctypes.data)
    t = 0
    while t < n_tokens:
        whole_tokens = t + TILE_TOKENS <= n_tokens
        x_at = x_base + np.uint64(4 * t * n_cols)
        r = 0
        while r < n_rows:
            whole_rows = r + TILE_ROWS <= n_rows
            w_at = w_base + np.uint64(4 * r * n_cols)
            y_at = y_base + np.uint64(4 * (t * stride + first + r))
            if whole_tokens and whole_rows:
                tile_product(TILE_TOKENS, TILE_ROWS, y_at, stride, x_at, w_at, n_cols)
            elif whole_tokens:
                tile_product(TILE_TOKENS, 1, y_at, stride, x_at, w_at, n_cols)
            elif whole_rows:
                tile_product(1, TILE_ROWS, y_at, stride, x_at, w_at, n_cols)
            else:
                tile_product(1, 1, y_at, stride, x_at, w_at, n_cols)
            r += TILE_ROWS if whole_rows else 1
        t += TILE_TOKENS if whole_tokens else 1


def _matmul_interpreted(
    target: Target,
    y: np.ndarray,
    cache: PageCache,
    w: PagedMatrix,
    x: np.ndarray,
    begin: int,
    end: int,
    scratch: np.ndarray,
) -> None:
    """The loop's twin without a compiler."""
    rows = scratch.size // w.n_cols
    for first in range(begin, end, rows):
        last = min(first + rows, end)
        band = scratch[: (last - first) * w.n_cols].reshape(last - first, w.n_cols)
        dequantise(target, band, cache, w, first, last)
        np.matmul(x, band.T, out=y[:, first:last])


def matmul(
    target: Target,
    y: Any,
    cache: PageCache,
    w: PagedMatrix,
    x: Any,
    begin: int,
    end: int,
    scratch: Any,
) -> None:
    """y[:, begin:end] = x @ w[begin:end].T; the rest of y is left alone.

    Parameters
    ----------
    target
        Where to run.
    y
        float32 [n_tokens, at least n_rows].
    cache, w
        The pages, all of these rows resident, and the matrix.
    x
        float32 [n_tokens, n_cols].
    begin, end
        Range of rows.
    scratch
        float32 [at least n_cols], overwritten. On the CPU a thread needs n_cols elements and gains
        up to `BAND_ELEMENTS`. On tensor cores 16 tokens take `words_of_group(n_cols)`, about 8
        n_cols: with less for all tokens they are multiplied in several passes, with less for 16
        without tensor cores. It must start on a multiple of 16 bytes.

    Raises
    ------
    GGUFShardError
        If the matrix has a type that cannot be computed with.
    """
    check_range(w.name, begin, end, w.n_rows)
    check_array("x", x, np.float32, (None, w.n_cols))
    check_array("y", y, np.float32, (x.shape[0], None))
    if y.shape[1] < end:
        raise ValueError(f"y has {y.shape[1]} columns, rows go to {end}")
    check_array("scratch", scratch, np.float32, (None,))
    if scratch.shape[0] < w.n_cols:
        raise ValueError(f"scratch has {scratch.shape[0]} elements, a row needs {w.n_cols}")
    matrix = matrix_arguments(cache, w)
    if begin == end or x.shape[0] == 0:
        return
    if x.shape[0] == 1:
        matvec(target, y[0], cache, w, x[0], begin, end)
    elif isinstance(target, CudaTarget) and fits_tensor_cores(target, w, scratch):
        matmul_tensor(target, y, cache, w, x, begin, end, scratch)
    elif target.is_cuda:
        n_tiles = -(-(end - begin) // _TILE) * -(-x.shape[0] // _TILE)
        _KERNELS[w.ggml_type].launch(
            target, min(n_tiles, MAX_BLOCKS), _SIDE * _SIDE, y, x, begin, end, *matrix
        )
    elif config.DISABLE_JIT:
        _matmul_interpreted(target, y, cache, w, x, begin, end, scratch)
    else:
        n_workers = min(get_num_threads(), scratch.size // w.n_cols)
        _loop(int(w.ggml_type))(y, x, begin, end, scratch, n_workers, *matrix)


KERNELS = {f"matmul_kernel_{kind.name.lower()}": one for kind, one in _KERNELS.items()}
