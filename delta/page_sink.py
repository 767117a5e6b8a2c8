"""Where the bytes of a target go: a new file, or a journal of changes to the base."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from delta.page_grid import Run
from forge.buffers import read_buffer


class PageSink(ABC):
    """Where the bytes of a target go. `put` and `read` are called by several threads."""

    #: Whether the base's pages are there already, and stay where they are.
    has_base = False
    #: Whether what is not put is zero.
    is_zero = False

    @abstractmethod
    def put_header(self, part: int, data: bytes) -> None:
        """Take the header of a file."""

    @abstractmethod
    def put(self, run: Run, first_page: int, data: np.ndarray) -> None:
        """Take bytes of consecutive pages of a run."""

    @abstractmethod
    def read_into(self, part: int, offset: int, buffer: np.ndarray) -> None:
        """Fill a contiguous uint8 array with bytes of a file as they will be."""

    def settle(self, part: int, end: int) -> None:  # noqa: B027 - most need not know
        """All of a file before byte `end` has been put."""

    def read(self, part: int, offset: int, n_bytes: int) -> np.ndarray:
        """Bytes of a file as they will be, uint8 [n_bytes]."""
        buffer = read_buffer(offset, n_bytes)
        self.read_into(part, offset, buffer)
        return buffer
