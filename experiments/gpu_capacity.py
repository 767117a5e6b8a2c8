"""What a device's memory and link can do at most, measured."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from atlas.ops.read_words import N_PARTS, read_words
from atlas.ops.stopwatch import Stopwatch
from atlas.target import CudaTarget


class Capacity:
    """Bandwidths of a device and its link, each call a measurement.

    Parameters
    ----------
    target, stopwatch
        The device and its clock.
    n_bytes
        How much is copied or read; a multiple of 16.
    seed
        Of what is copied.
    """

    def __init__(self, target: CudaTarget, stopwatch: Stopwatch, n_bytes: int, seed: int) -> None:
        self._target = target
        self._stopwatch = stopwatch
        self._n_bytes = n_bytes
        self._seed = seed

    def copy(self) -> float:
        """GB/s read and written by the driver's copy from device memory to device memory."""
        return 2 * self._n_bytes / self._stopwatch.seconds(self._copy) / 1e9

    def read(self) -> float:
        """GB/s read by a kernel that does nothing else."""
        return self._n_bytes / self._stopwatch.seconds(self._read) / 1e9

    def link(self) -> float:
        """GB/s of one large copy from pinned host memory to the device."""
        return self._n_bytes / self._stopwatch.seconds(self._bring) / 1e9

    def copies(self) -> bool:
        """Whether `copy` copies."""
        self._target.write(self._sink, np.zeros(self._words.size, np.uint32))
        self._copy()
        return bool(np.array_equal(self._target.get(self._sink), self._words))

    def reads(self) -> bool:
        """Whether `read` reads everything."""
        self._read()
        found = np.bitwise_xor.reduce(self._target.get(self._parts))
        return bool(found == np.bitwise_xor.reduce(self._words))

    def brings(self) -> bool:
        """Whether `link` copies."""
        self._bring()
        return bool(np.array_equal(self._target.get(self._landing), self._pinned.host))

    def _copy(self) -> None:
        self._sink.copy_to_device(self._source, stream=self._target.stream)

    def _read(self) -> None:
        read_words(self._target, self._source, self._parts)

    def _bring(self) -> None:
        self._landing.copy_to_device(self._pinned.host, stream=self._target.stream)

    @cached_property
    def _words(self) -> np.ndarray:
        draws = np.random.SFC64(self._seed).random_raw(self._n_bytes // 8)
        return draws.view(np.uint32)

    @cached_property
    def _source(self) -> Any:
        return self._target.put(self._words)

    @cached_property
    def _sink(self) -> Any:
        return self._target.empty(self._words.size, np.uint32)

    @cached_property
    def _parts(self) -> Any:
        return self._target.empty(N_PARTS, np.uint32)

    @cached_property
    def _pinned(self) -> Any:
        pinned = self._target.mapped(self._n_bytes // 4, np.uint32)
        pinned.host[:] = self._words
        return pinned

    @cached_property
    def _landing(self) -> Any:
        return self._target.full(self._n_bytes // 4, 0, np.uint32)
