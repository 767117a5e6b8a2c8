"""The warp simulator against NumPy, and what it must refuse."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from numba import config, cuda, types

if not config.ENABLE_CUDASIM:
    pytest.skip(
        "runs under python -m tests.warp_simulator -m pytest tests/test_warp_simulator.py",
        allow_module_level=True,
    )

from tests import warp_scheduler
from tests.warp_simulator import DeadlockError, current_lane, exchange, install

install()

FULL = 0xFFFFFFFF
LANES = np.arange(32)


def lanes_of(body, n_threads=32, dtype=np.int64, n_blocks=1):
    """What `body(thread)` returns in each thread of one block or more."""
    out = np.zeros(n_threads * n_blocks, dtype)

    @cuda.jit
    def kernel(out):
        out[cuda.grid(1)] = body(cuda.threadIdx.x)

    kernel[n_blocks, n_threads](out)
    return out


def test_install_twice_changes_nothing():
    before = cuda.jit
    install()
    assert cuda.jit is before


@pytest.mark.parametrize("operand", [0, 1, 5, 16, 31, 32])
def test_shuffles(operand):
    values = LANES * 3 + 1
    source = {
        "shfl_sync": np.full(32, operand % 32),
        "shfl_up_sync": np.where(operand <= LANES, LANES - operand, LANES),
        "shfl_down_sync": np.where(LANES + operand < 32, LANES + operand, LANES),
        "shfl_xor_sync": np.where((LANES ^ operand) < 32, LANES ^ operand, LANES),
    }
    for name, wanted in source.items():
        shuffle = getattr(cuda, name)
        got = lanes_of(lambda t, shuffle=shuffle: shuffle(FULL, values[t], operand))
        np.testing.assert_array_equal(got, values[wanted], name)


def test_shuffles_of_two_warps_and_of_half_a_warp():
    got = lanes_of(lambda t: cuda.shfl_xor_sync(FULL, t, 1), 64)
    np.testing.assert_array_equal(got, np.arange(64) ^ 1)

    def halves(t):
        if t < 16:
            return cuda.shfl_sync(0x0000FFFF, t, 3)
        return cuda.shfl_sync(0xFFFF0000, t, 20)

    np.testing.assert_array_equal(lanes_of(halves), np.where(LANES < 16, 3, 20))


def test_shuffle_from_an_absent_lane_is_poisoned():
    got = lanes_of(lambda t: cuda.shfl_sync(FULL, np.float32(t), 8), 8, np.float32)
    assert np.isnan(got).all()


def test_votes():
    odd = int("10" * 16, 2)
    assert (lanes_of(lambda t: cuda.ballot_sync(FULL, t % 2)) == np.int32(odd - 2**32)).all()
    assert (lanes_of(lambda t: cuda.popc(cuda.ballot_sync(FULL, True))) == 32).all()
    assert lanes_of(lambda t: cuda.any_sync(FULL, t == 7)).all()
    assert not lanes_of(lambda t: cuda.any_sync(FULL, False)).any()
    assert lanes_of(lambda t: cuda.all_sync(FULL, t >= 0)).all()
    assert not lanes_of(lambda t: cuda.all_sync(FULL, t > 0)).any()
    assert lanes_of(lambda t: cuda.eq_sync(FULL, False)).all()
    assert not lanes_of(lambda t: cuda.eq_sync(FULL, t == 3)).any()


def test_matches_and_lane_masks():
    thirds = [sum(1 << lane for lane in range(t % 3, 32, 3)) for t in LANES]
    got = lanes_of(lambda t: cuda.match_any_sync(FULL, t % 3))
    np.testing.assert_array_equal(got & FULL, thirds)
    assert (lanes_of(lambda t: cuda.match_all_sync(FULL, 5)[0]) == -1).all()
    assert not lanes_of(lambda t: cuda.match_all_sync(FULL, t)[1]).any()
    np.testing.assert_array_equal(lanes_of(lambda t: cuda.lanemask_lt()), (1 << LANES) - 1)
    np.testing.assert_array_equal(lanes_of(lambda t: cuda.laneid, 40), np.arange(40) % 32)


def test_activemask_is_who_is_at_the_same_place():
    def branches(t):
        if t < 5:
            return cuda.activemask()
        return cuda.activemask()

    got = lanes_of(branches)
    np.testing.assert_array_equal(got, np.where(LANES < 5, 0x1F, FULL - 0x1F))


def test_integer_functions_take_the_width_of_their_type():
    assert cuda.popc(np.int32(-1)) == 32 and cuda.popc(np.int64(-1)) == 64
    assert cuda.clz(np.uint32(1)) == 31 and cuda.clz(np.uint64(1)) == 63
    assert cuda.ffs(np.uint32(8)) == 4 and cuda.ffs(np.uint32(0)) == 0
    assert cuda.brev(np.uint32(1)) == 1 << 31


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 100])
def test_warp_reduction_and_block_scan(n):
    """Sum of a block by shuffles, and places of the odd values by ballots."""
    rng = np.random.default_rng(n)
    values = rng.integers(0, 100, n).astype(np.int32)
    total, places = np.full(1, -7, np.int32), np.full(128, -7, np.int32)

    @cuda.jit(launch_bounds=128, max_registers=32)
    def kernel(values, total, places):
        sums = cuda.shared.array(4, np.int32)
        counts = cuda.shared.array(4, np.int32)
        thread, warp = cuda.threadIdx.x, cuda.threadIdx.x // 32
        value = values[thread] if thread < values.size else np.int32(0)
        is_odd = value % 2 == 1
        odd = cuda.ballot_sync(FULL, is_odd)
        for reach in (16, 8, 4, 2, 1):
            value += cuda.shfl_down_sync(FULL, value, reach)
        if cuda.laneid == 0:
            sums[warp], counts[warp] = value, cuda.popc(odd)
        cuda.syncthreads()
        if thread == 0:
            total[0] = sums.sum()
        if is_odd:
            before = cuda.popc(np.uint32(odd) & cuda.lanemask_lt())
            places[thread] = before + counts[:warp].sum()

    kernel[1, 128](values, total, places)
    assert total[0] == values.sum()
    is_odd = values % 2 == 1
    np.testing.assert_array_equal(places[:n][is_odd], np.arange(is_odd.sum()))
    assert (np.delete(places, np.flatnonzero(is_odd)) == -7).all()


def test_block_barriers_with_a_value():
    assert (lanes_of(lambda t: cuda.syncthreads_count(t % 3 == 0), 50) == 17).all()
    assert (lanes_of(lambda t: cuda.syncthreads_and(t != 49), 50) == 0).all()
    assert (lanes_of(lambda t: cuda.syncthreads_and(t < 50), 50) == 1).all()
    assert (lanes_of(lambda t: cuda.syncthreads_or(t == 49), 50) == 1).all()
    assert (lanes_of(lambda t: cuda.syncthreads_or(False), 50) == 0).all()


def run(body, n_threads=32, n_blocks=1):
    cuda.jit(body)[n_blocks, n_threads]()


def test_divergent_barriers_raise_and_say_who_waits():
    def kinds():
        if cuda.threadIdx.x < 3:
            cuda.syncthreads()
        else:
            cuda.syncthreads_count(1)

    with pytest.raises(DeadlockError, match=r"kinds: deadlock in block \(0, 0, 0\)") as caught:
        run(kinds, n_blocks=2)
    assert "threads 0-2 wait at syncthreads (test_warp_simulator.py:" in str(caught.value)
    assert "threads 3-31 wait at syncthreads_count (" in str(caught.value)

    def places():
        if cuda.threadIdx.x < 3:
            cuda.syncthreads()
        else:
            cuda.syncthreads()

    with pytest.raises(DeadlockError, match="places"):
        run(places)


def test_warp_operation_whose_lanes_never_come_raises():
    def kernel():
        if cuda.threadIdx.x % 16 == 0:
            cuda.shfl_sync(FULL, 1, 0)
        else:
            cuda.syncwarp()

    with pytest.raises(
        DeadlockError, match=r"0, 16 wait at shfl_sync .* lanes 1-15, 17-31 of mask"
    ):
        run(kernel)

    def outside():
        cuda.syncwarp(0xFFFE)

    with pytest.raises(RuntimeError, match=r"mask 0x0000fffe leaves out lane (0|31)"):
        run(outside)


def test_exited_threads_are_not_waited_for():
    def block(t):
        if t >= 5:
            return -1
        return cuda.syncthreads_count(True)

    np.testing.assert_array_equal(lanes_of(block, 40), np.r_[np.full(5, 5), np.full(35, -1)])

    def warp(t):
        if t >= 5:
            return -1
        return cuda.popc(cuda.ballot_sync(FULL, True))

    np.testing.assert_array_equal(lanes_of(warp, 32), np.r_[np.full(5, 5), np.full(27, -1)])


def test_a_thread_that_exits_opens_the_barrier_others_wait_at():
    def kernel(t):
        cuda.syncwarp()
        if t < 32:
            return -1
        cuda.syncwarp()
        return cuda.syncthreads_count(True)

    np.testing.assert_array_equal(lanes_of(kernel, 64)[32:], 32)


def test_grid_sync_of_several_blocks():
    n_blocks, n_threads = 3, 33
    sums = np.zeros((2, n_blocks), np.int64)

    @cuda.jit
    def kernel(sums):
        grid = cuda.cg.this_grid()
        block = cuda.blockIdx.x
        for turn in range(2):
            cuda.atomic.add(sums, (turn, block), 1)
            grid.sync()
            if cuda.threadIdx.x == 0:
                assert sums[turn].sum() == n_blocks * n_threads
            if block == 0:
                cuda.syncthreads()

    kernel[n_blocks, n_threads](sums)
    assert (sums == n_threads).all()
    assert kernel.overloads[()].max_cooperative_grid_blocks(n_threads) > 1


def test_grid_sync_that_some_threads_miss_raises():
    def kernel():
        if cuda.blockIdx.x == 1 and cuda.threadIdx.x < 4:
            cuda.syncwarp()
        else:
            cuda.cg.this_grid().sync()

    with pytest.raises(DeadlockError, match=r"block \(1, 0, 0\).*0-3 wait at syncwarp"):
        run(kernel, n_blocks=2)


def test_nanosleep_lets_others_go_first_and_ends_hopeless_waiting():
    flag = np.zeros(1, np.int32)

    @cuda.jit
    def kernel(flag, last):
        while cuda.ldcv(flag, 0) == 0:
            if cuda.grid(1) == last:
                cuda.stcg(flag, 0, 1)
            cuda.nanosleep(20)

    kernel[2, 8](flag, 15)
    assert flag[0] == 1
    flag[0] = 0
    with pytest.raises(DeadlockError, match="nothing but nanosleep"):
        kernel[1, 1](flag, 15)


def test_new_arrays_are_poisoned_in_every_block():
    @cuda.jit
    def kernel(out):
        shared = cuda.shared.array((2, 3), types.float32)
        local = cuda.local.array(4, np.float64)
        dynamic = cuda.shared.array(0, np.float16)
        integers = cuda.shared.array(4, np.int32)
        i = cuda.grid(1)
        out[i, 0] = np.isnan(shared).all() or i % 2
        out[i, 1] = np.isnan(local).all()
        out[i, 2] = (np.isnan(dynamic).all() and dynamic.size == 5) or i % 2
        out[i, 3] = (integers < -1000).all() or i % 2
        cuda.syncthreads()
        shared[:], local[:], dynamic[:], integers[:] = 0, 0, 0, 0

    out = np.zeros((4, 4), bool)
    kernel[2, 2, 0, 11](out)
    assert out.all()


def test_arrays_of_one_line_are_two_arrays():
    def kernel(t):
        a, b = cuda.shared.array(32, np.int64), cuda.shared.array(32, np.int64)
        a[t], b[t] = t, -t
        cuda.syncthreads()
        return 100 * a[31 - t] + b[31 - t]

    np.testing.assert_array_equal(lanes_of(kernel), 99 * (31 - LANES))


def test_dynamic_arrays_share_their_bytes():
    @cuda.jit
    def kernel(out):
        cuda.shared.array(0, np.uint32)[0] = 0x01020304
        out[0] = cuda.shared.array(0, np.uint8)[0]

    out = np.zeros(1, np.int64)
    kernel[1, 1, 0, 4](out)
    assert out[0] == 4


def test_exceptions_keep_their_type_and_name_the_thread():
    def broken():
        cuda.syncthreads()
        if cuda.grid(2) == (3, 1):
            raise IndexError("beyond the end")

    with pytest.raises(
        IndexError, match=r"broken, block \(1, 0, 0\), thread \(1, 1, 0\): beyond the end"
    ):
        cuda.jit(broken)[(2, 1), (2, 2)]()
    assert (lanes_of(lambda t: t) == LANES).all(), "the simulator goes on after an error"


def test_nested_device_functions():
    @cuda.jit(device=True, inline="always")
    def neighbour(value):
        return cuda.shfl_xor_sync(FULL, value, 1)

    @cuda.jit("int64(int64)", device=True, forceinline=True)
    def twice(value):
        return 2 * neighbour(value) + cuda.blockIdx.x

    got = lanes_of(twice, n_blocks=2)
    np.testing.assert_array_equal(got, np.r_[2 * (LANES ^ 1), 2 * (LANES ^ 1) + 1])


def test_arguments_of_all_kinds():
    record = np.zeros(2, [("a", np.int32), ("b", np.float32)])
    device = cuda.to_device(np.arange(6).reshape(2, 3))
    host, scalar = np.zeros(3), np.float32(2.5)

    @cuda.jit
    def kernel(record, device, pair, host, scalar):
        i = cuda.grid(1)
        record[i].a = device[i, 1]
        host[i] = scalar * pair[0][i, 2] + pair[1]

    kernel[1, 2](record, device, (device, 1), host, scalar)
    np.testing.assert_array_equal(record["a"], [1, 4])
    np.testing.assert_array_equal(host, [6, 13.5, 0])


def test_configuring_a_kernel_twice_keeps_both():
    out = np.zeros(1, np.int64)

    @cuda.jit
    def kernel(out):
        cuda.atomic.add(out, 0, 1)

    small, large = kernel[1, 2], kernel[3, 4]
    small(out)
    assert out[0] == 2
    large(out)
    assert out[0] == 14


def test_exchange_and_current_lane():
    def rotated(t):
        return exchange(FULL, t * t, "rotate")[(current_lane() + 1) % 32]

    np.testing.assert_array_equal(lanes_of(rotated), np.roll(LANES**2, -1))
    with pytest.raises(RuntimeError, match="no kernel is running"):
        current_lane()
    assert not hasattr(cuda, "threadIdx")


@pytest.mark.parametrize("reverse", [False, True])
def test_order_of_threads_shows_missing_barriers(monkeypatch, reverse):
    monkeypatch.setattr(warp_scheduler, "_REVERSE", reverse)

    def racy(t):
        passed = cuda.shared.array(33, np.int64)
        passed[t] = t
        return passed[max(t - 1, 0)]

    is_right = np.array_equal(lanes_of(racy), np.maximum(LANES - 1, 0))
    assert is_right is not reverse


def test_command_line_switches_the_simulator_on(tmp_path):
    (tmp_path / "print_lanes.py").write_text(
        "import sys, numpy as np\n"
        "from numba import cuda\n"
        "@cuda.jit\n"
        "def kernel(out):\n"
        "    out[0] = cuda.popc(cuda.ballot_sync(0xFFFFFFFF, True))\n"
        "out = np.zeros(1)\n"
        "kernel[1, 32](out)\n"
        "print(__name__, sys.argv[1:], out[0])\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "tests.warp_simulator", "-m", "print_lanes", "--a", "b"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "__main__ ['--a', 'b'] 32.0\n", done.stderr
