"""A GGUF file that is read while nobody may change it.

Which file it is, its size and the time of its last change are noted when the header is read, and
compared when it is opened again and at the end: what was read in between is then one state of one
file, not a mixture of two.
"""

from __future__ import annotations

import numpy as np

from forge.buffers import read_buffer
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader
from forge.input_file import identity, open_input, read_fully


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
        If it is not the file that the header was read from, or has been changed since.
    OSError
        If it cannot be opened.
    """

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self._file = open_input(header.name)
        self._before = header.identity or identity(self._file.fileno())
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
        now = identity(self.fileno())
        if now != self._before or now.bytes != self.header.file_bytes:
            raise GGUFShardError(f"{self.header.name}: changed while it was read")
