"""Targets: arrays, copies, and the count of what is held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import config, get_num_threads, set_num_threads
from numba.cuda.cudadrv.driver import CudaAPIError

from atlas.target import (
    CpuTarget,
    CudaTarget,
    Target,
    cuda_is_usable,
    select_target,
)
from forge.errors import GGUFShardError

SHAPES = [0, 1, 7, (3, 5), (0, 4), (2, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float32])
def test_what_is_put_comes_back(target: Target, shape: int | tuple[int, ...], dtype: type) -> None:
    host = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    found = target.get(target.put(host))
    np.testing.assert_array_equal(found, host)
    assert found.dtype == dtype
    np.testing.assert_array_equal(
        target.get(target.full(shape, 3, dtype)), np.full(shape, 3, dtype)
    )
    assert target.empty(shape, dtype).shape == found.shape


def test_host_arrays_of_any_layout_are_taken(target: Target) -> None:
    host = np.arange(24, dtype=np.int32).reshape(4, 6)
    for view in (host.T, host[:, ::2], host[::-1]):
        np.testing.assert_array_equal(target.get(target.put(view)), view)


@pytest.mark.parametrize(("first", "end"), [(0, 10), (2, 5), (9, 10), (4, 4)])
def test_parts_are_written_and_read(target: Target, first: int, end: int) -> None:
    array = target.full(10, 1, np.int64)
    target.write(array[first:end], np.full(end - first, 7, np.int64))
    expected = np.ones(10, np.int64)
    expected[first:end] = 7
    np.testing.assert_array_equal(target.get(array), expected)
    np.testing.assert_array_equal(target.get(array[first:end]), expected[first:end])


def test_copies_are_copies(target: Target) -> None:
    host = np.zeros(4, np.float32)
    array = target.put(host)
    host[:] = 1
    copy = target.get(array)
    copy[:] = 2
    np.testing.assert_array_equal(target.get(array), np.zeros(4, np.float32))


def test_memory_counts_until_it_is_garbage(target: Target) -> None:
    assert target.allocated_bytes == target.peak_bytes == 0
    a = target.empty((3, 5), np.float32)
    b = target.full(7, 0, np.int64)
    assert target.allocated_bytes == target.peak_bytes == 60 + 56
    del a
    assert (target.allocated_bytes, target.peak_bytes) == (56, 116)
    c = target.put(np.zeros(4, np.uint8))
    assert (target.allocated_bytes, target.peak_bytes) == (60, 116)
    del b, c
    assert (target.allocated_bytes, target.peak_bytes) == (0, 116)


def test_a_view_keeps_its_memory_counted() -> None:
    target = CpuTarget()
    view = target.empty(100, np.uint8)[10:20]
    assert target.allocated_bytes == 100
    del view
    assert target.allocated_bytes == 0


@pytest.mark.gpu
def test_any_view_keeps_device_memory_counted() -> None:
    target = CudaTarget()
    array = target.empty(100, np.uint8)
    part, words = array[10:20], array.view(np.uint32)
    del array
    assert target.allocated_bytes == 100
    del words
    assert target.allocated_bytes == 100
    del part
    assert target.allocated_bytes == 0


def test_cpu_arrays_are_aligned() -> None:
    target = CpuTarget()
    for shape, dtype in ((1, np.uint8), (1000, np.float32), ((3, 3), np.int64)):
        array = target.empty(shape, dtype)
        assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous
    target.synchronize()


def test_a_device_without_room_says_so_in_a_line(
    cuda_target: CudaTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(shape: int, dtype: np.dtype) -> None:
        raise CudaAPIError(2, "CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr("atlas.target.cuda.device_array", refuse)
    with pytest.raises(GGUFShardError, match=r"^an array 7 of float32 on the device: .*MEMORY"):
        cuda_target.empty(7, np.float32)
    assert cuda_target.allocated_bytes == 0


def test_targets_by_name() -> None:
    assert type(select_target("cpu")) is CpuTarget
    assert type(select_target("auto")) is (CudaTarget if cuda_is_usable() else CpuTarget)
    with pytest.raises(GGUFShardError, match=r"^target 'tpu' is none of auto, cpu, cuda$"):
        select_target("tpu")
    if cuda_is_usable():
        assert type(select_target("cuda")) is CudaTarget
    else:
        with pytest.raises(GGUFShardError, match=r"^target cuda: (no usable CUDA device|numba-c)"):
            select_target("cuda")


def test_threads_are_bounded() -> None:
    before = get_num_threads()
    try:
        assert CpuTarget(1).threads == get_num_threads() == 1
        assert CpuTarget().threads == 1
    finally:
        set_num_threads(before)
    for threads in (0, -1, config.NUMBA_NUM_THREADS + 1):
        with pytest.raises(GGUFShardError, match=f"^threads: {threads} is not within 1"):
            CpuTarget(threads)


def test_the_simulator_needs_the_compiler_off() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import atlas.target"], capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "0"},
    )  # fmt: skip
    assert run.returncode == 1
    assert "the CUDA simulator needs NUMBA_DISABLE_JIT=1" in run.stderr


@pytest.mark.skipif(config.ENABLE_CUDASIM, reason="the simulator compiles nothing")
def test_numpy_that_numba_cuda_cannot_compile_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.target.cuda.is_available", lambda: True)
    monkeypatch.delattr(np, "row_stack", raising=False)
    assert not cuda_is_usable()
    assert type(select_target("auto")) is CpuTarget
    with pytest.raises(GGUFShardError, match=r"^target cuda: .* NumPy .*'numpy<2\.5'"):
        select_target("cuda")
