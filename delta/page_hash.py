"""Hashes of pages, by which equal ones are looked for; whoever finds some compares their bytes.

    page     the sum over all its bytes, two at a time, each times a random number of its own
    sample   the same over every 64th pair of bytes: next to nothing while a page is read anyway

Pages that differ seldom agree in the first. In the second they do where they differ in little, or
hold much the same; but pages that are equal always agree, so it says which need the first at all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from forge.jit import cached_njit
from forge.pages import PAGE_BYTES

#: Smaller pages have no hash: naming a copy takes some bytes, too.
SMALLEST_BYTES = 64
_SAMPLE_STEP = 64  # pairs of bytes
_FACTORS = np.random.default_rng(0).integers(1, 1 << 32, PAGE_BYTES // 2, np.uint32)
_SAMPLE_FACTORS = np.ascontiguousarray(_FACTORS[::_SAMPLE_STEP])


@cached_njit()
def _hash_loop(words: np.ndarray, page_words: int, factors: np.ndarray, keys: np.ndarray) -> None:
    for page in range(keys.size):
        here = words[page * page_words : (page + 1) * page_words]
        key = np.uint64(0)
        for i in range(here.size):
            key += np.uint64(here[i]) * np.uint64(factors[i])
        keys[page] = key | np.uint64(1 << 63)


@cached_njit()
def _sample_loop(words: np.ndarray, page_words: int, factors: np.ndarray, keys: np.ndarray) -> None:
    for page in range(keys.size):
        here = words[page * page_words : (page + 1) * page_words : _SAMPLE_STEP]
        key = np.uint64(0)
        for i in range(here.size):
            key += np.uint64(here[i]) * np.uint64(factors[i])
        keys[page] = key | np.uint64(1 << 63)


def hash_pages(data: np.ndarray, page_bytes: int) -> np.ndarray:
    """A hash of each page, uint64 [n_pages]; 0 for those too small to be looked for.

    Parameters
    ----------
    data
        uint8 [n_bytes], pages one after the other, the last one perhaps short. Pages have an even
        number of bytes; of a short one an odd byte at its end does not count.
    page_bytes
        Bytes of a page.
    """
    return _keys(_hash_loop, data, page_bytes, _FACTORS)


def sample_pages(data: np.ndarray, page_bytes: int) -> np.ndarray:
    """A hash of a sample of each page, as `hash_pages`."""
    return _keys(_sample_loop, data, page_bytes, _SAMPLE_FACTORS)


def _keys(
    loop: Callable[..., None], data: np.ndarray, page_bytes: int, factors: np.ndarray
) -> np.ndarray:
    n_pages = -(-len(data) // page_bytes)
    keys = np.zeros(n_pages, np.uint64)
    loop(data[: len(data) // 2 * 2].view(np.uint16), page_bytes // 2, factors, keys)
    if len(data) - (n_pages - 1) * page_bytes < SMALLEST_BYTES:
        keys[-1] = 0
    return keys
