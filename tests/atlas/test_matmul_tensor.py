"""Products on tensor cores against sums in float64, within what rounding may cost.

In the simulator `mma.sync` is emulated and tiles are small; the tiles of a GPU have a test of their
own. On a GPU without tensor cores nothing here runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from numba import config

from atlas.ops import matmul_tensor as op
from atlas.ops.matmul import matmul
from atlas.ops.round_tokens import GROUP, words_of_group
from atlas.target import CudaTarget, Target
from forge.block_layouts import MEMORY_LAYOUTS, block_layout
from tests import naive, paged_matrix
from tests.paged_matrix import Sample, random_blocks, sample

TYPES = [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_0, Q.Q4_K, Q.Q5_K, Q.Q6_K]
SLICES_OF_PLAIN = 96  # columns of F16 and BF16 matrices: three slices, and page ends inside


pytestmark = pytest.mark.cuda


@pytest.fixture
def target() -> CudaTarget:
    """A target with tensor cores."""
    target = CudaTarget()
    if config.ENABLE_CUDASIM:
        target.has_tensor_cores = True
    elif not target.has_tensor_cores:
        pytest.skip("needs a GPU of compute capability 8.0 or more")
    return target


def matrix(target: Target, ggml_type: Q, memory_layout: str = "column_major") -> Sample:
    is_plain = ggml_type in (Q.F16, Q.BF16)
    return sample(target, ggml_type, memory_layout, SLICES_OF_PLAIN if is_plain else None)


def tokens(n_tokens: int, s: Sample) -> np.ndarray:
    return np.random.default_rng(n_tokens).standard_normal((n_tokens, s.matrix.n_cols), np.float32)


def product(
    target: Target, s: Sample, x: np.ndarray, begin: int, end: int, scratch_words: int = 0
) -> np.ndarray:
    """Rows `begin` to `end` - 1 of y; the others are checked to be as they were."""
    words = scratch_words or len(x) * words_of_group(s.matrix.n_cols)
    y = target.full((len(x), s.matrix.n_rows + 1), np.nan, np.float32)
    scratch = target.full(words, np.nan, np.float32)
    cache = s.with_resident(target, begin, end)
    matmul(target, y, cache, s.matrix, target.put(x), begin, end, scratch)
    result = target.get(y)
    assert np.isnan(result[:, :begin]).all()
    assert np.isnan(result[:, end:]).all()
    return result[:, begin:end]


def assert_within_bound(s: Sample, result: np.ndarray, x: np.ndarray, begin: int, end: int) -> None:
    rows = s.weights[begin:end]
    is_bfloat = s.matrix.ggml_type == Q.BF16
    for row, token in zip(result, x, strict=True):
        error = np.abs(row - naive.matvec(rows, token))
        assert np.all(error <= naive.tensor_core_bound(rows, token, is_bfloat))


def check(
    target: Target, s: Sample, n_tokens: int, begin: int, end: int, scratch_words: int = 0
) -> None:
    x = tokens(n_tokens, s)
    assert_within_bound(s, product(target, s, x, begin, end, scratch_words), x, begin, end)


@pytest.mark.parametrize("memory_layout", MEMORY_LAYOUTS)
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda kind: kind.name)
def test_every_type_across_pages(target: CudaTarget, ggml_type: Q, memory_layout: str) -> None:
    s = matrix(target, ggml_type, memory_layout)
    crossing = s.matrix.layout.per_page // s.matrix.blocks_per_row
    begin = max(crossing - 2, 0)
    check(target, s, 3, begin, begin + 5)
    assert s.matrix.pages_of_rows(begin, begin + 5).stop - s.matrix.first_page > 1


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 15, 16, 17, 33])
def test_any_number_of_tokens(target: CudaTarget, n_tokens: int) -> None:
    check(target, matrix(target, Q.Q8_0), n_tokens, 1, 6)


@pytest.mark.parametrize("n_rows", [1, 15, 16, 17])
def test_any_number_of_rows(target: CudaTarget, n_rows: int) -> None:
    check(target, matrix(target, Q.Q4_0), 2, 3, 3 + n_rows)


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("number", [0, 1], ids=["wide", "narrow"])
def test_either_tile(
    target: CudaTarget, monkeypatch: pytest.MonkeyPatch, number: int, ggml_type: Q
) -> None:
    """Across a page's end; more than one tile both ways of the types that are fast to emulate."""
    tile = op.TILES[number]
    monkeypatch.setattr(op, "TILES", (tile, tile))
    s = matrix(target, ggml_type)
    is_fast = ggml_type in (Q.Q8_0, Q.BF16)
    n_tokens, n_rows = (tile.tokens + 1, tile.rows + 1) if is_fast else (2, 3)
    begin = max(s.matrix.layout.per_page // s.matrix.blocks_per_row - 1, 0)
    check(target, s, n_tokens, begin, min(begin + n_rows, s.matrix.n_rows))


def test_the_wide_tile_is_for_many_tiles_and_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "TILES", (op.WIDE, op.NARROW))
    monkeypatch.setattr(op, "MIN_WIDE_TILES", 256)
    assert op.tile_for(128 * 64, 129) == op.WIDE
    assert op.tile_for(128 * 64, 128) == op.tile_for(127 * 64, 256) == op.NARROW
    assert op.tile_for(256 * 64, 65) == op.WIDE
    assert op.tile_for(1 << 20, 64) == op.NARROW  # half of a wide one would be empty


