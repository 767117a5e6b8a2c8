"""The tables by which a warp computes the CRC32 of a page: linear maps over GF(2), on the host.

`atlas.ops.warp_page` says which maps they are and what for. Here they are built, and laid out for
shared memory, whose 32 banks are a word wide each. A warp looks up 32 arbitrary places at once
without two lanes meeting in a bank in two cases:

    a table of 32 entries     every entry has a bank of its own (equal entries are one access)
    a copy for each lane      entry e of lane l is word 32 e + l, in the bank l

So a map is cut into fields of its argument's bits, and the image of a word is the xor of the images
of its fields: of 5 bits by a table of 32 words, of up to 6 bits by one of 64 x 32.

    STEP    S^4096, 28 times a page. Turned right by 0, 11 and 22 bits, a word shows 11, 11 and 10
            more of its bits as bits 2 to 12: five that index a small table, the others one with
            copies. As masks leave them there, they are byte offsets.
    JOIN    S^32, 3 times a page: seven fields of 5 bits, the last of 2.
    PLACE   S^(32 (N - 899 - 4 l)), once a page, another map for each lane l, so there are copies
            anyway: eight fields of 4 bits.

All in one array of words: three small tables of STEP, its three with copies, JOIN, PLACE.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from atlas.target import Target
from forge.crc32 import CONTENT_BYTES, REFLECTED_POLYNOMIAL

LANES = 32
CHAINS = 4  # words of a 16-byte load
LOADS = 8  # of each lane for a page

STEP_BITS = 32 * CHAINS * LANES
STEP_TURNS = (0, 11, 22)
_SMALL_BITS = 5
_COPIED_BITS = (6, 6, 5)
_PLACE_BITS = 4

# Where the tables begin, in words.
STEP_SMALL = 0
STEP_COPIED = STEP_SMALL + 3 * 32
STEP_COPIED_WORDS = 64 * LANES  # of the first two of those
JOIN = STEP_COPIED + sum(LANES << n_bits for n_bits in _COPIED_BITS)
PLACE = JOIN + 7 * 32
PLACE_WORDS = LANES << _PLACE_BITS  # of each of the eight
TABLE_WORDS = PLACE + 8 * PLACE_WORDS

_DEVICE_TABLES: WeakKeyDictionary[Target, Any] = WeakKeyDictionary()


def device_tables(target: Target) -> Any:
    """The tables on a target, uint32 [TABLE_WORDS]; put there once."""
    if target not in _DEVICE_TABLES:
        _DEVICE_TABLES[target] = target.put(build_tables())
    return _DEVICE_TABLES[target]


@cache
def build_tables() -> np.ndarray:
    """The tables, uint32 [TABLE_WORDS]."""
    step = shift_columns(STEP_BITS)
    small, copied = [], []
    for turn, n_bits in zip(STEP_TURNS, _COPIED_BITS, strict=True):
        small.append(_images(step, range(turn + 2, turn + 2 + _SMALL_BITS)))
        first = turn + 2 + _SMALL_BITS
        copied.append(np.repeat(_images(step, range(first, first + n_bits)), LANES))
    one_word = shift_columns(32)
    join = [_images(one_word, range(first, first + 5)) for first in range(0, 30, 5)]
    join.append(np.pad(_images(one_word, range(30, 32)), (0, 28)))
    n_words = CONTENT_BYTES // 4
    last = CHAINS * LANES * (LOADS - 1) + CHAINS - 1  # of lane 0's words
    places = [shift_columns(32 * (n_words - last - CHAINS * lane)) for lane in range(LANES)]
    place = [
        np.stack([_images(of_lane, range(first, first + _PLACE_BITS)) for of_lane in places], 1)
        for first in range(0, 32, _PLACE_BITS)
    ]
    return np.concatenate([part.reshape(-1) for part in (*small, *copied, *join, *place)])


def _images(columns: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """What a map makes of a field of a word, for every value: uint32 [1 << len(bits)]. `bits` says
    which bits of the word the field's are; they count around."""
    images = np.zeros(1, np.uint32)
    for bit in bits:
        images = np.concatenate([images, images ^ columns[bit % 32]])
    return images


def shift_columns(n_bits: int) -> np.ndarray:
    """The map S^n_bits: uint32 [32], the images of the single bits, by repeated squaring.

    That a CRC can be moved past n zero bits by such a matrix, and the matrix found in log n
    squarings, is how zlib's `crc32_combine` joins checksums (M. Adler, zlib/crc32.c). A negative
    number moves back: S is invertible, and S^-1 undoes the shift and the polynomial.
    """
    result = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if n_bits >= 0:
        power = result >> np.uint32(1)
        power[0] = REFLECTED_POLYNOMIAL
    else:
        # Bit 31 of S(c) is bit 0 of c, as the polynomial's bit 31 is set.
        power = result << np.uint32(1)
        power[31] = (REFLECTED_POLYNOMIAL << 1 | 1) & 0xFFFFFFFF
    n_bits = abs(n_bits)
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
