"""Tokens as tensor cores take them: rounded to 16 bits, in the order of the fragments.

To float16 a token goes multiplied by the power of two that takes its largest value to 2^14 .. 2^15:
none overflows, and only values below 2^-28 of the largest are subnormal. The product is multiplied
by the inverse, which is exact. bfloat16 has the range of float32 and needs no scale.

Columns are cut into slices of 32 (two k16 multiplications) and tokens into groups of 16 (the rows
of a fragment). A slice of a group is 256 words, of which tokens g and g + 8 share 32: eight quads,
so that lane 4 g + i loads its four words of a multiplication at once, quad i for the first one and
4 + i for the second. Of odd g the two halves are swapped, and eight lanes meet in no bank of shared
memory. Which columns meet in a multiplication does not matter as long as they are the same of both
factors: lane i has words 4 i to 4 i + 3 of a slice, where the PTX ISA's layout has them apart.

    [group][slice][g][quad ^ 4 (g % 2)][word % 2, token / 8 % 2]        then a scale for each token
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config, cuda, types

from atlas.ops.kernel import Kernel, kernel
from atlas.ops.ptx import floats_to_bfloat2, floats_to_half2

SLICE = 32  # columns
SLICE_WORDS = SLICE // 2
GROUP = 16  # tokens
COLUMN_ALIGNMENT = 128  # rounded tokens have zeros up to a multiple: for tiles of four slices
ROUND_THREADS = 32 if config.ENABLE_CUDASIM else 256

_EXPONENT = np.uint32(127 + 14)  # of the largest value after scaling, as float32 has it
_SMALLEST_EXPONENT = np.uint32(15)  # so that both the scale and its inverse are normal


def words_of_group(n_cols: int) -> int:
    """Words that a group of rounded tokens takes, with its scales."""
    return GROUP * (-(-n_cols // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT // 2 + 1)


@cuda.jit(device=True)
def padded_slices(n_cols):
    """Slices of a rounded token."""
    last = np.uint32(COLUMN_ALIGNMENT - 1)
    wholes = np.uint32(np.uint32(n_cols + last) // np.uint32(COLUMN_ALIGNMENT))
    return np.uint32(wholes * np.uint32(COLUMN_ALIGNMENT // SLICE))


@cuda.jit(device=True)
def rounded_place(token, word, n_slices):
    """Where word `word` of a token lies."""
    g, is_second = np.uint32(token & np.uint32(7)), np.uint32(token >> np.uint32(3)) & np.uint32(1)
    piece = np.uint32((token >> np.uint32(4)) * n_slices + (word >> np.uint32(4)))
    lane, step = (word >> np.uint32(2)) & np.uint32(3), (word >> np.uint32(1)) & np.uint32(1)
    quad = np.uint32(((step ^ (g & np.uint32(1))) << np.uint32(2)) | lane)
    within = np.uint32(((word & np.uint32(1)) << np.uint32(1)) | is_second)
    return np.uint32(
        (piece << np.uint32(8)) + (g << np.uint32(5)) + (quad << np.uint32(2)) + within
    )


@cuda.jit(device=True)
def _largest_exponent(row, n_cols, shared):
    """Exponent of the largest value of a row, as float32 has it; by a whole block."""
    thread, n_threads = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
    if thread == np.uint32(0):
        shared[0] = np.uint32(0)
    cuda.syncthreads()
    largest, column = np.uint32(0), thread
    while column < n_cols:
        # Without their signs, the bits of floats are in the order of the floats.
        bits = np.uint32(np.float32(row[column]).view(np.uint32) & np.uint32(0x7FFFFFFF))
        largest = max(largest, bits)
        column = np.uint32(column + n_threads)
    cuda.atomic.max(shared, 0, largest)
    cuda.syncthreads()
    exponent = np.uint32(shared[0] >> np.uint32(23))
    cuda.syncthreads()
    return exponent


@cuda.jit(device=True)
def _power_of_two(exponent):
    return np.uint32(exponent << np.uint32(23)).view(np.float32)


def _round_tokens(pack: Any, is_scaled: bool) -> Kernel:
    """`round_tokens_kernel` with `pack` from two float32 to a word."""

    @kernel(
        types.float32[:, ::1], types.uint32[::1],
        launch_bounds=ROUND_THREADS, min_capability=(8, 0),
    )  # fmt: skip
    def round_tokens_kernel(x, rounded):
        """A block for each token of all groups; zeros where the last group has none."""
        shared = cuda.shared.array(1, np.uint32)
        thread, n_threads = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
        n_tokens, n_slices = np.uint32(x.shape[0]), padded_slices(np.uint32(x.shape[1]))
        n_words = np.uint32(n_slices * np.uint32(SLICE_WORDS))
        n_places = np.uint32((n_tokens + np.uint32(GROUP - 1)) & np.uint32(0xFFFFFFF0))
        token = np.uint32(cuda.blockIdx.x)
        while token < n_places:
            n_cols = np.uint32(x.shape[1]) if token < n_tokens else np.uint32(0)
            row = x[min(token, np.uint32(n_tokens - np.uint32(1)))]
            exponent = _EXPONENT
            if is_scaled:
                exponent = max(_largest_exponent(row, n_cols, shared), _SMALLEST_EXPONENT)
            scale = _power_of_two(np.uint32(_EXPONENT + np.uint32(127) - exponent))
            word = thread
            while word < n_words:
                column = np.uint32(word << np.uint32(1))
                first = second = np.float32(0)
                if column < n_cols:
                    first = np.float32(row[column] * scale)
                column = np.uint32(column + np.uint32(1))
                if column < n_cols:
                    second = np.float32(row[column] * scale)
                rounded[rounded_place(token, word, n_slices)] = pack(first, second)
                word = np.uint32(word + n_threads)
            if thread == np.uint32(0):
                inverse = _power_of_two(np.uint32(exponent + np.uint32(127) - _EXPONENT))
                rounded[np.uint32(n_places * n_words + token)] = inverse.view(np.uint32)
            token = np.uint32(token + np.uint32(cuda.gridDim.x))

    return round_tokens_kernel


round_to_half_kernel = _round_tokens(floats_to_half2, True)
round_to_bfloat_kernel = _round_tokens(floats_to_bfloat2, False)

KERNELS = {
    "round_to_half_kernel": round_to_half_kernel,
    "round_to_bfloat_kernel": round_to_bfloat_kernel,
}
