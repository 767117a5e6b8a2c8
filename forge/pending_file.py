"""Writing files so that a reader sees the old one or the new one, never a third state.

A `PendingFile` is written beside its target as `NAME.sgnew`, under a lock, and takes its place only
on `commit`, after `fsync`. A process that dies leaves at most a `NAME.sgnew`, which the next writer
takes over.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from forge.errors import GGUFShardError

#: Of a file that is being written: a name that nobody else gives to a file of theirs.
SUFFIX = ".sgnew"
#: Of what is to be written into files that are changed in place (`forge.journal`).
JOURNAL_SUFFIX = ".sgjournal"
_WRITE_BACK_BYTES = 4 << 20


def pending_path(path: Path) -> Path:
    """Where a file is while it is being written."""
    return path.with_name(path.name + SUFFIX)


def journal_path(owner: Path) -> Path:
    """Where the journal is of a change in place of `owner`: a map, a GGUF file, or the first part
    of a split model."""
    return owner.parent / (owner.name + JOURNAL_SUFFIX)  # `with_name` refuses what has no name


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # which does not know of what
        raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` is a name of the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def take_lock(descriptor: int, path: Path) -> None:
    """Lock an open file, or a folder, until it is closed.

    Raises
    ------
    GGUFShardError
        If another process has the lock, or has moved the file since it was opened.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = is_at(descriptor, path)
    except OSError:
        is_ours = False
    if not is_ours:
        raise GGUFShardError(f"{path}: another process is writing it")


def finish_pending(descriptor: int, path: Path) -> None:
    """Put the complete `NAME.sgnew` that is open as `descriptor` in the place of `path`.

    A writer that is still alive is waited for: it does so itself, or takes its file away.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if is_at(descriptor, pending_path(path)):
        os.replace(pending_path(path), path)
        sync_folder(path.parent)


def require_room(path: Path, n_bytes: int) -> None:
    """Refuse to start what the disk has no room for.

    Raises
    ------
    GGUFShardError
        If `n_bytes` more do not fit beside `path`.
    OSError
        If its folder cannot be asked.
    """
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise GGUFShardError(f"{path}: needs {n_bytes} bytes, the disk has {free} left")


def write_fully(descriptor: int, data: bytes | np.ndarray, offset: int, path: object) -> None:
    """Write all of `data` at byte `offset` of an open file.

    Raises
    ------
    GGUFShardError
        If the disk refuses.
    """
    view = memoryview(data)
    view = view.cast("B") if view.nbytes else memoryview(b"")  # an empty array cannot be cast
    try:
        while len(view):
            n = os.pwrite(descriptor, view, offset)
            view, offset = view[n:], offset + n
    except OSError as error:
        raise GGUFShardError(f"{path}: offset {offset}: {error.strerror}") from None


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
        If the file exists, is not a regular one, the folder cannot be written, the disk is too
        full, or another process is writing the same file.
    """

    def __init__(self, path: str | os.PathLike[str], n_bytes: int, force: bool = False) -> None:
        self.path = Path(path)
        self.pending = pending_path(self.path)
        if self.path.is_dir():
            raise GGUFShardError(f"{self.path}: is a folder")
        if self.path.exists() and not self.path.is_file():
            raise GGUFShardError(f"{self.path}: is not a regular file")
        if self.path.exists() and not force:
            raise GGUFShardError(f"{self.path}: exists already (--force replaces it)")
        try:
            require_room(self.path, n_bytes)
            self._descriptor = os.open(self.pending, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise GGUFShardError(f"{self.pending}: {error.strerror}") from None
        self._open = True
        self._keep = False
        self._settled = 0
        try:
            take_lock(self._descriptor, self.pending)
        except GGUFShardError:
            self._close()
            raise
        try:
            os.ftruncate(self._descriptor, 0)
            os.ftruncate(self._descriptor, n_bytes)
        except OSError as error:
            self._discard()
            raise GGUFShardError(f"{self.pending}: {error.strerror}") from None

    def __enter__(self) -> PendingFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._discard()

    def fileno(self) -> int:
        """The descriptor of the file as it is being written, open for reading, too."""
        return self._descriptor

    def write(self, data: bytes | np.ndarray, offset: int) -> None:
        """Write all of `data` at byte `offset`.

        Raises
        ------
        GGUFShardError
            If the disk refuses.
        """
        write_fully(self._descriptor, data, offset, self.path)

    def settle(self, end: int) -> None:
        """Have the system begin to write what lies before byte `end` and will not change again, so
        that `sync` has little left to wait for. For one thread."""
        if end - self._settled < _WRITE_BACK_BYTES or not hasattr(os, "posix_fadvise"):
            return
        # What is dirty is being written from then on; what is clean would be forgotten.
        with suppress(OSError):  # no more than a hint
            os.posix_fadvise(
                self._descriptor, self._settled, end - self._settled, os.POSIX_FADV_DONTNEED
            )
        self._settled = end

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

    def _discard(self) -> None:
        try:
            if not self._keep and is_at(self._descriptor, self.pending):
                self.pending.unlink()
        except OSError:
            pass  # it counts for nothing, and the next writer takes it over
        finally:
            self._close()  # which gives up the lock

    def _close(self) -> None:
        self._open = False
        os.close(self._descriptor)


def commit_together(first: PendingFile, *others: PendingFile) -> None:
    """Commit files that belong together: the rename of the first decides.

    All are durable before it. If anything fails after it, the others stay behind complete, as
    `NAME.sgnew`, for `finish_pending`; before it, nothing has happened.
    """
    for file in (first, *others):
        file.sync()
    for file in others:
        file._keep = True
    try:
        first.commit()
    except BaseException:
        for file in others:
            file._keep = is_at(first._descriptor, first.path)
        raise
    for file in others:
        file.commit()