def test_more_rows_than_a_grid_has_room_for(target: CudaTarget) -> None:
    s = matrix(target, Q.Q8_0)
    scratch = target.full(words_of_group(s.matrix.n_cols), 0, np.float32)
    most = 65535 * min(tile.rows for tile in op.TILES)
    assert op.fits_tensor_cores(target, replace(s.matrix, n_rows=most), scratch)
    assert not op.fits_tensor_cores(target, replace(s.matrix, n_rows=most + 1), scratch)


@pytest.mark.parametrize("tile", [op.WIDE, op.NARROW], ids=str)
def test_tiles_of_a_gpu(target: CudaTarget, monkeypatch: pytest.MonkeyPatch, tile: op.Tile) -> None:
    """What the simulator's small tiles stand for, over a few columns: more than a step, and not
    enough for all planes of the second."""
    monkeypatch.setattr(op, "TILES", (tile, tile))
    kernel = op.tensor_kernel(Q.F16, tile)
    monkeypatch.setitem(op._KERNELS, (Q.F16, tile), kernel)
    s = sample(target, Q.F16, "column_major", 160)
    x = tokens(50, s)
    end = min(61, s.matrix.n_rows)
    assert_within_bound(s, product(target, s, x, 0, end), x, 0, end)


def test_a_matrix_that_ends_with_the_last_page(target: CudaTarget) -> None:
    """Behind it the page table ends, too."""
    n_rows = 3 * block_layout(Q.Q8_0).per_page // 3
    s = sample(target, Q.Q8_0, "column_major", 3, n_rows)
    pages = s.matrix.pages_of_rows(0, n_rows)
    assert len(pages) == 3 and pages.stop == s.cache.table.size << s.cache.shard_shift
    check(target, s, 2, n_rows - 3, n_rows)


@pytest.mark.parametrize("groups", [1, 2])
def test_passes_where_scratch_is_short(target: CudaTarget, groups: int) -> None:
    s = matrix(target, Q.Q8_0)
    words = groups * words_of_group(s.matrix.n_cols)
    check(target, s, groups * GROUP + 1, 0, 3, words + 5)


def test_plain_product_where_scratch_is_too_short(target: CudaTarget) -> None:
    s = matrix(target, Q.Q8_0)
    x = tokens(2, s)
    result = product(target, s, x, 0, 3, words_of_group(s.matrix.n_cols) - 1)
    assert_is_float32_product(s, result, x, 3)


@pytest.mark.parametrize("ggml_type", [Q.F32, Q.F16], ids=lambda kind: kind.name)
def test_plain_product_of_what_does_not_fit(target: CudaTarget, ggml_type: Q) -> None:
    """F32 loses too much, and rows of 117 elements are no whole slices."""
    s = sample(target, ggml_type, "column_major")
    x = tokens(2, s)
    assert_is_float32_product(s, product(target, s, x, 0, 3), x, 3)


def assert_is_float32_product(s: Sample, result: np.ndarray, x: np.ndarray, end: int) -> None:
    for row, token in zip(result, x, strict=True):
        bound = 2e-6 * naive.matvec(np.abs(s.weights[:end]), np.abs(token))
        assert np.all(np.abs(row - naive.matvec(s.weights[:end], token)) <= bound)


@pytest.mark.parametrize("ggml_type", [Q.Q8_0, Q.BF16], ids=lambda kind: kind.name)
def test_tokens_of_any_magnitude(target: CudaTarget, ggml_type: Q) -> None:
    """Far beyond float16 at both ends, each token beside others of another magnitude."""
    s = matrix(target, ggml_type)
    magnitudes = np.array([1e-30, 7e4, 1e30, 1, 0], np.float32)
    x = tokens(len(magnitudes), s) * magnitudes[:, None]
    x[3, 0] = 65520  # the least that is infinite as float16
    result = product(target, s, x, 0, 4)
    assert np.isfinite(result).all()
    assert_within_bound(s, result, x, 0, 4)
    assert np.all(result[4] == 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_with_its_token(target: CudaTarget, value: float) -> None:
    s = matrix(target, Q.Q8_0)
    x = tokens(3, s)
    x[1, 5] = value
    result = product(target, s, x, 0, 4)
    assert not np.isfinite(result[1]).any()
    assert_within_bound(s, result[[0, 2]], x[[0, 2]], 0, 4)


def test_an_infinite_weight_is_multiplied_once(
    target: CudaTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows end amid the narrow tile's columns: behind them, where tokens are zero, the next row's
    weights must not count, or the sum would be no number."""

    def blocks(*arguments: Any) -> np.ndarray:
        found = random_blocks(*arguments)
        found.view(np.float16).reshape(-1, SLICES_OF_PLAIN)[:, 8] = np.inf
        return found

    monkeypatch.setattr(paged_matrix, "random_blocks", blocks)
    monkeypatch.setattr(op, "MIN_WIDE_TILES", 1000)
    s = sample(target, Q.F16, "column_major", SLICES_OF_PLAIN, 8)
    x = tokens(2, s)
    assert np.array_equal(product(target, s, x, 0, 8), np.repeat(x[:, 8:9] * np.inf, 8, axis=1))
