"""`create_patch`: what turns one model into another, as a small file.

First pass: both models are hashed while every run is held against its namesake (`delta.compare`).
Changed pages that stand elsewhere are copied (`delta.moved_pages`). Second pass: the others are
stored, in groups of one element type and one mode (`delta.page_coding`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from delta.compare import Comparison, RunChange, compare
from delta.hashed_reads import HashedReads
from delta.moved_pages import PageSources, find_sources, numbered
from delta.page_grid import TENSOR, RunKey
from delta.page_groups import PageEncoder, gather
from delta.patch_file import BOTH, FORWARD, REVERSE, PageGroup, PatchWriter
from delta.patch_plan import (
    MAX_COPIES,
    Direction,
    FileRecord,
    HeaderEdit,
    LostRun,
    PageCopy,
    PatchPlan,
    TouchedRun,
    encode_header,
)
from delta.source_model import ShardedSource, SourceModel, open_source
from forge.errors import GGUFShardError
from forge.pending_file import PendingFile
from forge.pipeline import in_order
from forge.progress import progress_bar

DEFAULT_LEVEL = 3
MAX_LEVEL = 22
_THREADS = 2


@dataclass
class PatchFacts:
    """What a patch holds: its plan, each group with its bytes in the file, the file's size."""

    plan: PatchPlan
    groups: list[tuple[PageGroup, int]] = field(default_factory=list)
    n_bytes: int = 0


@dataclass(frozen=True)
class _Way:
    """One direction: from `base` to `target`, whose touched runs get their pages by `sources`."""

    base: SourceModel
    target: SourceModel
    touched: Sequence[RunChange]
    sources: PageSources
    direction: Direction


def _plan_way(
    base: SourceModel, target: SourceModel, forward: Sequence[RunChange],
    backward: Sequence[RunChange],
) -> _Way:  # fmt: skip
    """Plan one direction.

    Parameters
    ----------
    base, target
        From and to.
    forward, backward
        The target's runs held against the base's, and the other way round.
    """
    touched = [change for change in forward if change.changed.any()]
    sources = find_sources(base, target, backward, touched)
    headers = tuple(_header_edit(base, target, part) for part in range(len(target.names)))
    lost = tuple(
        LostRun(change.run.name, change.run.index, change.run.n_pages - change.n_paired)
        for change in backward
        if change.run.kind == TENSOR and change.n_paired < change.run.n_pages
    )
    runs = tuple(TouchedRun.of(change.run, change.n_paired) for change in touched)
    copies = list(_copies(sources))
    if len(copies) > MAX_COPIES:  # the rest is stored
        is_late = sources.pages >= copies[MAX_COPIES].first
        sources.source[is_late], sources.from_target[is_late] = -1, False
        del copies[MAX_COPIES:]
    direction = Direction(headers, runs, lost, tuple(copies))
    return _Way(base, target, touched, sources, direction)


def _header_edit(base: SourceModel, target: SourceModel, part: int) -> HeaderEdit:
    origin = base.header_bytes(min(part, len(base.names) - 1))
    try:
        return encode_header(target.header_bytes(part), origin)
    except GGUFShardError as error:
        raise GGUFShardError(f"{target.headers[part].name}: {error}") from None


def _copies(sources: PageSources) -> Iterator[PageCopy]:
    """Copies of consecutive pages in one piece."""
    copied = sources.source >= 0
    first, source = sources.pages[copied], sources.source[copied]
    from_target = sources.from_target[copied]
    if len(first) == 0:
        return
    breaks = (np.diff(first) != 1) | (np.diff(source) != 1) | (np.diff(from_target) != 0)
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(first)]
    for begin, end in pairwise(bounds):
        yield PageCopy(int(first[begin]), end - begin, bool(from_target[begin]), int(source[begin]))


def _records(model: SourceModel, sha256: Sequence[str]) -> tuple[FileRecord, ...]:
    return tuple(
        FileRecord(name, n_bytes, digest)
        for name, n_bytes, digest in zip(model.names, model.sizes, sha256, strict=True)
    )


def _compare_and_hash(
    base: SourceModel, target: SourceModel, advance: Callable[[int], None]
) -> tuple[Comparison, tuple[FileRecord, ...], tuple[FileRecord, ...]]:
    with ExitStack() as stack:
        # A sharded model's map says what its files are; nothing need be hashed.
        old, new = (
            model
            if isinstance(model, ShardedSource)
            else stack.enter_context(HashedReads(model, role))
            for model, role in ((base, "base"), (target, "target"))
        )
        comparison = compare(old, new, advance)
        return comparison, _records(old, old.sha256()), _records(new, new.sha256())


