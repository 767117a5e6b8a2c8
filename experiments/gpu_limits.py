"""GPU cases about the device itself, the limits of all others: what its memory and link can do, and
what a launch costs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from atlas.ops.read_words import N_PARTS, read_words
from experiments.bench import Case, Variant
from experiments.gpu_bench import COPY, GpuBench


def limits(bench: GpuBench) -> list[dict[str, Any]]:
    """Bandwidths of memory and link, and what a launch costs."""
    capacity = bench.capacity
    rows = bench.measure(
        Case("gpu-bandwidth", "GB/s", {"MiB": bench.cases.memory_bytes >> 20}),
        [
            Variant(COPY, capacity.copy, capacity.copies),
            Variant("reading kernel", capacity.read, capacity.reads),
            Variant("pinned copy to the device", capacity.link, capacity.brings),
        ],
    )
    return rows + bench.measure(Case("gpu-launch", "us", {}, "lower"), _launch_variants(bench))


def _launch_variants(bench: GpuBench) -> list[Variant]:
    """The host's time for a kernel that has next to nothing to do: queued, and waited for."""
    target = bench.target
    words, parts = target.full(4, 7, np.uint32), target.full(N_PARTS, 1, np.uint32)

    def timed(n: int) -> float:
        target.synchronize()
        started = time.perf_counter()
        for _ in range(n):
            read_words(target, words, parts)
        return 1e6 * (time.perf_counter() - started) / n

    def waited() -> float:
        target.synchronize()
        started = time.perf_counter()
        read_words(target, words, parts)
        target.synchronize()
        return 1e6 * (time.perf_counter() - started)

    def is_right() -> bool:
        read_words(target, words, parts)
        return not np.bitwise_xor.reduce(target.get(parts))  # four equal words

    return [
        Variant("queueing a kernel", lambda: timed(bench.cases.launches), is_right),
        Variant("queueing and waiting for it", waited, is_right),
    ]
