"""Reading memory for its bandwidth: every word counts; and the stopwatch runs what it times."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from atlas.ops.read_words import MAX_WORDS, N_PARTS, read_words
from atlas.ops.stopwatch import Stopwatch, hold
from atlas.target import CudaTarget, Target

# Nothing, one load, one short of a round of the simulator's two blocks of 64 threads, a round of
# four loads a thread, and one more.
SIZES = (0, 4, 508, 512, 516, 2044, 2048, 2052, 5000)


@pytest.mark.parametrize("n", SIZES)
def test_every_word_is_read(target: Target, n: int) -> None:
    words = np.random.default_rng(n).integers(0, 1 << 32, n, dtype=np.uint32)
    parts = target.full(N_PARTS, 0xDEADBEEF, np.uint32)
    read_words(target, target.put(words), parts)
    assert np.bitwise_xor.reduce(target.get(parts)) == np.bitwise_xor.reduce(words)


def test_what_the_kernel_would_trust_is_checked(target: Target) -> None:
    parts = target.full(N_PARTS, 0, np.uint32)
    with pytest.raises(ValueError, match=f"words: 6, want a multiple of 4 up to {MAX_WORDS}"):
        read_words(target, target.full(6, 0, np.uint32), parts)
    with pytest.raises(ValueError, match="parts has shape"):
        read_words(target, target.full(8, 0, np.uint32), target.full(N_PARTS - 1, 0, np.uint32))
    with pytest.raises(TypeError, match="words has dtype int32"):
        read_words(target, target.full(8, 0, np.int32), parts)


def test_stopwatch_on_cuda_runs_the_work_once_and_waits(
    cuda_target: CudaTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = cuda_target
    words = target.put(np.arange(1024, dtype=np.uint32))
    parts = target.full(N_PARTS, 0xDEADBEEF, np.uint32)
    stopwatch = Stopwatch(target)
    calls: list[str] = []

    def noted_hold(target: CudaTarget, duration: int) -> None:
        calls.append("hold")
        hold(target, duration)

    def work() -> None:
        calls.append("work")
        read_words(target, words, parts)

    monkeypatch.setattr("atlas.ops.stopwatch.hold", noted_hold)
    seconds = stopwatch.seconds(work)
    assert math.isnan(seconds) if target.name == "cuda-simulator" else seconds > 0
    assert calls == ["hold", "work"]
    assert np.bitwise_xor.reduce(target.get(parts)) == np.bitwise_xor.reduce(np.arange(1024))


def test_hold_keeps_the_stream_busy(cuda_target: CudaTarget) -> None:
    cuda_target.synchronize()
    started = time.monotonic_ns()
    hold(cuda_target, 20_000_000)
    cuda_target.synchronize()
    assert time.monotonic_ns() - started >= 19_000_000  # clocks differ a little
