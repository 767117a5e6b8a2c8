"""Rows of a paged matrix as float32, on every target, against the gguf package."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from atlas.ops.block_values import half_to_float
from atlas.ops.dequant import dequantise
from atlas.target import CpuTarget, Target
from forge.block_layouts import MEMORY_LAYOUTS
from forge.errors import GGUFShardError
from tests.paged_matrix import K_TYPES, TYPES, of_unknown_type, sample


def assert_same_values(
    target: Target, ggml_type: GGMLQuantizationType, actual: np.ndarray, expected: np.ndarray
) -> None:
    """Equal bit for bit, but where a GPU fuses the multiplication and the subtraction."""
    if target.name == "cuda" and ggml_type in K_TYPES:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("memory_layout", MEMORY_LAYOUTS)
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda kind: kind.name)
def test_dequantise_matches_gguf(
    target: Target, ggml_type: GGMLQuantizationType, memory_layout: str
) -> None:
    s = sample(target, ggml_type, memory_layout)
    for begin, end in s.ranges():
        out = target.full((end - begin, s.matrix.n_cols), np.nan, np.float32)
        dequantise(target, out, s.with_resident(target, begin, end), s.matrix, begin, end)
        assert_same_values(target, ggml_type, target.get(out), s.weights[begin:end])


def test_no_rows() -> None:
    target = CpuTarget()
    s = sample(target, GGMLQuantizationType.Q8_0, "column_major")
    rows = np.full((1, s.matrix.n_cols), np.nan, np.float32)
    for row in (0, s.matrix.n_rows):
        dequantise(target, rows[:0], s.with_resident(target, 0, 1), s.matrix, row, row)
    assert np.isnan(rows).all()


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda kind: kind.name)
def test_a_missing_shard_does_not_fault(target: Target, ggml_type: GGMLQuantizationType) -> None:
    """After a failed swap kernels that are queued run on; their results are not looked at."""
    s = sample(target, ggml_type, "column_major")
    cache = s.with_resident(target, 0, 0)
    assert (target.get(cache.table) == -1).all()
    out = target.full((2, s.matrix.n_cols), np.nan, np.float32)
    dequantise(target, out[:1], cache, s.matrix, 0, 1)
    assert np.isnan(target.get(out)[1]).all()


def test_half_to_float_on_every_float16() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = np.array([half_to_float(np.uint32(b)) for b in bits], np.float32)
    np.testing.assert_array_equal(values, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(values), bits >= 1 << 15)


def test_unknown_type_is_refused(target: Target) -> None:
    s = sample(target, GGMLQuantizationType.Q8_0, "column_major")
    out = target.full((1, s.matrix.n_cols), np.nan, np.float32)
    with pytest.raises(GGUFShardError, match="tensor w: cannot compute with IQ4_NL"):
        dequantise(target, out, s.cache, of_unknown_type(s), 0, 1)


def test_wrong_arguments_are_refused() -> None:
    target = CpuTarget()
    s = sample(target, GGMLQuantizationType.Q8_0, "column_major")
    n_rows, n_cols = s.matrix.n_rows, s.matrix.n_cols
    with pytest.raises(ValueError, match=f"rows 1..{n_rows + 1} are not within 0..{n_rows}"):
        dequantise(target, np.empty((n_rows, n_cols), np.float32), s.cache, s.matrix, 1, n_rows + 1)
    with pytest.raises(ValueError, match=rf"out has shape .* expected \[2, {n_cols}\]"):
        dequantise(target, np.empty((1, n_cols), np.float32), s.cache, s.matrix, 0, 2)
    with pytest.raises(TypeError, match="out has dtype float64, expected float32"):
        dequantise(target, np.empty((1, n_cols)), s.cache, s.matrix, 0, 1)
    with pytest.raises(ValueError, match="out is not C-contiguous"):
        dequantise(target, np.empty((2, 2 * n_cols), np.float32)[:, ::2], s.cache, s.matrix, 0, 2)
