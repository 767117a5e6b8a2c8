"""`restore_model`: the source files of a sharded model, bit for bit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forge.block_layouts import BlockLayout
from forge.crc32 import CONTENT_BYTES
from forge.errors import GGUFShardError
from forge.gguf_file import part_paths
from forge.pages import unpack_blocks, unpack_raw
from forge.pending_file import PendingFile
from forge.pipeline import in_order
from forge.progress import progress_bar
from forge.sgmap import ShardMap
from forge.sharded_model import ShardedModel

_CHUNK_PAGES = 1024
_ZERO_CHUNK = 4 << 20


@dataclass(frozen=True)
class _Run:
    """Consecutive source bytes that lie in consecutive pages."""

    offset: int
    bytes: int
    first_page: int
    layout: BlockLayout | None  # None: raw bytes


@dataclass(frozen=True)
class _Piece:
    """Source bytes to write: from `pages` pages at `first_page`, or zeros where there are none."""

    offset: int
    bytes: int
    first_page: int = 0
    pages: int = 0
    layout: BlockLayout | None = None


def _runs(shard_map: ShardMap, part: int) -> list[_Run]:
    runs = [_Run(r.offset, r.bytes, r.first_page, None) for r in shard_map.raw if r.part == part]
    for tensor in shard_map.tensors:
        if tensor.part == part:
            layout = tensor.layout(shard_map.atlas.memory_layout)
            size = tensor.slice_bytes
            runs += [
                _Run(tensor.offset + i * size, size, s.first_page, layout)
                for i, s in enumerate(tensor.slices)
            ]
    return sorted(runs, key=lambda run: run.offset)


def _pieces(shard_map: ShardMap, part: int) -> Iterator[_Piece]:
    """The whole file in order."""
    end = 0
    for run in _runs(shard_map, part):
        yield from _zeros(end, run.offset)
        end = run.offset + run.bytes
        per_page = run.layout.bytes * run.layout.per_page if run.layout else CONTENT_BYTES
        for begin in range(0, run.bytes, _CHUNK_PAGES * per_page):
            size = min(_CHUNK_PAGES * per_page, run.bytes - begin)
            first = run.first_page + begin // per_page
            yield _Piece(run.offset + begin, size, first, -(-size // per_page), run.layout)
    yield from _zeros(end, shard_map.source[part].bytes)


def _zeros(begin: int, end: int) -> Iterator[_Piece]:
    for offset in range(begin, end, _ZERO_CHUNK):
        yield _Piece(offset, min(_ZERO_CHUNK, end - offset))


def _content(model: ShardedModel, piece: _Piece) -> np.ndarray:
    if not piece.pages:
        return np.zeros(piece.bytes, np.uint8)
    pages = model.read_checked(piece.first_page, piece.pages)
    if piece.layout is None:
        return unpack_raw(pages, piece.bytes)
    blocks = np.empty(piece.bytes, np.uint8)
    unpack_blocks(pages, piece.layout, blocks)
    return blocks


def _write_part(
    model: ShardedModel, part: int, file: PendingFile, advance: Callable[[int], None]
) -> None:
    digest = hashlib.sha256()
    with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(1) as hasher:

        def read(piece: _Piece) -> tuple[_Piece, np.ndarray]:
            data = _content(model, piece)
            file.write(data, piece.offset)
            return piece, data

        hashed = None
        for piece, data in in_order(readers, read, _pieces(model.map, part), 4):
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, data.data)
            advance(piece.bytes)
    source = model.map.source[part]
    if digest.hexdigest() != source.sha256:
        raise GGUFShardError(
            f"{model.map_path}: restored {source.name} has SHA-256 {digest.hexdigest()}, "
            f"not {source.sha256} (source[{part}].sha256)"
        )


def restore_model(
    map_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Write the GGUF file (or files) a sharded model was cut from.

    Parameters
    ----------
    map_path
        `core.sgmap`.
    output
        The GGUF file to write; for a split model its first part, the others get the names that
        go with it.
    force
        Replace existing files.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    list[pathlib.Path]
        The files written.

    Raises
    ------
    GGUFShardError
        If a page is damaged, the SHA-256 differs from the source's, or the output cannot be
        written; then no file is. (Only a failure of the renames themselves, at the very end, can
        leave some parts of a split model new and others not.)
    """
    with ShardedModel(map_path) as model, ExitStack() as stack:
        paths = part_paths(Path(output), len(model.map.source))
        for path in paths:
            if path.exists() and any(map(path.samefile, (model.map_path, model.core.path))):
                raise GGUFShardError(f"{path}: is the sharded model itself")
        total = sum(source.bytes for source in model.map.source)
        advance = stack.enter_context(progress_bar(total, "restore", progress))
        files = [
            stack.enter_context(PendingFile(path, source.bytes, force))
            for path, source in zip(paths, model.map.source, strict=True)
        ]
        for part, file in enumerate(files):
            _write_part(model, part, file, advance)
        for file in files:
            file.sync()
        for file in files:
            file.commit()
    return paths
