"""An open sharded model: the map, the pages, the table, the header of the source."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from forge.core_file import CoreFile
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader, parse_header
from forge.pages import PAGE_BYTES, unpack_raw
from forge.pending_file import pending_path, sync_folder
from forge.sgmap import RawSegment, core_path
from forge.sgmap_reader import load_map
from forge.shard_scan import check_pages


def _finish_interrupted_write(map_path: Path, n_pages: int, digest: str) -> None:
    """Put pages in place whose map was committed just before their writer died."""
    pages_path = core_path(map_path)
    pending = pending_path(pages_path)
    if not pending.exists():
        return
    try:
        with CoreFile(pending, n_pages) as core:
            core.read_crc_table(digest)
    except GGUFShardError:
        return  # a writer's work in progress, or its remains: not what this map speaks of
    os.replace(pending, pages_path)
    sync_folder(pages_path.parent)


class ShardedModel:
    """A sharded model opened for reading; a context manager.

    Parameters
    ----------
    map_path
        `core.sgmap`; the pages are in the `.gguf` file beside it.

    Attributes
    ----------
    map
        The checked map.
    core
        The open pages.
    page_crc32
        uint32 [n_pages], the CRC each page must have.

    Raises
    ------
    GGUFShardError
        If map, size of the pages' file, or the table of CRCs do not hold.
    """

    def __init__(self, map_path: str | os.PathLike[str]) -> None:
        self.map_path = Path(map_path)
        self.map = load_map(self.map_path)
        digest = self.map.page_crc32_xxh3_128
        _finish_interrupted_write(self.map_path, self.map.n_pages, digest)
        self.core = CoreFile(core_path(self.map_path), self.map.n_pages)
        try:
            self.page_crc32 = self.core.read_crc_table(digest)
        except GGUFShardError:
            self.core.close()
            raise

    def __enter__(self) -> ShardedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the pages' file."""
        self.core.close()

    def read_checked(self, first: int, count: int) -> np.ndarray:
        """Pages `first` to `first + count` - 1, uint8 [count, 4096], each checked.

        Raises
        ------
        GGUFShardError
            If a page does not hold; the message names page, shard and tensor.
        """
        pages = np.empty((count, PAGE_BYTES), np.uint8)
        self.core.read_pages(first, pages)
        fault = check_pages(pages, self.page_crc32[first : first + count])
        if fault is not None:
            raise GGUFShardError(self.describe_fault(first + fault[0], fault[1]))
        return pages

    def describe_fault(self, page: int, reason: str) -> str:
        """One line about a page that does not hold."""
        shard = page // self.map.pages_per_shard
        tensor = self.map.tensor_of_page(page)
        return f"{self.core.path}: page {page} (shard {shard}, {tensor}): {reason}"

    def read_raw(self, segment: RawSegment) -> np.ndarray:
        """The bytes of a raw segment, uint8 [segment.bytes]."""
        return unpack_raw(self.read_checked(segment.first_page, segment.pages), segment.bytes)

    def source_header(self, part: int = 0) -> GGUFHeader:
        """The header of a source file, parsed from its raw pages."""
        for segment in self.map.raw:
            if segment.part == part and segment.offset == 0:
                source = self.map.source[part]
                return parse_header(self.read_raw(segment).tobytes(), source.name, source.bytes)
        raise GGUFShardError(f"{self.map_path}: field raw: holds no header of part {part}")
