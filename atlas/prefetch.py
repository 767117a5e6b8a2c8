"""What comes next, and a thread that fetches it while the present is computed on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

#: Shards smaller than this are read ahead by the thread that computes: handing them to another
#: one costs more than reading them.
MIN_BACKGROUND_BYTES = 256 << 10


def count_shared(first: int, last: int, step_before: tuple[int, int] | None) -> int:
    """How many of the shards `first` to `last` the step before used, too."""
    if step_before is None:
        return 0
    return max(0, min(last, step_before[1]) - max(first, step_before[0]) + 1)


class Schedule:
    """The shards of a pass in the order in which it reads them; passes repeat.

    Parameters
    ----------
    order
        Shards in execution order, each once.
    n_shards
        Shards of the model.
    """

    def __init__(self, order: Sequence[int], n_shards: int) -> None:
        self.order = list(order)
        self._place = np.full(n_shards, -1, np.int64)
        self._place[self.order] = np.arange(len(self.order))

    def after(self, shard: int, distance: int) -> list[int]:
        """The next `distance` shards behind `shard`, round the corner into the next pass; none if
        `shard` is not scheduled."""
        place = int(self._place[shard])
        count = min(distance, len(self.order) - 1)
        if place < 0 or count <= 0:
            return []
        return [self.order[(place + 1 + i) % len(self.order)] for i in range(count)]


class Prefetcher(threading.Thread):
    """Calls `fetch_next` until it has nothing to do, and again whenever it is woken.

    Parameters
    ----------
    changed
        The condition whose lock guards the cache.
    fetch_next
        Called with the lock held; brings something in (letting the lock go meanwhile) and returns
        whether there may be more to do.
    """

    def __init__(self, changed: threading.Condition, fetch_next: Callable[[], bool]) -> None:
        super().__init__(name="atlas-prefetch", daemon=True)
        self.changed = changed
        self.fetch_next = fetch_next
        self._stopping = False
        self.start()

    def run(self) -> None:
        with self.changed:
            while not self._stopping:
                if not self.fetch_next():
                    self.changed.wait()

    def stop(self) -> None:
        """End the thread; a read under way is finished first."""
        with self.changed:
            self._stopping = True
            self.changed.notify_all()
        self.join()
