"""How long a CUDA device takes, by events on a stream."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import config, cuda

from atlas.target import CudaTarget

#: Copied before each measurement; with its copy, twice the L2 cache of any device so far.
FLUSH_BYTES = (4 << 10) if config.ENABLE_CUDASIM else (128 << 20)
#: How often it is copied: for two milliseconds on the fastest device so far, in which the host
#: queues some fifty kernels.
N_FLUSHES = 1 if config.ENABLE_CUDASIM else 20


class Stopwatch:
    """Times work on a target's compute stream.

    What is measured begins behind `N_FLUSHES` copies of `FLUSH_BYTES`. So it finds nothing of its
    own in the L2 cache; and the host has queued it before the device comes to it, so that short
    kernels are measured without the host's time.

    Parameters
    ----------
    target
        The device. In the simulator everything runs, and every time is NaN.
    """

    def __init__(self, target: CudaTarget) -> None:
        self._target = target
        self._flush = [target.full(FLUSH_BYTES // 4, 0, np.uint32) for _ in range(2)]
        self._start, self._stop = cuda.event(), cuda.event()

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds from the start to the end of all that `work` queues on the compute stream."""
        stream = self._target.stream
        for _ in range(N_FLUSHES):
            self._flush[0].copy_to_device(self._flush[1], stream=stream)
        self._start.record(stream)
        work()
        self._stop.record(stream)
        self._stop.synchronize()
        if config.ENABLE_CUDASIM:
            return math.nan
        return float(self._start.elapsed_time(self._stop)) / 1e3
