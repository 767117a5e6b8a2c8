"""The small operations between the products: norms, rotary positions, activations, sums, argmax.

    rms_norm     out = x / sqrt(mean(x^2) + eps) * weight       B. Zhang, R. Sennrich, 2019
    rope         pairs of a head turned by position * frequency J. Su et al., "RoFormer", 2021
    swiglu       out = gate / (1 + exp(-gate)) * up             N. Shazeer, 2020

The loops are serial: next to the products they take little, and starting threads would cost a
decode step more than it gains.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, types

from atlas.ops.checks import MAX_BLOCKS, MAX_THREADS, check_array, grid_size
from atlas.target import Target
from forge.jit import cached_njit

_QUARTERS_PER_RADIAN = 2.0 / math.pi
# Minimax polynomials for sine and cosine on [-pi/4, pi/4]: S. Moshier, Cephes, sinf.c.
_S1, _S2, _S3 = (np.float32(c) for c in (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4))
_C1, _C2, _C3 = (np.float32(c) for c in (4.166664568e-2, -1.388731625e-3, 2.443315712e-5))


@cached_njit()
def silu(x):
    """x times its logistic sigmoid, without overflow on either side."""
    decay = np.float32(math.exp(-abs(x)))
    share = np.float32(1) if x >= 0 else decay
    return np.float32(x * share / (np.float32(1) + decay))


@cached_njit()
def cos_sin(position, frequency):
    """Cosine and sine of position * frequency, to float32 precision at any position.

    The angle is taken in float64, reduced to an eighth of a turn: a float32 product has lost its
    fraction of a turn at long contexts, and the library's reduction spills registers on GPUs.
    """
    quarters = np.float64(position) * np.float64(frequency) * _QUARTERS_PER_RADIAN
    nearest = math.floor(quarters + 0.5)
    angle = np.float32((quarters - nearest) / _QUARTERS_PER_RADIAN)
    square = np.float32(angle * angle)
    sine = angle + angle * square * (_S1 + square * (_S2 + square * _S3))
    cosine = (
        np.float32(1)
        - np.float32(0.5) * square
        + square * square * (_C1 + square * (_C2 + square * _C3))
    )
    quadrant = np.int64(nearest) & np.int64(3)
    if quadrant & 1:
        cosine, sine = -sine, cosine
    if quadrant & 2:
        cosine, sine = -cosine, -sine
    return np.float32(cosine), np.float32(sine)


@cached_njit()
def pair_of(i, n_pairs, interleaved):
    """Dimensions of a head that pair `i` turns."""
    if interleaved:
        return 2 * i, 2 * i + 1
    return i, i + n_pairs


# --- rms_norm ---


@cuda.jit
def rms_norm_kernel(out, x, weight, eps):
    """A block per token; sums in float32 over the block's threads."""
    partial = cuda.shared.array(MAX_THREADS, types.float32)
    thread = cuda.threadIdx.x
    for t in range(cuda.blockIdx.x, x.shape[0], cuda.gridDim.x):
        total = np.float32(0)
        for i in range(thread, x.shape[1], cuda.blockDim.x):
            total += x[t, i] * x[t, i]
        partial[thread] = total
        cuda.syncthreads()
        left = cuda.blockDim.x
        while left > 1:
            half = (left + 1) // 2
            if thread + half < left:
                partial[thread] += partial[thread + half]
            left = half
            cuda.syncthreads()
        mean = np.float32(partial[0] / np.float32(x.shape[1]))
        scale = np.float32(np.float32(1) / np.float32(math.sqrt(mean + eps)))
        for i in range(thread, x.shape[1], cuda.blockDim.x):
            out[t, i] = x[t, i] * scale * weight[i]
        cuda.syncthreads()


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
        grid = min(x.shape[0], MAX_BLOCKS)
        rms_norm_kernel[grid, target.block](out, x, weight, np.float32(eps))
    else:
        rms_norm_loop(out, x, weight, np.float32(eps))


