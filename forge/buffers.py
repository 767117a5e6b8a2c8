"""Memory for large reads of files, placed where the kernel copies fastest.

The kernel fills a buffer from the page cache with one string move. AMD's processors (seen on Zen 2
to 5) do that three to five times slower where the destination lies up to 32 bytes behind the source
modulo 4096, and NumPy's large arrays begin 16 bytes behind the start of a page: the wrong place for
just the reads that begin on a page of the file. Half a page away from the source is right for any
offset, for writing the same bytes back to it, too.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from forge.pages import PAGE_BYTES
from forge.thread_things import ThreadThings

_LARGE = 1 << 15  # below it the call costs more than the copy
_ALIGNMENT = 64

_MOST_FREE = 8  # arrays

_things = ThreadThings()
_free: list[np.ndarray] = []


class ReadBuffer:
    """Memory that is read into again and again, by one thread.

    New memory has to be mapped and cleared page by page, which takes as long as the copy.

    Parameters
    ----------
    n_bytes
        The largest read.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._memory = np.empty(n_bytes + PAGE_BYTES, np.uint8)

    def at(self, offset: int, n_bytes: int) -> np.ndarray:
        """Where to read what lies from byte `offset` of a file on, uint8 [n_bytes], aligned to 8
        bytes; what was read before is lost."""
        wanted = (offset + PAGE_BYTES // 2) // _ALIGNMENT * _ALIGNMENT
        begin = (wanted - self._memory.ctypes.data) % PAGE_BYTES
        return self._memory[begin : begin + n_bytes]


def read_buffer(offset: int, n_bytes: int) -> np.ndarray:
    """New memory to read into from byte `offset` of a file on, uint8 [n_bytes], aligned to 8 bytes.

    Examples
    --------
    >>> buffer = read_buffer(4096, 1 << 20)
    >>> (buffer.ctypes.data - 4096) % 4096
    2048
    """
    if n_bytes < _LARGE:
        return np.empty(n_bytes, np.uint8)
    return ReadBuffer(n_bytes).at(offset, n_bytes)


def scratch(name: str, n_bytes: int, offset: int = 0) -> np.ndarray:
    """Memory for what is made on the way to something else, uint8 [n_bytes]; for a read, from byte
    `offset` of a file on.

    New memory is cleared page by page, and a large array's is given back at once: making it again
    and again can take longer than what is done in it. This memory stays its thread's, and is left
    to another when that ends. What is in it is good until the thread asks for the same name again.

    Examples
    --------
    >>> one, other = scratch("one", 1000), scratch("other", 1000)
    >>> one[:], other[:] = 1, 2
    >>> one.sum(), scratch("one", 10).base is one.base
    (np.uint64(1000), True)
    """
    buffers: dict[str, ReadBuffer] = _things.mine()
    if name not in buffers or buffers[name].n_bytes < n_bytes:
        buffers[name] = ReadBuffer(n_bytes)
    return buffers[name].at(offset, n_bytes)


class _Loan:
    """Memory that an array lies in: free for another when the last view of the array is gone."""

    def __init__(self, memory: np.ndarray, free: list[np.ndarray]) -> None:
        self._memory, self._free = memory, free
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        if len(self._free) < _MOST_FREE:
            self._free.append(self._memory)


def recycled(n_bytes: int) -> np.ndarray:
    """Memory for what one thread makes and another uses up, uint8 [n_bytes].

    It is what an earlier such array had that nobody can see any more, or new.

    Examples
    --------
    >>> array = recycled(1 << 20)
    >>> place, part = array.ctypes.data, array[1000:]
    >>> del array
    >>> recycled(1 << 20).ctypes.data == place
    False
    >>> del part
    >>> recycled(1 << 20).ctypes.data == place
    True
    """
    if n_bytes < _LARGE:
        return np.empty(n_bytes, np.uint8)
    memory = None
    with suppress(IndexError):
        memory = _free.pop()
    if memory is None or memory.size < n_bytes:
        memory = np.empty(n_bytes, np.uint8)
    return np.asarray(_Loan(memory, _free))[:n_bytes]


def forget_scratch() -> None:
    """Give back this thread's scratch memory, what ended threads have left, and what is free or
    becomes free of `recycled`."""
    global _free
    _things.forget()
    _free = []  # what is still in use goes to the old list, and with it
