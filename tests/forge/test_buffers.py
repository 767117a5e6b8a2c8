"""Buffers lie where the kernel copies fastest: half a page from what they are filled with."""

from __future__ import annotations

import numpy as np
import pytest

from forge import buffers
from forge.buffers import forget_scratch, read_buffer, recycled


@pytest.mark.parametrize("offset", [0, 1, 63, 64, 2047, 2048, 4088, 4095, 4096, 123_457])
@pytest.mark.parametrize("n_bytes", [1 << 15, (1 << 15) + 1, 1 << 20])
def test_far_from_the_slow_place(offset: int, n_bytes: int) -> None:
    buffer = read_buffer(offset, n_bytes)
    assert buffer.shape == (n_bytes,) and buffer.flags.c_contiguous and buffer.flags.writeable
    assert buffer.ctypes.data % 8 == 0
    assert 1024 <= (buffer.ctypes.data - offset) % 4096 <= 3072
    buffer[:] = 7  # all of it is ours
    assert buffer.sum(dtype=int) == 7 * n_bytes


@pytest.mark.parametrize("n_bytes", [0, 1, (1 << 15) - 1])
def test_small_ones(n_bytes: int) -> None:
    assert read_buffer(4096, n_bytes).shape == (n_bytes,)


def place_of(array: np.ndarray) -> int:
    place: int = array.__array_interface__["data"][0]
    return place


def test_what_nobody_sees_is_used_again() -> None:
    forget_scratch()
    array = recycled(100_000)
    part, place = array[50_000:], place_of(array)
    part[:] = 1
    del array
    other = recycled(100_000)
    other[:] = 2
    assert place_of(other) != place and (part == 1).all()
    del part
    again = recycled(90_000)  # less is there, too
    assert place_of(again) == place and again.shape == (90_000,)
    assert not np.shares_memory(again, other)


def test_what_is_free_but_too_small() -> None:
    forget_scratch()
    recycled(100_000)
    array = recycled(200_000)
    assert array.shape == (200_000,) and array.flags.writeable
    array[:] = 7
    assert array.sum(dtype=int) == 7 * 200_000


def test_few_are_kept_and_none_that_are_forgotten() -> None:
    forget_scratch()
    arrays = [recycled(100_000) for _ in range(20)]
    places = {place_of(array) for array in arrays}
    assert len(places) == 20
    arrays.clear()
    assert len(buffers._free) == buffers._MOST_FREE
    array = recycled(100_000)
    assert place_of(array) in places
    forget_scratch()
    del array
    assert buffers._free == []


@pytest.mark.parametrize("n_bytes", [0, 1, (1 << 15) - 1])
def test_small_ones_are_new(n_bytes: int) -> None:
    forget_scratch()
    assert recycled(n_bytes).shape == (n_bytes,)
    assert buffers._free == []
