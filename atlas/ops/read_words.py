"""Reading memory and doing next to nothing else: what a bandwidth is measured with.

The xor of all words is kept, in parts, so that nothing can be left out. On a GPU every thread has
four loads of 16 bytes on their way at a time, and a full device of them (2048 threads on each of
132 multiprocessors) has 16 MiB: several times what bandwidth and latency of its memory ask for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config, cuda, prange, types

from atlas.ops.checks import check_array
from atlas.ops.kernel import kernel
from atlas.ops.memory import load16_once
from atlas.ops.ptx import shuffle_xor, xor3
from atlas.target import Target
from forge.jit import cached_njit

_THREADS = 64 if config.ENABLE_CUDASIM else 256
_BLOCKS = 2 if config.ENABLE_CUDASIM else 1056
#: Parts of the xor: one for each warp, or chunk of the loop.
N_PARTS = _BLOCKS * _THREADS // 32
#: So that an index and some steps fit 32 bits.
MAX_WORDS = 1 << 31


@kernel(types.uint32[::1], types.uint32[::1], launch_bounds=256)
def read_words_kernel(words, parts):
    thread = np.uint32(
        np.uint32(np.uint32(cuda.blockIdx.x) * np.uint32(cuda.blockDim.x))
        + np.uint32(cuda.threadIdx.x)
    )
    step = np.uint32(
        np.uint32(np.uint32(cuda.gridDim.x) * np.uint32(cuda.blockDim.x)) << np.uint32(2)
    )
    size = np.uint32(words.size)
    i = np.uint32(thread << np.uint32(2))
    part = np.uint32(0)
    while np.uint32(i + np.uint32(step * np.uint32(3))) < size:
        a0, a1, a2, a3 = load16_once(words, i)
        b0, b1, b2, b3 = load16_once(words, np.uint32(i + step))
        c0, c1, c2, c3 = load16_once(words, np.uint32(i + np.uint32(step * np.uint32(2))))
        d0, d1, d2, d3 = load16_once(words, np.uint32(i + np.uint32(step * np.uint32(3))))
        part = xor3(xor3(part, a0, a1), a2, a3)
        part = xor3(xor3(part, b0, b1), b2, b3)
        part = xor3(xor3(part, c0, c1), c2, c3)
        part = xor3(xor3(part, d0, d1), d2, d3)
        i = np.uint32(i + np.uint32(step << np.uint32(2)))
    while i < size:
        a0, a1, a2, a3 = load16_once(words, i)
        part = xor3(xor3(part, a0, a1), a2, a3)
        i = np.uint32(i + step)
    part = np.uint32(part ^ shuffle_xor(part, np.uint32(16)))
    part = np.uint32(part ^ shuffle_xor(part, np.uint32(8)))
    part = np.uint32(part ^ shuffle_xor(part, np.uint32(4)))
    part = np.uint32(part ^ shuffle_xor(part, np.uint32(2)))
    part = np.uint32(part ^ shuffle_xor(part, np.uint32(1)))
    if np.uint32(thread & np.uint32(31)) == np.uint32(0):
        parts[np.uint32(thread >> np.uint32(5))] = part


@cached_njit(parallel=True)
def read_words_loop(words, parts):
    pairs = words.view(np.uint64)
    for k in prange(parts.size):
        # A slice: its indices need no check for being negative, so the loop becomes one of vectors.
        share = pairs[pairs.size * k // parts.size : pairs.size * (k + 1) // parts.size]
        total = np.uint64(0)
        for i in range(share.size):
            total ^= share[i]
        parts[k] = np.uint32((total ^ (total >> np.uint64(32))) & np.uint64(0xFFFFFFFF))


def read_words(target: Target, words: Any, parts: Any) -> None:
    """Read every word once.

    Parameters
    ----------
    target
        Where the arrays live.
    words
        uint32 [n], n a multiple of 4 and at most `MAX_WORDS`.
    parts
        uint32 [N_PARTS] to fill; their xor is that of all words.

    Raises
    ------
    TypeError, ValueError
        If an array has another type or shape, or is not contiguous.
    """
    check_array("words", words, np.uint32, (None,))
    check_array("parts", parts, np.uint32, (N_PARTS,))
    if words.size % 4 or words.size > MAX_WORDS:
        raise ValueError(f"words: {words.size}, want a multiple of 4 up to {MAX_WORDS}")
    if target.is_cuda:
        read_words_kernel.launch(target, _BLOCKS, _THREADS, words, parts)
    else:
        read_words_loop(words, parts)


KERNELS = {"read_words_kernel": read_words_kernel}