# --- rope ---


@cuda.jit
def rope_kernel(x, position, frequencies, interleaved):
    """A thread per token, head and pair."""
    n_head, n_pairs = np.int64(x.shape[1]), np.int64(frequencies.size)
    n_items = np.int64(x.shape[0]) * n_head * n_pairs
    for item in range(cuda.grid(1), n_items, cuda.gridsize(1)):
        i, head = item % n_pairs, item // n_pairs % n_head
        t = item // n_pairs // n_head
        cosine, sine = cos_sin(position + t, frequencies[i])
        first, second = pair_of(i, n_pairs, interleaved)
        a, b = x[t, head, first], x[t, head, second]
        x[t, head, first] = a * cosine - b * sine
        x[t, head, second] = a * sine + b * cosine


@cached_njit()
def rope_loop(x, position, frequencies, interleaved):
    n_pairs = frequencies.size
    for t in range(x.shape[0]):
        for i in range(n_pairs):
            cosine, sine = cos_sin(position + t, frequencies[i])
            first, second = pair_of(i, n_pairs, interleaved)
            for head in range(x.shape[1]):
                a, b = x[t, head, first], x[t, head, second]
                x[t, head, first] = a * cosine - b * sine
                x[t, head, second] = a * sine + b * cosine


def rope(target: Target, x: Any, position: int, frequencies: Any, interleaved: bool) -> None:
    """Turn pairs of dimensions of each head by an angle that grows with the position, in place.

    Parameters
    ----------
    target
        Where to run.
    x
        float32 [n_tokens, n_head, head_dim]; token t stands at `position` + t.
    position
        Position of the first token.
    frequencies
        float32 [n_rot / 2], radians per position of each pair, any scaling included. Dimensions
        from n_rot on stay.
    interleaved
        Pairs are (2 i, 2 i + 1), as llama-architecture GGUF files have them, or else
        (i, i + n_rot / 2), as in GPT-NeoX.
    """
    check_array("x", x, np.float32, (None, None, None))
    check_array("frequencies", frequencies, np.float32, (None,))
    if 2 * frequencies.shape[0] > x.shape[2]:
        raise ValueError(f"{frequencies.shape[0]} pairs do not fit a head of {x.shape[2]}")
    if x.size == 0 or frequencies.shape[0] == 0:
        return
    if target.is_cuda:
        n_items = x.shape[0] * x.shape[1] * frequencies.shape[0]
        rope_kernel[grid_size(target, n_items), target.block](x, position, frequencies, interleaved)
    else:
        rope_loop(x, position, frequencies, interleaved)


# --- swiglu, add, add_scaled, add_rows ---


@cuda.jit
def swiglu_kernel(out, gate, up):
    for i in range(cuda.grid(1), out.size, cuda.gridsize(1)):
        out[i] = silu(gate[i]) * up[i]


@cached_njit()
def swiglu_loop(out, gate, up):
    for i in range(out.size):
        out[i] = silu(gate[i]) * up[i]


def swiglu(target: Target, out: Any, gate: Any, up: Any) -> None:
    """out = silu(gate) * up; float32 of one shape, `out` may be either of the others."""
    check_array("gate", gate, np.float32, (None,) * len(gate.shape))
    check_array("out", out, np.float32, gate.shape)
    check_array("up", up, np.float32, gate.shape)
    _run_flat(target, swiglu_kernel, swiglu_loop, (out, gate, up))


@cuda.jit
def add_scaled_kernel(x, y, scale):
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        x[i] += scale * y[i]


@cached_njit()
def add_scaled_loop(x, y, scale):
    for i in range(x.size):
        x[i] += scale * y[i]


def add_scaled(target: Target, x: Any, y: Any, scale: float) -> None:
    """x += scale * y; float32 of one shape."""
    check_array("x", x, np.float32, (None,) * len(x.shape))
    check_array("y", y, np.float32, x.shape)
    _run_flat(target, add_scaled_kernel, add_scaled_loop, (x, y), np.float32(scale))


