"""Buffers lie where the kernel copies fastest: half a page from what they are filled with."""

from __future__ import annotations

import pytest

from forge.buffers import read_buffer


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
