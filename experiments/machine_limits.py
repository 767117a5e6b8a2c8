"""What this machine can do at most, measured: the limits that results are held against."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np

_REPEATS = 3
_SECONDS = 0.5
_SAMPLE_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20


def best_seconds(work: Callable[[], object]) -> float:
    """Time of the fastest run out of at least three, and of half a second's worth: a limit must not
    be too low because the machine was briefly busy."""
    work()
    n_runs, total, best = 0, 0.0, math.inf
    while n_runs < _REPEATS or total < _SECONDS:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        n_runs, total, best = n_runs + 1, total + seconds, min(best, seconds)
    return best


class Best:
    """A capacity measured again at every call; gives the best seen so far, so that variants which
    share it are held against the same."""

    def __init__(self, measure: Callable[[], float]) -> None:
        self._measure = measure
        self._best = 0.0

    def __call__(self) -> float:
        self._best = max(self._best, self._measure())
        return self._best


@numba.njit(nogil=True)
def _read_words(words):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(words.size):
        total ^= words[i]
    return total


def read_bandwidth(data: np.ndarray) -> float:
    """Bytes a second at which one thread reads an array."""
    words = data.reshape(-1).view(np.uint64)
    return words.nbytes / best_seconds(lambda: _read_words(words))


def hash_bandwidth() -> float:
    """Bytes a second that SHA-256 takes on one thread."""
    data = np.random.default_rng(0).bytes(_SAMPLE_BYTES)
    return len(data) / best_seconds(lambda: hashlib.sha256(data).digest())


def product_flops() -> float:
    """Floating-point operations a second of a float32 product by NumPy's BLAS, on its threads."""
    n = 512  # a millisecond: short enough that some runs are not disturbed
    a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    return 2 * n**3 / best_seconds(lambda: a @ a)


def file_read_seconds(path: Path, threads: int) -> float:
    """Seconds in which a file is read once into memory, by several threads in 4 MiB pieces."""
    buffers = [np.empty(_CHUNK_BYTES, np.uint8) for _ in range(threads)]
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:
        size = os.fstat(file.fileno()).st_size

        def read(number: int) -> None:
            for offset in range(number * _CHUNK_BYTES, size, threads * _CHUNK_BYTES):
                os.preadv(file.fileno(), [buffers[number].data], offset)

        started = time.perf_counter()
        list(pool.map(read, range(threads)))
        return time.perf_counter() - started


def write_bandwidth(folder: Path) -> float:
    """Bytes a second at which one thread writes a file and forces it to disk."""
    data = np.random.default_rng(0).bytes(_SAMPLE_BYTES)
    path = folder / "write-sample"

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())

    try:
        return len(data) / best_seconds(write)
    finally:
        path.unlink(missing_ok=True)
