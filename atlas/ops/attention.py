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

from atlas.ops.checks import MAX_BLOCKS, check_array, grid_size
from atlas.target import Target
from forge.jit import cached_njit

_TILE = 32  # positions


#: Products of queries and keys below which waking other threads costs more than they save.
SERIAL_PRODUCTS = 1 << 16


@cuda.jit
def attention_kernel(out, q, keys, values, position, scale):
    """A block per token and head: threads over the tile's positions, then over dimensions."""
    weights = cuda.shared.array(_TILE, types.float32)
    thread, n_threads = cuda.threadIdx.x, cuda.blockDim.x
    n_tokens, n_head, head_dim = q.shape
    group = n_head // keys.shape[1]
    for item in range(cuda.blockIdx.x, n_tokens * n_head, cuda.gridDim.x):
        t, head = item // n_head, item % n_head
        head_kv = head // group
        length = position + t + 1
        highest, total = np.float32(-np.inf), np.float32(0)
        for d in range(thread, head_dim, n_threads):
            out[t, head, d] = np.float32(0)
        for start in range(0, length, _TILE):
            count = min(_TILE, length - start)
            for p in range(thread, count, n_threads):
                score = np.float32(0)
                for d in range(head_dim):
                    score += q[t, head, d] * keys[start + p, head_kv, d]
                weights[p] = score * scale
            cuda.syncthreads()
            before = highest
            for p in range(count):
                highest = max(highest, weights[p])
            cuda.syncthreads()
            for p in range(thread, count, n_threads):
                weights[p] = math.exp(weights[p] - highest)
            cuda.syncthreads()
            shrink = np.float32(math.exp(before - highest))
            total *= shrink
            for p in range(count):
                total += weights[p]
            for d in range(thread, head_dim, n_threads):
                summed = out[t, head, d] * shrink
                for p in range(count):
                    summed += weights[p] * values[start + p, head_kv, d]
                out[t, head, d] = summed
            cuda.syncthreads()
        for d in range(thread, head_dim, n_threads):
            out[t, head, d] /= total


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


def attention(target: Target, out: Any, q: Any, keys: Any, values: Any, position: int) -> None:
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
        Position of the first new token.
    """
    check_array("q", q, np.float32, (None, None, None))
    check_array("out", out, np.float32, q.shape)
    n_tokens, n_head, head_dim = q.shape
    check_array("keys", keys, np.float32, (None, None, head_dim))
    check_array("values", values, np.float32, keys.shape)
    if keys.shape[1] == 0 or n_head % keys.shape[1]:
        raise ValueError(f"{n_head} heads do not share {keys.shape[1]} key-value heads evenly")
    if position < 0 or position + n_tokens > keys.shape[0]:
        raise ValueError(
            f"positions {position}..{position + n_tokens} are not within a context of "
            f"{keys.shape[0]}"
        )
    if q.size == 0:
        return
    scale = np.float32(1 / math.sqrt(head_dim))
    if target.is_cuda:
        grid = min(n_tokens * n_head, MAX_BLOCKS)
        attention_kernel[grid, target.block](out, q, keys, values, position, scale)
    elif q.size * (position + n_tokens) < SERIAL_PRODUCTS:
        attention_serial_loop(out, q, keys, values, position, scale)
    else:
        attention_loop(out, q, keys, values, position, scale)


@cuda.jit
def store_kv_kernel(cache, new, position):
    width = np.int64(new.shape[1]) * np.int64(new.shape[2])
    n_items = np.int64(new.shape[0]) * width
    for item in range(cuda.grid(1), n_items, cuda.gridsize(1)):
        t, head, d = item // width, item % width // new.shape[2], item % new.shape[2]
        cache[position + t, head, d] = new[t, head, d]


def store_kv(target: Target, cache: Any, new: Any, position: int) -> None:
    """Copy new keys or values into the cache.

    Parameters
    ----------
    target
        Where to run.
    cache
        float32 [n_context, n_head_kv, head_dim].
    new
        float32 [n_tokens, n_head_kv, head_dim], to stand from `position` on.
    position
        Position of the first new token.
    """
    check_array("new", new, np.float32, (None, None, None))
    check_array("cache", cache, np.float32, (None, *new.shape[1:]))
    if position < 0 or position + new.shape[0] > cache.shape[0]:
        raise ValueError(
            f"positions {position}..{position + new.shape[0]} are not within a context of "
            f"{cache.shape[0]}"
        )
    if new.size == 0:
        return
    if target.is_cuda:
        store_kv_kernel[grid_size(target, new.size), target.block](cache, new, position)
    else:
        cache[position : position + new.shape[0]] = new


_HEADS = types.float32[:, :, ::1]
KERNELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "attention_kernel": (
        attention_kernel,
        (_HEADS, _HEADS, _HEADS, _HEADS, types.int64, types.float32),
    ),
    "store_kv_kernel": (store_kv_kernel, (_HEADS, _HEADS, types.int64)),
}
