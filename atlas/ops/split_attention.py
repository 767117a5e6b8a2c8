"""Attention kernels that read keys and values once for several query rows, and share out long ones.

The query rows of a key-value head (token by token, and head by head of its group) are taken in
chunks. A block computes a chunk over a share of the positions, tile by tile:

    load    16 bytes a load: keys to shared memory; values to registers, on their way meanwhile
    score   a thread per position and part of the dimensions, for all rows of the chunk
    weigh   a warp per row: the softmax built up tile by tile
            (M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018)
    sum     a thread per four dimensions and some of the positions, for all rows of the chunk

With more than one share, blocks leave their sums in scratch memory, and a second kernel combines
them (`atlas.ops.attention_shares`). The grid is laid out for the whole context; how long shares are
is computed from the position on the device, and blocks beyond it have nothing to do: one recorded
launch serves every token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import config, cuda, types

from atlas.ops.attention_shares import (
    COMBINE_THREADS,
    MAX_SHARES,
    combine_kernel,
    share_length,
)
from atlas.ops.checks import MAX_BLOCKS
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.memory import load16, store16
from atlas.ops.ptx import divide
from atlas.ops.warp import warp_max, warp_sum
from atlas.target import Target

THREADS = 128
MAX_HEAD_DIM = 256

# Blocks that a multiprocessor is to hold: with 16 KiB under way in each, that is more than the
# memory's latency times its bandwidth, and there are registers for them.
_BLOCKS_EACH = 3
# Those of 132 multiprocessors.
_BLOCKS = 8 if config.ENABLE_CUDASIM else _BLOCKS_EACH * 132
# Positions of a share when the context is full: two tiles, so that loading one can hide another.
_SMALLEST_SHARE = 64

_PER_THREAD = 8  # positions of a tile whose values one thread keeps, at most
_TILE_FLOATS = THREADS * _PER_THREAD * 4  # of a tile's keys

_HEADS, _FLOATS = types.float32[:, :, ::1], types.float32[::1]
_HIGHEST, _TOTAL, _SHRINK = range(3)  # a row's state: maximum, sum of weights, last rescaling


@cuda.jit(device=True)
def _place(row, group, head_kv, n_head):
    """A query row of a key-value head among all the [n_tokens * n_head]."""
    token = divide(row, group)
    return np.uint32(token * n_head + head_kv * group + (row - token * group))


@cuda.jit(device=True)
def _start_chunk(queries, state, visible, q, scale, first, rows_of):
    """Scaled queries to shared memory, how many positions each sees, and no sums yet. Behind the
    last row it is repeated: nobody asks for the result."""
    group, head_kv, first_row, last_row = rows_of
    thread = np.uint32(cuda.threadIdx.x)
    n_head, head_dim = np.uint32(q.shape[1]), np.uint32(q.shape[2])
    rows, columns = np.uint32(visible.size), np.uint32(head_dim >> np.uint32(2))
    i = thread
    while i < rows * columns:
        r = divide(i, columns)
        row = np.uint32(min(np.uint32(first_row + r), last_row))
        at = np.uint32(_place(row, group, head_kv, n_head) * columns + (i - r * columns))
        a, b, c, d = load16(q, np.uint32(np.uint32(4) * at))
        at = np.uint32(r * np.uint32(queries.shape[1]) + np.uint32(4) * (i - r * columns))
        store16(queries, at, a * scale, b * scale, c * scale, d * scale)
        i = np.uint32(i + np.uint32(THREADS))
    if thread < rows:
        row = np.uint32(min(np.uint32(first_row + thread), last_row))
        visible[thread] = np.uint32(first + divide(row, group) + np.uint32(1))
        state[_HIGHEST, thread] = np.float32(-np.inf)
        state[_TOTAL, thread] = np.float32(0)


@cuda.jit(device=True)
def _load(kept, array, at, mine):
    """A thread's four dimensions of `mine` positions of keys or values; all loads are under way
    before the first is waited for."""
    stride = np.uint32(np.uint32(array.shape[1]) * np.uint32(array.shape[2]))
    for i in range(_PER_THREAD):
        if np.uint32(i) < mine:
            a, b, c, d = load16(array, at)
            kept[i, 0], kept[i, 1], kept[i, 2], kept[i, 3] = a, b, c, d
        at = np.uint32(at + stride)


@cuda.jit(device=True)
def _share_keys(key_tile, kept, place, column, mine):
    """The keys a thread has loaded to shared memory."""
    pitch = np.uint32(key_tile.shape[1])
    at = np.uint32(place * pitch + column)
    for i in range(_PER_THREAD):
        if np.uint32(i) < mine:
            a, b, c, d = kept[i, 0], kept[i, 1], kept[i, 2], kept[i, 3]
            store16(key_tile, np.uint32(at + np.uint32(i) * pitch), a, b, c, d)


@cuda.jit(device=True)
def _score(scores, dots, key_tile, queries, head_dim):
    """Products of a thread's position with all queries, over its part of the dimensions."""
    n_parts, tile = np.uint32(scores.shape[0]), np.uint32(scores.shape[2])
    thread = np.uint32(cuda.threadIdx.x)
    part = np.uint32(thread // tile)
    p = np.uint32(thread - part * tile)
    keys_at = np.uint32(p * np.uint32(key_tile.shape[1]))
    pitch = np.uint32(queries.shape[1])
    for r in range(dots.size):
        dots[r] = np.float32(0)
    column = np.uint32(np.uint32(4) * part)
    while column < head_dim:
        a, b, c, d = load16(key_tile, np.uint32(keys_at + column))
        for r in range(dots.size):
            e, f, g, h = load16(queries, np.uint32(column + np.uint32(r) * pitch))
            dots[r] += (a * e + b * f) + (c * g + d * h)
        column = np.uint32(column + np.uint32(4) * n_parts)
    for r in range(dots.size):
        scores[part, np.uint32(r), p] = dots[r]


@cuda.jit(device=True)
def _weigh(weights, state, scores, visible, start, count):
    """A warp per row: its weights in the tile, and its state with the tile in it."""
    n_parts, tile = np.uint32(scores.shape[0]), np.uint32(scores.shape[2])
    thread = np.uint32(cuda.threadIdx.x)
    lane, row = np.uint32(thread & np.uint32(31)), np.uint32(thread >> np.uint32(5))
    while row < np.uint32(visible.size):
        score = np.float32(-np.inf)
        if lane < count and start + lane < visible[row]:
            score = np.float32(0)
            part = np.uint32(0)
            while part < n_parts:
                score += scores[part, row, lane]
                part = np.uint32(part + np.uint32(1))
        before = state[_HIGHEST, row]
        highest = max(before, warp_max(score))
        # A row that has seen nothing yet weighs nothing: not NaN.
        level = highest if highest > np.float32(-np.inf) else np.float32(0)
        weight, shrink = np.float32(math.exp(score - level)), np.float32(math.exp(before - level))
        total = warp_sum(weight)
        if lane < tile:
            weights[lane, row] = weight
        if lane == np.uint32(0):
            state[_SHRINK, row] = shrink
            state[_TOTAL, row] = state[_TOTAL, row] * shrink + total
            state[_HIGHEST, row] = highest
        row = np.uint32(row + np.uint32(THREADS // 32))


@cuda.jit(device=True)
def _add_values(sums, kept, weights, state, place, mine):
    """A thread's four dimensions: what it kept, weighted, for every row."""
    for r in range(sums.shape[0]):
        shrink = state[_SHRINK, np.uint32(r)]
        for j in range(4):
            sums[r, j] *= shrink
    for i in range(_PER_THREAD):
        if np.uint32(i) < mine:
            for r in range(sums.shape[0]):
                weight = weights[np.uint32(place + np.uint32(i)), np.uint32(r)]
                for j in range(4):
                    sums[r, j] += weight * kept[i, j]


@cuda.jit(device=True)
def _share_sums(shared, sums, head_dim, part):
    """What the threads have summed to shared memory, [rows, n_subsets, head_dim]."""
    n_subsets, subset, column, _, _ = part
    if subset < n_subsets:
        for r in range(sums.shape[0]):
            at = np.uint32((np.uint32(r) * n_subsets + subset) * head_dim + column)
            store16(shared, at, sums[r, 0], sums[r, 1], sums[r, 2], sums[r, 3])


@cuda.jit(device=True)
def _finish_chunk(out, scratch, shared, state, rows_of, share, n_shares, part):
    """Results of a chunk: to `out` if this was all there is, else to scratch memory."""
    group, head_kv, first_row, last_row = rows_of
    n_subsets = part[0]
    n_head, head_dim = np.uint32(out.shape[1]), np.uint32(out.shape[2])
    n_sums = np.uint32(np.uint32(out.shape[0]) * n_head * n_shares)
    i = np.uint32(cuda.threadIdx.x)
    columns = np.uint32(head_dim >> np.uint32(2))
    while i < (last_row - first_row + np.uint32(1)) * columns:
        r = divide(i, columns)
        column = np.uint32(np.uint32(4) * (i - r * columns))
        a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        subset = np.uint32(0)
        while subset < n_subsets:
            at = np.uint32((r * n_subsets + subset) * head_dim + column)
            e, f, g, h = load16(shared, at)
            a, b, c, d = a + e, b + f, c + g, d + h
            subset = np.uint32(subset + np.uint32(1))
        row = _place(np.uint32(first_row + r), group, head_kv, n_head)
        total = state[_TOTAL, r]
        if n_shares == np.uint32(1):
            at = np.uint32(row * head_dim + column)
            store16(out, at, a / total, b / total, c / total, d / total)
        else:
            at = np.uint32(row * n_shares + share)
            store16(scratch, np.uint32(at * head_dim + column), a, b, c, d)
            if column == np.uint32(0):
                at = np.uint32(n_sums * head_dim + at)
                scratch[at] = state[_HIGHEST, r]
                scratch[np.uint32(at + n_sums)] = total
        i = np.uint32(i + np.uint32(THREADS))


@cuda.jit(device=True)
def _part(head_dim, tile):
    """What of a tile is a thread's own: subsets there are, its subset, its first dimension of four,
    its first position, and how many positions a thread has."""
    columns, thread = np.uint32(head_dim >> np.uint32(2)), np.uint32(cuda.threadIdx.x)
    n_subsets, subset = divide(np.uint32(THREADS), columns), divide(thread, columns)
    column = np.uint32(np.uint32(4) * (thread - subset * columns))
    per_thread = divide(np.uint32(tile - np.uint32(1) + n_subsets), n_subsets)
    place = np.uint32(min(np.uint32(subset * per_thread), tile))  # behind the tile: none
    return n_subsets, subset, column, place, per_thread


@cuda.jit(device=True)
def _sum_tiles(shared, own, keys, values, start, end, head_kv, part):
    """Positions `start` to `end` - 1, tile by tile, into the sums and the state of every row."""
    key_tile, queries, scores, weights, state, visible = shared
    sums, kept, dots = own
    _, _, column, place, per_thread = part
    head_dim, tile = np.uint32(keys.shape[2]), np.uint32(key_tile.shape[0])
    stride = np.uint32(np.uint32(keys.shape[1]) * head_dim)
    for r in range(sums.shape[0]):
        for j in range(4):
            sums[r, j] = np.float32(0)
    while start < end:
        count = np.uint32(min(tile, np.uint32(end - start)))
        mine = np.uint32(min(np.uint32(max(count, place) - place), per_thread))
        at = np.uint32((start + place) * stride + head_kv * head_dim + column)
        _load(kept, keys, at, mine)
        _share_keys(key_tile, kept, place, column, mine)
        _load(kept, values, at, mine)  # on their way while the keys are used
        cuda.syncthreads()
        _score(scores, dots, key_tile, queries, head_dim)
        cuda.syncthreads()
        _weigh(weights, state, scores, visible, start, count)
        cuda.syncthreads()
        _add_values(sums, kept, weights, state, place, mine)
        start = np.uint32(start + tile)


def _kernel(rows: int, tile: int) -> Kernel:
    """The kernel for chunks of `rows` query rows and tiles of `tile` positions, for heads of up to
    4096 / `tile` dimensions."""
    # Numba wants the shapes as constants. Four floats more a position, so that the same dimensions
    # of eight positions lie in different banks.
    key_shape, query_shape = (tile, _TILE_FLOATS // tile + 4), (rows, _TILE_FLOATS // tile)
    scores_shape, weights_shape = (THREADS // tile, rows, tile), (tile, rows)
    state_shape, sums_shape, kept_shape = (3, rows), (rows, 4), (_PER_THREAD, 4)

    @kernel(
        _HEADS, _HEADS, _HEADS, _HEADS, types.int32[::1], _FLOATS, types.uint32, types.float32,
        launch_bounds=(THREADS, _BLOCKS_EACH),
    )  # fmt: skip
    def split_attention_kernel(out, q, keys, values, position, scratch, n_shares, scale):
        key_tile = cuda.shared.array(key_shape, types.float32, alignment=16)
        queries = cuda.shared.array(query_shape, types.float32, alignment=16)
        scores = cuda.shared.array(scores_shape, types.float32)
        weights = cuda.shared.array(weights_shape, types.float32)
        state = cuda.shared.array(state_shape, types.float32)
        visible = cuda.shared.array(rows, types.uint32)
        shared = key_tile, queries, scores, weights, state, visible
        sums = cuda.local.array(sums_shape, types.float32)
        kept = cuda.local.array(kept_shape, types.float32)
        own = sums, kept, cuda.local.array(rows, types.float32)

        n_tokens, n_head_kv = np.uint32(q.shape[0]), np.uint32(keys.shape[1])
        group = divide(np.uint32(q.shape[1]), n_head_kv)
        n_rows = np.uint32(n_tokens * group)
        n_chunks = divide(np.uint32(n_rows + np.uint32(rows - 1)), np.uint32(rows))
        first = np.uint32(position[0])
        length = np.uint32(min(np.uint32(first + n_tokens), np.uint32(keys.shape[0])))
        per_share = share_length(length, n_shares)
        part = _part(np.uint32(q.shape[2]), np.uint32(tile))
        item = np.uint32(cuda.blockIdx.x)
        while item < n_head_kv * n_chunks * n_shares:
            chunk = divide(item, n_shares)
            share, head_kv = np.uint32(item - chunk * n_shares), divide(chunk, n_chunks)
            first_row = np.uint32((chunk - head_kv * n_chunks) * np.uint32(rows))
            last_row = np.uint32(min(np.uint32(first_row + np.uint32(rows)), n_rows) - np.uint32(1))
            start = np.uint32(share * per_share)
            end = np.uint32(min(np.uint32(first + divide(last_row, group) + np.uint32(1)), length))
            end = np.uint32(min(np.uint32(start + per_share), end))
            if start < end:
                rows_of = group, head_kv, first_row, last_row
                _start_chunk(queries, state, visible, q, scale, first, rows_of)
                _sum_tiles(shared, own, keys, values, start, end, head_kv, part)
                # The keys are done with: their place is where sums meet.
                _share_sums(key_tile, sums, np.uint32(q.shape[2]), part)
                cuda.syncthreads()
                _finish_chunk(out, scratch, key_tile, state, rows_of, share, n_shares, part)
                cuda.syncthreads()
            item = np.uint32(item + np.uint32(cuda.gridDim.x))

    return split_attention_kernel


# By the rows of a chunk and the dimensions of a head: each is for what fits no smaller one.
_SPLIT_KERNELS: dict[tuple[int, int], Kernel] = {
    (rows, max_dim): _kernel(rows, _TILE_FLOATS // max_dim)
    for rows in (1, 4, 8)
    for max_dim in (128, MAX_HEAD_DIM)
}


def scratch_floats(n_head: int, n_head_kv: int, head_dim: int, n_context: int) -> int:
    """Scratch memory for one token, in float32; none if its attention is not shared out."""
    n_shares = _plan(1, n_head, n_head_kv, n_context)[2]
    return n_head * n_shares * (head_dim + 2) if n_shares > 1 else 0


def _plan(n_tokens: int, n_head: int, n_head_kv: int, n_context: int) -> tuple[int, int, int]:
    """Rows of a chunk, blocks that one share takes, and shares."""
    n_rows = n_tokens * (n_head // n_head_kv)
    rows = next((rows for rows in (1, 4, 8) if n_rows <= rows), 8)
    n_blocks = n_head_kv * -(-n_rows // rows)
    shares = min(-(-_BLOCKS // n_blocks), -(-n_context // _SMALLEST_SHARE), MAX_SHARES)
    return rows, n_blocks, max(1, shares)


def launch_split_attention(
    target: Target, out: Any, q: Any, keys: Any, values: Any, position: Any, scratch: Any
) -> None:
    """Queue the kernels; arguments as for `atlas.ops.attention.attention`, and checked by it.

    Several tokens use as many shares as the scratch memory holds.
    """
    n_tokens, n_head, head_dim = q.shape
    n_context, n_head_kv, _ = keys.shape
    rows, n_blocks, n_shares = _plan(n_tokens, n_head, n_head_kv, n_context)
    n_shares = max(1, min(n_shares, scratch.size // (n_tokens * n_head * (head_dim + 2))))
    made = _SPLIT_KERNELS[rows, 128 if head_dim <= 128 else MAX_HEAD_DIM]
    grid = min(n_blocks * n_shares, MAX_BLOCKS)
    scale = 1 / math.sqrt(head_dim)
    made.launch(target, grid, THREADS, out, q, keys, values, position, scratch, n_shares, scale)
    if n_shares > 1:
        grid = min(n_tokens * n_head, MAX_BLOCKS)
        combine_kernel.launch(
            target, grid, COMBINE_THREADS, out, position, scratch, n_context, n_shares
        )


KERNELS: dict[str, Kernel] = {
    f"split_attention_kernel[{rows} rows, {max_dim}]": made
    for (rows, max_dim), made in _SPLIT_KERNELS.items()
}
