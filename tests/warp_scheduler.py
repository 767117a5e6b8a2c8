"""Runs the threads of a launch as greenlets, and lets them meet: the heart of `warp_simulator`.

A thread runs until it exits or has to meet others; `meet` is the only place where it waits. When
nobody can move, complete meetings are opened: everyone in it gets what everyone brought, and goes
on. If none is complete, the launch ends with a `DeadlockError` that says who waits where.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba.cuda.simulator import kernelapi

WARP_SIZE = 32

#: With whom a thread waits: its block, lanes of its warp, whoever is in the same place, the grid,
#: or nobody.
BLOCK, WARP, CONVERGED, GRID, SLEEP = "block", "warp", "converged", "grid", "sleep"

_OWN_MODULES = {__name__, "tests.warp_operations"}  # left out when a place in the source is named
_REVERSE = os.environ.get("WARP_SIMULATOR_ORDER") == "reverse"
_MAX_NAPS = 10_000  # rounds of nothing but nanosleep before a launch counts as hanging


class DeadlockError(RuntimeError):
    """Threads wait for others that will never arrive."""


class Thread:
    """A CUDA thread; `value` goes into the meeting it waits for, `received` comes out."""

    __slots__ = ("block", "index", "lane", "rank", "received", "value", "warp", "worker")

    def __init__(self, block: Block, rank: int, index: Any) -> None:
        self.block, self.rank, self.index = block, rank, index
        self.warp, self.lane = divmod(rank, WARP_SIZE)


class Worker(greenlet):
    """Runs CUDA threads, one after the other as long as they do not wait."""

    thread: Thread


class Block:
    """What the threads of a block share: arrays, and who is there and who waits for what."""

    def __init__(self, launch: Launch, index: Any, n_threads: int) -> None:
        self.launch, self.index, self.n_threads = launch, index, n_threads
        self.n_live = n_threads
        self.live = [  # lanes of each warp that have not exited
            (1 << min(WARP_SIZE, n_threads - first)) - 1 for first in range(0, n_threads, WARP_SIZE)
        ]
        self.meetings: dict[tuple[str, str, int, int], list[Thread]] = {}
        self.shared: dict[tuple[int, int], np.ndarray] = {}
        self.dynamic = poison(launch.dynamic_bytes, np.uint8)

    def leave(self, thread: Thread) -> None:
        self.live[thread.warp] &= ~(1 << thread.lane)
        self.n_live -= 1

    def is_complete(self, scope: str, warp: int, mask: int, n_arrived: int) -> bool:
        if scope == BLOCK:
            return n_arrived == self.n_live
        return scope == WARP and n_arrived == (mask & self.live[warp]).bit_count()

    def open(self, scope: str) -> list[Thread]:
        """The threads of all meetings of a scope, each with what the others brought."""
        return [
            thread
            for key in list(self.meetings)
            if key[0] == scope
            for thread in self.open_meeting(key)
        ]

    def open_meeting(self, key: tuple[str, str, int, int]) -> list[Thread]:
        arrived = self.meetings.pop(key)
        values = {(t.lane if key[0] == WARP else t.rank): t.value for t in arrived}
        for thread in arrived:
            thread.received = values
        return arrived

    def waits_for(self, *scopes: str) -> bool:
        return any(key[0] in scopes for key in self.meetings)

    def __str__(self) -> str:
        groups = []
        for (scope, what, warp, mask), arrived in self.meetings.items():
            text = f"threads {_ranges(t.rank for t in arrived)} wait at {what} ({_where(arrived)})"
            if scope == WARP:
                absent = mask & self.live[warp] & ~mask_of(t.lane for t in arrived)
                text += f" for lanes {_ranges(_lanes(absent))} of mask {mask:#010x}"
            groups.append(text)
        groups.append(f"{self.n_threads - self.n_live} of {self.n_threads} threads have exited")
        return f"block {self.index}: " + "; ".join(groups)


class Launch:
    """One launch of a kernel, from the first block to the last."""

    def __init__(self, launched: Any, grid: Any, block: Any, arguments: list[Any]) -> None:
        self.name = launched.fn.__name__
        self.body = functools.partial(launched.fn, *arguments)
        self.grid, self.block = kernelapi.Dim3(*grid), kernelapi.Dim3(*block)
        self.dynamic_bytes = launched.dynshared_size
        self.scheduler = getcurrent()
        self.unstarted: deque[Thread] = deque()
        self.workers: list[Worker] = []
        self.idle: list[Worker] = []
        with np.errstate(all="ignore"), np.errstate(divide="raise" if launched._debug else None):
            self.context = contextvars.copy_context()

    def run(self) -> None:
        kept: list[Block] = []
        n_naps = 0
        try:
            for index in _points(self.grid):
                block = self._start(index)
                self._settle(block, [])
                if block.n_live:
                    kept.append(block)
            while kept:
                scope = self._choose_scope(kept)
                n_naps += scope == SLEEP
                if n_naps > _MAX_NAPS:
                    raise DeadlockError(f"{self.name}: nothing but nanosleep: {kept[0]}")
                for block, woken in [(block, block.open(scope)) for block in kept]:
                    self._settle(block, woken)
                kept = [block for block in kept if block.n_live]
        finally:
            for worker in self.workers:
                worker.throw()

    def _start(self, index: Any) -> Block:
        """A block, whose threads have all begun and run until they wait or exit."""
        places = list(_points(self.block))
        block = Block(self, index, len(places))
        self.unstarted.extend(Thread(block, rank, place) for rank, place in enumerate(places))
        if _REVERSE:
            self.unstarted.reverse()
        while self.unstarted:
            if not self.idle:
                worker = Worker(self._work)
                worker.gr_context = self.context
                self.workers.append(worker)
                self.idle.append(worker)
            self.idle.pop().switch()
        return block

    def _work(self) -> None:
        worker = getcurrent()
        while True:
            while self.unstarted:
                thread = self.unstarted.popleft()
                worker.thread, thread.worker = thread, worker
                try:
                    self.body()
                except Exception as error:
                    raise self._named(error, worker.thread) from error
                thread.block.leave(thread)
            self.idle.append(worker)
            self.scheduler.switch()

    def _settle(self, block: Block, woken: list[Thread]) -> None:
        """Let `woken` and whom they wake run, until all exit or wait for other blocks."""
        while True:
            for thread in woken:
                thread.worker.switch()
            complete = [
                key
                for key, arrived in block.meetings.items()
                if block.is_complete(key[0], key[2], key[3], len(arrived))
            ]
            woken = [thread for key in complete for thread in block.open_meeting(key)]
            woken = woken or block.open(CONVERGED)
            if not woken:
                break
        if block.meetings and not block.waits_for(GRID, SLEEP):
            raise DeadlockError(f"{self.name}: deadlock in {block}")

    def _choose_scope(self, kept: list[Block]) -> str:
        """What to wake when no block can go on by itself: sleepers, or else the whole grid."""
        if any(block.waits_for(SLEEP) for block in kept):
            return SLEEP
        for block in kept:
            if block.waits_for(BLOCK, WARP):
                raise DeadlockError(f"{self.name}: deadlock in {block}")
        return GRID

    def _named(self, error: Exception, thread: Thread) -> Exception:
        place = f"{self.name}, block {thread.block.index}, thread {thread.index}"
        try:
            return type(error)(f"{place}: {error}")
        except TypeError:  # an exception that is not made of a message
            return RuntimeError(f"{place}: {error!r}")


def poison(shape: Any, dtype: Any) -> np.ndarray:
    """A new array of 0xF5, 0xFF, 0xF5, ...: NaN in 16, 32 and 64 bits, and no likely integer."""
    return _poisoned(shape, np.dtype(dtype)).copy()


@functools.lru_cache(maxsize=1000)  # each thread wants its own of the same few
def _poisoned(shape: Any, dtype: np.dtype) -> np.ndarray:
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    pattern = np.full((n_bytes + 1) // 2, 0xFFF5, "<u2")
    return pattern.view(np.uint8)[:n_bytes].view(dtype).reshape(shape)


def _points(dim: Any) -> Iterator[Any]:
    for z, y, x in itertools.product(range(dim.z), range(dim.y), range(dim.x)):
        yield kernelapi.Dim3(x, y, z)


def mask_of(lanes: Iterable[int]) -> int:
    return sum(1 << lane for lane in lanes)


def _lanes(mask: int) -> list[int]:
    return [lane for lane in range(WARP_SIZE) if mask >> lane & 1]


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as people write them: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _where(waiting: list[Thread]) -> str:
    """File and line of the kernel or device function in which the first thread waits."""
    frame = waiting[0].worker.gr_frame
    while frame.f_globals.get("__name__") in _OWN_MODULES:
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def current_thread() -> Thread:
    try:
        return getcurrent().thread
    except AttributeError:
        raise RuntimeError("no kernel is running here") from None


def meet(scope: str, what: str, value: Any = None, warp: int = 0, detail: int = 0) -> Any:
    """Wait for the others of a meeting; what each brought, by lane in a warp and by rank else."""
    thread = current_thread()
    thread.value = value
    thread.block.meetings.setdefault((scope, what, warp, detail), []).append(thread)
    thread.block.launch.scheduler.switch()
    return thread.received
