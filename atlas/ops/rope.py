"""Rotary positions, and new keys and values on their way into the cache.

    rope   pairs of a head's dimensions turned by position * frequency
           J. Su et al., "RoFormer", 2021

The position is read from an array on the target: a decode pass whose kernels were recorded once
can be replayed for every token.

The loops are serial: next to the products they take little, and starting threads would cost a
decode step more than it gains.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, types

from atlas.ops.checks import MAX_BLOCKS, check_array, check_positions
from atlas.ops.kernel import Kernel, kernel
from atlas.target import Target
from forge.jit import cached_njit

_QUARTERS_PER_RADIAN, _RADIANS_PER_QUARTER = 2.0 / math.pi, math.pi / 2.0
# Minimax polynomials for sine and cosine on [-pi/4, pi/4]: S. Moshier, Cephes, sinf.c.
_S1, _S2, _S3 = (np.float32(c) for c in (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4))
_C1, _C2, _C3 = (np.float32(c) for c in (4.166664568e-2, -1.388731625e-3, 2.443315712e-5))


@cached_njit()
def cos_sin(position, frequency):
    """Cosine and sine of position * frequency, to float32 precision at any position.

    The angle is taken in float64, reduced to an eighth of a turn: a float32 product has lost its
    fraction of a turn at long contexts, and the library's reduction spills registers on GPUs.
    """
    quarters = np.float64(position) * np.float64(frequency) * _QUARTERS_PER_RADIAN
    nearest = math.floor(quarters + 0.5)
    angle = np.float32((quarters - nearest) * _RADIANS_PER_QUARTER)
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


@cuda.jit(device=True)
def _turn(out, out_row, x, t, head, i, position, frequencies, interleaved):
    """Pair `i` of a head of x[t], turned, to a row of `out`."""
    cosine, sine = cos_sin(position, frequencies[i])
    first, second = pair_of(np.int64(i), np.int64(frequencies.size), interleaved)
    first, second = np.uint32(first), np.uint32(second)
    a, b = x[t, head, first], x[t, head, second]
    out[out_row, head, first] = a * cosine - b * sine
    out[out_row, head, second] = a * sine + b * cosine


@cuda.jit(device=True)
def _copy_pair(out, out_row, x, t, head, first):
    """Two dimensions of a head as they are; one, at an odd end."""
    out[out_row, head, first] = x[t, head, first]
    second = np.uint32(first + np.uint32(1))
    if second < np.uint32(x.shape[2]):
        out[out_row, head, second] = x[t, head, second]


_HEADS = types.float32[:, :, ::1]


@kernel(
    _HEADS, _HEADS, _HEADS, _HEADS, _HEADS, types.int32[::1], types.float32[::1], types.boolean
)  # fmt: skip
def rotate_and_store_kernel(q, k, v, keys, values, position, frequencies, interleaved):
    """A thread per token, head (of q, then of k, then of v) and pair of dimensions."""
    n_head, n_head_kv = np.uint32(q.shape[1]), np.uint32(k.shape[1])
    half = np.uint32((np.uint32(q.shape[2]) + np.uint32(1)) >> np.uint32(1))
    heads = np.uint32(n_head + np.uint32(2) * n_head_kv)
    n_items = np.uint32(np.uint32(q.shape[0]) * heads * half)
    n_pairs = np.uint32(frequencies.size)
    item = np.uint32(cuda.grid(1))
    while item < n_items:
        i, row = np.uint32(item % half), np.uint32(item // half)
        t, head = np.uint32(row // heads), np.uint32(row % heads)
        place = np.uint32(np.uint32(position[0]) + t)
        first = np.uint32(np.uint32(2) * i)
        if head < n_head:
            if i < n_pairs:
                _turn(q, t, q, t, head, i, place, frequencies, interleaved)
        elif head < n_head + n_head_kv:
            head = np.uint32(head - n_head)
            if i < n_pairs:
                _turn(keys, place, k, t, head, i, place, frequencies, interleaved)
            else:
                _copy_pair(keys, place, k, t, head, first)
        else:
            _copy_pair(values, place, v, t, np.uint32(head - n_head - n_head_kv), first)
        item = np.uint32(item + np.uint32(cuda.gridsize(1)))


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


@cached_njit()
def rotate_and_store_loop(q, k, v, keys, values, position, frequencies, interleaved):
    rope_loop(q, position, frequencies, interleaved)
    rope_loop(k, position, frequencies, interleaved)
    keys[position : position + k.shape[0]] = k
    values[position : position + v.shape[0]] = v


def rotate_and_store(
    target: Target,
    q: Any,
    k: Any,
    v: Any,
    keys: Any,
    values: Any,
    position: Any,
    frequencies: Any,
    interleaved: bool,
) -> None:
    """Turn queries and keys by angles that grow with the position; remember keys and values.

    Parameters
    ----------
    target
        Where to run.
    q
        float32 [n_tokens, n_head, head_dim], turned in place.
    k, v
        float32 [n_tokens, n_head_kv, head_dim]; `k` is used up: turned or not, as it comes.
    keys, values
        float32 [n_context, n_head_kv, head_dim]: token t enters row `position` + t.
    position
        int32 [1], position of the first token.
    frequencies
        float32 [n_rot / 2], radians per position of each pair, any scaling included. Dimensions
        from n_rot on stay.
    interleaved
        Pairs are (2 i, 2 i + 1), as llama-architecture GGUF files have them, or else
        (i, i + n_rot / 2), as in GPT-NeoX.

    Raises
    ------
    ValueError
        If shapes disagree, or (CPU) the tokens do not fit the context.
    """
    check_array("q", q, np.float32, (None, None, None))
    n_tokens, _, head_dim = q.shape
    check_array("k", k, np.float32, (n_tokens, None, head_dim))
    check_array("v", v, np.float32, k.shape)
    check_array("keys", keys, np.float32, (None, *k.shape[1:]))
    check_array("values", values, np.float32, keys.shape)
    check_array("frequencies", frequencies, np.float32, (None,))
    if 2 * frequencies.shape[0] > head_dim:
        raise ValueError(f"{frequencies.shape[0]} pairs do not fit a head of {head_dim}")
    check_positions(target, position, n_tokens, keys.shape[0])
    if q.size == 0:
        return
    if target.is_cuda:
        n_items = n_tokens * (q.shape[1] + 2 * k.shape[1]) * -(-head_dim // 2)
        grid = min(-(-n_items // target.block), MAX_BLOCKS)
        rotate_and_store_kernel.launch(
            target, grid, target.block, q, k, v, keys, values, position, frequencies, interleaved
        )
    else:
        rotate_and_store_loop(
            q, k, v, keys, values, int(position[0]), frequencies, interleaved
        )  # fmt: skip


KERNELS: dict[str, Kernel] = {"rotate_and_store_kernel": rotate_and_store_kernel}
