"""Elements in the order of the exponents of others: how updates of one size come to lie together.

How many units in the last place an update makes depends on the exponent of the weight. So the
differences of floating-point elements are moved together by the exponent of their base, stably;
who has the base can move them back.

It is a counting sort. Neighbours mostly have the same exponent, so counting one after the other
would wait each time for the count before. So the elements are taken from four quarters in turn,
each with counts of its own, which makes no difference to their order.
"""

from __future__ import annotations

import numpy as np

from delta.byte_planes import ElementKind
from forge.jit import cached_njit

_QUARTERS = 4


@cached_njit()
def _count_loop(base: np.ndarray, shift: np.uint64, mask: np.uint64, counts: np.ndarray) -> None:
    """How often each exponent occurs in each quarter, uint32 [4, n_exponents]; the elements that
    are left over count to the last."""
    one, quarter = np.uint32(1), np.uint64(base.size // _QUARTERS)
    second, third = quarter + quarter, quarter + quarter + quarter
    for i in range(quarter):
        at = np.uint64(i)
        counts[0, (base[at] >> shift) & mask] += one
        counts[1, (base[at + quarter] >> shift) & mask] += one
        counts[2, (base[at + second] >> shift) & mask] += one
        counts[3, (base[at + third] >> shift) & mask] += one
    for i in range(third + quarter, np.uint64(base.size)):
        counts[3, (base[np.uint64(i)] >> shift) & mask] += one


@cached_njit()
def _next_place(word: int, shift: np.uint64, mask: np.uint64, free: np.ndarray,
                quarter: int) -> np.uint64:  # fmt: skip
    exponent = (word >> shift) & mask
    place = free[quarter, exponent]
    free[quarter, exponent] = place + np.uint32(1)
    return np.uint64(place)


@cached_njit()
def _move_loop(words: np.ndarray, base: np.ndarray, shift: np.uint64, mask: np.uint64,
               free: np.ndarray, out: np.ndarray) -> None:  # fmt: skip
    """Move elements to their places; `free` [4, n_exponents] are the first of each, and then the
    next."""
    quarter = np.uint64(base.size // _QUARTERS)
    left_over = quarter + quarter + quarter + quarter
    for i in range(quarter):
        at = np.uint64(i)
        out[_next_place(base[at], shift, mask, free, 0)] = words[at]
        at += quarter
        out[_next_place(base[at], shift, mask, free, 1)] = words[at]
        at += quarter
        out[_next_place(base[at], shift, mask, free, 2)] = words[at]
        at += quarter
        out[_next_place(base[at], shift, mask, free, 3)] = words[at]
    for i in range(left_over, np.uint64(base.size)):
        at = np.uint64(i)
        out[_next_place(base[at], shift, mask, free, 3)] = words[at]


@cached_njit()
def _move_back_loop(words: np.ndarray, base: np.ndarray, shift: np.uint64, mask: np.uint64,
                    free: np.ndarray, out: np.ndarray) -> None:  # fmt: skip
    """What `_move_loop` has moved, back."""
    quarter = np.uint64(base.size // _QUARTERS)
    left_over = quarter + quarter + quarter + quarter
    for i in range(quarter):
        at = np.uint64(i)
        out[at] = words[_next_place(base[at], shift, mask, free, 0)]
        at += quarter
        out[at] = words[_next_place(base[at], shift, mask, free, 1)]
        at += quarter
        out[at] = words[_next_place(base[at], shift, mask, free, 2)]
        at += quarter
        out[at] = words[_next_place(base[at], shift, mask, free, 3)]
    for i in range(left_over, np.uint64(base.size)):
        at = np.uint64(i)
        out[at] = words[_next_place(base[at], shift, mask, free, 3)]


def _first_places(words: np.ndarray, shift: np.uint64, mask: np.uint64) -> np.ndarray:
    """Where the first element of each exponent goes of each quarter, uint32 [4, n_exponents]."""
    counts = np.zeros((_QUARTERS, int(mask) + 1), np.uint32)
    _count_loop(words, shift, mask, counts)
    # First all of the smallest exponent, quarter by quarter; then those of the next.
    ends = np.cumsum(counts.T, dtype=np.uint32).reshape(-1, _QUARTERS).T
    return np.ascontiguousarray(ends - counts)


def sort_by_exponent(
    kind: ElementKind, content: np.ndarray, base: np.ndarray, out: np.ndarray, undo: bool = False
) -> np.ndarray:
    """Elements in the order of the exponents of their base, those of one as they came.

    Parameters
    ----------
    content, base
        uint8 [n_bytes], fewer than 2^32 elements of a type with an exponent.
    out
        uint8 [n_bytes], for the result.
    undo
        Move elements that were so sorted back to their places.

    Returns
    -------
    numpy.ndarray
        uint8 [n_bytes]; `out`.
    """
    keys = base.view(f"u{kind.block_bytes}")
    shift, mask = np.uint64(kind.exponent_shift), np.uint64((1 << kind.exponent_bits) - 1)
    loop = _move_back_loop if undo else _move_loop
    loop(kind.words(content), keys, shift, mask, _first_places(keys, shift, mask), kind.words(out))
    return out
