"""The files a sharded model was cut from, read byte by byte out of its checked pages.

The map says which pages hold which source bytes: a *run* is source bytes that lie one after the
other in consecutive pages (a slice of a tensor, or a raw segment). Source bytes that belong to no
run are zero. A read takes the pages it needs and no others:

    source     |....zeros....|=========== run ===========|..zeros..|======
    pages                     page 7 | page 8 | page 9 |10
    read                                [=====]                           -> pages 8 and 9
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from forge.block_layouts import BlockLayout
from forge.crc32 import CONTENT_BYTES
from forge.errors import GGUFShardError
from forge.pages import unpack_blocks, unpack_raw
from forge.pipeline import in_order
from forge.sgmap import ShardMap

_CHUNK_PAGES = 1024
_ZERO_CHUNK = 4 << 20
_READERS = 2
_IN_FLIGHT = 4


class CheckedPages(Protocol):
    """What is asked of a model: its map and its pages. `forge.sharded_model.ShardedModel` is one.

    `read_checked(first, count)` gives uint8 [count, 4096]; it is called from several threads.
    """

    map: ShardMap

    def read_checked(self, first: int, count: int) -> np.ndarray: ...


@dataclass(frozen=True)
class SourceRun:
    """Consecutive source bytes that lie in consecutive pages; raw bytes have no layout."""

    part: int
    offset: int
    bytes: int
    first_page: int
    pages: int
    layout: BlockLayout | None

    @property
    def end(self) -> int:
        """Past its last source byte."""
        return self.offset + self.bytes

    @property
    def end_page(self) -> int:
        """Past its last page."""
        return self.first_page + self.pages

    @property
    def page_bytes(self) -> int:
        """Source bytes in each of its pages but the last."""
        return self.layout.bytes * self.layout.per_page if self.layout else CONTENT_BYTES


@dataclass(frozen=True)
class _Piece:
    """Source bytes to read at once: of one run, or zeros."""

    offset: int
    bytes: int
    run: SourceRun | None = None


def source_runs(shard_map: ShardMap) -> list[SourceRun]:
    """All runs of a model, in no particular order."""
    runs = [SourceRun(r.part, r.offset, r.bytes, r.first_page, r.pages, None)
            for r in shard_map.raw]  # fmt: skip
    for tensor in shard_map.tensors:
        layout = tensor.layout(shard_map.atlas.memory_layout)
        size = tensor.slice_bytes
        runs += [
            SourceRun(tensor.part, tensor.offset + i * size, size, s.first_page, s.pages, layout)
            for i, s in enumerate(tensor.slices)
        ]
    return runs


def _zeros(begin: int, end: int) -> Iterator[_Piece]:
    for offset in range(begin, end, _ZERO_CHUNK):
        yield _Piece(offset, min(_ZERO_CHUNK, end - offset))


def _pieces_of_run(run: SourceRun, begin: int, end: int) -> Iterator[_Piece]:
    """Bytes `begin` to `end` of the source, which lie in the run; pieces end where pages do."""
    while begin < end:
        page = (begin - run.offset) // run.page_bytes
        size = min(run.offset + (page + _CHUNK_PAGES) * run.page_bytes, end) - begin
        yield _Piece(begin, size, run)
        begin += size


class SourceBytes:
    """The source files of a sharded model.

    Parameters
    ----------
    model
        Its map and checked pages.

    Notes
    -----
    Nothing is kept of what was read; reads may come from several threads at once.
    """

    def __init__(self, model: CheckedPages) -> None:
        self._model = model
        self._runs: list[list[SourceRun]] = [[] for _ in model.map.source]
        for run in sorted(source_runs(model.map), key=lambda run: run.offset):
            self._runs[run.part].append(run)
        self._offsets = [[run.offset for run in runs] for runs in self._runs]

    def read(self, part: int, offset: int, n_bytes: int) -> np.ndarray:
        """Bytes `offset` to `offset + n_bytes` - 1 of a source file, uint8 [n_bytes].

        Raises
        ------
        GGUFShardError
            If they do not lie in the file, or a page does not hold.
        """
        source = self._model.map.source[part]
        if not 0 <= offset <= offset + n_bytes <= source.bytes:
            raise GGUFShardError(
                f"{source.name}: offset {offset}: {n_bytes} bytes do not lie in the file of "
                f"{source.bytes} bytes"
            )
        data = np.empty(n_bytes, np.uint8)
        for piece in self._pieces(part, offset, offset + n_bytes):
            begin = piece.offset - offset
            self._read_piece(piece, data[begin : begin + piece.bytes])
        return data

    def chunks(self, part: int) -> Iterator[tuple[int, np.ndarray]]:
        """A whole source file in order: (offset, uint8 [n]), n up to a few MiB.

        Two threads read ahead of the caller by a bounded number of chunks.

        Raises
        ------
        GGUFShardError
            If a page does not hold.
        """

        def read(piece: _Piece) -> tuple[int, np.ndarray]:
            data = np.empty(piece.bytes, np.uint8)
            self._read_piece(piece, data)
            return piece.offset, data

        pieces = self._pieces(part, 0, self._model.map.source[part].bytes)
        with ThreadPoolExecutor(_READERS) as readers:
            yield from in_order(readers, read, pieces, _IN_FLIGHT)

    def _pieces(self, part: int, begin: int, end: int) -> Iterator[_Piece]:
        runs = self._runs[part]
        index = max(0, bisect_right(self._offsets[part], begin) - 1)
        while begin < end and index < len(runs):
            run = runs[index]
            yield from _zeros(begin, min(run.offset, end))
            yield from _pieces_of_run(run, max(begin, run.offset), min(run.end, end))
            begin = max(begin, run.end)
            index += 1
        yield from _zeros(begin, end)

    def _read_piece(self, piece: _Piece, data: np.ndarray) -> None:
        """Fill `data`, uint8 [piece.bytes]."""
        run = piece.run
        if run is None:
            data[:] = 0
            return
        begin = piece.offset - run.offset
        first = begin // run.page_bytes
        end = -(-(begin + piece.bytes) // run.page_bytes)
        pages = self._model.read_checked(run.first_page + first, end - first)
        start = first * run.page_bytes
        n_bytes = min(end * run.page_bytes, run.bytes) - start
        if run.layout is None:
            data[:] = unpack_raw(pages, n_bytes)[begin - start :][: piece.bytes]
        elif n_bytes == piece.bytes:
            unpack_blocks(pages, run.layout, data)
        else:
            blocks = np.empty(n_bytes, np.uint8)
            unpack_blocks(pages, run.layout, blocks)
            data[:] = blocks[begin - start :][: piece.bytes]
