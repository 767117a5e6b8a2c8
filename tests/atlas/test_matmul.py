"""Products of several tokens with a paged matrix on every target, against sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numba import config

from atlas.ops.matmul import matmul
from atlas.target import CpuTarget, CudaTarget, Target
from forge.block_layouts import MEMORY_LAYOUTS
from forge.errors import GGUFShardError
from tests import naive
from tests.paged_matrix import TYPES, Sample, of_unknown_type, sample


def check_matmul(
    target: Target, s: Sample, n_tokens: int, begin: int, end: int, scratch_elements: int
) -> None:
    x = np.random.default_rng(n_tokens).standard_normal((n_tokens, s.matrix.n_cols), np.float32)
    y = target.full((n_tokens, s.matrix.n_rows + 1), np.nan, np.float32)
    scratch = target.full(scratch_elements, np.nan, np.float32)
    cache = s.with_resident(target, begin, end) if end > begin else s.cache
    if isinstance(target, CudaTarget):
        target.has_tensor_cores = False  # which round tokens, and have tests of their own
    matmul(target, y, cache, s.matrix, target.put(x), begin, end, scratch)
    result = target.get(y)
    rows = s.weights[begin:end]
    for t in range(n_tokens):
        bound = 2e-6 * naive.matvec(np.abs(rows), np.abs(x[t]))
        assert np.all(np.abs(result[t, begin:end] - naive.matvec(rows, x[t])) <= bound)
    assert np.isnan(result[:, :begin]).all()
    assert np.isnan(result[:, end:]).all()


@pytest.mark.parametrize("memory_layout", MEMORY_LAYOUTS)
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda kind: kind.name)
def test_matmul_matches_float64(
    target: Target, ggml_type: GGMLQuantizationType, memory_layout: str
) -> None:
    s = sample(target, ggml_type, memory_layout)
    for begin, end in s.ranges()[1:2] if config.DISABLE_JIT else s.ranges():
        check_matmul(target, s, 3, begin, end, 2 * s.matrix.n_cols)


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
def test_any_number_of_tokens(target: Target, n_tokens: int) -> None:
    s = sample(target, GGMLQuantizationType.Q8_0, "column_major")
    check_matmul(target, s, n_tokens, 1, 7, s.matrix.n_cols)


@pytest.mark.parametrize(("n_tokens", "end"), [(0, 4), (2, 1), (0, 1)])
def test_no_tokens_or_no_rows(n_tokens: int, end: int) -> None:
    target = CpuTarget()
    s = sample(target, GGMLQuantizationType.Q8_0, "column_major")
    check_matmul(target, s, n_tokens, 1, end, s.matrix.n_cols)


def test_any_scratch_of_a_row_or_more(target: Target) -> None:
    s = sample(target, GGMLQuantizationType.Q4_0, "column_major")
    n_rows = 3 if config.DISABLE_JIT else s.matrix.n_rows
    for rows in (1, 2, n_rows - 1, n_rows, n_rows + 1):
        check_matmul(target, s, 2, 0, n_rows, rows * s.matrix.n_cols + 1)


def test_wrong_arguments_are_refused() -> None:
    target = CpuTarget()
    s = sample(target, GGMLQuantizationType.Q8_0, "column_major")
    n_rows, n_cols = s.matrix.n_rows, s.matrix.n_cols
    x, y = np.zeros((2, n_cols), np.float32), np.zeros((2, n_rows), np.float32)
    scratch = np.zeros(n_cols, np.float32)
    with pytest.raises(GGUFShardError, match="tensor w: cannot compute with IQ4_NL"):
        matmul(target, y, s.cache, of_unknown_type(s), x, 0, n_rows, scratch)
    with pytest.raises(ValueError, match=f"a row needs {n_cols}"):
        matmul(target, y, s.cache, s.matrix, x, 0, n_rows, scratch[:-1])
    with pytest.raises(ValueError, match="y has shape"):
        matmul(target, y[:1], s.cache, s.matrix, x, 0, n_rows, scratch)
    with pytest.raises(ValueError, match="y is not C-contiguous"):
        matmul(target, y[:, :-1], s.cache, s.matrix, x, 0, n_rows, scratch)
    with pytest.raises(ValueError, match=f"y has {n_rows - 1} columns, rows go to {n_rows}"):
        matmul(target, y[:, :-1].copy(), s.cache, s.matrix, x, 0, n_rows, scratch)
    with pytest.raises(ValueError, match="rows 0"):
        matmul(target, y, s.cache, s.matrix, x, 0, n_rows + 1, scratch)
