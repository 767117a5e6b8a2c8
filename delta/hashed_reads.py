"""Reading a model and hashing its files in one go.

Whoever compares models reads nearly all of them, and nearly in the order of the files. So what is
read anyway goes to the SHA-256 of its file if it is what comes next there; what was skipped is read
for the hash alone, and what comes late has been hashed already.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from delta.source_model import SourceModel
from forge.buffers import ReadBuffer, scratch

_MOST_WAITING = 8  # pieces of what was read
_PIECE_BYTES = 1 << 20


class HashedReads(SourceModel):
    """A model whose files are hashed on a thread of their own while it is read.

    Parameters
    ----------
    model
        The model; it is not closed with this object.
    role
        What no other model that is read at the same time is.

    Notes
    -----
    For one reader, who leaves alone what it has been given. What `read` gives lies in memory
    that is used again: it is good for the next few reads.
    """

    def __init__(self, model: SourceModel, role: str) -> None:
        self.path, self.names, self.headers = model.path, model.names, model.headers
        self._model = model
        self._digests = [hashlib.sha256() for _ in model.names]
        self._done = [0] * len(model.names)
        self._hasher = ThreadPoolExecutor(1)
        self._buffer = ReadBuffer(_PIECE_BYTES)
        self._role = role
        self._n_reads = 0
        self._waiting: deque[Future[None]] = deque()

    def read(self, part: int, offset: int, n_bytes: int) -> np.ndarray:
        self._n_reads += 1
        place = self._n_reads % (_MOST_WAITING + 1)  # one more than can wait to be hashed
        data = scratch(f"{self._role} {place}", n_bytes, offset)
        self.read_into(part, offset, data)
        return data

    def read_into(self, part: int, offset: int, buffer: np.ndarray) -> None:
        self._model.read_into(part, offset, buffer)
        while len(self._waiting) >= _MOST_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._hasher.submit(self._hash, part, offset, buffer))

    def sha256(self, advance: Callable[[int], None] = lambda n_bytes: None) -> tuple[str, ...]:
        """SHA-256 of each file, hexadecimal, once what nobody has read is read."""
        for part, n_bytes in enumerate(self.sizes):
            self._waiting.append(self._hasher.submit(self._read_up_to, part, n_bytes))
        while self._waiting:
            self._waiting.popleft().result()
        return tuple(digest.hexdigest() for digest in self._digests)

    def files_on_disk(self) -> list[Path]:
        return self._model.files_on_disk()

    def check_in_place(self) -> None:
        self._model.check_in_place()

    def check_unchanged(self) -> None:
        self._model.check_unchanged()

    def close(self) -> None:
        """Stop hashing."""
        self._hasher.shutdown(cancel_futures=True)

    def _hash(self, part: int, offset: int, data: np.ndarray) -> None:
        self._read_up_to(part, offset)
        late = self._done[part] - offset
        if late < len(data):
            self._digests[part].update(data[late:].data)
            self._done[part] = offset + len(data)

    def _read_up_to(self, part: int, end: int) -> None:
        while self._done[part] < end:
            n_bytes = min(_PIECE_BYTES, end - self._done[part])
            data = self._buffer.at(self._done[part], n_bytes)
            self._model.read_into(part, self._done[part], data)
            self._digests[part].update(data.data)
            self._done[part] += n_bytes
