"""A GGUF file that is read while nobody may change it.

Size and time of the last change are noted at the start and compared at the end: what was read in
between is then one state of the file, not a mixture of two.
"""

from __future__ import annotations

import os

import numpy as np

from forge.buffers import read_buffer
from forge.core_file import read_fully
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader


class SourceFile:
    """One file of a model, opened for reading; a context manager.

    Parameters
    ----------
    header
        What was read of the file before; its `name` is the path.

    Attributes
    ----------
    header
        The same.

    Raises
    ------
    GGUFShardError
        If the file has another size than the header says.
    OSError
        If it cannot be opened.
    """

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self._file = open(header.name, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._before = os.fstat(self._file.fileno())
        try:
            self.check_unchanged()
        except GGUFShardError:
            self.close()
            raise

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def fileno(self) -> int:
        """The descriptor of the open file."""
        return self._file.fileno()

    def read(self, offset: int, n_bytes: int) -> np.ndarray:
        """The bytes from `offset` on, uint8 [n_bytes].

        Raises
        ------
        GGUFShardError
            If the file ends first or cannot be read.
        """
        data = read_buffer(offset, n_bytes)
        self.read_into(offset, data)
        return data

    def read_into(self, offset: int, buffer: np.ndarray) -> None:
        """Fill a contiguous uint8 [n] from byte `offset` on; raises what `read` does."""
        read_fully(self.fileno(), buffer.data, offset, self.header.name)

    def check_unchanged(self) -> None:
        """Raise GGUFShardError if the file has been changed since it was opened."""
        now = os.fstat(self.fileno())
        same = (now.st_size, now.st_mtime_ns) == (self._before.st_size, self._before.st_mtime_ns)
        if not same or now.st_size != self.header.file_bytes:
            raise GGUFShardError(f"{self.header.name}: changed while it was read")
