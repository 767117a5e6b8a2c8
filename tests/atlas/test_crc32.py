"""CRC32 of pages on every target, against zlib."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from atlas.ops import crc32_tables as tables
from atlas.ops.crc32 import crc32_kernel, crc32_pages
from atlas.target import CudaTarget, Target
from tests import naive

POISON = 0xDEADBEEF
N_WORDS = 1022


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


def test_every_word_of_a_lane_has_its_place(target: Target) -> None:
    """Pages of zeros but for one bit, in each load and at both ends of the warp."""
    offsets = [16 * (lane + 32 * k) + k for k in range(8) for lane in (0, 31)]
    offsets[-1] = 4087  # of the last lane's last load only half is content
    pages = np.zeros((len(offsets), 4096), np.uint8)
    pages[np.arange(len(offsets)), offsets] = [1 << i % 8 for i in range(len(offsets))]
    np.testing.assert_array_equal(crc32_on(target, pages), naive.crc32_pages(pages))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("threads", [32, 96])
def test_any_block_size_and_grid(cuda_target: CudaTarget, blocks: int, threads: int) -> None:
    target = cuda_target
    pages = random_pages(5)
    out = target.full(5, POISON, np.uint32)
    words = target.put(pages.reshape(-1).view(np.uint32))
    crc32_kernel.launch(target, blocks, threads, words, tables.device_tables(target), out)
    np.testing.assert_array_equal(target.get(out), naive.crc32_pages(pages))


@pytest.mark.parametrize("n_bytes", [0, 1, 4, 512, 4088])
def test_shift_moves_a_register_past_zeros(n_bytes: int) -> None:
    columns = tables.shift_columns(8 * n_bytes)
    ones = 0xFFFFFFFF  # which zlib puts around the register
    expected = [zlib.crc32(bytes(n_bytes), 1 << bit ^ ones) ^ ones for bit in range(32)]
    assert columns.tolist() == expected


@pytest.mark.parametrize("n_bits", [1, 32, 4096])
def test_shift_goes_back(n_bits: int) -> None:
    there, back = tables.shift_columns(n_bits), tables.shift_columns(-n_bits)
    assert [image(there, int(word)) for word in back] == [1 << bit for bit in range(32)]


def image(columns: np.ndarray, word: int) -> int:
    """What a map makes of a word, column by column."""
    result = 0
    for bit in range(32):
        if word >> bit & 1:
            result ^= int(columns[bit])
    return result


def looked_up(fields: list[tuple[int, int, int, int]], word: int, lane: int) -> int:
    """The xor of entries; a field is (begin of the table, first bit, number of bits, copies)."""
    built = tables.build_tables()
    turned = word | word << 32  # fields count around
    result = 0
    for begin, first_bit, n_bits, copies in fields:
        entry = turned >> first_bit & (1 << n_bits) - 1
        result ^= int(built[begin + entry * copies + lane % copies])
    return result


STEP_FIELDS = [
    (tables.STEP_SMALL, 2, 5, 1),
    (tables.STEP_COPIED, 7, 6, 32),
    (tables.STEP_SMALL + 32, 13, 5, 1),
    (tables.STEP_COPIED + 2048, 18, 6, 32),
    (tables.STEP_SMALL + 64, 24, 5, 1),
    (tables.STEP_COPIED + 4096, 29, 5, 32),
]
JOIN_FIELDS = [(tables.JOIN + 32 * i, 5 * i, 5 if i < 6 else 2, 1) for i in range(7)]
PLACE_FIELDS = [(tables.PLACE + 512 * i, 4 * i, 4, 32) for i in range(8)]


@pytest.mark.parametrize("lane", [0, 1, 17, 31])
def test_tables_hold_the_maps(lane: int) -> None:
    last_word = 899 + 4 * lane
    maps = [
        (STEP_FIELDS, tables.shift_columns(4096)),
        (JOIN_FIELDS, tables.shift_columns(32)),
        (PLACE_FIELDS, tables.shift_columns(32 * (N_WORDS - last_word))),
    ]
    for word in np.random.default_rng(lane).integers(0, 1 << 32, 8, dtype=np.int64).tolist():
        for fields, columns in maps:
            assert looked_up(fields, word, lane) == image(columns, word)


def test_tables_describe_the_checksum() -> None:
    """The derivation in the docstring of `atlas.ops.warp_page`, in plain Python."""
    page = random_pages(1, seed=3)
    words = [*page[0, :4088].view("<u4").tolist(), 0, 0]
    total = zlib.crc32(bytes(4088))
    for lane in range(32):
        chains = [0] * 4
        for k in range(8):
            for j in range(4):
                step = looked_up(STEP_FIELDS, chains[j], lane)
                chains[j] = step ^ words[4 * (lane + 32 * k) + j]
        register = chains[0]
        for j in range(1, 4):
            register = looked_up(JOIN_FIELDS, register, lane) ^ chains[j]
        total ^= looked_up(PLACE_FIELDS, register, lane)
    assert total == naive.crc32_pages(page)[0]


def test_tables_are_put_on_a_target_once(target: Target) -> None:
    first = tables.device_tables(target)
    assert first.shape == (tables.TABLE_WORDS,)
    held = target.allocated_bytes
    assert tables.device_tables(target) is first
    assert target.allocated_bytes == held


def test_wrong_arrays_are_refused(target: Target) -> None:
    pages = target.put(random_pages(2))
    with pytest.raises(TypeError, match="out has dtype int32, expected uint32"):
        crc32_pages(target, pages, target.full(2, 0, np.int32))
    with pytest.raises(ValueError, match=r"out has shape \[3\], expected \[2\]"):
        crc32_pages(target, pages, target.full(3, 0, np.uint32))
    with pytest.raises(ValueError, match="pages is not C-contiguous"):
        crc32_pages(target, target.put(random_pages(4))[::2], target.full(2, 0, np.uint32))
