"""`matmul` on tensor cores: 16-bit floats in, float32 sums (`mma.sync.m16n8k16`, sm_80 and up).

What is rounded: tokens to float16, each scaled so that none of its values overflows
(`round_tokens`), and weights to float16, F16 as it is (`block_halves`). With u = 2^-11, and sums
that lose at most 2^-22 in each of n_cols / 16 steps, the error of y[t, r] is at most

    sum over c of (2 u + u^2 + n_cols 2^-26) |w| |x| + 2^-25 |x| + 2^-38 |w| max |x[t]|,

the last two for values that are subnormal as float16. BF16 weights meet tokens rounded to bfloat16,
and the error is at most (2^-8 + n_cols 2^-26) |w| |x|. A quantised weight above 65504, which takes
a block scale above 500, becomes infinite, and so does its product: it is seen. F32 weights would
lose what they are kept for, and are left to the plain kernel.

A block computes a tile of rows by tokens over slices of 32 columns. While its warps multiply one
slice out of shared memory, the next is on its way: the weights as raw words in registers, decoded
and stored when the multiplications are issued, the tokens by asynchronous copies. A product of few
tiles or few tokens has tiles of several planes instead, each a slice of its own with its own warps,
whose sums are added in the end: more bytes are on their way at a time, and fewer steps follow each
other.

There is a block for every tile, and no loop over tiles: what it would carry from one tile to the
next are registers that the wide tile does not have.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numba import config, cuda, types

from atlas.ops.block_halves import HALF_DECODERS, VALUES, plain_decoder
from atlas.ops.checks import MAX_BLOCKS
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.memory import store16, wait_for_copies
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.ops.ptx import mma_bf16, mma_f16
from atlas.ops.round_tokens import (
    GROUP,
    ROUND_THREADS,
    SLICE,
    SLICE_WORDS,
    padded_slices,
    round_to_bfloat_kernel,
    round_to_half_kernel,
    rounded_place,
    words_of_group,
)
from atlas.ops.tensor_tiles import (
    PLAIN,
    PLAIN_GROUP,
    Tile,
    copier,
    fetcher,
    multiplier,
    page_place,
    plane_adder,
    row_place,
    writer,
)
from atlas.target import CudaTarget, as_vector
from forge.block_layouts import block_layout

# 64 sums a thread (32 rows by 64 tokens a warp): 12 loads from shared memory serve 32
# multiplications, which is about what shared memory can feed. Four blocks of 128 registers a thread
# fit a multiprocessor: some compute while others wait. Of the tiles tried on an H100 (32 to 128
# rows by 64 to 256 tokens) it is the fastest for 512 tokens, or nearly so, for each type.
WIDE = Tile(64, 128, 1, 2)
# A block for each of about as many multiprocessors as there are out of 4096 rows and few tokens,
# each with 4 KiB of 8-bit weights and 16 KiB of tokens on their way.
NARROW = Tile(32, 64, 4, 1)
#: The wide one and the narrow one, see `tile_for`.
TILES = (Tile(32, 32, 1, 1), Tile(16, 16, 2, 1)) if config.ENABLE_CUDASIM else (WIDE, NARROW)
#: Tiles from which on wide ones pay: with fewer, multiprocessors have one at a time, or none.
MIN_WIDE_TILES = 2 if config.ENABLE_CUDASIM else 256


def tensor_kernel(kind: GGMLQuantizationType, tile: Tile) -> Kernel:
    """`matmul_tensor_kernel` of a type and a tile."""
    elements = PLAIN_GROUP if kind in PLAIN else VALUES  # of a piece, which lies in one page
    parts = np.uint32(max(block_layout(kind).elements // elements, 1))  # pieces of a block
    per_page = np.uint32(block_layout(kind).per_page * block_layout(kind).elements // elements)
    decoder = plain_decoder if kind in PLAIN else HALF_DECODERS[kind]
    fetch, decode = fetcher(kind), decoder.decode
    is_whole = tile.planes == 1  # else planes may lie behind the row, where weights are zero
    columns = tile.planes * SLICE
    pieces = np.uint32(columns // elements)  # from a thread's slice to its next

    rows, tile_tokens, planes = (np.uint32(n) for n in tile[:3])
    plane_warps, row_warps = np.uint32(tile.rows // 16), np.uint32(tile.row_warps)
    warp_rows = np.uint32(8 * tile.row_fragments)
    warp_tokens = np.uint32(GROUP * tile.token_fragments)
    plane_words, token_words = (np.uint32(n * SLICE_WORDS) for n in tile[:2])
    n_weight_words, n_token_words = (2 * tile.planes * n * SLICE_WORDS for n in tile[:2])
    n_sums = tile.sums
    copy_tokens, add_planes, write_sums = copier(tile), plane_adder(tile), writer(tile)
    multiply = multiplier(tile, mma_bf16 if kind == GGMLQuantizationType.BF16 else mma_f16)

    @kernel(
        types.float32[::1], types.uint32, types.uint32, types.uint32[::1], *[types.uint32] * 3,
        types.uint64, types.int32[::1], types.uint32, types.uint32, types.boolean,
        launch_bounds=(tile.threads, tile.resident), min_capability=(8, 0),
    )  # fmt: skip
    def matmul_tensor_kernel(
        y,
        n_y_tokens,
        n_y_rows,
        rounded,
        begin,
        end,
        n_cols,
        pool,
        table,
        shard_shift,
        first_page,
        is_row_major,
    ):
        weights = cuda.shared.array(n_weight_words, np.uint32, 16)  # [stage, plane, row, slice]
        tokens = cuda.shared.array(n_token_words, np.uint32, 16)  # [stage, plane, group, slice]
        sums = cuda.local.array(n_sums, np.float32)
        for k in range(n_sums):
            sums[k] = np.float32(0)

        # Which tile: blocks side by side share rows, so that weights come once from memory.
        n_slices = np.uint32(padded_slices(n_cols))
        n_steps = np.uint32(np.uint32(n_cols + np.uint32(columns - 1)) // np.uint32(columns))
        last_group = np.uint32(np.uint32(n_y_tokens - np.uint32(1)) >> np.uint32(4))
        first_row = np.uint32(begin + np.uint32(np.uint32(cuda.blockIdx.y) * rows))
        first_token = np.uint32(np.uint32(cuda.blockIdx.x) * tile_tokens)

        # Which part of it a warp multiplies.
        thread = np.uint32(cuda.threadIdx.x)
        plane = np.uint32((thread >> np.uint32(5)) // plane_warps)
        warp = np.uint32((thread >> np.uint32(5)) % plane_warps)
        warp_row, warp_token = warp % row_warps * warp_rows, warp // row_warps * warp_tokens
        g = np.uint32((thread & np.uint32(31)) >> np.uint32(2))
        i = np.uint32(thread & np.uint32(3))
        row_at = np.uint32(warp_row * np.uint32(SLICE_WORDS) + row_place(g, i))
        token_at = np.uint32(
            warp_token * np.uint32(SLICE_WORDS)
            + rounded_place(g, np.uint32(i << np.uint32(2)), np.uint32(0))
        )

        # Which row a thread fetches, sixteen values of each slice, and where it stands in it.
        # Behind the last row it is again the last, and its product is not stored.
        fetched_row = np.uint32((thread >> np.uint32(1)) % rows)
        half = np.uint32(thread & np.uint32(1))
        stored = row_place(fetched_row, np.uint32(half << np.uint32(1)))
        row = min(np.uint32(first_row + fetched_row), np.uint32(end - np.uint32(1)))
        column = np.uint32(plane * np.uint32(SLICE) + half * np.uint32(16))
        start = np.uint64(np.uint64(row) * np.uint64(n_cols) + np.uint64(column))
        before = np.uint64(start // np.uint64(elements))  # pieces of the matrix
        page = np.uint32(first_page + np.uint32(before // np.uint64(per_page)))
        piece = np.uint32(before % np.uint64(per_page))
        place = page_place(table, shard_shift, page)

        step = np.uint32(0)
        while step < n_steps:
            stage = np.uint32(np.uint32(step & np.uint32(1)) * planes)
            copy_tokens(
                tokens, np.uint32(stage * token_words), rounded, n_slices,
                np.uint32(first_token >> np.uint32(4)), last_group, np.uint32(step * planes),
                thread,
            )  # fmt: skip
            # `raw` has one value a step, behind the row whatever comes there: NVVM 13.0 does not
            # come to an end with tuples that change.
            raw = fetch(pool, table, shard_shift, page, place, is_row_major, piece)
            if step > np.uint32(0):
                other = np.uint32(np.uint32(planes - stage) + plane)
                multiply(
                    sums, weights, np.uint32(np.uint32(other * plane_words) + row_at),
                    tokens, np.uint32(np.uint32(other * token_words) + token_at),
                )  # fmt: skip
            w0, w1, w2, w3, w4, w5, w6, w7 = decode(raw, np.uint32(piece % parts))
            if not is_whole and column >= n_cols:
                w0 = w1 = w2 = w3 = w4 = w5 = w6 = w7 = np.uint32(0)
            at = np.uint32(np.uint32(np.uint32(stage + plane) * plane_words) + stored)
            store16(weights, at, w0, w1, w2, w3)
            store16(weights, np.uint32(at ^ np.uint32(4)), w4, w5, w6, w7)
            column = np.uint32(column + np.uint32(columns))
            piece = np.uint32(piece + pieces)
            if piece >= per_page:
                piece, page = np.uint32(piece - per_page), np.uint32(page + np.uint32(1))
                place = page_place(table, shard_shift, page)
            wait_for_copies()
            cuda.syncthreads()
            step = np.uint32(step + np.uint32(1))
        last = np.uint32(np.uint32(n_steps - np.uint32(1)) & np.uint32(1))
        stage = np.uint32(np.uint32(last * planes) + plane)
        multiply(
            sums, weights, np.uint32(stage * plane_words + row_at),
            tokens, np.uint32(stage * token_words + token_at),
        )  # fmt: skip

        if planes > np.uint32(1):
            add_planes(sums, tokens, plane, thread)
        if plane == np.uint32(0):
            write_sums(
                y, n_y_tokens, n_y_rows, sums,
                np.uint32(first_row + warp_row + (i << np.uint32(1))), end,
                np.uint32(first_token + warp_token + g), rounded,
                np.uint32((last_group + np.uint32(1)) * (n_slices << np.uint32(8))),
            )  # fmt: skip

    return matmul_tensor_kernel


_KERNELS = {
    (kind, tile): tensor_kernel(kind, tile) for kind in (*PLAIN, *HALF_DECODERS) for tile in TILES
}


def fits_tensor_cores(target: CudaTarget, w: PagedMatrix, scratch: Any) -> bool:
    """Whether `matmul_tensor` can multiply with a matrix.

    The target must have tensor cores, rows must be whole slices of a type with a decoder, no more
    than a grid has room for, and the scratch memory must hold a group of rounded tokens.
    """
    return (
        target.has_tensor_cores
        and (w.ggml_type in PLAIN or w.ggml_type in HALF_DECODERS)
        and w.n_cols % SLICE == 0
        and all(tile.grid_of(w.n_rows, 1)[1] <= MAX_BLOCKS for tile in TILES)
        and scratch.shape[0] >= words_of_group(w.n_cols)
    )


def tile_for(n_rows: int, n_tokens: int) -> Tile:
    """The tile that a product is cut into: narrow if wide ones would be few, or half empty."""
    wide, narrow = TILES
    are_many = math.prod(wide.grid_of(n_rows, n_tokens)) >= MIN_WIDE_TILES
    return wide if are_many and n_tokens > narrow.tokens else narrow


def matmul_tensor(
    target: CudaTarget,
    y: Any,
    cache: PageCache,
    w: PagedMatrix,
    x: Any,
    begin: int,
    end: int,
    scratch: Any,
) -> None:
    """`matmul` where `fits_tensor_cores`; takes what `matmul` has checked.

    As many tokens are multiplied at a time as the scratch memory holds rounded. Each such pass
    reads the weights once.
    """
    n_tokens = x.shape[0]
    per_pass = scratch.shape[0] // words_of_group(w.n_cols) * GROUP
    if n_tokens <= per_pass:  # views of device arrays cost more than a launch
        _multiply(target, y, cache, w, x, begin, end, scratch)
        return
    for first in range(0, n_tokens, per_pass):
        last = min(first + per_pass, n_tokens)
        _multiply(target, y[first:last], cache, w, x[first:last], begin, end, scratch)


def _multiply(
    target: CudaTarget,
    y: Any,
    cache: PageCache,
    w: PagedMatrix,
    x: Any,
    begin: int,
    end: int,
    scratch: Any,
) -> None:
    n_rows, n_tokens = end - begin, x.shape[0]
    is_bfloat = w.ggml_type == GGMLQuantizationType.BF16
    rounding = round_to_bfloat_kernel if is_bfloat else round_to_half_kernel
    rounding.launch(target, -(-n_tokens // GROUP) * GROUP, ROUND_THREADS, x, scratch)
    tile = tile_for(n_rows, n_tokens)
    _KERNELS[w.ggml_type, tile].launch(
        target, tile.grid_of(n_rows, n_tokens), tile.threads,
        as_vector(y), n_tokens, y.shape[1], scratch, begin, end, w.n_cols,
        target.address(cache.frames), cache.table, cache.shard_shift, w.first_page,
        w.layout.memory_layout == "row_major",
    )  # fmt: skip


KERNELS = {
    f"matmul_tensor_kernel_{kind.name.lower()}_{tile}": one
    for (kind, tile), one in _KERNELS.items()
}
