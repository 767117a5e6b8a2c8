"""The parts of a tensor-core product: fetching weights, copying tokens, multiplying, storing.

Everything here is made for a `Tile` and becomes a piece of `matmul_tensor`'s kernel. Local arrays
that they are handed are registers: all loops over them have constant bounds, and unroll.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from numba import cuda

from atlas.ops.block_halves import HALF_DECODERS, VALUES
from atlas.ops.block_values import field_places
from atlas.ops.memory import copy16_async, load8_cached_at, load16
from atlas.ops.ptx import multiply_add_wide, shift_left, shift_right
from atlas.ops.round_tokens import GROUP, SLICE, SLICE_WORDS
from forge.block_layouts import MEMORY_LAYOUTS, block_layout
from forge.pages import PAGE_BYTES


class Tile(NamedTuple):
    """What a block computes: `rows` by `tokens` over `planes` slices at a time.

    A plane has rows / 16 warps, `row_warps` of them over the rows and the others over the tokens.
    Two threads fetch a row of a plane.
    """

    rows: int
    tokens: int
    planes: int
    row_warps: int

    @property
    def threads(self) -> int:
        return 2 * self.rows * self.planes

    @property
    def resident(self) -> int:
        """Blocks that must fit a multiprocessor: their threads have 128 registers each."""
        return max(512 // self.threads, 1)

    @property
    def row_fragments(self) -> int:
        """Fragments of 8 rows that a warp multiplies."""
        return self.rows // self.row_warps // 8

    @property
    def token_fragments(self) -> int:
        """Fragments of 16 tokens that a warp multiplies."""
        return self.tokens // (self.rows // 16 // self.row_warps) // GROUP

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return 4 * self.row_fragments * self.token_fragments

    def grid_of(self, n_rows: int, n_tokens: int) -> tuple[int, int]:
        """Tiles of a product, over the tokens and over the rows."""
        return -(-n_tokens // self.tokens), -(-n_rows // self.rows)

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}x{self.planes * SLICE}"


# --- weights: sixteen values from a page ---

PLAIN = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
PLAIN_GROUP = 4  # plain elements that never straddle pages: a page holds a multiple


@cuda.jit(device=True)
def page_place(table, shard_shift, page):
    """Pages in the pool before a page; some number, if it is behind the last or its shard is not
    resident."""
    shard = np.uint32(min(shift_right(page, shard_shift), np.uint32(table.size - 1)))
    frame = np.uint32(max(table[shard], np.int32(0)))
    in_shard = np.uint32(page & np.uint32(~shift_left(np.uint32(0xFFFFFFFF), shard_shift)))
    return np.uint32(shift_left(frame, shard_shift) | in_shard)


def fetcher(kind: GGMLQuantizationType) -> Any:
    """`fetch(pool, table, shard_shift, page, place, is_row_major, piece) -> raw` of a type.

    `place` is where `page` is in the pool; `piece` counts sixteen values in it, of plain elements
    four.
    """
    return _plain_fetcher(kind) if kind in PLAIN else _block_fetcher(kind)


def _block_fetcher(kind: GGMLQuantizationType) -> Any:
    load, parts = HALF_DECODERS[kind].load, np.uint32(block_layout(kind).elements // VALUES)
    # Both layouts are in the code, since places that are constants cost no registers.
    columns, rows = (field_places(block_layout(kind, layout)) for layout in MEMORY_LAYOUTS)

    @cuda.jit(device=True)
    def fetch(pool, table, shard_shift, page, place, is_row_major, piece):
        base = multiply_add_wide(place, np.uint32(PAGE_BYTES), pool)
        slot, part = np.uint32(piece // parts), np.uint32(piece % parts)
        if is_row_major:
            return load(base, rows, slot, part)
        return load(base, columns, slot, part)

    return fetch


def _plain_fetcher(kind: GGMLQuantizationType) -> Any:
    """Four groups, of which some may lie in the next page."""
    groups_per_page = np.uint32(block_layout(kind).per_page // PLAIN_GROUP)

    @cuda.jit(device=True)
    def group(pool, table, shard_shift, page, place, slot):
        if slot >= groups_per_page:
            place = page_place(table, shard_shift, np.uint32(page + np.uint32(1)))
            slot = np.uint32(slot - groups_per_page)
        base = multiply_add_wide(place, np.uint32(PAGE_BYTES), pool)
        return load8_cached_at(np.uint64(base + np.uint64(slot << np.uint32(3))))

    @cuda.jit(device=True)
    def fetch(pool, table, shard_shift, page, place, is_row_major, piece):
        s1, s2 = np.uint32(piece + np.uint32(1)), np.uint32(piece + np.uint32(2))
        s3 = np.uint32(piece + np.uint32(3))
        if s3 < groups_per_page:
            base = multiply_add_wide(place, np.uint32(PAGE_BYTES), pool)
            at = np.uint64(base + np.uint64(piece << np.uint32(3)))
            w0, w1 = load8_cached_at(at)
            w2, w3 = load8_cached_at(np.uint64(at + np.uint64(8)))
            w4, w5 = load8_cached_at(np.uint64(at + np.uint64(16)))
            w6, w7 = load8_cached_at(np.uint64(at + np.uint64(24)))
        else:
            w0, w1 = group(pool, table, shard_shift, page, place, piece)
            w2, w3 = group(pool, table, shard_shift, page, place, s1)
            w4, w5 = group(pool, table, shard_shift, page, place, s2)
            w6, w7 = group(pool, table, shard_shift, page, place, s3)
        return w0, w1, w2, w3, w4, w5, w6, w7

    return fetch


# --- shared memory ---


@cuda.jit(device=True)
def row_place(row, chunk):
    """Word of a chunk of a row in a slice of weights.

    A row is 64 bytes, 4 chunks; of the 8 chunks that two rows share 128 bytes for, each is at its
    number xor (row / 2 % 4): neither a fragment's loads nor the stores meet in a bank.
    """
    pair = np.uint32(row >> np.uint32(1))
    within = np.uint32((((row & np.uint32(1)) << np.uint32(2)) | chunk) ^ (pair & np.uint32(3)))
    return np.uint32((pair << np.uint32(5)) + (within << np.uint32(2)))


def copier(tile: Tile) -> Any:
    """`copy_tokens`: a slice for each plane from the rounded tokens to shared memory, as it is.

    The 64 quads of a slice of a group are copied by so many threads, each some of them, that all
    have the same number to copy: a thread has one place to look up.
    """
    groups = np.uint32(tile.tokens // GROUP)
    n_copies = 4 * tile.tokens * tile.planes // tile.threads
    stride = 64 // n_copies

    @cuda.jit(device=True)
    def copy_tokens(tokens, stage, rounded, n_slices, first_group, last_group, first_slice, thread):
        piece, quad = np.uint32(thread // np.uint32(stride)), np.uint32(thread % np.uint32(stride))
        # Behind the last group it is again the last, and its product is not stored.
        group = np.uint32(min(np.uint32(first_group + np.uint32(piece % groups)), last_group))
        slices = np.uint32(first_slice + np.uint32(piece // groups))
        source = np.uint32(np.uint32(group * n_slices) + slices)
        word = np.uint32(quad << np.uint32(2))
        to = np.uint64(np.uint32(np.uint32(stage + np.uint32(piece << np.uint32(8))) + word))
        at = np.uint64(np.uint32(np.uint32(source << np.uint32(8)) + word))
        for i in range(n_copies):
            ahead = np.uint64(4 * stride * i)
            copy16_async(tokens, np.uint64(to + ahead), rounded, np.uint64(at + ahead))

    return copy_tokens


# --- products and sums ---


def multiplier(tile: Tile, multiply_add: Any) -> Any:
    """`multiply`: a warp's fragments of a slice, times each other, onto its sums.

    `row_at` and `token_at` are the lane's first words in shared memory.
    """
    n_rows, n_tokens = tile.row_fragments, tile.token_fragments
    n_words = 8 * n_tokens

    @cuda.jit(device=True)
    def multiply(sums, weights, row_at, tokens, token_at):
        a = cuda.local.array(n_words, np.uint32)
        for j in range(2 * n_tokens):
            group = np.uint64(j // 2 * GROUP * SLICE_WORDS)
            a[4 * j], a[4 * j + 1], a[4 * j + 2], a[4 * j + 3] = load16(
                tokens, np.uint64(np.uint64(token_at ^ np.uint32(16 * (j % 2))) + group)
            )
        for i in range(n_rows):
            w0, w1, w2, w3 = load16(
                weights, np.uint64(np.uint64(row_at) + np.uint64(i * 8 * SLICE_WORDS))
            )
            for j in range(n_tokens):
                k, f = 4 * (i * n_tokens + j), 8 * j
                sums[k], sums[k + 1], sums[k + 2], sums[k + 3] = multiply_add(
                    a[f], a[f + 1], a[f + 2], a[f + 3], w0, w1,
                    sums[k], sums[k + 1], sums[k + 2], sums[k + 3],
                )  # fmt: skip
            for j in range(n_tokens):
                k, f = 4 * (i * n_tokens + j), 8 * j + 4
                sums[k], sums[k + 1], sums[k + 2], sums[k + 3] = multiply_add(
                    a[f], a[f + 1], a[f + 2], a[f + 3], w2, w3,
                    sums[k], sums[k + 1], sums[k + 2], sums[k + 3],
                )  # fmt: skip

    return multiply


def plane_adder(tile: Tile) -> Any:
    """`add_planes`: by way of shared memory, in order, to the sums of plane 0."""
    planes, n_sums, plane_threads = tile.planes, tile.sums, 2 * tile.rows

    @cuda.jit(device=True)
    def add_planes(sums, shared, plane, thread):
        own = np.uint32(thread % np.uint32(plane_threads))
        cuda.syncthreads()
        if plane > np.uint32(0):
            start = np.uint32((plane - np.uint32(1)) * np.uint32(n_sums * plane_threads) + own)
            for k in range(n_sums):
                bits = np.float32(sums[k]).view(np.uint32)
                shared[np.uint32(start + np.uint32(k * plane_threads))] = bits
        cuda.syncthreads()
        if plane == np.uint32(0):
            for k in range(n_sums * (planes - 1)):
                bits = shared[np.uint32(own + np.uint32(k * plane_threads))]
                sums[k % n_sums] += np.uint32(bits).view(np.float32)

    return add_planes


def writer(tile: Tile) -> Any:
    """`write_sums`: those of tokens and rows that there are, times their tokens' scales, to y."""
    n_rows, n_tokens = tile.row_fragments, tile.token_fragments

    @cuda.jit(device=True)
    def write_sums(y, n_y_tokens, n_y_rows, sums, row, end, token, rounded, scales):
        for j in range(n_tokens):
            for h in range(2):
                t = np.uint32(token + np.uint32(16 * j + 8 * h))
                if t < n_y_tokens:
                    scale = np.uint32(rounded[np.uint32(scales + t)]).view(np.float32)
                    at = np.uint64(np.uint64(t) * np.uint64(n_y_rows) + np.uint64(row))
                    for i in range(n_rows):
                        for s in range(2):
                            if np.uint32(row + np.uint32(8 * i + s)) < end:
                                k = 4 * (i * n_tokens + j) + 2 * h + s
                                y[np.uint64(at + np.uint64(8 * i + s))] = np.float32(
                                    sums[k] * scale
                                )

    return write_sums
