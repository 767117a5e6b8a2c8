"""CRC32 of pages on every target, against zlib."""

from __future__ import annotations

import numpy as np
import pytest

from atlas.ops.crc32 import crc32_kernel, crc32_pages, crc32_tables
from atlas.target import CudaTarget, Target, cuda_is_usable
from tests import naive

POISON = 0xDEADBEEF


def random_pages(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 4096), dtype=np.uint8)


def crc32_on(target: Target, pages: np.ndarray) -> np.ndarray:
    out = target.full(len(pages), POISON, np.uint32)
    crc32_pages(target, target.put(pages), out)
    return target.get(out)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
def test_equals_zlib(target: Target, n: int) -> None:
    pages = random_pages(n)
    np.testing.assert_array_equal(crc32_on(target, pages), naive.crc32_pages(pages))


def test_constant_pages(target: Target) -> None:
    pages = np.zeros((2, 4096), np.uint8)
    pages[1] = 255
    np.testing.assert_array_equal(crc32_on(target, pages), naive.crc32_pages(pages))


def test_only_the_content_counts(target: Target) -> None:
    pages = np.repeat(random_pages(1), 3, axis=0)
    pages[1, 4088:] ^= 255
    pages[2, 4087] ^= 1
    crcs = crc32_on(target, pages)
    assert crcs[0] == crcs[1]
    assert crcs[0] != crcs[2]


@pytest.mark.parametrize("block", [1, 2, 5, 16])
def test_any_block_size_and_grid(block: int) -> None:
    if not cuda_is_usable():
        pytest.skip("needs a CUDA device or the simulator")
    target = CudaTarget()
    pages = random_pages(3)
    out = target.full(3, POISON, np.uint32)
    words = target.put(pages.reshape(-1).view(np.uint32))
    crc32_kernel[2, block](words, *crc32_tables(target, block), out)
    np.testing.assert_array_equal(target.get(out), naive.crc32_pages(pages))


@pytest.mark.parametrize("n_threads", [1, 8, 128, 1021, 1022, 1023, 1024])
def test_tables_describe_the_checksum(target: Target, n_threads: int) -> None:
    """The derivation in the module's docstring, word by word in plain Python."""
    step, place = (target.get(table) for table in crc32_tables(target, n_threads))
    page = random_pages(1, seed=n_threads)
    words = page[0, :4088].view("<u4").tolist()
    words[0] ^= 0xFFFFFFFF
    total = 0xFFFFFFFF
    for thread in range(n_threads):
        register = 0
        for word in words[thread::n_threads]:
            moved = 0
            for k in range(4):
                moved ^= int(step[k, register >> 8 * k & 255])
            register = moved ^ word
        for bit in range(32):
            if register >> bit & 1:
                total ^= int(place[thread, bit])
    assert total == naive.crc32_pages(page)[0]


def test_tables_are_built_once(target: Target) -> None:
    first = crc32_tables(target, 8)
    held = target.allocated_bytes
    assert crc32_tables(target, 8)[0] is first[0]
    assert target.allocated_bytes == held


def test_wrong_arrays_are_refused(target: Target) -> None:
    pages = target.put(random_pages(2))
    with pytest.raises(TypeError, match="out has dtype int32, expected uint32"):
        crc32_pages(target, pages, target.full(2, 0, np.int32))
    with pytest.raises(ValueError, match=r"out has shape \[3\], expected \[2\]"):
        crc32_pages(target, pages, target.full(3, 0, np.uint32))
    with pytest.raises(ValueError, match="pages is not C-contiguous"):
        crc32_pages(target, target.put(random_pages(4))[::2], target.full(2, 0, np.uint32))
