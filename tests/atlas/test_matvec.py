"""Paged mat-vec on every target, against a sum in float64."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from atlas.ops.matvec import matvec
from atlas.target import CpuTarget, Target
from forge.block_layouts import MEMORY_LAYOUTS
from forge.errors import GGUFShardError
from tests import naive
from tests.paged_matrix import TYPES, of_unknown_type, sample


@pytest.mark.parametrize("memory_layout", MEMORY_LAYOUTS)
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda kind: kind.name)
def test_matvec_matches_float64(
    target: Target, ggml_type: GGMLQuantizationType, memory_layout: str
) -> None:
    s = sample(target, ggml_type, memory_layout)
    n_rows = s.matrix.n_rows
    x = np.random.default_rng(1).standard_normal(s.matrix.n_cols).astype(np.float32)
    device_x = target.put(x)
    for begin, end in s.ranges():
        y = target.full(n_rows + 1, np.nan, np.float32)
        matvec(target, y, s.with_resident(target, begin, end), s.matrix, device_x, begin, end)
        result = target.get(y)
        rows = s.weights[begin:end]
        # The bound of a sum's error: a few roundings of the terms' magnitudes.
        bound = 1e-6 * naive.matvec(np.abs(rows), np.abs(x))
        assert np.all(np.abs(result[begin:end] - naive.matvec(rows, x)) <= bound)
        assert np.isnan(result[:begin]).all()
        assert np.isnan(result[end:]).all()
    np.testing.assert_array_equal(target.get(device_x), x)


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda kind: kind.name)
def test_a_row_does_not_depend_on_the_range(ggml_type: GGMLQuantizationType) -> None:
    target = CpuTarget()
    s = sample(target, ggml_type, "column_major")
    n_rows = min(s.matrix.n_rows, 9)
    x = np.random.default_rng(2).standard_normal(s.matrix.n_cols).astype(np.float32)
    whole, parts = (np.full(s.matrix.n_rows, np.nan, np.float32) for _ in range(2))
    matvec(target, whole, s.cache, s.matrix, x, 0, n_rows)
    matvec(target, parts, s.cache, s.matrix, x, 0, n_rows // 2)
    matvec(target, parts, s.cache, s.matrix, x, n_rows // 2, n_rows)
    np.testing.assert_array_equal(whole, parts)


def test_no_rows(target: Target) -> None:
    s = sample(target, GGMLQuantizationType.Q8_0, "column_major")
    x = target.full(s.matrix.n_cols, 1, np.float32)
    y = target.full(s.matrix.n_rows, np.nan, np.float32)
    for row in (0, s.matrix.n_rows):
        matvec(target, y, s.cache, s.matrix, x, row, row)
    assert np.isnan(target.get(y)).all()


def test_all_rows_by_default(target: Target) -> None:
    s = sample(target, GGMLQuantizationType.Q6_K, "column_major")
    x = np.ones(s.matrix.n_cols, np.float32)
    y = target.full(s.matrix.n_rows, np.nan, np.float32)
    matvec(target, y, s.cache, s.matrix, target.put(x))
    np.testing.assert_allclose(
        target.get(y), naive.matvec(s.weights, x), atol=1e-6 * np.abs(s.weights).sum(1).max()
    )


def test_wrong_arguments_are_refused() -> None:
    target = CpuTarget()
    s = sample(target, GGMLQuantizationType.Q8_0, "column_major")
    n_rows, n_cols = s.matrix.n_rows, s.matrix.n_cols
    x, y = np.zeros(n_cols, np.float32), np.zeros(n_rows, np.float32)
    with pytest.raises(GGUFShardError, match="tensor w: cannot compute with IQ4_NL"):
        matvec(target, y, s.cache, of_unknown_type(s), x)
    with pytest.raises(ValueError, match="x has shape"):
        matvec(target, y, s.cache, s.matrix, x[:-1])
    with pytest.raises(TypeError, match="x has dtype float64"):
        matvec(target, y, s.cache, s.matrix, x.astype(np.float64))
    with pytest.raises(ValueError, match=f"y has {n_rows - 1} elements, rows go to {n_rows}"):
        matvec(target, y[:-1], s.cache, s.matrix, x)
    with pytest.raises(ValueError, match=r"rows 2\.\.1 are not within"):
        matvec(target, y, s.cache, s.matrix, x, 2, 1)
