"""Building the target of a patch as it is written, page by page, wherever it goes.

    steps      in file order: keep pages of the base, decode a group, copy pages
    sink       takes the target's bytes
    digest     follows behind: reads back from the sink what is complete, and hashes it

Groups are decoded by two threads, kept pages carried over by a third.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from delta.bound_patch import COPIED, KEPT, BoundPatch
from delta.compare import chunks, read_pages
from delta.decode_ahead import DecodedAhead
from delta.page_grid import n_paired, stretches
from delta.page_sink import PageSink
from forge.buffers import ReadBuffer
from forge.pipeline import in_order

_DECODERS = 2
_IN_FLIGHT = 16  # steps, which keep no data; several may have little to do
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Step:
    """One thing to do: decode a group or, if `group` is -1, carry over and copy what is due of
    `count` pages of a run; those are complete then, as their groups come before."""

    group: int
    index: int = 0
    first: int = 0
    count: int = 0


def _steps(bound: BoundPatch) -> Iterator[_Step]:
    """All steps, in file order; a group comes where its first page does."""
    begun = np.zeros(len(bound.groups), np.bool_)
    for index, (run, sources) in enumerate(zip(bound.runs, bound.sources, strict=True)):
        for first, count in chunks(run, 0, run.n_pages):
            for group in np.unique(sources[first : first + count]).tolist():
                if group >= 0 and not begun[group]:
                    begun[group] = True
                    yield _Step(group)
            yield _Step(-1, index, first, count)


def groups_in_order(bound: BoundPatch) -> Iterator[int]:
    """All groups, in the order in which a `TargetBuilder` decodes them."""
    return (step.group for step in _steps(bound) if step.group >= 0)


class _Workers:
    """Threads for steps: with as many for carrying pages over as for decoding, they would take the
    time of hashing, for which everything waits where little has changed."""

    def __init__(self, stack: ExitStack) -> None:
        self._decoders = stack.enter_context(ThreadPoolExecutor(_DECODERS))
        self._carrier = stack.enter_context(ThreadPoolExecutor(1))

    def submit(self, do: Callable[[_Step], _Step], step: _Step, /) -> Future[_Step]:
        return (self._carrier if step.group < 0 else self._decoders).submit(do, step)


class TargetBuilder:
    """Builds a target into a sink.

    Parameters
    ----------
    bound
        The patch and its base.
    sink
        Where to.
    advance
        Called with the bytes of the target that are complete and hashed.
    ahead
        What has been decoded of the groups.
    """

    def __init__(
        self, bound: BoundPatch, sink: PageSink, advance: Callable[[int], None],
        ahead: DecodedAhead,
    ) -> None:  # fmt: skip
        self.bound = bound
        self.ahead = ahead
        self.sink = sink
        self.advance = advance

    def build(self) -> None:
        """Put every byte of the target, and hold it against the digests that the patch names.

        Raises
        ------
        GGUFShardError
            If the base or the patch cannot be read, the sink refuses, or a SHA-256 is wrong.
        """
        for part, data in enumerate(self.bound.header_bytes):
            self.sink.put_header(part, data)
        with ExitStack() as stack:
            workers = _Workers(stack)
            hasher = stack.enter_context(ThreadPoolExecutor(1))
            digests = _Digests(self, hasher)
            try:
                for step in in_order(workers, self._do, _steps(self.bound), _IN_FLIGHT):
                    if step.group < 0:
                        self._copy(step)  # not before: its source may just have been written
                        run = self.bound.runs[step.index]
                        digests.follow(run.part, sum(run.span(step.first, step.count)))
                digests.finish()
            except BaseException:
                hasher.shutdown(cancel_futures=True)
                raise

    def _do(self, step: _Step) -> _Step:
        if step.group < 0:
            self._keep(step)
        else:
            for piece in self.ahead.take(step.group):
                self.sink.put(piece.run, piece.first_page, piece.data)
        return step

    def _spans(self, step: _Step, source: int) -> list[tuple[int, int]]:
        """Begin and end, counted from the step's first page, of the pages from one source."""
        sources = self.bound.sources[step.index][step.first : step.first + step.count]
        return stretches(sources == source)

    def _keep(self, step: _Step) -> None:
        """Carry pages over; what has no counterpart is padding, and zero."""
        spans = self._spans(step, KEPT)
        run, other = self.bound.runs[step.index], self.bound.others[step.index]
        paired = min(max(n_paired(run, other) - step.first, 0), step.count)
        if spans and paired and other is not None and not self.sink.has_base:
            data = read_pages(self.bound.base, other, step.first, paired)
            for begin, end in spans:
                place = slice(begin * run.page_bytes, min(end, paired) * run.page_bytes)
                if begin < paired:
                    self.sink.put(run, step.first + begin, data[place])
        for begin, end in spans:
            begin = max(begin, paired)
            if begin < end and not self.sink.is_zero:
                n_bytes = run.span(step.first + begin, end - begin)[1]
                self.sink.put(run, step.first + begin, np.zeros(n_bytes, np.uint8))

    def _copy(self, step: _Step) -> None:
        run = self.bound.runs[step.index]
        for begin, end in self._spans(step, COPIED):
            pieces = self.bound.copied(run, step.first + begin, end - begin)
            for first, count, source, page, from_target in pieces:
                offset, n_bytes = source.span(page, count)
                model = self.sink if from_target else self.bound.base
                self.sink.put(run, first, model.read(source.part, offset, n_bytes))


class _Digests:
    """Hashes the files of a target as they become complete."""

    def __init__(self, builder: TargetBuilder, hasher: ThreadPoolExecutor) -> None:
        self._bound = builder.bound
        self._sink = builder.sink
        self._buffer = ReadBuffer(_HASH_CHUNK)
        self._advance = builder.advance
        self._hasher = hasher
        self._digests = [hashlib.sha256() for _ in builder.bound.files]
        self._done = [0] * len(self._digests)
        self._pending: deque[Future[None]] = deque()

    def follow(self, part: int, end: int) -> None:
        """Hash a file up to `end`: that much is complete."""
        if end > self._done[part]:
            while self._pending and self._pending[0].done():
                self._pending.popleft().result()
            self._pending.append(self._hasher.submit(self._hash, part, self._done[part], end))
            self._done[part] = end
            self._sink.settle(part, end)

    def finish(self) -> None:
        """Hash the rest; GGUFShardError if a file is not what it should be."""
        for part, file in enumerate(self._bound.files):
            self.follow(part, file.bytes)
        for pending in self._pending:
            pending.result()
        self._bound.require_digests([digest.hexdigest() for digest in self._digests])

    def _hash(self, part: int, begin: int, end: int) -> None:
        for offset in range(begin, end, _HASH_CHUNK):
            n_bytes = min(_HASH_CHUNK, end - offset)
            data = self._buffer.at(offset, n_bytes)
            self._sink.read_into(part, offset, data)
            self._digests[part].update(data.data)
            self._advance(n_bytes)
