"""Causal attention of new tokens over the key-value cache, with grouped heads.

    out[t, h] = sum over p <= position + t of softmax_p(q[t, h] . k[p, g] / sqrt(head_dim)) v[p, g]

with g = h // (n_head / n_head_kv). The softmax is built up tile by tile of positions (M. Milakov,
N. Gimelshein, "Online normalizer calculation for softmax", 2018): whenever a tile raises the
highest score, what was summed before is scaled down. No scores are stored beyond a tile, so no
memory is needed that grows with the context.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, prange, types

from atlas.ops.checks import MAX_BLOCKS, check_array, check_positions
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.ptx import divide
from atlas.ops.split_attention import MAX_HEAD_DIM, launch_split_attention, scratch_floats
from atlas.target import Target
from forge.jit import cached_njit

_TILE = 32  # positions
_HEADS = types.float32[:, :, ::1]

#: Products of queries and keys below which waking other threads costs more than they save.
SERIAL_PRODUCTS = 1 << 16


@kernel(_HEADS, _HEADS, _HEADS, _HEADS, types.int32[::1], types.float32)
def attention_kernel(out, q, keys, values, position, scale):
    """For heads of any size. A block per token and head: threads over the tile's positions, then
    over dimensions."""
    weights = cuda.shared.array(_TILE, types.float32)
    thread, n_threads = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
    n_head, head_dim = np.uint32(q.shape[1]), np.uint32(q.shape[2])
    group = divide(n_head, np.uint32(keys.shape[1]))
    item = np.uint32(cuda.blockIdx.x)
    while item < np.uint32(q.shape[0]) * n_head:
        t = divide(item, n_head)
        head = np.uint32(item - t * n_head)
        head_kv = divide(head, group)
        length = np.uint32(np.uint32(position[0]) + t + np.uint32(1))
        length = np.uint32(min(length, np.uint32(keys.shape[0])))
        highest, total = np.float32(-np.inf), np.float32(0)
        d = thread
        while d < head_dim:
            out[t, head, d] = np.float32(0)
            d = np.uint32(d + n_threads)
        start = np.uint32(0)
        while start < length:
            count = np.uint32(min(np.uint32(_TILE), np.uint32(length - start)))
            p = thread
            while p < count:
                score = np.float32(0)
                for d in range(head_dim):
                    score += q[t, head, d] * keys[np.uint32(start + p), head_kv, d]
                weights[p] = score * scale
                p = np.uint32(p + n_threads)
            cuda.syncthreads()
            before = highest
            for p in range(count):
                highest = max(highest, weights[p])
            shrink = np.float32(math.exp(before - highest))
            total *= shrink
            for p in range(count):
                total += np.float32(math.exp(weights[p] - highest))
            d = thread
            while d < head_dim:
                summed = out[t, head, d] * shrink
                for p in range(count):
                    weight = np.float32(math.exp(weights[p] - highest))
                    summed += weight * values[np.uint32(start + np.uint32(p)), head_kv, d]
                out[t, head, d] = summed
                d = np.uint32(d + n_threads)
            cuda.syncthreads()
            start = np.uint32(start + np.uint32(_TILE))
        d = thread
        while d < head_dim:
            out[t, head, d] /= total
            d = np.uint32(d + n_threads)
        item = np.uint32(item + np.uint32(cuda.gridDim.x))


def _attention(out, q, keys, values, position, scale):
    """Body of both loops: heads in parallel where `prange` is, one after the other elsewhere."""
    n_tokens, n_head, head_dim = q.shape
    group = n_head // keys.shape[1]
    # Tokens run fastest: threads get whole heads, hence equal shares of the causal triangle.
    for item in prange(n_head * n_tokens):
        head, t = item // n_tokens, item % n_tokens
        head_kv = head // group
        length = position + t + 1
        weights = np.empty(_TILE, np.float32)
        highest, total = np.float32(-np.inf), np.float32(0)
        for d in range(head_dim):
            out[t, head, d] = np.float32(0)
        for start in range(0, length, _TILE):
            count = min(_TILE, length - start)
            before = highest
            for p in range(count):
                score = np.float32(0)
                for d in range(head_dim):
                    score += q[t, head, d] * keys[start + p, head_kv, d]
                weights[p] = score * scale
                highest = max(highest, weights[p])
            shrink = np.float32(math.exp(before - highest))
            total *= shrink
            for d in range(head_dim):
                out[t, head, d] *= shrink
            for p in range(count):
                weights[p] = math.exp(weights[p] - highest)
                total += weights[p]
            # Four positions at a time, or each would wait for the last one's sums to be stored.
            fours = count // 4 * 4
            for p in range(0, fours, 4):
                w0, w1, w2, w3 = weights[p], weights[p + 1], weights[p + 2], weights[p + 3]
                for d in range(head_dim):
                    out[t, head, d] += (
                        w0 * values[start + p, head_kv, d]
                        + w1 * values[start + p + 1, head_kv, d]
                        + w2 * values[start + p + 2, head_kv, d]
                        + w3 * values[start + p + 3, head_kv, d]
                    )
            for p in range(fours, count):
                for d in range(head_dim):
                    out[t, head, d] += weights[p] * values[start + p, head_kv, d]
        for d in range(head_dim):
            out[t, head, d] /= total


# Sums may be reordered, or they would not vectorise; infinities keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz"}
attention_serial_loop = cached_njit(fastmath=_FASTMATH)(_attention)
attention_loop = cached_njit(parallel=True, fastmath=_FASTMATH)(_attention)


def attention(
    target: Target, out: Any, q: Any, keys: Any, values: Any, position: Any, scratch: Any
) -> None:
    """Attention of `n_tokens` new tokens over all positions up to their own.

    Parameters
    ----------
    target
        Where to run.
    out, q
        float32 [n_tokens, n_head, head_dim], two arrays.
    keys, values
        float32 [n_context, n_head_kv, head_dim]; positions 0 to `position` + n_tokens - 1 are
        filled, those of the new tokens included.
    position
        int32 [1], position of the first new token.
    scratch
        float32 [`attention_scratch_floats`], or longer; its contents are of no interest.

    Raises
    ------
    ValueError
        If shapes disagree, the scratch memory is too short, or (CPU) the tokens do not fit the
        context.
    """
    check_array("q", q, np.float32, (None, None, None))
    check_array("out", out, np.float32, q.shape)
    n_tokens, n_head, head_dim = q.shape
    check_array("keys", keys, np.float32, (None, None, head_dim))
    check_array("values", values, np.float32, keys.shape)
    n_context, n_head_kv = keys.shape[:2]
    if n_head_kv == 0 or n_head % n_head_kv:
        raise ValueError(f"{n_head} heads do not share {n_head_kv} key-value heads evenly")
    check_positions(target, position, n_tokens, n_context)
    check_array("scratch", scratch, np.float32, (None,))
    wanted = attention_scratch_floats(n_head, n_head_kv, head_dim, n_context)
    if scratch.shape[0] < wanted:
        raise ValueError(f"scratch has {scratch.shape[0]} elements, expected {wanted}")
    if q.size == 0:
        return
    if target.is_cuda:
        _launch(target, out, q, keys, values, position, scratch)
        return
    first, scale = int(position[0]), np.float32(1 / math.sqrt(head_dim))
    if q.size * (first + n_tokens) < SERIAL_PRODUCTS:
        attention_serial_loop(out, q, keys, values, first, scale)
    else:
        attention_loop(out, q, keys, values, first, scale)


def attention_scratch_floats(n_head: int, n_head_kv: int, head_dim: int, n_context: int) -> int:
    """Scratch memory that `attention` needs, in float32."""
    if not _is_split(head_dim):
        return 0
    return scratch_floats(n_head, n_head_kv, head_dim, n_context)


def _is_split(head_dim: int) -> bool:
    """Whether heads of this size are for the kernels that load 16 bytes at a time."""
    return head_dim % 4 == 0 and head_dim <= MAX_HEAD_DIM


def _launch(
    target: Target, out: Any, q: Any, keys: Any, values: Any, position: Any, scratch: Any
) -> None:
    if max(keys.size, q.size, scratch.size) >= 1 << 32:
        raise ValueError(
            "attention: an array has 2^32 elements or more, which kernels do not count"
        )
    if _is_split(q.shape[2]):
        launch_split_attention(target, out, q, keys, values, position, scratch)
        return
    grid = min(q.shape[0] * q.shape[1], MAX_BLOCKS)
    scale = 1 / math.sqrt(q.shape[2])
    attention_kernel.launch(target, grid, target.block, out, q, keys, values, position, scale)


KERNELS: dict[str, Kernel] = {"attention_kernel": attention_kernel}
