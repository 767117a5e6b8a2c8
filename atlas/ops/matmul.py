"""Products of a few tokens with a paged matrix: y[t, r] = sum over c of x[t, c] * w[r, c].

On the CPU a band of rows is dequantised into scratch memory, small enough to stay in the cache,
and handed to BLAS; each weight is decoded once for all tokens. On the GPU a block decodes a
stretch of one row into shared memory and its threads take a token each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, types

from atlas.ops.block_values import MATRIX_VALUES, matrix_arguments, matrix_signature
from atlas.ops.checks import MAX_BLOCKS, MAX_THREADS, check_array, check_range
from atlas.ops.dequant import dequantise
from atlas.ops.matvec import matvec
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.target import Target


def _kernel(matrix_value: Any) -> Any:
    """`matmul_kernel` of one type."""

    @cuda.jit
    def matmul_kernel(
        y, x, begin, end, frames, table, shard_shift, first_page, per_page, elements, places
    ):
        weights = cuda.shared.array(MAX_THREADS, types.float32)
        thread, n_threads = cuda.threadIdx.x, cuda.blockDim.x
        n_tokens, n_cols = np.int64(x.shape[0]), np.int64(x.shape[1])
        for row in range(begin + cuda.blockIdx.x, end, cuda.gridDim.x):
            for start in range(0, n_cols, n_threads):
                if start + thread < n_cols:
                    weights[thread] = matrix_value(
                        frames, table, shard_shift, first_page, per_page, elements, places,
                        row * n_cols + start + thread,
                    )  # fmt: skip
                cuda.syncthreads()
                for t in range(thread, n_tokens, n_threads):
                    total = np.float32(0)
                    if start > 0:
                        total = y[t, row]
                    for c in range(min(n_threads, n_cols - start)):
                        total += weights[c] * x[t, start + c]
                    y[t, row] = total
                cuda.syncthreads()

    return matmul_kernel


_KERNELS = {kind: _kernel(body) for kind, body in MATRIX_VALUES.items()}


def _matmul_by_bands(
    target: Target,
    y: np.ndarray,
    cache: PageCache,
    w: PagedMatrix,
    x: np.ndarray,
    begin: int,
    end: int,
    scratch: np.ndarray,
) -> None:
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
        float32 [at least n_cols], overwritten; as many rows as fit are decoded at a time.
        The CPU target alone uses it.

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
    elif target.is_cuda:
        kernel = _KERNELS[w.ggml_type]
        kernel[min(end - begin, MAX_BLOCKS), target.block](y, x, begin, end, *matrix)
    else:
        _matmul_by_bands(target, y, cache, w, x, begin, end, scratch)


_ARRAY = types.float32[:, ::1]
KERNELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    f"matmul_kernel_{kind.name.lower()}": (
        kernel,
        (_ARRAY, _ARRAY, types.int64, types.int64, *matrix_signature(kind)),
    )
    for kind, kernel in _KERNELS.items()
}
