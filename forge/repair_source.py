"""Where `repair` takes pages from: the GGUF file a model was cut from, or a copy of its pages.

    core.gguf, or the .sgmap beside it     page i is read from its place
    model.gguf (first part of a split one) page i is cut anew from the source bytes that the map
                                           says it holds, as `shard` did it

Nothing is checked here: a source may be damaged where it is not needed, and who takes a page holds
it against the map.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np

from forge.core_file import CoreFile, core_bytes
from forge.errors import GGUFShardError
from forge.input_file import open_input, read_fully, sha256_of
from forge.pages import PAGE_BYTES, tag_pages
from forge.pending_file import journal_path
from forge.sgmap import ShardMap, core_path
from forge.shard import pack_pages
from forge.source_bytes import SourceRun, source_runs
from forge.split_model import part_paths


class RepairSource(Protocol):
    """Where pages are taken from; `path` is what messages call it."""

    path: Path

    def pages(self, first: int, count: int) -> np.ndarray:
        """Pages `first` to `first + count` - 1, uint8 [count, 4096], not checked."""
        ...

    def differences(self) -> list[str]:
        """In one line each, files that are not as a whole what the map says of them."""
        ...

    def close(self) -> None: ...


class _CopiedPages:
    """Another copy of `core.gguf`."""

    def __init__(self, path: Path, shard_map: ShardMap) -> None:
        self.path = path
        self._core = CoreFile(path, shard_map.n_pages)

    def pages(self, first: int, count: int) -> np.ndarray:
        pages = np.empty((count, PAGE_BYTES), np.uint8)
        self._core.read_pages(first, pages)
        return pages

    def differences(self) -> list[str]:
        return []  # the map does not know the whole file by a digest

    def close(self) -> None:
        self._core.close()


class _CutPages:
    """The pages that cutting the source files anew gives."""

    def __init__(self, paths: Sequence[Path], shard_map: ShardMap) -> None:
        self.path = paths[0]
        self._paths = paths
        self._parts = shard_map.source
        runs = (run for run in source_runs(shard_map) if run.pages)
        self._runs = sorted(runs, key=lambda run: run.first_page)
        self._first_pages = [run.first_page for run in self._runs]
        with ExitStack() as stack:
            self._files: list[io.FileIO] = []
            for path, part in zip(paths, self._parts, strict=True):
                file = stack.enter_context(_opened(path))
                self._files.append(file)
                size = os.fstat(file.fileno()).st_size
                if size != part.bytes:
                    raise GGUFShardError(
                        f"{path}: has {size} bytes, {part.name} had {part.bytes}: not the source"
                    )
            self._stack = stack.pop_all()

    def pages(self, first: int, count: int) -> np.ndarray:
        pages = np.zeros((count, PAGE_BYTES), np.uint8)
        tag_pages(pages)  # those of no run stay so
        index = max(0, bisect_right(self._first_pages, first) - 1)
        while index < len(self._runs) and self._runs[index].first_page < first + count:
            run = self._runs[index]
            begin, end = max(first, run.first_page), min(first + count, run.end_page)
            if begin < end:
                pages[begin - first : end - first] = self._cut(run, begin, end)
            index += 1
        return pages

    def _cut(self, run: SourceRun, begin: int, end: int) -> np.ndarray:
        """Pages `begin` to `end` - 1 of a run."""
        skipped = (begin - run.first_page) * run.page_bytes
        kept = min((end - run.first_page) * run.page_bytes, run.bytes)
        data = np.empty(kept - skipped, np.uint8)
        file = self._files[run.part]
        read_fully(file.fileno(), data.data, run.offset + skipped, self._paths[run.part])
        return pack_pages(data, run.layout)[0]

    def differences(self) -> list[str]:
        found = []
        for path, file, part in zip(self._paths, self._files, self._parts, strict=True):
            try:
                file.seek(0)
                sha256 = sha256_of(file)
            except OSError as error:
                found.append(f"{path}: {error.strerror}")
                continue
            if sha256 != part.sha256:
                found.append(f"{path}: has SHA-256 {sha256}, the map says {part.sha256}")
        return found

    def close(self) -> None:
        self._stack.close()


def _opened(path: Path) -> io.FileIO:
    try:
        return open_input(path)
    except OSError as error:
        raise GGUFShardError(f"{path}: {error.strerror}") from None


def _refuse_the_model_itself(paths: Sequence[Path], map_path: Path) -> None:
    for path in paths:
        for own in (map_path, core_path(map_path)):
            if path.exists() and own.exists() and path.samefile(own):
                raise GGUFShardError(f"{path}: is what is to be repaired")


def open_repair_source(
    path: str | os.PathLike[str], map_path: Path, shard_map: ShardMap
) -> RepairSource:
    """Open the source of a repair.

    Parameters
    ----------
    path
        A copy of `core.gguf`, the `.sgmap` beside one, or the GGUF file that the model was cut
        from; of a split model the first part. A file is told by its size.
    map_path, shard_map
        What is to be repaired.

    Raises
    ------
    GGUFShardError
        If it is missing, of no size that fits, half-way through an update in place, or the model
        itself.
    """
    path = Path(path)
    if path.suffix == ".sgmap":
        path = core_path(path)
        _refuse_the_model_itself([path], map_path)
        return _CopiedPages(path, shard_map)
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size == core_bytes(shard_map.n_pages) != shard_map.source[0].bytes:
        _refuse_the_model_itself([path], map_path)
        return _CopiedPages(path, shard_map)
    paths = part_paths(path, len(shard_map.source))
    if path not in paths[:1]:
        raise GGUFShardError(f"{path}: is not the first part of a split model")
    _refuse_the_model_itself(paths, map_path)
    if os.path.lexists(journal_path(path)):
        raise GGUFShardError(f"{path}: an update in place was interrupted: it must be finished")
    return _CutPages(paths, shard_map)
