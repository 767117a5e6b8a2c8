"""What every operation on weights is given: the pages, and where a matrix lies in them.

block b of a matrix      -> page = first_page + b // per_page, slot = b % per_page
page                     -> shard = page >> shard_shift
shard                    -> frame = table[shard]           (-1: not resident)
byte address in `frames` -> (frame << shard_shift | page & (2^shard_shift - 1)) * 4096
                            + field.page_offset + slot * field.page_stride
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType

from forge.block_layouts import BlockLayout


class PageCache(NamedTuple):
    """The resident pages as kernels see them.

    Attributes
    ----------
    frames
        uint8 [n_frames * 4096 << shard_shift], the frames one after the other.
    table
        int32 [n_shards], the frame of each shard or -1.
    shard_shift
        log2 of the pages per shard.
    words
        `frames` as uint32, for loads of more than a byte.
    """

    frames: Any
    table: Any
    shard_shift: int
    words: Any


@dataclass(frozen=True)
class PagedMatrix:
    """A matrix (or vector: one row) whose rows lie as consecutive blocks in pages.

    Attributes
    ----------
    n_rows, n_cols
        Rows (outputs of a mat-vec) and columns in elements; `n_cols` is a multiple of
        `layout.elements`.
    first_page
        Page of the first block; blocks follow without regard to rows.
    layout
        Type of the blocks and their places in a page.
    """

    name: str
    n_rows: int
    n_cols: int
    first_page: int
    layout: BlockLayout

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        return self.layout.ggml_type

    @property
    def blocks_per_row(self) -> int:
        return self.n_cols // self.layout.elements

    @property
    def n_pages(self) -> int:
        return self.layout.pages_for(self.n_rows * self.blocks_per_row)

    def pages_of_rows(self, begin: int, end: int) -> range:
        """The pages that hold rows `begin` to `end` - 1."""
        first = begin * self.blocks_per_row // self.layout.per_page
        last = (end * self.blocks_per_row - 1) // self.layout.per_page
        return range(self.first_page + first, self.first_page + last + 1)
