"""Root mean square norms, alone and behind the addition that nearly always comes before.

    rms_norm       out = x / sqrt(mean(x^2) + eps) * weight       B. Zhang, R. Sennrich, 2019
    add_rms_norm   x = x + delta, then the same

The loops are serial: next to the products they take little, and starting threads would cost a
decode step more than it gains.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import config, cuda, types

from atlas.ops.checks import MAX_BLOCKS, check_array
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.memory import load16, store16
from atlas.ops.warp import MAX_WARPS, aligned_fours, block_sum
from atlas.target import Target
from forge.jit import cached_njit

# A block a token. At 4096 elements each thread loads 16 bytes of each array, once: a decode step
# waits for one trip to memory, and for the sum.
_THREADS = 64 if config.ENABLE_CUDASIM else 1024
_VECTOR, _ROWS = types.float32[::1], types.float32[:, ::1]


@cuda.jit(device=True)
def _scale_row(out, x, weight, t, total, eps):
    """The second half: `total` is the sum of the row's squares."""
    n = np.uint32(x.shape[1])
    thread, step = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
    fours, row = aligned_fours(n), np.uint32(t * n)
    scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(n) + eps))
    four = thread
    while four < fours:
        i = np.uint32(np.uint32(4) * four)
        a, b, c, d = load16(x, np.uint32(row + i))
        e, f, g, h = load16(weight, i)
        store16(out, np.uint32(row + i), a * scale * e, b * scale * f, c * scale * g, d * scale * h)
        four = np.uint32(four + step)
    i = np.uint32(np.uint32(4) * fours + thread)
    while i < n:
        out[t, i] = x[t, i] * scale * weight[i]
        i = np.uint32(i + step)


@kernel(_ROWS, _ROWS, _VECTOR, types.float32, launch_bounds=1024)
def rms_norm_kernel(out, x, weight, eps):
    partial = cuda.shared.array(MAX_WARPS, types.float32)
    n = np.uint32(x.shape[1])
    thread, step = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
    fours = aligned_fours(n)
    t = np.uint32(cuda.blockIdx.x)
    while t < np.uint32(x.shape[0]):
        total = np.float32(0)
        four = thread
        while four < fours:
            a, b, c, d = load16(x, np.uint32(t * n + np.uint32(4) * four))
            total += (a * a + b * b) + (c * c + d * d)
            four = np.uint32(four + step)
        i = np.uint32(np.uint32(4) * fours + thread)
        while i < n:
            total += x[t, i] * x[t, i]
            i = np.uint32(i + step)
        total = block_sum(total, partial)
        _scale_row(out, x, weight, t, total, eps)
        cuda.syncthreads()
        t = np.uint32(t + np.uint32(cuda.gridDim.x))


@kernel(_ROWS, _ROWS, _ROWS, _VECTOR, types.float32, launch_bounds=1024)
def add_rms_norm_kernel(out, x, delta, weight, eps):
    """A thread scales what it has stored itself."""
    partial = cuda.shared.array(MAX_WARPS, types.float32)
    n = np.uint32(x.shape[1])
    thread, step = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
    fours = aligned_fours(n)
    t = np.uint32(cuda.blockIdx.x)
    while t < np.uint32(x.shape[0]):
        total = np.float32(0)
        four = thread
        while four < fours:
            i = np.uint32(t * n + np.uint32(4) * four)
            a, b, c, d = load16(x, i)
            e, f, g, h = load16(delta, i)
            a, b, c, d = a + e, b + f, c + g, d + h
            store16(x, i, a, b, c, d)
            total += (a * a + b * b) + (c * c + d * d)
            four = np.uint32(four + step)
        i = np.uint32(np.uint32(4) * fours + thread)
        while i < n:
            value = x[t, i] + delta[t, i]
            x[t, i] = value
            total += value * value
            i = np.uint32(i + step)
        total = block_sum(total, partial)
        _scale_row(out, x, weight, t, total, eps)
        cuda.syncthreads()
        t = np.uint32(t + np.uint32(cuda.gridDim.x))


@cached_njit(fastmath={"reassoc", "contract"})
def rms_norm_loop(out, x, weight, eps):
    """Sums in float64, as llama.cpp does."""
    for t in range(x.shape[0]):
        total = 0.0
        for i in range(x.shape[1]):
            total += np.float64(x[t, i]) * np.float64(x[t, i])
        mean = np.float32(total / x.shape[1])
        scale = np.float32(np.float32(1) / np.float32(math.sqrt(mean + eps)))
        for i in range(x.shape[1]):
            out[t, i] = x[t, i] * scale * weight[i]


@cached_njit()
def add_rms_norm_loop(out, x, delta, weight, eps):
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[t, i] += delta[t, i]
    rms_norm_loop(out, x, weight, eps)


def rms_norm(target: Target, out: Any, x: Any, weight: Any, eps: float) -> None:
    """Scale each token's vector to a root mean square of one, then by `weight`.

    Parameters
    ----------
    target
        Where to run.
    out, x
        float32 [n_tokens, n]; may be the same array.
    weight
        float32 [n].
    eps
        `rms_norm_eps` of the model.

    The mean of the squares is summed in float64 by the loop, as llama.cpp does, and in float32
    partial sums by the kernel.
    """
    check_array("x", x, np.float32, (None, None))
    check_array("out", out, np.float32, x.shape)
    check_array("weight", weight, np.float32, (x.shape[1],))
    if x.shape[0] == 0:
        return
    if target.is_cuda:
        rms_norm_kernel.launch(target, min(x.shape[0], MAX_BLOCKS), _THREADS, out, x, weight, eps)
    else:
        rms_norm_loop(out, x, weight, np.float32(eps))


def add_rms_norm(target: Target, out: Any, x: Any, delta: Any, weight: Any, eps: float) -> None:
    """x += delta, then out = rms_norm(x).

    Parameters
    ----------
    target
        Where to run.
    out, x, delta
        float32 [n_tokens, n]; `out` is none of the others.
    weight, eps
        As for `rms_norm`.
    """
    check_array("x", x, np.float32, (None, None))
    check_array("out", out, np.float32, x.shape)
    check_array("delta", delta, np.float32, x.shape)
    check_array("weight", weight, np.float32, (x.shape[1],))
    if x.shape[0] == 0:
        return
    if target.is_cuda:
        grid = min(x.shape[0], MAX_BLOCKS)
        add_rms_norm_kernel.launch(target, grid, _THREADS, out, x, delta, weight, eps)
    else:
        add_rms_norm_loop(out, x, delta, weight, np.float32(eps))


KERNELS: dict[str, Kernel] = {
    "rms_norm_kernel": rms_norm_kernel,
    "add_rms_norm_kernel": add_rms_norm_kernel,
}
