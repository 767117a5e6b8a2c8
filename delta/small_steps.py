"""Small steps in half a byte each: where sorted differences end.

Sorted by the exponent of the base's element, differences shrink towards the end, until most take a
few bits. There a code of whole bits for each, and chance matches, are dear and slow to make. So
from where on nearly all are below 16, the low four bits of two make a byte: of the first of one
half of them and the first of the other, then of the second of both, and so on. Their other bits,
moved down, stay where they were, nearly all zero.
"""

from __future__ import annotations

import numpy as np

from delta.byte_planes import ElementKind
from forge.errors import GGUFShardError
from forge.jit import cached_njit

_BITS = 4
_BLOCK = 1 << 16  # elements
#: This share of a block's steps may be larger: each costs some ten bits more.
_MOST_LARGE = 1 / 256


@cached_njit()
def _count_large_loop(words: np.ndarray) -> int:
    n = 0
    for i in range(words.size):
        n += words[i] >> _BITS != 0
    return n


@cached_njit()
def _take_loop(low: np.ndarray, high: np.ndarray, pairs: np.ndarray) -> None:
    """The low bits of `low` and `high`, uint [n], in `pairs`, uint8 [n]; the others move down."""
    word, bits = low.dtype.type, low.dtype.type(_BITS)
    mask = word((1 << _BITS) - 1)
    for i in range(pairs.size):
        pairs[i] = np.uint8(word(low[i] & mask) | word(word(high[i] & mask) << bits))
        low[i] = word(low[i] >> bits)
        high[i] = word(high[i] >> bits)


@cached_njit()
def _put_loop(low: np.ndarray, high: np.ndarray, pairs: np.ndarray) -> None:
    word, bits = low.dtype.type, low.dtype.type(_BITS)
    mask = word((1 << _BITS) - 1)
    for i in range(pairs.size):
        pair = word(pairs[i])
        low[i] = word(word(low[i] << bits) | word(pair & mask))
        high[i] = word(word(high[i] << bits) | word(pair >> bits))


def _halves(kind: ElementKind, steps: np.ndarray, n_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """The last 2 `n_pairs` elements in two halves."""
    words = steps.view(f"u{kind.block_bytes}")
    middle = words.size - n_pairs
    return words[middle - n_pairs : middle], words[middle:]


def count_pairs(kind: ElementKind, steps: np.ndarray) -> int:
    """How many pairs of steps `take_pairs` should take.

    Parameters
    ----------
    kind
        A plain type.
    steps
        uint8 [n_bytes]: zigzagged differences.
    """
    words = steps.view(f"u{kind.block_bytes}")
    begin = words.size
    while begin:
        block = words[max(begin - _BLOCK, 0) : begin]
        if _count_large_loop(block) > _MOST_LARGE * block.size:
            break
        begin -= block.size
    return (words.size - begin) // 2


def take_pairs(kind: ElementKind, steps: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Take the low bits from the last steps.

    Parameters
    ----------
    kind
        A plain type.
    steps
        uint8 [n_bytes]: zigzagged differences, which are changed.
    out
        uint8 [n_pairs], for the result.

    Returns
    -------
    numpy.ndarray
        uint8 [n_pairs]; `out`.
    """
    _take_loop(*_halves(kind, steps, out.size), out)
    return out


def put_pairs(kind: ElementKind, steps: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Undo `take_pairs`, in `steps`.

    Raises
    ------
    GGUFShardError
        If there are fewer steps.
    """
    check_pairs(kind, steps.size, pairs.size)
    _put_loop(*_halves(kind, steps, pairs.size), pairs)
    return steps


def check_pairs(kind: ElementKind, n_bytes: int, n_pairs: int) -> None:
    """GGUFShardError if elements of `n_bytes` together cannot make so many pairs."""
    if not 0 <= 2 * n_pairs <= n_bytes // kind.block_bytes:
        raise GGUFShardError(f"{n_pairs} pairs of {n_bytes // kind.block_bytes} steps")
