"""How long a CUDA device takes, by events on a stream."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from numba import config, cuda, types

from atlas.ops.kernel import kernel
from atlas.ops.ptx import ptx_op
from atlas.target import CudaTarget

#: Copied before each measurement; with its copy, twice the L2 cache of any device so far.
FLUSH_BYTES = (4 << 10) if config.ENABLE_CUDASIM else (128 << 20)
#: How long the device is kept busy before a measurement. To queue a kernel takes the host some
#: 10 us (seen beside an H100); a measurement queues up to some tens.
HOLD_NANOSECONDS = 1000 if config.ENABLE_CUDASIM else 2_000_000


@ptx_op("mov.u64 $0, %globaltimer;", "l", "", has_effect=True)
def nanoseconds():
    """The device's clock; it ticks once in a microsecond or less often."""
    return np.uint64(time.monotonic_ns())


@kernel(types.int64)
def hold_kernel(duration):
    start = nanoseconds()
    while np.uint64(nanoseconds() - start) < np.uint64(duration):
        pass


def hold(target: CudaTarget, duration: int) -> None:
    """Keep the compute stream from going on for `duration` nanoseconds."""
    hold_kernel.launch(target, 1, 1, duration)


class Stopwatch:
    """Times work on a target's compute stream.

    What is measured begins behind a copy of `FLUSH_BYTES`, so that it finds nothing of its own in
    the L2 cache; and behind a kernel that waits, so that the host has queued all of it before the
    device comes to it, and short kernels are measured without the host's time.

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
        self._flush[0].copy_to_device(self._flush[1], stream=stream)
        hold(self._target, HOLD_NANOSECONDS)
        self._start.record(stream)
        work()
        self._stop.record(stream)
        self._stop.synchronize()
        if config.ENABLE_CUDASIM:
            return math.nan
        return float(self._start.elapsed_time(self._stop)) / 1e3


KERNELS = {"hold_kernel": hold_kernel}
