"""Making a target once in memory, before anything is written.

A target's SHA-256 takes as long as the base's, and neither can be split over threads. So the target
is made and hashed while the base is. Then it is written, and what was written is held against fast
digests of what had been made: by several threads, piece by piece.

What is stored in the patch stays decoded in the meantime. Where that is much, or where the base
need not be hashed at all, targets are made and hashed as they are written
(`delta.target_builder`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash

from delta.bound_patch import KEPT, BoundPatch, total_bytes
from delta.compare import chunks
from delta.page_grid import n_paired, stretches
from delta.page_sink import PageSink
from delta.source_model import ShardedSource
from delta.target_pages import TargetPages
from forge.buffers import scratch
from forge.errors import GGUFShardError
from forge.info import printable
from forge.pipeline import in_order

_MOST_STORED_BYTES = 72 << 20
#: Of a target of which a larger share is stored, and more than a little, it is the decoding that
#: takes long, and putting it together twice is the dearer way.
_MOST_STORED_SHARE, _FEW_STORED_BYTES = 1 / 2, 8 << 20
_STRETCH_BYTES = 4 << 20
_DECODERS, _WRITERS = 2, 2
_IN_FLIGHT = 4


@dataclass(frozen=True)
class _Stretch:
    """A few MiB of a file: pages of a run, and the groups that they are in or copied from."""

    index: int
    first: int
    count: int
    groups: list[int]


class Rehearsal:
    """A target that has been made and hashed.

    Parameters
    ----------
    bound
        The patch and its base, which need not have been checked yet.
    """

    def __init__(self, bound: BoundPatch) -> None:
        self._bound = bound
        self._pages = TargetPages(bound)
        self._stretches = list(self._cut())
        self._marks: list[int] = []  # XXH3-128 of each

    @staticmethod
    def is_worthwhile(bound: BoundPatch) -> bool:
        """Whether a target can be rehearsed, and time is saved by it."""
        stored = sum(stored.group.n_bytes for stored in bound.groups)
        most = max(_FEW_STORED_BYTES, int(_MOST_STORED_SHARE * total_bytes(bound.files)))
        is_much = stored > min(most, _MOST_STORED_BYTES)
        return not is_much and not isinstance(bound.base, ShardedSource)

    def run(self, stop: threading.Event) -> Rehearsal:
        """Make the target, and hold it against the digests that the patch names.

        Parameters
        ----------
        stop
            Ends it early, once set.

        Returns
        -------
        Rehearsal
            This one.

        Raises
        ------
        GGUFShardError
            If the base or the patch cannot be read, or a SHA-256 is wrong.
        CancelledError
            If it was ended early.
        """
        digests = [hashlib.sha256(data) for data in self._bound.header_bytes]
        with ThreadPoolExecutor(_DECODERS) as decoders:
            groups = {group: decoders.submit(self._pages.decode, group) for group in self._groups()}
            try:
                for stretch in self._stretches:
                    if stop.is_set():
                        raise CancelledError
                    for group in stretch.groups:
                        if group in groups:
                            self._pages.store(group, groups.pop(group).result())
                    data = self._make(stretch)
                    digests[self._bound.runs[stretch.index].part].update(data.data)
                    self._marks.append(xxhash.xxh3_128_intdigest(data.data))
            finally:
                decoders.shutdown(cancel_futures=True)
        self._bound.require_digests([digest.hexdigest() for digest in digests])
        return self

    def perform(self, sink: PageSink, advance: Callable[[int], None]) -> None:
        """Put every byte of the target, and hold what the sink has then against what it should.

        Raises
        ------
        GGUFShardError
            If the base cannot be read or has changed, the sink refuses, or does not give back what
            it has taken.
        """
        for part, data in enumerate(self._bound.header_bytes):
            sink.put_header(part, data)
            if sink.read(part, 0, len(data)).tobytes() != data:
                raise self._not_as_made(part, 0)
            advance(len(data))

        def put(number: int) -> int:
            self._put(sink, number)
            return number

        with ThreadPoolExecutor(_WRITERS) as writers:
            for number in in_order(writers, put, range(len(self._stretches)), _IN_FLIGHT):
                stretch = self._stretches[number]
                run = self._bound.runs[stretch.index]
                offset, n_bytes = run.span(stretch.first, stretch.count)
                sink.settle(run.part, offset + n_bytes)
                advance(n_bytes)

    def _cut(self) -> Iterator[_Stretch]:
        """The target as stretches, in file order."""
        for index, run in enumerate(self._bound.runs):
            for first, count in chunks(run, 0, run.n_pages, _STRETCH_BYTES):
                groups = self._pages.groups_of(index, first, count)
                yield _Stretch(index, first, count, groups)

    def _groups(self) -> dict[int, None]:
        """All groups, in the order in which they are needed."""
        return dict.fromkeys(group for stretch in self._stretches for group in stretch.groups)

    def _make(self, stretch: _Stretch) -> np.ndarray:
        """The bytes of a stretch, good until this thread makes the next."""
        offset, n_bytes = self._bound.runs[stretch.index].span(stretch.first, stretch.count)
        data = scratch("made", n_bytes, offset)
        self._pages.fill(stretch.index, stretch.first, data)
        return data

    def _put(self, sink: PageSink, number: int) -> None:
        stretch = self._stretches[number]
        run = self._bound.runs[stretch.index]
        data = self._make(stretch)
        for begin, end in stretches(self._is_due(sink, stretch)):
            place = slice(begin * run.page_bytes, end * run.page_bytes)
            sink.put(run, stretch.first + begin, data[place])
        offset, n_bytes = run.span(stretch.first, stretch.count)
        there = scratch("read", n_bytes, offset)
        sink.read_into(run.part, offset, there)
        if xxhash.xxh3_128_intdigest(there.data) != self._marks[number]:
            raise self._not_as_made(run.part, offset)

    def _is_due(self, sink: PageSink, stretch: _Stretch) -> np.ndarray:
        """Which pages of a stretch the sink does not have, bool [count]."""
        index, first = stretch.index, stretch.first
        is_kept = self._bound.sources[index][first : first + stretch.count] == KEPT
        paired = n_paired(self._bound.runs[index], self._bound.others[index])
        is_due = ~is_kept if sink.has_base else np.ones(stretch.count, np.bool_)
        beyond = slice(max(paired - first, 0), None)  # padding there is zero
        is_due[beyond] = ~is_kept[beyond] | (not sink.is_zero)
        return is_due

    def _not_as_made(self, part: int, offset: int) -> GGUFShardError:
        name = printable(self._bound.files[part].name)
        return GGUFShardError(
            f"{self._bound.patch.path}: {name}: offset {offset}: what was written is not what the "
            "base gave before: it has changed, or the disk is bad"
        )
