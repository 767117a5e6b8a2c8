"""Reading what strangers named: a regular file, or an error; never a wait for a named pipe."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from typing import NamedTuple

from forge.errors import GGUFShardError

_HASH_CHUNK = 8 << 20


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def open_input(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a file for reading, unbuffered.

    Raises
    ------
    GGUFShardError
        If it is a pipe, a socket or a device.
    OSError
        If it cannot be opened, or is a folder.
    """
    file = io.FileIO(path, "rb", opener=_without_waiting)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise GGUFShardError(f"{path}: is not a regular file")
    return file


class Identity(NamedTuple):
    """A file, and the state that it is in as far as the file system tells."""

    device: int
    inode: int
    bytes: int
    changed_ns: int


def identity(descriptor: int) -> Identity:
    """Which file is open, in which state; it has another identity once somebody writes to it."""
    status = os.fstat(descriptor)
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_fully(descriptor: int, buffer: memoryview, offset: int, path: object) -> None:
    """Fill `buffer` from byte `offset` of an open file.

    Raises
    ------
    GGUFShardError
        If the file ends first or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            n = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise GGUFShardError(f"{path}: offset {offset + done}: {error.strerror}") from None
        if n == 0:
            raise GGUFShardError(
                f"{path}: offset {offset + done}: the file ends, {len(buffer) - done} bytes short"
            )
        done += n


def sha256_of(file: io.FileIO) -> str:
    """SHA-256 of the rest of an open file, hexadecimal."""
    digest = hashlib.sha256()
    while chunk := file.read(_HASH_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
