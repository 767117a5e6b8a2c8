"""Paged mat-vec on every target, against a sum in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from atlas.ops import matvec_kernels
from atlas.ops.matvec import matvec, matvecs
from atlas.ops.matvec_kernels import launch_units
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.target import CpuTarget, CudaTarget, Target
from forge.block_layouts import MEMORY_LAYOUTS, block_layout
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


#: Types that are read in units, with blocks in a row: one, an odd number that crosses pages at ever
#: other places, as many as make a unit for each thread, more than a page holds.
UNIT_CASES = {
    GGMLQuantizationType.F32: (2, 46, 128, 1022 + 6),
    GGMLQuantizationType.F16: (4, 44, 68, 256, 2044 + 4),
    GGMLQuantizationType.BF16: (4, 44, 68, 256, 2044 + 4),
    GGMLQuantizationType.Q8_0: (1, 7, 16, 120 + 3),
    GGMLQuantizationType.Q4_0: (1, 7, 16, 227 + 1),
}


@pytest.mark.parametrize(
    ("ggml_type", "blocks_per_row"),
    [
        pytest.param(kind, n_blocks, id=f"{kind.name}-{n_blocks}")
        for kind, cases in UNIT_CASES.items()
        for n_blocks in cases
    ],
)
def test_rows_in_units(
    target: Target, ggml_type: GGMLQuantizationType, blocks_per_row: int
) -> None:
    s = sample(target, ggml_type, "column_major", blocks_per_row)
    n_rows, crossing = s.matrix.n_rows, s.matrix.layout.per_page // blocks_per_row
    x = np.random.default_rng(3).standard_normal(s.matrix.n_cols).astype(np.float32)
    device_x = target.put(x)
    # Groups are of 4 or 8 rows: parts of one, one and a part of the next, all about a page's end.
    begins = {size: max(0, min(crossing, n_rows) - size // 2 - 1) for size in (1, 3, 5, 18)}
    for begin, end in {(first, min(first + size, n_rows)) for size, first in begins.items()}:
        y = target.full(n_rows + 1, np.nan, np.float32)
        cache = s.with_resident(target, begin, end)
        if target.is_cuda:
            assert launch_units(target, [y], cache, [s.matrix], device_x, begin, [end])
        else:
            matvec(target, y, cache, s.matrix, device_x, begin, end)
        result = target.get(y)
        rows = s.weights[begin:end]
        bound = 1e-6 * naive.matvec(np.abs(rows), np.abs(x))
        assert np.all(np.abs(result[begin:end] - naive.matvec(rows, x)) <= bound)
        assert np.isnan(result[:begin]).all()
        assert np.isnan(result[end:]).all()


def test_units_stride_over_a_small_grid(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take group after group, and their shared sums are not mixed up."""
    monkeypatch.setattr(matvec_kernels, "MAX_BLOCKS", 2)
    s = sample(target, GGMLQuantizationType.Q4_0, "column_major", 5)
    x = np.random.default_rng(4).standard_normal(s.matrix.n_cols).astype(np.float32)
    y = target.full(s.matrix.n_rows, np.nan, np.float32)
    matvec(target, y, s.cache, s.matrix, target.put(x))
    bound = 1e-6 * naive.matvec(np.abs(s.weights), np.abs(x))
    assert np.all(np.abs(target.get(y) - naive.matvec(s.weights, x)) <= bound)


def test_what_is_not_read_in_units(target: Target) -> None:
    """The general kernel reads it, with the same result."""
    if not target.is_cuda:
        pytest.skip("loops know no units")
    for kind, memory_layout, blocks_per_row, first in (
        (GGMLQuantizationType.F16, "column_major", 46, 0),  # rows begin inside a unit
        (GGMLQuantizationType.Q8_0, "row_major", 7, 0),
        (GGMLQuantizationType.Q8_0, "column_major", 7, 1),  # x is not aligned
        (GGMLQuantizationType.Q5_0, "column_major", 7, 0),
    ):
        s = sample(target, kind, memory_layout, blocks_per_row)
        x = np.random.default_rng(5).standard_normal(s.matrix.n_cols + first).astype(np.float32)
        device_x = target.put(x)[first:]
        y = target.full(s.matrix.n_rows, np.nan, np.float32)
        assert not launch_units(target, [y], s.cache, [s.matrix], device_x, 0, [1])
        matvec(target, y, s.cache, s.matrix, device_x, 0, 2)
        rows, result = s.weights[:2], target.get(y)
        bound = 1e-6 * naive.matvec(np.abs(rows), np.abs(x[first:]))
        assert np.all(np.abs(result[:2] - naive.matvec(rows, x[first:])) <= bound)
        assert np.isnan(result[2:]).all()


