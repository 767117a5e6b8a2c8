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
from forge.buffers import scratch
from forge.jit import cached_njit

_QUARTERS = 4


@cached_njit()
def _exponents_loop(words: np.ndarray, shift: int, mask: int, out: np.ndarray) -> None:
    word = words.dtype.type
    for i in range(words.size):
        out[i] = np.uint16((words[i] >> word(shift)) & word(mask))


@cached_njit()
def _count_loop(exponents: np.ndarray, counts: np.ndarray) -> None:
    """How often each exponent occurs in each quarter, uint32 [4, n_exponents]; the elements that
    are left over count to the last."""
    one, quarter = np.uint32(1), np.uint64(exponents.size // _QUARTERS)
    second, third = quarter + quarter, quarter + quarter + quarter
    for i in range(quarter):
        at = np.uint64(i)
        counts[0, exponents[at]] += one
        counts[1, exponents[at + quarter]] += one
        counts[2, exponents[at + second]] += one
        counts[3, exponents[at + third]] += one
    for i in range(third + quarter, exponents.size):
        counts[3, exponents[i]] += one


@cached_njit()
def _place_loop(exponents: np.ndarray, free: np.ndarray, places: np.ndarray) -> None:
    """Where each element goes; `free` [4, n_exponents] are the first places, and then the next."""
    one, quarter = np.uint32(1), np.uint64(exponents.size // _QUARTERS)
    second, third = quarter + quarter, quarter + quarter + quarter
    for i in range(quarter):
        at = np.uint64(i)
        place = free[0, exponents[at]]
        free[0, exponents[at]] = place + one
        places[at] = place
        place = free[1, exponents[at + quarter]]
        free[1, exponents[at + quarter]] = place + one
        places[at + quarter] = place
        place = free[2, exponents[at + second]]
        free[2, exponents[at + second]] = place + one
        places[at + second] = place
        place = free[3, exponents[at + third]]
        free[3, exponents[at + third]] = place + one
        places[at + third] = place
    for i in range(third + quarter, exponents.size):
        places[i] = free[3, exponents[i]]
        free[3, exponents[i]] += one


@cached_njit()
def _move_loop(words: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    for i in range(places.size):
        out[np.uint64(places[i])] = words[i]


@cached_njit()
def _move_back_loop(words: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    for i in range(places.size):
        out[i] = words[np.uint64(places[i])]


def _sorted_places(kind: ElementKind, base: np.ndarray) -> np.ndarray:
    """Where each element goes, uint32 [n_elements], in this thread's scratch memory."""
    words = base.view(f"u{kind.block_bytes}")
    n_exponents = 1 << kind.exponent_bits
    exponents = scratch("exponents", 2 * words.size).view(np.uint16)
    _exponents_loop(words, kind.exponent_shift, n_exponents - 1, exponents)
    counts = np.zeros((_QUARTERS, n_exponents), np.uint32)
    _count_loop(exponents, counts)
    # First all of the smallest exponent, quarter by quarter; then those of the next.
    ends = np.cumsum(counts.T, dtype=np.uint32).reshape(n_exponents, _QUARTERS).T
    places = scratch("places", 4 * words.size).view(np.uint32)
    _place_loop(exponents, np.ascontiguousarray(ends - counts), places)
    return places


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
    loop = _move_back_loop if undo else _move_loop
    loop(kind.words(content), _sorted_places(kind, base), kind.words(out))
    return out
