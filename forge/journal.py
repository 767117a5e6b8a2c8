"""A redo log: several files of one folder are changed in place, and a kill at any point is no harm.

What is to be written is first collected in the *journal* of the change, `OWNER.sgjournal`, where
the owner is the file a model is named by: its map, its GGUF file, or the first part of a split one.

    with JournalWriter(owner, [("core.gguf", size), ("core.sgmap", size)], n_bytes) as journal:
        journal.record(0, offset, data)         # as often as needed; the files are not touched
        journal.overlay(0, offset, buffer)      # what will be there
        journal.commit()                        # from here on the change will happen
    finish_journal(owner)                       # it happens; after a kill, whoever comes next calls

Until `commit` the journal is `OWNER.sgjournal.sgnew`, which counts for nothing. After it, writing
the records again, and again from the start, always ends in the same files.

The layout is described in `forge.journal_file`, the rules in `forge/FORMAT.md`.

A journal knows its files by samples of the bytes that it leaves alone, so it is not written into
others that took their names since. (A file that is written anew as a whole needs none: it comes
out right whatever it was.) Whoever replaces an owner calls `finish_journal` while holding the
`PendingFile` of it: a journal is written under that lock, too, so no other can come to be.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import xxhash

from forge.byte_ranges import ByteRanges
from forge.errors import GGUFShardError
from forge.input_file import read_fully
from forge.journal_file import MAX_SAMPLE_BYTES, JournalFile, Target, head_bytes, tail_bytes
from forge.pending_file import (
    PendingFile,
    is_at,
    journal_path,
    pending_path,
    require_room,
    sync_folder,
    write_fully,
)
from forge.progress import progress_bar
from forge.sgmap import core_path
from forge.split_model import is_later_part

_BUFFER_BYTES = 1 << 20
_SAMPLES = 64
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)


def _may_change(owner: Path, name: str) -> bool:
    """Whether a file belongs to the model that is named by `owner`; other names are refused."""
    if owner.suffix == ".sgmap" and name == core_path(owner).name:
        return True
    return name == owner.name or is_later_part(name, owner.name)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The descriptor of a file to change; a link is not followed out of the folder."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise GGUFShardError(f"{path}: is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def _sample_places(gaps: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Some dozens of places, spread over the gaps between records: (offset, bytes)."""
    step = max(size // _SAMPLES, MAX_SAMPLE_BYTES)
    place = 0
    for begin, end in gaps:
        place = max(place, begin)
        while place < end:
            yield place, min(MAX_SAMPLE_BYTES, end - place)
            place += step


def _sample_digest(descriptor: int, offset: int, n_bytes: int, path: Path) -> int:
    data = np.empty(n_bytes, np.uint8)
    read_fully(descriptor, data.data, offset, path)
    return int(xxhash.xxh3_64_intdigest(data))


class JournalWriter:
    """The journal of one change, being written; a context manager.

    Parameters
    ----------
    owner
        The map, the GGUF file, or the first part of a split model.
    files
        What will be changed: (bare name in the owner's folder, size afterwards). Only files of the
        owner's model: itself, its pages, its later parts.
    n_bytes
        Bytes to be recorded, at most: the disk must have room for them, and for what the files
        will grow by.

    Raises
    ------
    ValueError
        If no file is named, or one twice, or with a size below 0.
    GGUFShardError
        If the journal of an interrupted change is there, another process is writing one, a file
        cannot be changed, or the disk is too full.

    Notes
    -----
    There is one writer at a time for an owner: what a change is made from MUST be read after this
    is constructed, or it may be what another change has just replaced. Without `commit` nothing is
    left behind.
    """

    def __init__(
        self, owner: str | os.PathLike[str], files: Sequence[tuple[str, int]], n_bytes: int
    ) -> None:
        if not files or len(dict(files)) < len(files) or min(size for _, size in files) < 0:
            raise ValueError(f"{list(files)}: not files, each with a size")
        self._owner = Path(owner)
        self._path = journal_path(self._owner)
        self._ranges = [ByteRanges() for _ in files]
        self._digest = xxhash.xxh3_128()
        self._end = 0  # of what is in the file
        self._buffer: list[bytes] = []
        self._buffer_bytes = 0
        self._lock = threading.Lock()
        with ExitStack() as stack:
            stack.enter_context(PendingFile(self._owner, 0, force=True))  # the lock, no more
            self._file = stack.enter_context(PendingFile(self._path, 0, force=True))
            if os.path.lexists(self._path):
                raise GGUFShardError(f"{self._path}: an update in place was interrupted before")
            self._targets = [self._target(name, size) for name, size in files]
            self._growth = sum(target.growth for target in self._targets)
            require_room(self._path, n_bytes + self._growth)
            self._append(head_bytes(self._targets))
            self._flush()
            self._data_begin = self._end
            self._files = stack.pop_all()

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _target(self, name: str, size: int) -> Target:
        if not _may_change(self._owner, name):
            raise GGUFShardError(f"{self._path}: {name!r} is no file of {self._owner.name}")
        path = self._owner.with_name(name)
        try:
            with _opened(path) as descriptor:
                return Target(name, os.fstat(descriptor).st_size, size)
        except OSError as error:
            raise GGUFShardError(f"{path}: {error.strerror}") from None

    def record(self, file: int, offset: int, data: bytes | np.ndarray) -> None:
        """Write `data` at `offset` of a file, once the change is finished.

        Raises
        ------
        ValueError
            If it does not lie in the file as it will be, or a record is there already.
        GGUFShardError
            If the disk refuses.
        """
        view = memoryview(data)
        size = self._targets[file].size_after
        if not 0 <= offset <= offset + view.nbytes <= size:
            name = self._targets[file].name
            raise ValueError(f"{name}: {view.nbytes} bytes at {offset} do not lie in {size} bytes")
        if not view.nbytes:
            return
        with self._lock:
            position = self._end + self._buffer_bytes - self._data_begin
            self._ranges[file].add(offset, view.nbytes, position)
            self._append(view)

    def _append(self, data: bytes | memoryview) -> None:
        self._buffer.append(bytes(data))
        self._buffer_bytes += len(self._buffer[-1])
        if self._buffer_bytes >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Write the buffer; if the disk refuses, it stays as it is."""
        data = b"".join(self._buffer)
        self._file.write(data, self._end)
        self._digest.update(data)
        self._end += len(data)
        self._buffer, self._buffer_bytes = [], 0

    def overlay(self, file: int, offset: int, buffer: np.ndarray) -> None:
        """Put what is recorded for a place of a file over what the file holds there.

        Several threads may do so at once.

        Parameters
        ----------
        file, offset
            The place.
        buffer
            uint8 [n], contiguous: bytes of the file as it is; afterwards, as it will be.

        Raises
        ------
        GGUFShardError
            If the journal cannot be read.
        """
        end = offset + buffer.size
        with self._lock:
            found = list(self._ranges[file].overlapping(offset, end))
            written = self._end - self._data_begin
            if any(position + size > written for _, size, position in found):
                self._flush()
        for begin, size, position in found:
            first, last = max(begin, offset), min(begin + size, end)
            read_fully(
                self._file.fileno(),
                buffer[first - offset : last - offset].data,
                self._data_begin + position + first - begin,
                self._file.pending,
            )

    def commit(self) -> None:
        """Seal the journal and give it its name: from then on the change will happen.

        Raises
        ------
        GGUFShardError
            If the disk refuses. Nothing will happen then, unless it was making the name durable
            that failed: the journal has its name in that case, and is finished as any other.
        """
        try:
            with self._lock:
                self._seal()
            self._file.commit()
        except OSError as error:
            raise GGUFShardError(f"{self._path}: {error.strerror}") from None
        finally:
            self._files.close()  # nothing is left of what has not got its name

    def _seal(self) -> None:
        """Write what stands behind the data."""
        require_room(self._path, self._growth)
        data_bytes = self._end + self._buffer_bytes - self._data_begin
        for ranges in self._ranges:
            for table in ranges.tables():
                self._append(table.tobytes())
        counts = []
        for number, ranges in enumerate(self._ranges):
            samples = self._samples(number)
            self._append(samples.tobytes())
            counts.append((len(ranges), len(samples)))
        self._append(tail_bytes(counts, data_bytes))
        self._flush()
        self._file.write(self._digest.digest(), self._end)

    def _samples(self, number: int) -> np.ndarray:
        """Bytes of a file that will not change, uint64 [m, 3]: offset, bytes, digest."""
        target = self._targets[number]
        path = self._owner.with_name(target.name)
        places = _sample_places(self._ranges[number].gaps(target.kept), target.kept)
        with _opened(path) as descriptor:
            rows = [(at, n, _sample_digest(descriptor, at, n, path)) for at, n in places]
        return np.array(rows, "<u8").reshape(-1, 3)


def finish_journal(owner: str | os.PathLike[str], *, progress: bool = False) -> bool:
    """Make the change whose journal was committed, if there is one.

    A live process that does so is waited for. The journal goes when all is written, durable, and
    read back; until then the next call does everything again.

    Parameters
    ----------
    owner
        The map, the GGUF file, or the first part of a split model.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    bool
        Whether there was a journal.

    Raises
    ------
    GGUFShardError
        If the journal is damaged or is not one of these files: then nothing was written. If a file
        cannot be written: then the journal stays for the next try.
    """
    owner = Path(owner)
    path = journal_path(owner)
    found = False
    while os.path.lexists(path):
        with _refusals(path):
            try:
                journal = JournalFile(path)
            except FileNotFoundError:
                break
            with journal:
                fcntl.flock(journal.fileno(), fcntl.LOCK_EX)
                found = True
                if is_at(journal.fileno(), path):
                    _replay(journal, owner, progress)
                    break
    return found


def _replay(journal: JournalFile, owner: Path, progress: bool) -> None:
    """Check everything, then write everything, then take the journal away."""
    if not os.access(owner.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # It is read to be checked, to be written, and to be compared with what was written.
    with progress_bar(3 * journal.bytes, "finish update", progress) as advance:
        journal.verify(advance)
        for target in journal.targets:
            if not _may_change(owner, target.name):
                raise journal.damaged(f"{target.name!r} is no file of {owner.name}")
        # The name of the journal must outlast what is written by it.
        os.fsync(journal.fileno())
        sync_folder(owner.parent)
        for number, target in enumerate(journal.targets):
            _check_samples(journal, number, owner.with_name(target.name))
        for number, target in enumerate(journal.targets):
            _write_target(journal, number, owner.with_name(target.name), advance)
    _remove_lock(owner)
    os.unlink(journal.path)
    sync_folder(owner.parent)


def _remove_lock(owner: Path) -> None:
    """Take away what the journal's writer locked, if it died before it did so itself."""
    if os.path.lexists(pending_path(owner)):
        with suppress(GGUFShardError), PendingFile(owner, 0, force=True):
            pass  # somebody alive holds it, or it goes


def _check_samples(journal: JournalFile, number: int, path: Path) -> None:
    """Is this a file that the journal was made for, wherever an earlier try came to an end?"""
    target = journal.targets[number]
    if not os.path.lexists(path):
        raise journal.damaged(f"{path.name}: No such file")
    with _refusals(path), _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if not target.kept <= size <= target.kept + abs(target.size_after - target.size_before):
            raise journal.damaged(f"{path.name} has {size} bytes and is not the file it is for")
        for offset, n_bytes, digest in journal.samples(number):
            if _sample_digest(descriptor, offset, n_bytes, path) != digest:
                raise journal.damaged(f"{path.name}: offset {offset}: not the file it is for")


def _write_target(
    journal: JournalFile, number: int, path: Path, advance: Callable[[int], None]
) -> None:
    with _refusals(path), _opened(path) as descriptor:
        for offset, data in journal.pieces(number):
            write_fully(descriptor, data, offset, path)
            advance(data.size)
        os.ftruncate(descriptor, journal.targets[number].size_after)
        os.fsync(descriptor)
        for offset, data in journal.pieces(number):
            written = np.empty_like(data)
            read_fully(descriptor, written.data, offset, path)
            if written.tobytes() != data.tobytes():
                raise GGUFShardError(f"{path}: offset {offset}: wrong after writing")
            advance(data.size)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What the system refuses while a journal is being finished, in one line."""
    try:
        yield
    except OSError as error:
        what = "cannot be finished"
        if error.errno in _NO_ACCESS:
            what = "must be finished by someone with write access"
        raise GGUFShardError(
            f"{path}: {error.strerror}: an update in place was interrupted and {what}"
        ) from None