def add(target: Target, x: Any, y: Any) -> None:
    """x += y; float32 of one shape."""
    add_scaled(target, x, y, 1.0)


@cuda.jit
def add_rows_kernel(x, bias):
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        x[i] += bias[i % bias.size]


@cached_njit()
def add_rows_loop(x, bias):
    for start in range(0, x.size, bias.size):
        for i in range(bias.size):
            x[start + i] += bias[i]


def add_rows(target: Target, x: Any, bias: Any) -> None:
    """x[t] += bias for every token t; float32 [n_tokens, n] and [n]."""
    check_array("x", x, np.float32, (None, None))
    check_array("bias", bias, np.float32, (x.shape[1],))
    if x.size == 0:
        return
    flat = x.reshape(x.size)
    if target.is_cuda:
        add_rows_kernel[grid_size(target, x.size), target.block](flat, bias)
    else:
        add_rows_loop(flat, bias)


def _run_flat(
    target: Target, kernel: Any, loop: Any, arrays: tuple[Any, ...], *scalars: Any
) -> None:
    """Run a one-dimensional operation over arrays of one shape."""
    size = arrays[0].size
    if size == 0:
        return
    flat = [array.reshape(size) for array in arrays]
    if target.is_cuda:
        kernel[grid_size(target, size), target.block](*flat, *scalars)
    else:
        loop(*flat, *scalars)


# --- argmax ---


@cuda.jit
def argmax_kernel(x, out):
    """One block; of equal values the lowest index, as in the loop."""
    values = cuda.shared.array(MAX_THREADS, types.float32)
    indices = cuda.shared.array(MAX_THREADS, types.int64)
    thread = cuda.threadIdx.x
    best, index = np.float32(-np.inf), np.int64(0)
    for i in range(thread, x.size, cuda.blockDim.x):
        if x[i] > best:
            best, index = x[i], np.int64(i)
    values[thread] = best
    indices[thread] = index
    cuda.syncthreads()
    left = cuda.blockDim.x
    while left > 1:
        half = (left + 1) // 2
        other = thread + half
        if other < left:
            equal = values[other] == values[thread]
            lower = equal and indices[other] < indices[thread]
            if values[other] > values[thread] or lower:
                values[thread] = values[other]
                indices[thread] = indices[other]
        left = half
        cuda.syncthreads()
    if thread == 0:
        out[0] = indices[0]


@cached_njit()
def argmax_loop(x):
    best, index = np.float32(-np.inf), 0
    for i in range(x.size):
        if x[i] > best:
            best, index = x[i], i
    return index


def argmax(target: Target, x: Any) -> int:
    """Index of the largest element of a float32 [n]; the lowest of several. NaN never wins."""
    check_array("x", x, np.float32, (None,))
    if x.shape[0] == 0:
        raise ValueError("argmax of no elements")
    if not target.is_cuda:
        return int(argmax_loop(x))
    out = target.empty(1, np.int64)
    argmax_kernel[1, target.block](x, out)
    return int(target.get(out)[0])


_VECTOR, _ROWS, _HEADS = types.float32[::1], types.float32[:, ::1], types.float32[:, :, ::1]
KERNELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "rms_norm_kernel": (rms_norm_kernel, (_ROWS, _ROWS, _VECTOR, types.float32)),
    "rope_kernel": (rope_kernel, (_HEADS, types.int64, _VECTOR, types.boolean)),
    "swiglu_kernel": (swiglu_kernel, (_VECTOR, _VECTOR, _VECTOR)),
    "add_scaled_kernel": (add_scaled_kernel, (_VECTOR, _VECTOR, types.float32)),
    "add_rows_kernel": (add_rows_kernel, (_VECTOR, _VECTOR)),
    "argmax_kernel": (argmax_kernel, (_VECTOR, types.int64[::1])),
}
