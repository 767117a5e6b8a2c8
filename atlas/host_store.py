"""Where pages come from: the file, read by shard, with nothing between but the page cache."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from gguf.quants import dequantize

from atlas.errors import CorruptPageError
from atlas.ops.paged import PagedMatrix
from forge.core_file import page_buffer
from forge.crc32 import CONTENT_BYTES
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES, page_fault, unpack_blocks
from forge.shard_scan import check_pages, faulty_pages
from forge.sharded_model import ShardedModel

_ROWS_BYTES = 8 << 20  # of pages that are read at once for rows


class FileStore:
    """Shards of an open model, read straight into the caller's memory.

    Parameters
    ----------
    model
        The open sharded model.

    Attributes
    ----------
    model
        The model that shards come from now; another version of the same layout may take its place
        (`atlas.live_update`).
    """

    def __init__(self, model: ShardedModel) -> None:
        self.model = model
        self.shard_pages = model.map.pages_per_shard
        self.n_pages = model.map.n_pages

    @property
    def shard_bytes(self) -> int:
        return self.shard_pages * PAGE_BYTES

    def pages_of(self, shard: int) -> int:
        """Pages of a shard; the last one may have fewer than the others."""
        return min(self.shard_pages, self.n_pages - shard * self.shard_pages)

    def read_shard(self, shard: int, buffer: np.ndarray) -> int:
        """Read a shard into `buffer`, uint8 [shard_bytes]; returns the bytes read. No checks."""
        n_bytes = self.pages_of(shard) * PAGE_BYTES
        self.model.core.read_pages(shard * self.shard_pages, buffer[:n_bytes])
        return n_bytes

    def read_checked(self, first: int, count: int) -> np.ndarray:
        """Pages `first` to `first + count` - 1, uint8 [count, 4096], each checked.

        Raises
        ------
        CorruptPageError
            If a page does not hold, and again when read a second time.
        """
        pages = page_buffer(first, count)
        expected = self.model.page_crc32[first : first + count]
        self.model.core.read_pages(first, pages)
        fault = check_pages(pages, expected)
        if fault is not None:
            self.model.core.read_pages(first, pages)
            fault = check_pages(pages, expected)
        if fault is not None:
            raise self.corrupt_page(first + fault[0], pages[fault[0]])
        return pages

    def read_rows(self, w: PagedMatrix, numbers: Sequence[int]) -> np.ndarray:
        """Rows of a matrix, from checked pages, dequantised: float32 [len(numbers), n_cols].

        Raises
        ------
        CorruptPageError
            If a page does not hold, and again when read a second time.
        GGUFShardError
            If the matrix has no such row, or its type cannot be dequantised.
        """
        for number in numbers:
            if not 0 <= number < w.n_rows:
                raise GGUFShardError(f"tensor {w.name!r}: row {number} of {w.n_rows}")
        rows = np.empty((len(numbers), w.n_cols), np.float32)
        n_at_once = max(_ROWS_BYTES // (len(w.pages_of_rows(0, 1)) * PAGE_BYTES), 1)
        for first in range(0, len(numbers), n_at_once):
            blocks = self._read_blocks(w, numbers[first : first + n_at_once])
            try:
                values = dequantize(blocks, w.ggml_type)
            except NotImplementedError:
                raise GGUFShardError(
                    f"tensor {w.name!r}: type {w.ggml_type.name} cannot be dequantised"
                ) from None
            rows[first : first + n_at_once] = values.reshape(len(blocks), w.n_cols)
        return rows

    def _read_blocks(self, w: PagedMatrix, numbers: Sequence[int]) -> np.ndarray:
        """The blocks of rows, uint8 [len(numbers), bytes of a row]."""
        layout, per_row = w.layout, w.blocks_per_row
        runs = [w.pages_of_rows(number, number + 1) for number in numbers]
        *places, n_pages = accumulate(map(len, runs), initial=0)  # each row's first in `pages`
        pages = np.empty((n_pages, PAGE_BYTES), np.uint8)
        for run, place in zip(runs, places, strict=True):
            self.model.core.read_pages(run.start, pages[place : place + len(run)])
        page_crc32 = self.model.page_crc32
        expected = np.concatenate([page_crc32[run.start : run.stop] for run in runs])
        for i in faulty_pages(pages, expected):
            pages[i] = self.read_checked([page for run in runs for page in run][i], 1)[0]
        blocks = np.empty(len(pages) * layout.per_page * layout.bytes, np.uint8)
        unpack_blocks(pages, layout, blocks)
        rows = np.empty((len(numbers), per_row * layout.bytes), np.uint8)
        for row, number, place in zip(rows, numbers, places, strict=True):
            block = place * layout.per_page + number * per_row % layout.per_page
            row[:] = blocks[block * layout.bytes : (block + per_row) * layout.bytes]
        return rows

    def corrupt_page(self, page: int, found: np.ndarray | int) -> CorruptPageError:
        """The error about a page that was read as `found`, uint8 [4096], and does not hold; `found`
        may be the CRC32 of its content, if that is all that is known."""
        expected = int(self.model.page_crc32[page])
        shard_map = self.model.map
        fault = None if isinstance(found, int) else page_fault(found, expected)
        crc32 = found if isinstance(found, int) else zlib.crc32(found[:CONTENT_BYTES])
        return CorruptPageError(
            self.model.core.path,
            page,
            page // self.shard_pages,
            shard_map.tensor_of_page(page),
            expected,
            crc32,
            fault or "does not hold",
        )
