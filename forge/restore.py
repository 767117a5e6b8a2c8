"""`restore_model`: the source files of a sharded model, bit for bit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from forge.errors import GGUFShardError
from forge.journal import finish_journal
from forge.pending_file import PendingFile
from forge.progress import progress_bar
from forge.sharded_model import ShardedModel
from forge.source_bytes import SourceBytes
from forge.split_model import part_paths


def _write_part(
    source_bytes: SourceBytes,
    model: ShardedModel,
    part: int,
    file: PendingFile,
    advance: Callable[[int], None],
) -> None:
    digest = hashlib.sha256()
    hashed: Future[None] | None = None
    with ThreadPoolExecutor(1) as hasher:
        for offset, data in source_bytes.chunks(part):
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, data.data)
            file.write(data, offset)
            file.settle(offset + data.size)
            advance(data.size)
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
        for path in paths:
            finish_journal(path)
        source_bytes = SourceBytes(model)
        for part, file in enumerate(files):
            _write_part(source_bytes, model, part, file, advance)
        for file in files:
            file.sync()
        for file in files:
            file.commit()
    return paths
