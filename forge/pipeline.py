"""Work spread over threads with a bounded number of pieces in flight, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool(Protocol[Item, Result]):
    """Threads that take work, as `concurrent.futures.Executor` does."""

    def submit(self, work: Callable[[Item], Result], item: Item, /) -> Future[Result]: ...


def in_order(
    pool: Pool[Item, Result], work: Callable[[Item], Result], items: Iterable[Item], in_flight: int
) -> Iterator[Result]:
    """Like `map`, but takes a new item only when fewer than `in_flight` are under way.

    That bounds the memory of the results; an error of `work` is raised at its turn, and what has
    not started by then never does.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(waiting) == in_flight:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
