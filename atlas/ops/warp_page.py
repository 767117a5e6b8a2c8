"""A warp and a page: read and store 4 KiB, and compute the CRC32 of the content on the way.

Lane l of the warp (threadIdx.x % 32) holds the words 4 (l + 32 k) + j of a page, j = 0..3, from one
16-byte load for each k = 0..7. All eight are issued before any is used: 4 KiB in flight.

The checksum is zlib's, of the first N = 1022 words, and the maths is that of linear maps over
GF(2). Let S be the map that moves the 32-bit CRC register ahead by one zero bit:
`S(c) = c >> 1 ^ (0xEDB88320 if c & 1 else 0)`. The register after a word `w` is `S^32(c ^ w)`, and
S is linear under xor. So

    crc = Z ^ xor over i of S^(32 (N - i)) w_i

where Z, the CRC32 of 4088 zero bytes, stands for the ones that zlib starts and ends with. The words
may be taken in any order and by any lane:

    STEP    down k by Horner's rule in four chains, r_j = S^4096 r_j ^ w: a chain's next word is
            128 words on. Words 1022 and 1023, tag and magic, count as zeros.
    JOIN    the chains, r = S^32(S^32(S^32 r_0 ^ r_1) ^ r_2) ^ r_3
    PLACE   the lane's share is S^(32 (N - 899 - 4 l)) r, as its last word is word 899 + 4 l (for
            lane 31 behind the end: S backwards)

and the shares are xored across the warp by five shuffles. A map is applied by table look-ups:
Sarwate's byte tables (as sliced by M. Kounavis and F. Berry, "A Systematic Approach to Building
High Performance Software-Based CRC Generators", 2005), recut for the banks of shared memory
(`atlas.ops.crc32_tables`). A page costs a lane 197 look-ups without bank conflicts: six for each
word but the first four, and 29 besides.
"""

from __future__ import annotations

import zlib

import numpy as np
from numba import cuda
from numba.core import config

from atlas.ops.crc32_tables import (
    JOIN,
    PLACE,
    PLACE_WORDS,
    STEP_COPIED,
    STEP_COPIED_WORDS,
    STEP_SMALL,
    STEP_TURNS,
    TABLE_WORDS,
)
from atlas.ops.memory import load16, load16_at, load16_once, load16_once_at, shared_word, store16
from atlas.ops.ptx import rotate_right, shuffle_xor
from forge.crc32 import CONTENT_BYTES
from forge.pages import PAGE_BYTES

PAGE_WORDS = PAGE_BYTES // 4
#: Threads of a block. It loads the tables (38 KB) and keeps them, so it is large; with 64 registers
#: a thread two blocks are resident on an SM, and their 32 warps have 128 KiB in flight.
PAGE_THREADS = 64 if config.ENABLE_CUDASIM else 512
#: Blocks of a launch, some waves on any device; further pages are taken by striding over the grid,
#: so that the tables are loaded once for many pages.
MAX_PAGE_BLOCKS = 1056

#: The lane that holds a page's tag and magic, the last two of its words.
LAST_LANE = np.uint32(31)

_OF_ZEROS = np.uint32(zlib.crc32(bytes(CONTENT_BYTES)))
_SECOND_TURN, _THIRD_TURN = np.uint32(STEP_TURNS[1]), np.uint32(STEP_TURNS[2])
_SECOND_COPIED = STEP_COPIED + STEP_COPIED_WORDS
_THIRD_COPIED = _SECOND_COPIED + STEP_COPIED_WORDS


