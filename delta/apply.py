"""`apply_patch`: the target of a patch, as new files.

The patch is checked, then the base, and only then is anything written: beside its place, and
renamed when it is known to have the SHA-256 that the patch names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from delta.bound_patch import total_bytes
from delta.checked_patch import CheckedPatch, check_patch
from delta.diff import refuse_to_replace
from delta.page_grid import Run
from delta.page_sink import PageSink
from delta.patch_file import PatchReader
from delta.source_model import open_source
from forge.errors import GGUFShardError
from forge.input_file import read_fully
from forge.journal import finish_journal
from forge.pending_file import PendingFile
from forge.progress import progress_bar
from forge.split_model import part_paths


class FileSink(PageSink):
    """New files.

    Parameters
    ----------
    files
        One for each of the target's, as large as it, all zero.
    """

    is_zero = True

    def __init__(self, files: Sequence[PendingFile]) -> None:
        self._files = files

    def put_header(self, part: int, data: bytes) -> None:
        self._files[part].write(data, 0)

    def put(self, run: Run, first_page: int, data: np.ndarray) -> None:
        self._files[run.part].write(data, run.span(first_page, 1)[0])

    def read_into(self, part: int, offset: int, buffer: np.ndarray) -> None:
        file = self._files[part]
        read_fully(file.fileno(), buffer.data, offset, file.pending)

    def settle(self, part: int, end: int) -> None:
        self._files[part].settle(end)


def apply_patch(
    base: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    reverse: bool = False,
    force: bool = False,
    progress: bool = False,
    dry_run: bool = False,
) -> list[Path]:
    """Write the model that a patch makes of its base.

    Parameters
    ----------
    base
        The GGUF file (of a split model, the first part), or the `.sgmap` of a sharded model.
    patch
        The patch.
    output
        The GGUF file to write; of a split model its first part.
    reverse
        Make the base of the target, with a reversible patch.
    force
        Replace existing files.
    progress
        Show progress bars on stderr.
    dry_run
        Check patch and base, and that they fit, and write nothing; where the target is made in
        memory (`delta.rehearsal`), check its SHA-256, too.

    Returns
    -------
    list[pathlib.Path]
        The files written, or that would be.

    Raises
    ------
    GGUFShardError
        If the patch is damaged, the base is not its base, or the output cannot be written; then no
        file is. (Only a failure of the renames themselves, at the very end, can leave some parts
        of a split model new and others not.)
    """
    with PatchReader(patch) as reader, open_source(base) as model:
        bound = check_patch(reader, model, reverse, progress)
        paths = part_paths(Path(output), len(bound.files))
        for path in paths:
            refuse_to_replace(model, path)
            if path.exists() and path.samefile(patch):
                raise GGUFShardError(f"{path}: is the patch itself")
        if not dry_run:
            write_target(bound, paths, force, progress)
    return paths


def write_target(
    bound: CheckedPatch, paths: Sequence[Path], force: bool, progress: bool, in_place: bool = False
) -> None:
    """Build a target in new files, which take their places once all of them are right.

    Parameters
    ----------
    bound
        The patch and its base.
    paths
        The files to be.
    force
        Replace existing files.
    progress
        Show a progress bar on stderr.
    in_place
        They replace the base: GGUFShardError if that has been replaced in the meantime.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(PendingFile(path, record.bytes, force))
            for path, record in zip(paths, bound.files, strict=True)
        ]
        if in_place:
            bound.base.check_in_place()  # now that nobody else may replace it
        total = total_bytes(bound.files)
        advance = stack.enter_context(progress_bar(total, "apply", progress))
        bound.build(FileSink(files), advance)
        bound.base.check_unchanged()
        for file in files:
            finish_journal(file.path)  # of an update that the new file makes undone
            file.sync()
        for file in files:
            file.commit()