def _stored_pages(ways: Sequence[_Way]) -> Iterator[tuple[_Way, int, np.ndarray]]:
    """What to store for which directions: bool over the pages of the way's touched runs."""
    stored = []
    for way in ways:
        flags = np.zeros(way.direction.n_pages, np.bool_)
        flags[way.sources.stored] = True
        stored.append(flags)
    if len(ways) == 1:
        yield ways[0], FORWARD, stored[0]
        return
    # A pair that both ways store is stored once, in a mode that can be undone.
    starts = [_starts(way.touched) for way in ways]
    shared = np.zeros_like(stored[0])
    for change in ways[0].touched:
        if change.n_paired and change.run.key in starts[1]:
            here, there = (s[change.run.key] for s in starts)
            both = (stored[0][here : here + change.n_paired]
                    & stored[1][there : there + change.n_paired])  # fmt: skip
            shared[here : here + change.n_paired] = both
            stored[0][here : here + change.n_paired] &= ~both
            stored[1][there : there + change.n_paired] &= ~both
    yield ways[0], BOTH, shared
    yield ways[0], FORWARD, stored[0]
    yield ways[1], REVERSE, stored[1]


def _starts(touched: Sequence[RunChange]) -> dict[RunKey, int]:
    """Number of each run's first page, over all of them."""
    runs = [change.run for change in touched]
    return {run.key: int(start) for run, start in zip(runs, numbered(runs), strict=False)}


def _write_groups(
    ways: Sequence[_Way], level: int, writer: PatchWriter, facts: PatchFacts,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    with ThreadPoolExecutor(_THREADS) as coders:
        for way, directions, is_stored in _stored_pages(ways):
            encoder = PageEncoder(way.base, way.target, directions, level)
            batches = gather(way.touched, is_stored)
            for groups, n_bytes in in_order(coders, encoder.encode, batches, 2 * _THREADS):
                for group, data in groups:
                    writer.write_group(data)
                    facts.groups.append((group, len(data)))
                advance(n_bytes)


class _NoFile:
    """Takes what would be written."""

    def write(self, data: bytes | np.ndarray, offset: int) -> None:
        pass

    def settle(self, end: int) -> None:
        pass


def _write_patch(
    base: SourceModel, target: SourceModel, file: PendingFile | _NoFile, level: int,
    reversible: bool, progress: bool,
) -> PatchFacts:  # fmt: skip
    with progress_bar(target.n_bytes, "compare", progress) as advance:
        comparison, base_files, target_files = _compare_and_hash(base, target, advance)
    forward, backward = comparison.forward, comparison.backward
    ways = [_plan_way(base, target, forward, backward)]
    if reversible:
        ways.append(_plan_way(target, base, backward, forward))
    reverse = ways[1].direction if reversible else None
    facts = PatchFacts(PatchPlan(base_files, target_files, ways[0].direction, reverse))
    writer = PatchWriter(file, facts.plan)
    n_stored = sum(
        int(change.run.page_lengths(np.flatnonzero(change.changed)).sum())
        for change in ways[0].touched
    )
    with progress_bar(n_stored, "store", progress) as advance:
        _write_groups(ways, level, writer, facts, advance)
    base.check_unchanged()
    target.check_unchanged()
    writer.finish()
    facts.n_bytes = writer.n_bytes
    return facts


def create_patch(
    base: str | os.PathLike[str],
    target: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    level: int = DEFAULT_LEVEL,
    reversible: bool = False,
    force: bool = False,
    progress: bool = False,
    dry_run: bool = False,
) -> PatchFacts:
    """Write the patch that turns one model into another.

    Parameters
    ----------
    base, target
        GGUF files (of a split model, the first part) or `.sgmap` files of sharded models.
    output
        The patch.
    level
        Zstandard's level, 1 to 22.
    reversible
        Hold the way back, too.
    force
        Replace an existing file.
    progress
        Show progress bars on stderr.
    dry_run
        Do all the work and write nothing.

    Returns
    -------
    PatchFacts
        What the patch holds.

    Raises
    ------
    GGUFShardError
        If a model is malformed or damaged, changes while it is read, or the patch cannot be
        written. What stood at `output` is then as it was.
    """
    if not 1 <= level <= MAX_LEVEL:
        raise GGUFShardError(f"level {level}: not within 1..{MAX_LEVEL}")
    with open_source(base) as old, open_source(target) as new:
        if dry_run:
            return _write_patch(old, new, _NoFile(), level, reversible, progress)
        for model in (old, new):
            refuse_to_replace(model, Path(output))
        with PendingFile(output, 0, force) as file:
            facts = _write_patch(old, new, file, level, reversible, progress)
            file.commit()
    return facts


def refuse_to_replace(model: SourceModel, output: Path) -> None:
    """GGUFShardError if `output` is one of a model's own files."""
    if output.exists() and any(output.samefile(path) for path in model.files_on_disk()):
        raise GGUFShardError(f"{output}: is a file of the model itself")
