"""A pass of kernels, captured once and launched as one (a CUDA graph).

Launching a kernel costs the host microseconds, and a decode pass of a small model is hundreds of
kernels of a few microseconds each. What is captured is replayed as it was, arguments included: so a
pass may be captured once everything in it is in place, all kernels are compiled, and nothing in it
depends on the host.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import cuda
from numba.core import config

from atlas.target import CudaTarget


class CudaGraph:
    """Kernels that `work` queues on the target's stream, to be launched again.

    Parameters
    ----------
    target
        The GPU.
    work
        Queues the kernels; nothing runs while they are captured.

    Raises
    ------
    GraphUnavailableError
        If this cannot be captured here: an old driver, or no `cuda.core`.
    """

    def __init__(self, target: CudaTarget, work: Callable[[], None]) -> None:
        try:
            # Memory that becomes garbage meanwhile is freed later: freeing ends a capture.
            with cuda.defer_cleanup():
                self._replay = (_record if config.ENABLE_CUDASIM else _capture)(target, work)
        except Exception as error:  # of several layers, none of which says what it raises
            raise GraphUnavailableError(f"capture failed: {error}") from error

    def launch(self) -> None:
        """Queue all of it on the target's stream."""
        self._replay()


class GraphUnavailableError(RuntimeError):
    """What should have been captured has to be launched kernel by kernel."""


def _capture(target: CudaTarget, work: Callable[[], None]) -> Callable[[], None]:
    from cuda.core import Stream

    stream = Stream.from_handle(int(target.stream.handle))
    builder = stream.create_graph_builder()
    builder.begin_building()
    try:
        work()
    finally:
        builder.end_building()
    graph = builder.complete()
    return lambda: graph.launch(stream)


def _record(target: CudaTarget, work: Callable[[], None]) -> Callable[[], None]:
    """The simulator's twin: launches are noted down, and done again one after the other."""
    with target.recorded_launches() as launches:
        work()

    def replay() -> None:
        for launch in launches:
            launch()

    return replay
