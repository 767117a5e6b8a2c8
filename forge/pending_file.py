"""Writing files so that a reader sees the old one or the new one, never a third state.

A `PendingFile` is written beside its target as `NAME.new`, under a lock, and takes its place only
on `commit`, after `fsync`. A process that dies leaves at most a `NAME.new`, which the next writer
takes over.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import numpy as np

from forge.errors import GGUFShardError


def pending_path(path: Path) -> Path:
    """Where a file is while it is being written."""
    return path.with_name(path.name + ".new")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PendingFile:
    """A file that replaces `path` when, and only when, `commit` is called.

    Parameters
    ----------
    path
        The file to be.
    n_bytes
        Its size, reserved in the sense that the disk must have that much room now.
    force
        Whether an existing file may be replaced.

    Raises
    ------
    GGUFShardError
        If the file exists, the folder cannot be written, the disk is too full, or another process
        is writing the same file.
    """

    def __init__(self, path: str | os.PathLike[str], n_bytes: int, force: bool = False) -> None:
        self.path = Path(path)
        self.pending = pending_path(self.path)
        if self.path.is_dir():
            raise GGUFShardError(f"{self.path}: is a folder")
        if self.path.exists() and not force:
            raise GGUFShardError(f"{self.path}: exists already (--force replaces it)")
        try:
            free = shutil.disk_usage(self.path.parent).free
            if free < n_bytes:
                raise GGUFShardError(
                    f"{self.path}: needs {n_bytes} bytes, the disk has {free} left"
                )
            self._descriptor = os.open(self.pending, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise GGUFShardError(f"{self.pending}: {error.strerror}") from None
        self._open = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._close()
            raise GGUFShardError(f"{self.pending}: another process is writing it") from None
        os.ftruncate(self._descriptor, 0)
        os.ftruncate(self._descriptor, n_bytes)

    def __enter__(self) -> PendingFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self.pending.unlink(missing_ok=True)
            self._close()

    def write(self, data: bytes | np.ndarray, offset: int) -> None:
        """Write all of `data` at byte `offset`.

        Raises
        ------
        GGUFShardError
            If the disk refuses.
        """
        view = memoryview(data).cast("B")
        try:
            while len(view):
                n = os.pwrite(self._descriptor, view, offset)
                view, offset = view[n:], offset + n
        except OSError as error:
            raise GGUFShardError(f"{self.path}: offset {offset}: {error.strerror}") from None

    def sync(self) -> None:
        """Make what was written durable."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise GGUFShardError(f"{self.path}: fsync: {error.strerror}") from None

    def commit(self) -> None:
        """`sync`, then take the target's place."""
        self.sync()
        os.replace(self.pending, self.path)
        sync_folder(self.path.parent)
        self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._open = False
