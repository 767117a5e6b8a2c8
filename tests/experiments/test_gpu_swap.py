"""The swap cases on tiny pools: right where all is well, and wrong where a bit has flipped."""

from __future__ import annotations

import numpy as np
import pytest

from atlas.target import CudaTarget
from experiments.cases import GPU_REHEARSAL
from experiments.gpu_bench import GpuBench
from experiments.gpu_swap import Pool, Scan, swaps

pytestmark = pytest.mark.cuda


@pytest.fixture
def bench(cuda_target: CudaTarget) -> GpuBench:
    return GpuBench(cuda_target, GPU_REHEARSAL, is_rehearsal=True)


def test_every_case_is_right_in_a_rehearsal(bench: GpuBench) -> None:
    assert swaps(bench) == []
    assert bench.wrong == []
    for case in ("swap", "swap-latency", "gather", "select", "publish", "select-publish"):
        assert any(line.startswith(f"gpu-{case}: ") for line in bench.right)
    assert sum("without the check" in line for line in bench.right) == 6


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_scan_brings_what_comes_next(bench: GpuBench, is_checked: bool) -> None:
    pool = Pool(bench, 6, 12, 0)
    scan = Scan(pool, 2, np.arange(12)[::-1])
    assert scan.n_swaps == 6
    assert scan.is_right(is_checked)
    assert pool.holds([0, 1, 2, 3])
    scan.swap(is_checked)
    assert pool.holds([0, 1, 10, 11])
    assert not pool.holds([0, 1, 2, 3])


def test_scans_of_longer_and_longer_lists(bench: GpuBench) -> None:
    """The one before has kept fewer frames free than the next one's first list needs."""
    pool = Pool(bench, 6, 12, 0)
    for n in (1, 3):
        assert Scan(pool, n, np.arange(12)).is_right(True)


def test_a_gather_brings_all_pages_of_its_record(bench: GpuBench) -> None:
    pool = Pool(bench, 4, 4, 0)
    pool.set_record(np.array([2, 0, 3]), np.array([1, 3, 0]))
    for is_checked in (True, False):
        pool.forget()
        assert not pool.holds([0, 2, 3])
        pool.regather(is_checked, 1)
        assert pool.holds([0, 2, 3])
        assert bench.target.get(pool.cache.table).tolist() == [3, -1, 1, 0]


def test_only_the_checked_gather_sees_a_flipped_bit(bench: GpuBench) -> None:
    pool = Pool(bench, 3, 3, 0)
    pool.set_record(np.arange(3), np.arange(3))
    pool.host[1, 77] ^= 4
    pool.regather(False, 1)
    assert pool.holds(range(3))  # the flipped bit with the rest
    pool.forget()
    pool.regather(True, 1)
    assert bench.target.get(pool.cache.table).tolist() == [-1, -1, -1]
    assert not pool.holds(range(3))
