"""An open sharded model: the map, the pages, the table, the header of the source."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from forge.core_file import CoreFile, page_buffer
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader, parse_header
from forge.journal import finish_journal
from forge.pages import unpack_raw
from forge.pending_file import finish_pending, pending_path
from forge.sgmap import RawSegment, ShardMap, core_path
from forge.sgmap_reader import load_map
from forge.shard_scan import check_pages


def _open_table(path: Path, shard_map: ShardMap) -> tuple[CoreFile, np.ndarray]:
    """The file of pages that a map speaks of, and its table of CRCs."""
    core = CoreFile(path, shard_map.n_pages)
    try:
        return core, core.read_crc_table(shard_map.page_crc32_xxh3_128)
    except GGUFShardError:
        core.close()
        raise


def _finish_interrupted_write(path: Path, shard_map: ShardMap) -> None:
    """Put pages in place whose map was committed just before their writer died."""
    try:
        core, _ = _open_table(pending_path(path), shard_map)
    except GGUFShardError:
        return  # none, or a writer's work in progress, or its remains: not what the map speaks of
    with core:
        finish_pending(core.fileno(), path)


def _open_core(path: Path, shard_map: ShardMap) -> tuple[CoreFile, np.ndarray]:
    try:
        return _open_table(path, shard_map)
    except GGUFShardError:
        _finish_interrupted_write(path, shard_map)
        return _open_table(path, shard_map)


class ShardedModel:
    """A sharded model opened for reading; a context manager.

    A writer that died is finished first: a change in place whose journal it committed
    (`forge.journal`), or new pages that belong to the map.

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
        If map, size of the pages' file, or the table of CRCs do not hold, or a change in place was
        interrupted and cannot be finished.
    """

    def __init__(self, map_path: str | os.PathLike[str]) -> None:
        self.map_path = Path(map_path)
        finish_journal(self.map_path)
        self.map = load_map(self.map_path)
        self.core, self.page_crc32 = _open_core(core_path(self.map_path), self.map)

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
        pages = page_buffer(first, count)
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
