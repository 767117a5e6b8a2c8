"""Disjoint byte ranges of one file, and where the bytes of each are kept.

Ranges come in any order, a million of them and more. They are kept sorted in chunks of a few
thousand: adding one moves the rest of its chunk, not the rest of them all, and a range takes 24
bytes. A range that continues another both in the file and where it is kept becomes part of it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

_CHUNK = 4096


class _Chunk:
    """Consecutive ranges: three columns, sorted by the first."""

    def __init__(self, begins: array[int], sizes: array[int], positions: array[int]) -> None:
        self.begins, self.sizes, self.positions = begins, sizes, positions

    def insert(self, place: int, begin: int, size: int, position: int) -> None:
        self.begins.insert(place, begin)
        self.sizes.insert(place, size)
        self.positions.insert(place, position)

    def end_of_kept(self, place: int) -> int:
        return self.positions[place] + self.sizes[place]

    def cut(self, place: int) -> _Chunk:
        """Take away what lies from `place` on."""
        columns = (self.begins, self.sizes, self.positions)
        rest = _Chunk(*(column[place:] for column in columns))
        for column in columns:
            del column[place:]
        return rest


class ByteRanges:
    """A growing set of disjoint ranges."""

    def __init__(self) -> None:
        self._chunks = [_Chunk(array("q"), array("q"), array("q"))]
        self._firsts = [0]  # where each chunk begins; the first takes all that is smaller, too

    def __len__(self) -> int:
        return sum(len(chunk.begins) for chunk in self._chunks)

    def add(self, begin: int, size: int, position: int) -> None:
        """Add the range of `size` > 0 bytes at `begin`, kept at `position`.

        Raises
        ------
        ValueError
            If it overlaps a range that is there; then nothing is added.
        """
        end = begin + size
        number = bisect_right(self._firsts, begin) - 1
        chunk = self._chunks[number]
        place = bisect_right(chunk.begins, begin)
        end_before = chunk.begins[place - 1] + chunk.sizes[place - 1] if place else 0
        if begin < end_before or self._begin_after(number, place, end) < end:
            raise ValueError(f"bytes {begin} to {end - 1} overlap a range that is there")
        if place and begin == end_before and position == chunk.end_of_kept(place - 1):
            chunk.sizes[place - 1] += size
            return
        chunk.insert(place, begin, size, position)
        if len(chunk.begins) > _CHUNK:
            # Ranges in ascending order leave full chunks behind, others half-full ones.
            rest = chunk.cut(_CHUNK if place == _CHUNK else _CHUNK // 2)
            self._chunks.insert(number + 1, rest)
            self._firsts.insert(number + 1, rest.begins[0])

    def _begin_after(self, number: int, place: int, default: int) -> int:
        """Where the range begins that would come after a new one at `place` of a chunk."""
        if place < len(self._chunks[number].begins):
            return self._chunks[number].begins[place]
        return self._firsts[number + 1] if number + 1 < len(self._firsts) else default

    def overlapping(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Ranges with bytes in `begin` to `end` - 1, in order: (begin, size, position)."""
        for number in range(bisect_right(self._firsts, begin) - 1, len(self._chunks)):
            chunk = self._chunks[number]
            for i in range(max(0, bisect_right(chunk.begins, begin) - 1), len(chunk.begins)):
                start, size = chunk.begins[i], chunk.sizes[i]
                if start >= end:
                    return
                if min(start + size, end) > begin:
                    yield start, size, chunk.positions[i]

    def gaps(self, end: int) -> Iterator[tuple[int, int]]:
        """What no range covers of the bytes 0 to `end` - 1, in order: (begin, end)."""
        begin = 0
        for start, size, _ in self.overlapping(0, end):
            if start > begin:
                yield begin, start
            begin = start + size
        if begin < end:
            yield begin, end

    def tables(self) -> Iterator[np.ndarray]:
        """All ranges in order, some at a time: uint64 [n, 3] of begin, size, position."""
        for chunk in self._chunks:
            columns = (chunk.begins, chunk.sizes, chunk.positions)
            yield np.stack([np.frombuffer(c, np.int64) for c in columns], 1).astype("<u8")
