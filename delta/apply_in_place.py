"""`update_in_place`: a model becomes the target of a patch where it lies.

All changes go to a journal first (`forge.journal`), and the target is checked as it will be: the
old files with the journal over them. Only when that is right does the change begin, and it can be
finished after a kill at any point.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from delta.apply import write_target
from delta.bound_patch import KEPT, total_bytes
from delta.checked_patch import CheckedPatch, check_patch
from delta.page_grid import Run, n_paired
from delta.page_sink import PageSink
from delta.patch_file import PatchReader
from delta.sharded_update import ShardedUpdate, reshard
from delta.source_model import PlainModel, ShardedSource, SourceModel, mismatch, open_source
from forge.errors import GGUFShardError
from forge.journal import JournalWriter, finish_journal
from forge.pending_file import journal_path
from forge.progress import progress_bar


@dataclass(frozen=True)
class InPlaceResult:
    """What became of a model.

    Attributes
    ----------
    path
        The model.
    resumed
        An update that had been interrupted was finished first.
    changed
        Whether there was anything left to do.
    """

    path: Path
    resumed: bool
    changed: bool


class JournalSink(PageSink):
    """Changes to the files of a plain model, in a journal.

    Parameters
    ----------
    journal
        Where they go.
    base
        The files as they are.
    has_base
        Whether what the target keeps stays where it is; if not, everything is written.
    """

    def __init__(self, journal: JournalWriter, base: SourceModel, has_base: bool) -> None:
        self.has_base = has_base
        self._journal = journal
        self._base = base

    def put_header(self, part: int, data: bytes) -> None:
        if not self.has_base or data != self._base.header_bytes(part):
            self._journal.record(part, 0, np.frombuffer(data, np.uint8))

    def put(self, run: Run, first_page: int, data: np.ndarray) -> None:
        self._journal.record(run.part, run.span(first_page, 1)[0], data)

    def read_into(self, part: int, offset: int, buffer: np.ndarray) -> None:
        there = 0
        if self.has_base:
            there = min(max(self._base.sizes[part] - offset, 0), len(buffer))
            self._base.read_into(part, offset, buffer[:there])
        buffer[there:] = 0
        self._journal.overlay(part, offset, buffer)


def keeps_places(bound: CheckedPatch) -> bool:
    """Whether everything that a target keeps of its base stays where it is in its file."""
    if len(bound.files) != len(bound.base.names):
        return False
    return all(
        other is None or (run.part, run.offset) == (other.part, other.offset)
        for run, other, sources in zip(bound.runs, bound.others, bound.sources, strict=True)
        if n_paired(run, other) and (sources == KEPT).any()
    )


def update_in_place(
    path: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    *,
    reverse: bool = False,
    progress: bool = False,
    dry_run: bool = False,
) -> InPlaceResult:
    """Turn a model into the target of a patch where it lies.

    Only what changes is written, where all else stays where it is. If it does not (the header has
    grown, say), the files are written anew and replaced.

    Parameters
    ----------
    path
        The GGUF file (of a split model, the first part), or the `.sgmap` of a sharded model.
    patch
        The patch.
    reverse, progress, dry_run
        As for `delta.apply.apply_patch`.

    Raises
    ------
    GGUFShardError
        If the patch is damaged, the model is not its base, or there is no room: nothing has changed
        then. If a write fails once the change has begun, the next call finishes it.
    """
    path = Path(path)
    resumed = False
    if dry_run and journal_path(path).exists():
        raise GGUFShardError(
            f"{path}: an update in place was interrupted: it must be finished first"
        )
    if not dry_run:
        resumed = finish_journal(path, progress=progress)
    with PatchReader(patch) as reader, open_source(path) as base:
        if resumed and _is_target(base, reader, reverse):
            return InPlaceResult(path, resumed, False)
        bound = check_patch(reader, base, reverse, progress)
        if dry_run:
            return InPlaceResult(path, resumed, False)
        if isinstance(base, ShardedSource):
            _update_sharded(bound, base, progress)
        else:
            _update_plain(bound, base, progress)
    return InPlaceResult(path, resumed, True)


def _is_target(base: SourceModel, patch: PatchReader, reverse: bool) -> bool:
    files = patch.plan.base if reverse else patch.plan.target
    return mismatch(base, [file.bytes for file in files], [file.sha256 for file in files]) is None


def _update_sharded(bound: CheckedPatch, base: ShardedSource, progress: bool) -> None:
    update = ShardedUpdate.plan(bound, base.model)
    if update is None:
        reshard(bound, base.model, progress)
        return
    with update:
        update.build(progress)
        update.commit(progress)


def _update_plain(bound: CheckedPatch, base: SourceModel, progress: bool) -> None:
    assert isinstance(base, PlainModel)
    in_place = keeps_places(bound)
    paths = base.files_on_disk()
    if not in_place and len(paths) == len(bound.files) == 1:
        write_target(bound, paths, True, progress, in_place=True)
        return
    if len(paths) != len(bound.files):
        raise GGUFShardError(
            f"{base.path}: the patch makes {len(bound.files)} files of {len(paths)}: that cannot "
            "be done in place"
        )
    files = [(path.name, file.bytes) for path, file in zip(paths, bound.files, strict=True)]
    total = total_bytes(bound.files)
    with JournalWriter(base.path, files, _recorded_bytes(bound, in_place)) as journal:
        base.check_in_place()  # now that nobody else may change it
        with progress_bar(total, "check target", progress) as advance:
            bound.build(JournalSink(journal, base, in_place), advance)
        base.check_unchanged()
        journal.commit()
    finish_journal(base.path, progress=progress)


def _recorded_bytes(bound: CheckedPatch, in_place: bool) -> int:
    """What a journal will hold, at most."""
    if not in_place:
        return total_bytes(bound.files)
    changed = sum(
        int(run.page_lengths(np.flatnonzero(sources != KEPT)).sum())
        for run, sources in zip(bound.runs, bound.sources, strict=True)
    )
    return changed + sum(map(len, bound.header_bytes))