def test_more_units_than_an_index_counts_are_not_read_in_units(target: Target) -> None:
    if not target.is_cuda:
        pytest.skip("loops know no units")
    s = sample(target, GGMLQuantizationType.Q8_0, "column_major")
    huge = replace(s.matrix, n_rows=(1 << 31) // (2 * s.matrix.blocks_per_row) + 1)
    x, y = target.full(huge.n_cols, 1, np.float32), target.full(1, np.nan, np.float32)
    less = replace(huge, n_rows=huge.n_rows - 1)
    assert not launch_units(target, [y], s.cache, [huge], x, 0, [1])
    assert not launch_units(target, [y, y], s.cache, [less, huge], x, 0, [1, 1])
    assert launch_units(target, [y], s.cache, [less], x, 0, [1])


#: Blocks in a row, of which a page holds whole rows.
WHOLE_ROWS = {
    GGMLQuantizationType.F32: 14,
    GGMLQuantizationType.F16: 28,
    GGMLQuantizationType.BF16: 28,
    GGMLQuantizationType.Q8_0: 8,
    GGMLQuantizationType.Q4_0: 1,
}


@dataclass
class Joint:
    """Matrices in one cache: a whole one, and parts of it that begin with a later page.

    Attributes
    ----------
    weights
        Elements of each.
    """

    matrices: list[PagedMatrix]
    weights: list[np.ndarray]
    cache: PageCache
    x: np.ndarray

    def check(self, target: Target) -> None:
        """Their products with x are right, and nothing else is written."""
        ys = [target.full(w.n_rows + 1, np.nan, np.float32) for w in self.matrices]
        matvecs(target, ys, self.cache, self.matrices, target.put(self.x))
        for y, rows in zip(map(target.get, ys), self.weights, strict=True):
            bound = 1e-6 * naive.matvec(np.abs(rows), np.abs(self.x))
            assert np.all(np.abs(y[:-1] - naive.matvec(rows, self.x)) <= bound)
            assert np.isnan(y[-1])


def joint(target: Target, ggml_type: GGMLQuantizationType, *n_rows: int) -> Joint:
    layout, blocks_per_row = block_layout(ggml_type, "column_major"), WHOLE_ROWS[ggml_type]
    rows_per_page, rest = divmod(layout.per_page, blocks_per_row)
    assert rest == 0
    s = sample(target, ggml_type, "column_major", blocks_per_row, 2 * rows_per_page + 40)
    x = np.random.default_rng(6).standard_normal(s.matrix.n_cols).astype(np.float32)
    matrices, weights = [], []
    for number, n in enumerate(n_rows):
        first_page = s.matrix.first_page + number % 3
        matrices.append(replace(s.matrix, n_rows=n, first_page=first_page))
        weights.append(s.weights[number % 3 * rows_per_page :][:n])
    return Joint(matrices, weights, s.cache, x)


@pytest.mark.parametrize("max_blocks", [2, 65535])
@pytest.mark.parametrize("ggml_type", UNIT_CASES, ids=lambda kind: kind.name)
def test_several_matrices(
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    ggml_type: GGMLQuantizationType,
    max_blocks: int,
) -> None:
    """Groups of rows are of 4 or 8: parts of one, one whole, and several with a part."""
    monkeypatch.setattr(matvec_kernels, "MAX_BLOCKS", max_blocks)
    for n_rows in ((16, 21, 3), (1, 17), (33,)):
        joint(target, ggml_type, *n_rows).check(target)


def test_several_matrices_are_one_launch_where_they_can_be(cuda_target: CudaTarget) -> None:
    def launches(j: Joint) -> int:
        before = cuda_target.n_launches
        j.check(cuda_target)
        return cuda_target.n_launches - before

    kind = GGMLQuantizationType.Q8_0
    assert launches(joint(cuda_target, kind, 3, 2, 1)) == 1
    assert launches(joint(cuda_target, kind, 3, 2, 1, 4)) == 4
    assert launches(joint(cuda_target, kind, 3, 0, 1)) == 2  # no rows, no kernel
    mixed = joint(cuda_target, kind, 3, 2)
    mixed.matrices[1] = replace(
        mixed.matrices[1], layout=block_layout(GGMLQuantizationType.Q4_0, "column_major")
    )
    ys = [cuda_target.full(3, np.nan, np.float32) for _ in mixed.matrices]
    before = cuda_target.n_launches
    matvecs(cuda_target, ys, mixed.cache, mixed.matrices, cuda_target.put(mixed.x))
    assert cuda_target.n_launches - before == 2


def test_vectors_that_do_not_fit_are_refused(target: Target) -> None:
    j = joint(target, GGMLQuantizationType.F16, 5, 7)
    ys = [target.full(n, np.nan, np.float32) for n in (5, 6)]
    with pytest.raises(ValueError, match="y has 6 elements, rows go to 7"):
        matvecs(target, ys, j.cache, j.matrices, target.put(j.x))
    with pytest.raises(ValueError, match="x has shape"):
        matvecs(target, ys, j.cache, j.matrices, target.put(j.x[1:]))
    assert all(np.isnan(target.get(y)).all() for y in ys)


@pytest.mark.parametrize("memory_layout", MEMORY_LAYOUTS)
def test_a_missing_shard_does_not_fault(target: Target, memory_layout: str) -> None:
    """After a failed swap kernels that are queued run on; their results are not looked at."""
    s = sample(target, GGMLQuantizationType.Q4_0, memory_layout)
    cache = s.with_resident(target, 0, 0)
    assert (target.get(cache.table) == -1).all()
    x = target.full(s.matrix.n_cols, 1, np.float32)
    y = target.full(s.matrix.n_rows, np.nan, np.float32)
    matvec(target, y, cache, s.matrix, x, 0, 2)
    assert np.isnan(target.get(y)[2:]).all()


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
