"""`shard_model`: cut a GGUF model into `core.gguf` and `core.sgmap`.

The source is read once, front to back. Each chunk goes to two threads: one extends the SHA-256 of
the file, the other lays the blocks out in pages, checksums them and writes them where the plan
wants them. Then the finished pages are read back and checked against their CRCs, and only then do
the new files take their places, the map last.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forge.block_layouts import MEMORY_LAYOUTS, BlockLayout, block_layout
from forge.core_file import (
    CoreFile,
    core_bytes,
    core_header,
    crc_table_bytes,
    crc_table_digest,
    page_offset,
)
from forge.crc32 import CONTENT_BYTES
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader
from forge.journal import finish_journal
from forge.page_plan import (
    MAX_PAGES_PER_SHARD,
    PagePlan,
    RawPlan,
    SlicePlan,
    padding_ranges,
    plan_pages,
)
from forge.pages import PAGE_BYTES, pack_blocks, pack_raw, tag_pages
from forge.pending_file import PendingFile, commit_together, pending_path
from forge.pipeline import in_order
from forge.progress import progress_bar
from forge.sgmap import (
    CACHE_POLICIES,
    MAX_PREFETCH_DISTANCE,
    AtlasSettings,
    RawSegment,
    ShardMap,
    Slice,
    SourcePart,
    TensorEntry,
    render_map,
)
from forge.sgmap_reader import parse_map
from forge.shard_scan import scan_shards
from forge.sharded_model import ShardedModel
from forge.source_file import SourceFile
from forge.split_model import read_model

_CHUNK_PAGES = 1024
_ZERO_CHUNK = 4 << 20


@dataclass(frozen=True)
class ShardOptions:
    """How to shard.

    Attributes
    ----------
    memory_layout
        "column_major" or "row_major".
    cache_policy, prefetch_distance
        Written to the map as the model's defaults.
    pages_per_shard
        A power of two up to 256; None to choose by size.
    """

    memory_layout: str = "column_major"
    cache_policy: str = "lru"
    prefetch_distance: int = 8
    pages_per_shard: int | None = None

    def __post_init__(self) -> None:
        if self.memory_layout not in MEMORY_LAYOUTS:
            raise GGUFShardError(f"layout {self.memory_layout!r}: not in {MEMORY_LAYOUTS}")
        if self.cache_policy not in CACHE_POLICIES:
            raise GGUFShardError(f"policy {self.cache_policy!r}: not in {CACHE_POLICIES}")
        if not 0 <= self.prefetch_distance <= MAX_PREFETCH_DISTANCE:
            raise GGUFShardError(
                f"prefetch distance {self.prefetch_distance}: not in 0..{MAX_PREFETCH_DISTANCE}"
            )
        n = self.pages_per_shard
        if n is not None and (not 1 <= n <= MAX_PAGES_PER_SHARD or n & (n - 1)):
            raise GGUFShardError(
                f"pages per shard {n}: not a power of two up to {MAX_PAGES_PER_SHARD}"
            )


def _nonzero_ranges(source: SourceFile) -> list[tuple[int, int]]:
    """Ranges of the padding that hold anything but zeros."""
    found = []
    for start, n_bytes in padding_ranges(source.header):
        for offset in range(start, start + n_bytes, _ZERO_CHUNK):
            size = min(_ZERO_CHUNK, start + n_bytes - offset)
            if source.read(offset, size).any():
                found.append((offset, size))
    return found


@dataclass(frozen=True)
class _Chunk:
    """Consecutive source bytes, and the run of the plan whose pages they fill (None: zeros)."""

    offset: int
    bytes: int
    run: SlicePlan | RawPlan | None
    first_page: int


def _chunks(plan: PagePlan, part: int, file_bytes: int, memory_layout: str) -> Iterator[_Chunk]:
    """The whole file in order, cut so that each chunk fills whole pages."""
    runs = [run for run in plan.runs if run.part == part]
    end = 0
    for run in sorted(runs, key=lambda run: run.offset):
        yield from _zero_chunks(end, run.offset)
        if isinstance(run, RawPlan):
            page_bytes = CONTENT_BYTES
        else:
            assert run.tensor.ggml_type is not None
            layout = block_layout(run.tensor.ggml_type, memory_layout)
            page_bytes = layout.bytes * layout.per_page
        end = run.offset + run.bytes
        for i in range(0, run.pages, _CHUNK_PAGES):
            offset = run.offset + i * page_bytes
            size = min(_CHUNK_PAGES * page_bytes, end - offset)
            yield _Chunk(offset, size, run, run.first_page + i)
    yield from _zero_chunks(end, file_bytes)


def _zero_chunks(begin: int, end: int) -> Iterator[_Chunk]:
    for offset in range(begin, end, _ZERO_CHUNK):
        yield _Chunk(offset, min(_ZERO_CHUNK, end - offset), None, 0)


def pack_pages(data: np.ndarray, layout: BlockLayout | None) -> tuple[np.ndarray, np.ndarray]:
    """Source bytes as pages.

    Parameters
    ----------
    data
        uint8 [n_bytes] from a page's first byte on: whole blocks, or raw bytes.
    layout
        The blocks' layout; None for raw bytes.

    Returns
    -------
    tuple[numpy.ndarray, numpy.ndarray]
        The pages, uint8 [n, 4096], and the CRC32 of each content, uint32 [n].
    """
    if layout is None:
        pages = np.empty((-(-data.size // CONTENT_BYTES), PAGE_BYTES), np.uint8)
        return pages, pack_raw(data, pages)
    pages = np.empty((layout.pages_for(data.size // layout.bytes), PAGE_BYTES), np.uint8)
    return pages, pack_blocks(data, layout, pages)


class _PageWriter:
    """Lays chunks out in pages and writes them to their places in the pending `core.gguf`."""

    def __init__(self, file: PendingFile, plan: PagePlan, memory_layout: str) -> None:
        self.file = file
        self.memory_layout = memory_layout
        self.page_crc32 = np.zeros(plan.n_pages, np.uint32)
        self._write_padding(plan)

    def write(self, item: tuple[_Chunk, np.ndarray, Future[None]]) -> int:
        """Write a chunk's pages; returns its bytes once they are hashed, too."""
        chunk, data, hashed = item
        if chunk.run is not None:
            self._store(chunk.first_page, *self._pack(chunk.run, data))
        hashed.result()
        return chunk.bytes

    def _pack(self, run: SlicePlan | RawPlan, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(run, RawPlan):
            return pack_pages(data, None)
        assert run.tensor.ggml_type is not None
        return pack_pages(data, block_layout(run.tensor.ggml_type, self.memory_layout))

    def _store(self, first: int, pages: np.ndarray, crcs: np.ndarray) -> None:
        self.page_crc32[first : first + len(pages)] = crcs
        self.file.write(pages, page_offset(first))

    def _write_padding(self, plan: PagePlan) -> None:
        """Pages between groups, which start on shard boundaries, are valid and zero."""
        runs = sorted((run.first_page, run.pages) for run in plan.runs)
        end = 0
        for first, count in runs:
            if first > end:
                pages = np.zeros((first - end, PAGE_BYTES), np.uint8)
                self._store(end, pages, tag_pages(pages))
            end = first + count


def _read_and_hash(
    chunks: Iterator[_Chunk], source: SourceFile, digest: Any, hasher: Executor
) -> Iterator[tuple[_Chunk, np.ndarray, Future[None]]]:
    """Each chunk with its data, whose hashing has been handed to `hasher` in file order."""
    for chunk in chunks:
        data = source.read(chunk.offset, chunk.bytes)
        yield chunk, data, hasher.submit(digest.update, data.data)


def _write_pages(
    writer: _PageWriter,
    sources: Sequence[SourceFile],
    plan: PagePlan,
    advance: Callable[[int], None],
) -> list[SourcePart]:
    """Fill the pages from the sources; returns what the sources were."""
    parts = []
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as packer:
        for number, source in enumerate(sources):
            digest = hashlib.sha256()
            size = source.header.file_bytes
            chunks = _chunks(plan, number, size, writer.memory_layout)
            read = _read_and_hash(chunks, source, digest, hasher)
            for n_bytes in in_order(packer, writer.write, read, 3):
                advance(n_bytes)
            source.check_unchanged()
            name = os.path.basename(source.header.name)
            parts.append(SourcePart(name, size, digest.hexdigest()))
    return parts


def build_map(
    plan: PagePlan,
    parts: Sequence[GGUFHeader],
    source: Sequence[SourcePart],
    options: ShardOptions,
    digests: Sequence[str],
    table_digest: str,
) -> ShardMap:
    slices: dict[str, list[Slice]] = {}
    for s in plan.slices:
        slices.setdefault(s.tensor.name, []).append(Slice(s.first_page, s.pages, s.zone))
    tensors = tuple(
        TensorEntry(t.name, t.ggml_type, t.shape, part, t.offset, tuple(slices[t.name]))
        for part, header in enumerate(parts)
        for t in header.tensors
        if t.ggml_type is not None
    )
    return ShardMap(
        tuple(source),
        plan.n_pages,
        plan.pages_per_shard,
        AtlasSettings(
            options.memory_layout, options.cache_policy, options.prefetch_distance, plan.zones
        ),
        tensors,
        tuple(RawSegment(r.part, r.offset, r.bytes, r.first_page) for r in plan.raw),
        table_digest,
        tuple(digests),
    )


def write_around_pages(file: PendingFile, page_crc32: np.ndarray) -> None:
    """Write what stands before and behind the pages of a `core.gguf`: header and table."""
    n_pages = len(page_crc32)
    table = page_crc32.astype("<u4").tobytes()
    file.write(core_header(n_pages), 0)
    file.write(table.ljust(crc_table_bytes(n_pages), b"\0"), page_offset(n_pages))


def check_written(file: PendingFile, plan: PagePlan | ShardMap, page_crc32: np.ndarray,
                  advance: Callable[[int], None]) -> list[str]:  # fmt: skip
    """Read the pages back; returns the shards' digests.

    Raises
    ------
    GGUFShardError
        If a page is not as the table, uint32 [n_pages], says.
    """

    def report(page: int, reason: str) -> None:
        raise GGUFShardError(f"{file.pending}: page {page}: wrong after writing: {reason}")

    with CoreFile(file.pending, plan.n_pages) as core:
        return scan_shards(core, plan.pages_per_shard, page_crc32, report, advance)


def _check_map_fits(
    plan: PagePlan, parts: Sequence[GGUFHeader], options: ShardOptions, path: Path
) -> None:
    """Refuse before any work what a reader of the map would refuse after it.

    The map is read with blank digests, which are as long as the real ones.
    """
    source = [SourcePart(os.path.basename(p.name), p.file_bytes, "0" * 64) for p in parts]
    digests = ["0" * 16] * -(-plan.n_pages // plan.pages_per_shard)
    parse_map(render_map(build_map(plan, parts, source, options, digests, "0" * 32)), path)


def _write_model(
    plan: PagePlan,
    sources: Sequence[SourceFile],
    options: ShardOptions,
    map_file: PendingFile,
    pages_file: PendingFile,
    progress: bool,
) -> None:
    """Fill and check both files, then let them take their places."""
    parts = [source.header for source in sources]
    total = sum(part.file_bytes for part in parts) + plan.n_pages * PAGE_BYTES
    with progress_bar(total, "shard", progress) as advance:
        writer = _PageWriter(pages_file, plan, options.memory_layout)
        source = _write_pages(writer, sources, plan, advance)
        write_around_pages(pages_file, writer.page_crc32)
        digests = check_written(pages_file, plan, writer.page_crc32, advance)
        table_digest = crc_table_digest(writer.page_crc32)
        shard_map = build_map(plan, parts, source, options, digests, table_digest)
        map_file.write(render_map(shard_map), 0)
        # Before the map's rename the old pair stands; after it, opening the map finishes what a
        # dead writer could not.
        commit_together(map_file, pages_file)


def shard_model(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str] = ".",
    options: ShardOptions | None = None,
    *,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Cut a GGUF model into checked pages: `core.gguf` and `core.sgmap` in `folder`.

    Parameters
    ----------
    model
        The GGUF file; of a split model, its first part.
    folder
        Where to write; made if missing.
    options
        Layout, policy and shard size; the defaults if None.
    force
        Replace existing files.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    pathlib.Path
        The map.

    Raises
    ------
    GGUFShardError
        If the model is malformed, changes while it is read, or the output cannot be written. What
        stood in `folder` is then as it was.
    """
    options = options or ShardOptions()
    parts = read_model(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    map_path, pages_path = folder / "core.sgmap", folder / "core.gguf"
    written = (map_path, pages_path, pending_path(map_path), pending_path(pages_path))
    for path in written:
        if path.exists() and any(os.path.samefile(path, part.name) for part in parts):
            raise GGUFShardError(f"{path}: is the model itself; choose another folder")
    for part in parts:
        if "\\" in os.path.basename(part.name):
            raise GGUFShardError(f"{part.name}: a file name with a backslash cannot be recorded")
    with ExitStack() as stack:
        sources = [stack.enter_context(SourceFile(part)) for part in parts]
        padding = [_nonzero_ranges(source) for source in sources]
        plan = plan_pages(parts, padding, options.memory_layout, options.pages_per_shard)
        _check_map_fits(plan, parts, options, map_path)
        map_file = stack.enter_context(PendingFile(map_path, 0, force))
        finish_journal(map_path)
        # `core.gguf.sgnew` may hold the pages of the map that stands: not ours to take over.
        with suppress(GGUFShardError):
            ShardedModel(map_path).close()
        pages_file = stack.enter_context(PendingFile(pages_path, core_bytes(plan.n_pages), force))
        _write_model(plan, sources, options, map_file, pages_file, progress)
    return map_path