def page_blocks(n_pages: int) -> int:
    """Blocks of a kernel of `PAGE_THREADS` whose warps take a page each."""
    return min(-(-n_pages * 32 // PAGE_THREADS), MAX_PAGE_BLOCKS)


@cuda.jit(device=True)
def first_warp():
    """Number of this warp in the grid."""
    warps = np.uint32(np.uint32(cuda.blockDim.x) >> np.uint32(5))
    return np.uint32(
        np.uint32(cuda.blockIdx.x) * warps + np.uint32(np.uint32(cuda.threadIdx.x) >> np.uint32(5))
    )


@cuda.jit(device=True)
def warps_of_grid():
    """How many warps the grid has."""
    return np.uint32(
        np.uint32(cuda.gridDim.x) * np.uint32(np.uint32(cuda.blockDim.x) >> np.uint32(5))
    )


@cuda.jit(device=True)
def load_page(words, start, lane):
    """A lane's eight loads of the page at word `start` (uint64) of `words`."""
    at = np.uint64(start + np.uint64(np.uint32(lane << np.uint32(2))))
    return (
        load16_once(words, at),
        load16_once(words, np.uint64(at + np.uint64(128))),
        load16_once(words, np.uint64(at + np.uint64(256))),
        load16_once(words, np.uint64(at + np.uint64(384))),
        load16_once(words, np.uint64(at + np.uint64(512))),
        load16_once(words, np.uint64(at + np.uint64(640))),
        load16_once(words, np.uint64(at + np.uint64(768))),
        load16_once(words, np.uint64(at + np.uint64(896))),
    )


@cuda.jit(device=True)
def fetch_page(source, lane):
    """A lane's eight loads of a page by its address."""
    at = np.uint64(source + np.uint64(np.uint32(lane << np.uint32(4))))
    return (
        load16_once_at(at),
        load16_once_at(np.uint64(at + np.uint64(512))),
        load16_once_at(np.uint64(at + np.uint64(1024))),
        load16_once_at(np.uint64(at + np.uint64(1536))),
        load16_once_at(np.uint64(at + np.uint64(2048))),
        load16_once_at(np.uint64(at + np.uint64(2560))),
        load16_once_at(np.uint64(at + np.uint64(3072))),
        load16_once_at(np.uint64(at + np.uint64(3584))),
    )


@cuda.jit(device=True)
def fetch_page_anew(source, lane):
    """The same, past all caches."""
    at = np.uint64(source + np.uint64(np.uint32(lane << np.uint32(4))))
    return (
        load16_at(at),
        load16_at(np.uint64(at + np.uint64(512))),
        load16_at(np.uint64(at + np.uint64(1024))),
        load16_at(np.uint64(at + np.uint64(1536))),
        load16_at(np.uint64(at + np.uint64(2048))),
        load16_at(np.uint64(at + np.uint64(2560))),
        load16_at(np.uint64(at + np.uint64(3072))),
        load16_at(np.uint64(at + np.uint64(3584))),
    )


@cuda.jit(device=True)
def store_page(words, start, lane, page):
    """Store what `fetch_page` has loaded at word `start` (uint64) of `words`."""
    at = np.uint64(start + np.uint64(np.uint32(lane << np.uint32(2))))
    store16(words, at, *page[0])
    store16(words, np.uint64(at + np.uint64(128)), *page[1])
    store16(words, np.uint64(at + np.uint64(256)), *page[2])
    store16(words, np.uint64(at + np.uint64(384)), *page[3])
    store16(words, np.uint64(at + np.uint64(512)), *page[4])
    store16(words, np.uint64(at + np.uint64(640)), *page[5])
    store16(words, np.uint64(at + np.uint64(768)), *page[6])
    store16(words, np.uint64(at + np.uint64(896)), *page[7])


@cuda.jit(device=True)
def share_tables(shared, tables):
    """Copy the tables into shared memory, four loads at once; by all threads of the block."""
    quarter = np.uint32(TABLE_WORDS // 4)
    first = np.uint32(4 * cuda.threadIdx.x)
    while first < quarter:
        second = np.uint32(first + quarter)
        third = np.uint32(second + quarter)
        fourth = np.uint32(third + quarter)
        words = (
            load16(tables, first), load16(tables, second),
            load16(tables, third), load16(tables, fourth),
        )  # fmt: skip
        store16(shared, first, *words[0])
        store16(shared, second, *words[1])
        store16(shared, third, *words[2])
        store16(shared, fourth, *words[3])
        first = np.uint32(first + np.uint32(4 * cuda.blockDim.x))
    cuda.syncthreads()


@cuda.jit(device=True)
def step(tables, lane, register, word):
    """S^4096 register ^ word. Masks leave byte offsets: of bits 2 to 6 into a small table, of bits
    7 to 12 into one with copies, of which the lane takes its own."""
    small, copied, own = np.uint32(31 << 2), np.uint32(63 << 7), np.uint32(lane << np.uint32(2))
    second, third = rotate_right(register, _SECOND_TURN), rotate_right(register, _THIRD_TURN)
    return np.uint32(
        shared_word(tables, STEP_SMALL, np.uint32(register & small))
        ^ shared_word(tables, STEP_COPIED, np.uint32(register & copied | own))
        ^ shared_word(tables, STEP_SMALL + 32, np.uint32(second & small))
        ^ shared_word(tables, _SECOND_COPIED, np.uint32(second & copied | own))
        ^ shared_word(tables, STEP_SMALL + 64, np.uint32(third & small))
        ^ shared_word(tables, _THIRD_COPIED, np.uint32(third & np.uint32(31 << 7) | own))
        ^ word
    )


@cuda.jit(device=True)
def step4(tables, lane, registers, words):
    """`step` of four chains."""
    return (
        step(tables, lane, registers[0], words[0]),
        step(tables, lane, registers[1], words[1]),
        step(tables, lane, registers[2], words[2]),
        step(tables, lane, registers[3], words[3]),
    )


@cuda.jit(device=True)
def join(tables, register, word):
    """S^32 register ^ word."""
    small = np.uint32(31 << 2)
    image = np.uint32(word ^ shared_word(tables, JOIN, np.uint32(register << np.uint32(2)) & small))
    for field in range(1, 7):
        offset = np.uint32(register >> np.uint32(5 * field - 2)) & small
        image = np.uint32(image ^ shared_word(tables, JOIN + 32 * field, offset))
    return image


@cuda.jit(device=True)
def place(tables, lane, register):
    """A lane's share of the CRC."""
    copied, own = np.uint32(15 << 7), np.uint32(lane << np.uint32(2))
    low = np.uint32(np.uint32(register << np.uint32(7)) & copied | own)
    high = np.uint32(np.uint32(register << np.uint32(3)) & copied | own)
    image = np.uint32(
        shared_word(tables, PLACE, low) ^ shared_word(tables, PLACE + PLACE_WORDS, high)
    )
    for field in range(2, 8):
        offset = np.uint32(np.uint32(register >> np.uint32(4 * field - 7)) & copied | own)
        image = np.uint32(image ^ shared_word(tables, PLACE + PLACE_WORDS * field, offset))
    return image


@cuda.jit(device=True)
def warp_crc32(tables, lane, page):
    """CRC32 of the content of a page, known to every lane of the warp that has loaded it.

    `tables` are those in shared memory, `page` what `load_page` returns.
    """
    w0, w1, w2, w3 = page[7]
    if lane == LAST_LANE:
        w2, w3 = np.uint32(0), np.uint32(0)
    chains = page[0]
    chains = step4(tables, lane, chains, page[1])
    chains = step4(tables, lane, chains, page[2])
    chains = step4(tables, lane, chains, page[3])
    chains = step4(tables, lane, chains, page[4])
    chains = step4(tables, lane, chains, page[5])
    chains = step4(tables, lane, chains, page[6])
    chains = step4(tables, lane, chains, (w0, w1, w2, w3))
    register = join(tables, chains[0], chains[1])
    register = join(tables, register, chains[2])
    register = join(tables, register, chains[3])
    crc = place(tables, lane, register)
    crc = np.uint32(crc ^ shuffle_xor(crc, np.uint32(16)))
    crc = np.uint32(crc ^ shuffle_xor(crc, np.uint32(8)))
    crc = np.uint32(crc ^ shuffle_xor(crc, np.uint32(4)))
    crc = np.uint32(crc ^ shuffle_xor(crc, np.uint32(2)))
    crc = np.uint32(crc ^ shuffle_xor(crc, np.uint32(1)))
    return np.uint32(crc ^ _OF_ZEROS)
