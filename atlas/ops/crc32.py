"""CRC32 of the contents of pages: zlib's checksum of the first 4088 of each page's 4096 bytes.

On the CPU each page goes through `forge.crc32.crc32_content`, pages in parallel. On a GPU a block
of T threads takes a page, and the maths is that of linear maps over GF(2).

Let S be the map that moves the 32-bit CRC register ahead by one zero bit:
`S(c) = c >> 1 ^ (0xEDB88320 if c & 1 else 0)`. The register after a 32-bit word `w` is
`S^32(c ^ w)`, and S is linear under xor. So for the N = 1022 content words, with the initial
all-ones register xored into the first word,

    crc = ~ xor over i of S^(32 (N - i)) w_i

in which the words may be taken in any order and by any thread. Thread t takes the words t, t + T,
t + 2T, ... (neighbouring threads load neighbouring words) by Horner's rule, `r = S^(32 T) r ^ w`.
Its last word is word l(t), so `S^(32 (N - l(t))) r` is its share of the sum, and the shares are
xored together in shared memory.

- `step` uint32 [4, 256] is the map S^(32 T) by bytes: row k holds the images of the bytes shifted
  left by 8k, so one application is four look-ups (Sarwate's table method, as sliced by M. Kounavis
  and F. Berry, "A Systematic Approach to Building High Performance Software-Based CRC Generators",
  2005).
- `place` uint32 [T, 32] is the map S^(32 (N - l(t))) of each thread as 32 columns, the images of
  the single bits. That a CRC can be moved past n zero bits by such a matrix, and the matrix found
  in log n squarings, is how zlib's `crc32_combine` joins checksums (M. Adler, zlib/crc32.c).

Both depend on T alone; the host builds them once for each target and T.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numba import cuda, prange, types
from numba.core import config

from atlas.ops.checks import check_array
from atlas.target import Target
from forge.crc32 import CONTENT_BYTES, REFLECTED_POLYNOMIAL, crc32_content
from forge.jit import cached_njit
from forge.pages import PAGE_BYTES

CONTENT_WORDS = CONTENT_BYTES // 4
PAGE_WORDS = PAGE_BYTES // 4
#: Most threads in a block of any CUDA device: room for one share each.
MAX_BLOCK = 1024
#: Blocks of a launch; further pages are taken by striding over the grid.
MAX_GRID = 4096

if config.DISABLE_JIT:

    def content_crc32(pages: Any, start: int) -> Any:
        """CRC32 of the page content at byte `start` of a flat uint8 array, interpreted."""
        return np.uint32(zlib.crc32(pages[start : start + CONTENT_BYTES]))

else:

    @cached_njit()
    def content_crc32(pages, start):
        """CRC32 of the page content at byte `start` of a flat uint8 array, compiled."""
        return crc32_content(np.uint64(pages.ctypes.data + start))


@cached_njit()
def step_word(step, register, word):
    """`S^(32 T) register ^ word`, by the four tables `step`."""
    byte = np.uint32(255)
    return np.uint32(
        step[0, register & byte]
        ^ step[1, (register >> np.uint32(8)) & byte]
        ^ step[2, (register >> np.uint32(16)) & byte]
        ^ step[3, register >> np.uint32(24)]
        ^ word
    )


@cached_njit()
def apply_columns(columns, thread, register):
    """The image of `register` under the map whose 32 columns are `columns[thread]`."""
    image = np.uint32(0)
    for bit in range(32):
        if (register >> np.uint32(bit)) & np.uint32(1):
            image ^= columns[thread, bit]
    return image


@cuda.jit(device=True)
def block_crc32(words, start, step, place, shares):
    """CRC32 of the content at `words[start:]`, by all threads of the block, known to thread 0.

    `shares` is shared memory, uint32 [MAX_BLOCK], free again after the next barrier.
    """
    thread = cuda.threadIdx.x
    register = np.uint32(0)
    for i in range(thread, CONTENT_WORDS, cuda.blockDim.x):
        word = words[start + i]
        if i == 0:
            word = np.uint32(word ^ np.uint32(0xFFFFFFFF))
        register = step_word(step, register, word)
    shares[thread] = apply_columns(place, thread, register)
    cuda.syncthreads()
    active = cuda.blockDim.x
    while active > 1:
        half = (active + 1) // 2
        if thread < active - half:
            shares[thread] = np.uint32(shares[thread] ^ shares[thread + half])
        cuda.syncthreads()
        active = half
    return np.uint32(shares[0] ^ np.uint32(0xFFFFFFFF))


@cuda.jit
def crc32_kernel(words, step, place, out):
    shares = cuda.shared.array(MAX_BLOCK, np.uint32)
    for page in range(cuda.blockIdx.x, out.size, cuda.gridDim.x):
        crc = block_crc32(words, np.int64(page) * PAGE_WORDS, step, place, shares)
        if cuda.threadIdx.x == 0:
            out[page] = crc
        cuda.syncthreads()


@cached_njit(parallel=True)
def crc32_loop(pages, out):
    for page in prange(out.size):
        out[page] = content_crc32(pages, page * PAGE_BYTES)


def crc32_pages(target: Target, pages: Any, out: Any) -> None:
    """CRC32 of the content of each page.

    Parameters
    ----------
    target
        Where the arrays live.
    pages
        uint8 [n_pages, 4096].
    out
        uint32 [n_pages] to fill: `zlib.crc32(page[:4088])` of each page.

    Raises
    ------
    TypeError, ValueError
        If an array has another type or shape, or is not contiguous.
    """
    n_pages = len(pages)
    check_array("pages", pages, np.uint8, (n_pages, PAGE_BYTES))
    check_array("out", out, np.uint32, (n_pages,))
    if n_pages == 0:
        return
    flat = pages.reshape(n_pages * PAGE_BYTES)
    if target.is_cuda:
        step, place = crc32_tables(target, target.block)
        grid = min(n_pages, MAX_GRID)
        crc32_kernel[grid, target.block](flat.view(np.uint32), step, place, out)
    else:
        crc32_loop(flat, out)


_TABLES: WeakKeyDictionary[Target, dict[int, tuple[Any, Any]]] = WeakKeyDictionary()


def crc32_tables(target: Target, n_threads: int) -> tuple[Any, Any]:
    """Device arrays `step` uint32 [4, 256] and `place` uint32 [n_threads, 32], kept per target."""
    tables = _TABLES.setdefault(target, {})
    if n_threads not in tables:
        step, place = _build_tables(n_threads)
        tables[n_threads] = target.put(step), target.put(place)
    return tables[n_threads]


@cache
def _build_tables(n_threads: int) -> tuple[np.ndarray, np.ndarray]:
    columns = _shift_columns(32 * n_threads)
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    step = np.stack(
        [
            np.bitwise_xor.reduce(np.where(bits, columns[8 * k : 8 * k + 8], np.uint32(0)), axis=1)
            for k in range(4)
        ]
    )
    place = np.zeros((n_threads, 32), np.uint32)
    for thread in range(min(n_threads, CONTENT_WORDS)):
        last = thread + (CONTENT_WORDS - 1 - thread) // n_threads * n_threads
        place[thread] = _shift_columns(32 * (CONTENT_WORDS - last))
    return step, place


def _shift_columns(n_bits: int) -> np.ndarray:
    """The map S^n_bits: uint32 [32], the images of the single bits, by repeated squaring."""
    result = np.uint32(1) << np.arange(32, dtype=np.uint32)
    power = result >> np.uint32(1)
    power[0] = REFLECTED_POLYNOMIAL
    while n_bits:
        if n_bits & 1:
            result = _compose(power, result)
        power = _compose(power, power)
        n_bits >>= 1
    return result


def _compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Columns of the map that applies `inner`, then `outer`."""
    bits = (inner[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    images: np.ndarray = np.bitwise_xor.reduce(bits * outer, axis=1)
    return images


KERNELS = {
    "crc32_kernel": (
        crc32_kernel,
        (types.uint32[::1], types.uint32[:, ::1], types.uint32[:, ::1], types.uint32[::1]),
    ),
}
