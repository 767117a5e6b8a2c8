"""Arguments of kernels: what is packed on the host arrives."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda, types

from atlas.ops.kernel import Kernel, kernel
from atlas.target import CpuTarget, CudaTarget


@kernel(
    types.int64[::1], types.float32[:, :, ::1], types.uint8[::1], types.int32, types.uint32,
    types.int64, types.uint64, types.float32, types.boolean, types.boolean,
    types.UniTuple(types.int64, 3), types.uint64[::1],
)  # fmt: skip
def report_kernel(out, cube, empty, i32, u32, i64, u64, f32, yes, no, three, last):
    if cuda.grid(1) == 0:
        out[0], out[1], out[2] = cube.shape[0], cube.shape[1], cube.shape[2]
        out[3], out[4] = cube.size, empty.size
        out[5], out[6], out[7], out[8] = i32, u32, i64, np.int64(u64 >> np.uint64(1))
        out[9] = np.int64(f32 * np.float32(8))
        out[10], out[11] = np.int64(yes), np.int64(no)
        out[12], out[13], out[14] = three[0], three[1], three[2]
        out[15] = np.int64(cube[1, 2, 3])
        out[16] = np.int64(last[1])
        cube[0, 1, 2] = np.float32(99)


@pytest.mark.parametrize("sign", [1, -1])
def test_every_kind_of_argument_arrives(cuda_target: CudaTarget, sign: int) -> None:
    target = cuda_target
    out = target.full(17, -7, np.int64)
    cube = target.put(np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4))
    last = target.put(np.array([1, 2**40], np.uint64))
    report_kernel.launch(
        target, 1, 32, out, cube, target.empty(0, np.uint8), sign * 2**30, 2**32 - 1,
        sign * 2**60, 2**63 + 2, sign * 1.125, True, False, (1, sign * 2**50, 3), last,
    )  # fmt: skip
    assert target.get(out).tolist() == [
        2, 3, 4, 24, 0, sign * 2**30, 2**32 - 1, sign * 2**60, 2**62 + 1, sign * 9, 1, 0,
        1, sign * 2**50, 3, 23, 2**40,
    ]  # fmt: skip
    assert target.get(cube)[0, 1, 2] == 99  # the array itself, not a copy


def test_the_number_of_arguments_is_checked(cuda_target: CudaTarget) -> None:
    with pytest.raises(ValueError, match="zip"):
        report_kernel.launch(cuda_target, 1, 32, cuda_target.empty(17, np.int64))


def test_kernels_need_a_cuda_target() -> None:
    @kernel(types.int64)
    def nothing_kernel(n):
        pass

    assert isinstance(nothing_kernel, Kernel) and nothing_kernel.name == "nothing_kernel"
    with pytest.raises(TypeError, match="kernels run on a CUDA target, not on cpu"):
        nothing_kernel.launch(CpuTarget(), 1, 1, 3)  # type: ignore[arg-type]


@kernel(types.int32[::1])
def count_kernel(out):
    if cuda.grid(1) == 0:
        out[0] += 1


def test_an_array_is_asked_once_where_it_is(
    cuda_target: CudaTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    address = CudaTarget.address

    def noted(target: CudaTarget, array: object) -> int:
        asked.append(array)
        return address(target, array)

    monkeypatch.setattr(CudaTarget, "address", noted)
    counts = cuda_target.full(4, 0, np.int32)
    part = counts[2:]
    asked.clear()  # writing has asked, too
    for array in (counts, counts, part, counts, part):
        count_kernel.launch(cuda_target, 1, 32, array)
    assert [sum(a is array for a in asked) for array in (counts, part)] == [1, 1]
    assert cuda_target.get(counts).tolist() == [3, 0, 2, 0]
