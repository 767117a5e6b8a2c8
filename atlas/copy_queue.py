"""Shards that come by the copy engine.

A kernel that reads host memory gets less than the link carries: 48 to 50 of 55 GB/s beside an H100,
with or without a check. The engine gets all of it. But an engine cannot plan: the host has to know
what a select has decided, and there is no taking a copy back. So

    a copy into a frame waits for the gather that takes the frame's last shard out of the table
    a gather behind it checks what has come, and publishes it
    behind a fault gathers do nothing, but copies may have been queued: the shards they fell upon
    are given up
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from atlas.ops.paged import PageCache
from atlas.ops.swap_state import N_RECORDS, Record
from atlas.target import CudaTarget


class CopyQueue:
    """Copies into the frames of a pool, on a stream of their own.

    Parameters
    ----------
    target
        The GPU.
    pages
        Frames and table.
    frame_bytes
        Bytes of a frame.

    Attributes
    ----------
    stream
        Where copies are queued.
    """

    def __init__(self, target: CudaTarget, pages: PageCache, frame_bytes: int) -> None:
        self.stream = target.new_stream()
        self._target = target
        self._address = target.address(pages.frames)
        self._frame_bytes = frame_bytes
        self._frame_of = np.full(len(pages.table), -1, np.int64)
        self._freed_by = np.full(pages.frames.size // frame_bytes, -1, np.int64)  # tick, or -1
        self._copied: deque[tuple[int, list[int]]] = deque(maxlen=N_RECORDS)

    def copy(
        self, record: Record, sources: Sequence[int], put_behind: Callable[[Any, int], object]
    ) -> None:
        """Queue the copies of a record.

        Parameters
        ----------
        record
            The latest.
        sources
            Address of each incoming shard in pinned memory.
        put_behind
            `put_behind(stream, tick)` lets a stream wait for the gather of a tick.
        """
        freed_by = int(self._freed_by[record.frames].max(initial=-1))
        if freed_by >= 0:
            put_behind(self.stream, freed_by)
        for frame, source in zip(record.frames, sources, strict=True):
            to = self._address + frame * self._frame_bytes
            self._target.copy(to, source, self._frame_bytes, self.stream)
        self._freed_by[self._frame_of[record.outgoing]] = record.tick
        self._frame_of[record.incoming] = record.frames
        self._copied.append((record.tick, record.frames))

    def overwritten(self, table: np.ndarray, gathered: int) -> np.ndarray:
        """bool [n_shards]: those that are published in `table` though copies for tick `gathered` or
        later, of which none is published, fell upon them."""
        frames = [f for tick, copied in self._copied if tick >= gathered for f in copied]
        return np.isin(table, frames)

    def reset(self, table: np.ndarray) -> None:
        """Go on from what is published, int32 [n_shards]; nothing may be under way."""
        self._frame_of[:] = table
        self._freed_by[:] = -1
        self._copied.clear()
