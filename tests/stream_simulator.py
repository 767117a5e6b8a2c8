"""A CUDA target whose streams run in any order that events permit.

The simulator runs a kernel when it is launched, so work that should wait for other work always
finds it done. Here launches are kept, and run one at a time: some when others are launched, all
that it takes when the host waits. Which stream goes on is drawn; one of them, drawn anew now and
then, is slow, and goes on only when no other can. A dependency that nothing enforces is then broken
by some draw.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numba.cuda.simulator.cudadrv import devicearray

from atlas.driver_queue import Grid, Launchable
from atlas.target import CudaTarget

_CHANGE = 0.02  # how often another stream becomes the slow one


class Streams:
    """Streams of one device, and who runs next.

    Parameters
    ----------
    seed
        Of the draw.
    """

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._streams: list[Stream] = []
        self._slow: Stream | None = None

    def new(self) -> Stream:
        """A stream beside the others."""
        stream = Stream(self)
        self._streams.append(stream)
        return stream

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Run what may run, in some order, until something is over."""
        while not is_over():
            assert self._run_one() or self._run_slow(), "streams wait for each other"

    def run_some(self) -> None:
        """Let the device get on with some of it while the host is busy."""
        for _ in range(self._draw.randrange(6)):
            self._run_one()

    def _run_one(self) -> bool:
        if self._draw.random() < _CHANGE:
            self._slow = self._draw.choice(self._streams)
        ready = [s for s in self._streams if s is not self._slow and s.is_ready()]
        if ready:
            self._draw.choice(ready).queue.popleft().run()
        return bool(ready)

    def _run_slow(self) -> bool:
        if self._slow is None or not self._slow.is_ready():
            return False
        self._slow.queue.popleft().run()
        return True

    def synchronize(self) -> None:
        """Run everything."""
        self.run_until(lambda: not any(s.queue for s in self._streams))


class _Item:
    """What a stream is to do, once an event has come."""

    def __init__(self, run: Callable[[], None], awaited: Event | None = None) -> None:
        self.run = run
        self._mark = None if awaited is None else awaited.mark

    def is_ready(self) -> bool:
        return self._mark is None or self._mark.is_over


class _Mark:
    is_over = False

    def set(self) -> None:
        self.is_over = True


class Stream:
    """A queue of what is to be done in turn."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.queue: deque[_Item] = deque()

    def is_ready(self) -> bool:
        """Whether the first thing it has to do can be done."""
        return bool(self.queue) and self.queue[0].is_ready()

    def put(self, run: Callable[[], None]) -> None:
        """Queue something."""
        self.queue.append(_Item(run))
        self._streams.run_some()

    def synchronize(self) -> None:
        """Run this stream to its end, and of the others what it waits for, or more."""
        self._streams.run_until(lambda: not self.queue)


class Event:
    """A place in a stream, as of the last time it was recorded."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.mark: _Mark | None = None

    def record(self, stream: Stream) -> None:
        self.mark = _Mark()
        stream.queue.append(_Item(self.mark.set))

    def wait(self, stream: Stream) -> None:
        stream.queue.append(_Item(lambda: None, self))

    def synchronize(self) -> None:
        mark = self.mark
        self._streams.run_until(lambda: mark is None or mark.is_over)


class StreamTarget(CudaTarget):
    """A target of the simulator with streams of this kind.

    Parameters
    ----------
    seed
        Of the draw.
    patch
        Makes copies go through streams, as long as the test runs.
    """

    def __init__(self, seed: int, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.streams = Streams(seed)
        self.stream = self.streams.new()
        array, copy_to_host = devicearray.FakeCUDAArray, devicearray.FakeCUDAArray.copy_to_host
        copy_to_device = array.copy_to_device

        def to_host(source: Any, ary: Any = None, stream: Any = 0) -> np.ndarray:
            # Whoever copies waits before looking at it; with no stream named, for everything.
            (stream if isinstance(stream, Stream) else self.streams).synchronize()
            return copy_to_host(source, ary)

        def to_device(place: Any, source: Any, stream: Any = 0) -> None:
            content = np.array(source)
            if isinstance(stream, Stream):
                stream.put(lambda: copy_to_device(place, content))
            else:
                self.streams.synchronize()
                copy_to_device(place, content)

        patch.setattr(array, "copy_to_host", to_host)
        patch.setattr(array, "copy_to_device", to_device)

    def synchronize(self) -> None:
        self.streams.synchronize()

    def new_stream(self) -> Any:
        return self.streams.new()

    def event(self) -> Any:
        return Event(self.streams)

    def launch(
        self, kernel: Launchable, blocks: Grid, threads: int, stream: Any, words: Sequence[int]
    ) -> None:
        self.n_launches += 1
        stream.put(lambda: kernel.entry[blocks, threads](*words))

    def copy(self, to: int, source: int, n_bytes: int, stream: Any) -> None:
        stream.put(lambda: CudaTarget.copy(self, to, source, n_bytes, stream))
