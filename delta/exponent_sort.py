"""Differences in the order of the base's exponents: how updates of one size come to lie together.

How many units in the last place an update makes depends on the exponent of the weight. So the
differences of floating-point elements are moved together by the exponent of the base's element,
stably; who has the base can move them back.

It is a counting sort. Neighbours mostly have the same exponent, so counting one after the other
would wait each time for the count before. So the elements are taken from four quarters in turn,
each with counts of its own, which makes no difference to their order. It is done for a few
thousand at a time: what lies between two steps of it for all elements would leave the caches.
"""

from __future__ import annotations

import numpy as np

from delta.byte_planes import ElementKind, add_difference_loop, difference_loop
from forge.jit import cached_njit

_QUARTERS = 4
_BLOCK = 2048  # elements of each quarter at a time: 32 KiB of places


@cached_njit()
def _exponent(word: int, field: tuple[int, int]) -> np.uint64:
    """The bits of a word that `field` (shift, mask) names."""
    return np.uint64((word >> field[0]) & field[1])


@cached_njit()
def _count_loop(base: np.ndarray, field: tuple[int, int], counts: np.ndarray) -> None:
    """How often each exponent occurs in each quarter, uint32 [4, n_exponents]; the elements that
    are left over count to the last."""
    quarter = np.uint64(base.size // _QUARTERS)
    for i in range(quarter):
        at = np.uint64(i)
        for lane in range(_QUARTERS):
            counts[lane, _exponent(base[at], field)] += np.uint32(1)
            at += quarter
    for i in range(quarter * np.uint64(_QUARTERS), base.size):
        counts[_QUARTERS - 1, _exponent(base[i], field)] += np.uint32(1)


@cached_njit()
def _place_loop(base: np.ndarray, field: tuple[int, int], first: int, free: np.ndarray,
                places: np.ndarray) -> None:  # fmt: skip
    """Where elements of each quarter go, from its `first` on: uint32 [4, n]; `free`
    [4, n_exponents] are the first free places, and then the next."""
    quarter = np.uint64(base.size // _QUARTERS)
    for i in range(np.uint64(places.shape[1])):
        to = np.uint64(i)
        at = np.uint64(first) + to
        for lane in range(_QUARTERS):
            exponent = _exponent(base[at], field)
            place = free[lane, exponent]
            free[lane, exponent] = place + np.uint32(1)
            places[lane, to] = place
            at += quarter


@cached_njit()
def _scatter_loop(words: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    for i in range(words.size):
        out[np.uint64(places[i])] = words[i]


@cached_njit()
def _gather_loop(words: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.size):
        out[i] = words[np.uint64(places[i])]


@cached_njit()
def _sort_loop(target: np.ndarray, base: np.ndarray, field: tuple[int, int], free: np.ndarray,
               magnitude_mask: int, out: np.ndarray) -> None:  # fmt: skip
    """Zigzagged steps from `base` to `target`, signed words both, to their places in `out`; `free`
    [4, n_exponents] are the first free places."""
    room = np.empty((_QUARTERS, _BLOCK), np.uint32)
    steps = np.empty(_BLOCK, base.dtype)
    quarter = base.size // _QUARTERS
    for first in range(0, quarter, _BLOCK):
        places = room[:, : min(_BLOCK, quarter - first)]
        _place_loop(base, field, first, free, places)
        for lane in range(_QUARTERS):
            begin = lane * quarter + first
            here, n = slice(begin, begin + places.shape[1]), places.shape[1]
            difference_loop(target[here], base[here], steps[:n], magnitude_mask)
            _scatter_loop(steps[:n], places[lane], out)
    last = slice(_QUARTERS * quarter, base.size)
    n = base.size - last.start
    difference_loop(target[last], base[last], steps[:n], magnitude_mask)
    for i in range(n):
        exponent = _exponent(base[last.start + i], field)
        out[free[_QUARTERS - 1, exponent]] = steps[i]
        free[_QUARTERS - 1, exponent] += 1


@cached_njit()
def _add_loop(steps: np.ndarray, base: np.ndarray, field: tuple[int, int], free: np.ndarray,
              masks: tuple[int, int], out: np.ndarray) -> None:  # fmt: skip
    """The inverse of `_sort_loop`: `out` from `base` and its sorted steps."""
    room = np.empty((_QUARTERS, _BLOCK), np.uint32)
    own = np.empty(_BLOCK, base.dtype)
    quarter = base.size // _QUARTERS
    for first in range(0, quarter, _BLOCK):
        places = room[:, : min(_BLOCK, quarter - first)]
        _place_loop(base, field, first, free, places)
        for lane in range(_QUARTERS):
            begin = lane * quarter + first
            here, n = slice(begin, begin + places.shape[1]), places.shape[1]
            _gather_loop(steps, places[lane], own[:n])
            add_difference_loop(base[here], own[:n], out[here], masks, False)
    last = slice(_QUARTERS * quarter, base.size)
    n = base.size - last.start
    for i in range(n):
        exponent = _exponent(base[last.start + i], field)
        own[i] = steps[free[_QUARTERS - 1, exponent]]
        free[_QUARTERS - 1, exponent] += 1
    add_difference_loop(base[last], own[:n], out[last], masks, False)


def _first_places(kind: ElementKind, base: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
    """The field of the exponent in a signed word, and where the first element of each quarter and
    exponent goes, uint32 [4, n_exponents]."""
    n_exponents = 1 << kind.exponent_bits
    words = kind.words(base)
    word = words.dtype.type
    field = word(kind.exponent_shift), word(n_exponents - 1)
    counts = np.zeros((_QUARTERS, n_exponents), np.uint32)
    _count_loop(words, field, counts)
    # First all of the smallest exponent, quarter by quarter; then those of the next.
    ends = np.cumsum(counts.T, dtype=np.uint32).reshape(n_exponents, _QUARTERS).T
    return field, np.ascontiguousarray(ends - counts)


def sorted_difference(
    kind: ElementKind, target: np.ndarray, base: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """Steps from `base` to `target`, in the order of the exponents of the base's elements.

    Parameters
    ----------
    target, base
        uint8 [n_bytes], fewer than 2^32 elements of a type with an exponent.
    out
        uint8 [n_bytes], for the result.

    Returns
    -------
    numpy.ndarray
        uint8 [n_bytes]; `out`: what `delta.byte_planes.ordered_difference` gives, steps of one
        exponent as they came.
    """
    words = kind.words(base)
    field, free = _first_places(kind, base)
    mask = words.dtype.type(kind.magnitude_mask)
    _sort_loop(kind.words(target), words, field, free, mask, kind.words(out))
    return out


def add_sorted_difference(
    kind: ElementKind, base: np.ndarray, steps: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """The target again, in `out`: uint8 [n_bytes], like all."""
    words = kind.words(base)
    field, free = _first_places(kind, base)
    _add_loop(kind.words(steps), words, field, free, kind.masks, kind.words(out))
    return out
