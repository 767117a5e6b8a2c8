"""A model as the bytes of its source files, wherever they lie.

A plain model is read from its GGUF files; a sharded one from its checked pages. Either way it is
addressed by file and offset, and has the headers that the files have.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from forge.buffers import ReadBuffer, read_buffer
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader
from forge.pending_file import is_at
from forge.sgmap_reader import load_map
from forge.sharded_model import ShardedModel
from forge.source_bytes import SourceBytes
from forge.source_file import SourceFile
from forge.split_model import read_model

_HASH_CHUNK = 1 << 20


class SourceModel(ABC):
    """The source files of a model, opened for reading; a context manager.

    Attributes
    ----------
    path
        What was opened: the (first) GGUF file, or the map.
    names
        Bare names of the source files.
    headers
        Their headers, checked.
    """

    path: Path
    names: tuple[str, ...]
    headers: tuple[GGUFHeader, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each file."""
        return tuple(header.file_bytes for header in self.headers)

    @property
    def n_bytes(self) -> int:
        return sum(self.sizes)

    @abstractmethod
    def read_into(self, part: int, offset: int, buffer: np.ndarray) -> None:
        """Fill a contiguous uint8 array with bytes of a file; errors as of `read`."""

    def read(self, part: int, offset: int, n_bytes: int) -> np.ndarray:
        """Bytes of a file, uint8 [n_bytes].

        Raises
        ------
        GGUFShardError
            If they cannot be read, or a page that holds them is damaged.
        """
        buffer = read_buffer(offset, n_bytes)
        self.read_into(part, offset, buffer)
        return buffer

    @abstractmethod
    def sha256(self, advance: Callable[[int], None] = lambda n_bytes: None) -> tuple[str, ...]:
        """SHA-256 of each file, hexadecimal; of a sharded model what its map says."""

    def header_bytes(self, part: int) -> bytes:
        """The header of a file, up to the end of its tensor infos."""
        return self.read(part, 0, self.headers[part].header_bytes).tobytes()

    @abstractmethod
    def files_on_disk(self) -> list[Path]:
        """The files that it is read from."""

    @abstractmethod
    def check_in_place(self) -> None:
        """GGUFShardError if other files have taken the places of those that are open."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """GGUFShardError if a file has been written to since it was opened."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> SourceModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainModel(SourceModel):
    """GGUF files as they lie there; a split model is taken by its first part."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.headers = tuple(read_model(path))
        self.names = tuple(os.path.basename(header.name) for header in self.headers)
        self.files = [SourceFile(header) for header in self.headers]

    def read_into(self, part: int, offset: int, buffer: np.ndarray) -> None:
        self.files[part].read_into(offset, buffer)

    def sha256(self, advance: Callable[[int], None] = lambda n_bytes: None) -> tuple[str, ...]:
        return tuple(
            _hash_file(file, n_bytes, advance)
            for file, n_bytes in zip(self.files, self.sizes, strict=True)
        )

    def files_on_disk(self) -> list[Path]:
        return [Path(header.name) for header in self.headers]

    def check_in_place(self) -> None:
        for file, path in zip(self.files, self.files_on_disk(), strict=True):
            _require_at(file.fileno(), path)

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()


class ShardedSource(SourceModel):
    """The source files of a sharded model, from its pages.

    Attributes
    ----------
    model
        The open sharded model.
    """

    def __init__(self, model: ShardedModel) -> None:
        self.path = model.map_path
        self.model = model
        self.names = tuple(source.name for source in model.map.source)
        self.headers = tuple(model.source_header(part) for part in range(len(self.names)))
        self._bytes = SourceBytes(model)

    def read_into(self, part: int, offset: int, buffer: np.ndarray) -> None:
        buffer[:] = self._bytes.read(part, offset, len(buffer))

    def sha256(self, advance: Callable[[int], None] = lambda n_bytes: None) -> tuple[str, ...]:
        advance(self.n_bytes)
        return tuple(source.sha256 for source in self.model.map.source)

    def files_on_disk(self) -> list[Path]:
        return [self.model.map_path, self.model.core.path]

    def check_in_place(self) -> None:
        _require_at(self.model.core.fileno(), self.model.core.path)
        if load_map(self.path) != self.model.map:
            raise GGUFShardError(f"{self.path}: was replaced while it was read")

    def check_unchanged(self) -> None:
        pass  # each page is checked against the table that was read when the model was opened

    def close(self) -> None:
        self.model.close()


def _require_at(descriptor: int, path: Path) -> None:
    if not is_at(descriptor, path):
        raise GGUFShardError(f"{path}: was replaced while it was read")


def open_source(path: str | os.PathLike[str]) -> SourceModel:
    """Open a GGUF file, the first part of a split model, or a `.sgmap`.

    Raises
    ------
    GGUFShardError
        If it is not a model that can be read here.
    OSError
        If it cannot be opened.
    """
    if Path(path).suffix != ".sgmap":
        return PlainModel(path)
    model = ShardedModel(path)
    try:
        return ShardedSource(model)
    except BaseException:
        model.close()
        raise


def _hash_file(file: SourceFile, n_bytes: int, advance: Callable[[int], None]) -> str:
    """SHA-256 of a file, hexadecimal, on one thread: others have work of their own meanwhile."""
    digest = hashlib.sha256()
    buffer = ReadBuffer(_HASH_CHUNK)
    for offset in range(0, n_bytes, _HASH_CHUNK):
        data = buffer.at(offset, min(_HASH_CHUNK, n_bytes - offset))
        file.read_into(offset, data)
        digest.update(data.data)
        advance(len(data))
    return digest.hexdigest()


def mismatch(model: SourceModel, sizes: Sequence[int], sha256: Sequence[str],
             advance: Callable[[int], None] = lambda n_bytes: None) -> str | None:  # fmt: skip
    """How the files of a model differ from what they should be: one line, or None."""
    if list(model.sizes) != list(sizes):
        return f"{model.path}: has {_listed(model.sizes)} bytes, not {_listed(sizes)}"
    for name, found, expected in zip(model.names, model.sha256(advance), sha256, strict=True):
        if found != expected:
            return f"{model.path}: {name} has SHA-256 {found}, not {expected}"
    return None


def _listed(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes))


def require(model: SourceModel, sizes: Sequence[int], sha256: Sequence[str], role: str,
            advance: Callable[[int], None] = lambda n_bytes: None) -> None:  # fmt: skip
    """GGUFShardError if a model is not the one that a patch calls its `role`."""
    reason = mismatch(model, sizes, sha256, advance)
    if reason is not None:
        raise GGUFShardError(f"{reason}: it is not the patch's {role}")
