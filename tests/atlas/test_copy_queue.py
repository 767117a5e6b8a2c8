"""What copies wait for, and upon what they fall (`tests/atlas/test_stream_order.py` runs them)."""

from __future__ import annotations

from typing import Any

import numpy as np

from atlas.copy_queue import CopyQueue
from atlas.ops.paged import PageCache
from atlas.ops.swap_state import N_RECORDS, Record

FRAME_BYTES = 4096
N_FRAMES, N_SHARDS = 6, 10
POOL = 1 << 20  # address of the frames


class Target:
    """Notes copies down."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, int, int, Any]] = []

    def new_stream(self) -> str:
        return "copying"

    def address(self, array: np.ndarray) -> int:
        return POOL

    def copy(self, to: int, source: int, n_bytes: int, stream: Any) -> None:
        self.copies.append((to, source, n_bytes, stream))


class Copies:
    """A queue of copies into an empty pool.

    Attributes
    ----------
    waited
        Ticks whose gathers copies have been put behind.
    """

    def __init__(self) -> None:
        self.target, self.waited = Target(), list[int]()
        frames = np.zeros(N_FRAMES * FRAME_BYTES, np.uint8)
        table = np.full(N_SHARDS, -1, np.int32)
        pages = PageCache(frames, table, 0, frames.view(np.uint32))
        self.queue = CopyQueue(self.target, pages, FRAME_BYTES)  # type: ignore[arg-type]

    def copy(self, tick: int, incoming: dict[int, int], outgoing: list[int]) -> None:
        """Queue a record: frames of incoming shards, and shards that go."""
        record = Record(tick, list(incoming), list(incoming.values()), outgoing)
        self.queue.copy(record, [1000 + shard for shard in incoming], self._wait)

    def _wait(self, stream: Any, tick: int) -> None:
        assert stream == "copying"
        self.waited.append(tick)


def test_shards_are_copied_to_their_frames() -> None:
    copies = Copies()
    copies.copy(0, {7: 2, 3: 5}, [])
    assert copies.target.copies == [
        (POOL + 2 * FRAME_BYTES, 1007, FRAME_BYTES, "copying"),
        (POOL + 5 * FRAME_BYTES, 1003, FRAME_BYTES, "copying"),
    ]


def test_copies_wait_for_the_gather_that_frees_their_frames() -> None:
    copies = Copies()
    copies.copy(0, {0: 0, 1: 1}, [])
    copies.copy(1, {2: 2}, [0])
    copies.copy(2, {}, [1])
    copies.copy(3, {3: 3}, [])
    copies.copy(4, {4: 0}, [])
    copies.copy(5, {5: 4, 6: 1}, [4])
    copies.copy(6, {7: 0}, [])
    # No frame of tick 0, 1 and 3 has held anything, tick 2 copies nothing; frame 0 is free after 1,
    # then 5, and frame 1 after 2.
    assert copies.waited == [1, 2, 5]


def test_what_is_published_and_was_copied_upon_is_named() -> None:
    copies = Copies()
    copies.copy(4, {0: 0, 1: 1}, [])
    copies.copy(5, {2: 2}, [0, 1])
    copies.copy(6, {3: 0}, [])
    copies.copy(7, {4: 1}, [])
    table = np.full(N_SHARDS, -1, np.int32)
    table[[0, 1, 2]] = [0, 1, 2]
    named = {gathered: np.flatnonzero(copies.queue.overwritten(table, gathered)).tolist()
             for gathered in (8, 7, 6)}  # fmt: skip
    assert named == {8: [], 7: [1], 6: [0, 1]}


def test_copies_of_all_records_that_may_be_ahead_are_remembered() -> None:
    copies = Copies()
    for tick in range(N_RECORDS):
        copies.copy(tick, {tick: tick} if tick < N_FRAMES else {}, [])
    table = np.full(N_SHARDS, -1, np.int32)
    table[9] = 0
    assert np.flatnonzero(copies.queue.overwritten(table, 0)).tolist() == [9]


def test_after_a_reset_nothing_is_waited_for_but_what_goes_then() -> None:
    copies = Copies()
    copies.copy(0, {0: 0}, [])
    copies.copy(1, {}, [0])
    table = np.full(N_SHARDS, -1, np.int32)
    table[8] = 3
    copies.queue.reset(table)
    assert not copies.queue.overwritten(np.zeros(N_SHARDS, np.int32), 0).any()
    copies.copy(2, {1: 0}, [8])
    copies.copy(3, {2: 3}, [])
    assert copies.waited == [2]
