"""A strict, bounded reader of GGUF headers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
Headers come from strangers, so every count and length is bounded by the bytes that remain before
anything of that size is allocated, and whatever does not fit is refused in one line that names
the file, the offset and the field.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from forge.errors import GGUFShardError
from forge.input_file import Identity, identity, open_input, read_fully
from forge.pending_file import journal_path

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its terminator
MAX_DIMS = 4
# Far beyond any model, and little work for a file that lies.
MAX_HEADER_BYTES = 64 << 20
_HEADER_READS = (1 << 20, 8 << 20, MAX_HEADER_BYTES)
_MOST_ITEMS = 1 << 15  # key-values, and tensors
_MOST_STRINGS = 1 << 20  # of one array
_SMALLEST_KEY_VALUE = 8 + 1 + 4 + 1
_SMALLEST_TENSOR_INFO = 8 + 1 + 4 + 8 + 4 + 8
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_SHOWN_TEXT = 80


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file.

    Attributes
    ----------
    type_id
        The ggml type as stored; `ggml_type` is None where it is not known here.
    shape
        Elements per dimension, ggml's order: the contiguous one first.
    offset, bytes
        Place in the file. For an unknown type the bytes reach to the next tensor.
    """

    name: str
    type_id: int
    ggml_type: GGMLQuantizationType | None
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What the header of one GGUF file says.

    Attributes
    ----------
    metadata
        Key-values as Python scalars, strings, NumPy arrays and lists of strings. Strings that are
        not UTF-8 keep their bytes as surrogate escapes.
    header_bytes
        End of the tensor infos; `data_offset` is that, aligned.
    identity
        Which state of which file it was read from (`forge.input_file.identity`); None if it was
        not read from a file.
    """

    name: str
    file_bytes: int
    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    header_bytes: int
    data_offset: int
    identity: Identity | None = field(default=None, compare=False, repr=False)


def shown(value: Any) -> str:
    """A value from the file, short and on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}..."


class _Cursor:
    """Bounded reads from the start of a file; every error names file, offset and field."""

    def __init__(self, data: Any, name: str) -> None:
        # Of bytes a slice is one copy, of a bytearray two.
        self.data = bytes(memoryview(data)[:MAX_HEADER_BYTES])
        self.name = name
        self.offset = 0
        self.end = len(self.data)

    @property
    def remaining(self) -> int:
        return self.end - self.offset

    def fail(self, field: str, reason: str) -> GGUFShardError:
        return GGUFShardError(f"{self.name}: offset {self.offset}: {field}: {reason}")

    def take(self, n_bytes: int, field: str) -> bytes:
        if n_bytes > self.remaining:
            raise self.fail(field, f"needs {n_bytes} bytes, {self.remaining} remain")
        data = self.data[self.offset : self.offset + n_bytes]
        self.offset += n_bytes
        return data

    def u32(self, field: str) -> int:
        return int.from_bytes(self.take(4, field), "little")

    def u64(self, field: str) -> int:
        return int.from_bytes(self.take(8, field), "little")

    def count(self, field: str, smallest: int, most: int = MAX_HEADER_BYTES) -> int:
        """A number of items of at least `smallest` bytes each, which must still fit."""
        value = self.u64(field)
        if value * smallest > self.remaining:
            self.offset -= 8
            raise self.fail(field, f"{value} do not fit in the {self.remaining - 8} bytes left")
        if value > most:
            raise self.fail(field, f"{value} are more than the {most} that are supported")
        return value

    def string(self, field: str, longest: int | None = None) -> str:
        length = self.count(f"{field} length", 1)
        if longest is not None and not 1 <= length <= longest:
            self.offset -= 8
            raise self.fail(field, f"length {length} is not within 1..{longest}")
        return self.take(length, field).decode("utf-8", "surrogateescape")

    def strings(self, count: int, field: str) -> list[str]:
        # The hot loop of a vocabulary of 250,000 pieces: one slice and one unpack a piece.
        data, offset, end = self.data, self.offset, self.end
        unpack = struct.Struct("<Q").unpack_from
        items = []
        for i in range(count):
            (length,) = unpack(data, offset) if offset + 8 <= end else (end,)
            start = offset + 8
            if length > end - start:
                self.offset = offset
                raise self.fail(f"{field}[{i}]", f"length {length} does not fit in the file")
            offset = start + length
            items.append(data[start:offset].decode("utf-8", "surrogateescape"))
        self.offset = offset
        return items


def _read_numbers(cursor: _Cursor, kind: int, count: int, field: str) -> np.ndarray:
    dtype = np.dtype(_SCALARS[kind])
    values = np.frombuffer(cursor.take(count * dtype.itemsize, field), dtype)
    if kind == _BOOL:
        if (values > 1).any():
            raise cursor.fail(field, "a bool is neither 0 nor 1")
        return values.astype(bool)
    return values


def _read_value(cursor: _Cursor, kind: int, field: str) -> Any:
    if kind == _STRING:
        return cursor.string(field)
    if kind in _SCALARS:
        return _read_numbers(cursor, kind, 1, field)[0].item()
    if kind != _ARRAY:
        raise cursor.fail(field, f"value type {kind} is unknown")
    item_kind = cursor.u32(f"{field} item type")
    if item_kind == _STRING:
        return cursor.strings(cursor.count(f"{field} length", 8, _MOST_STRINGS), field)
    if item_kind not in _SCALARS:
        reason = "nested arrays are not supported" if item_kind == _ARRAY else "unknown"
        raise cursor.fail(field, f"array item type {item_kind}: {reason}")
    size = np.dtype(_SCALARS[item_kind]).itemsize
    return _read_numbers(cursor, item_kind, cursor.count(f"{field} length", size), field)


def _read_metadata(cursor: _Cursor, n_kv: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(n_kv):
        key = cursor.string(f"key {i}", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.fail(f"key {i}", f"{shown(key)} is given twice")
        kind = cursor.u32(f"type of {shown(key)}")
        metadata[key] = _read_value(cursor, kind, shown(key))
    return metadata


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        type(alignment) is not int
        or not 1 <= alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise cursor.fail(
            "general.alignment", f"{shown(alignment)} is not a power of two up to {MAX_ALIGNMENT}"
        )
    return alignment


def _read_tensor_info(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(f"name of tensor {index}", MAX_NAME_BYTES)
    field = f"tensor {name!r}"
    n_dims = cursor.u32(f"{field} dimensions")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(field, f"{n_dims} dimensions are not within 1..{MAX_DIMS}")
    shape = tuple(cursor.u64(f"{field} shape") for _ in range(n_dims))
    if min(shape) == 0:
        raise cursor.fail(field, f"shape {list(shape)} has a zero")
    return name, shape, cursor.u32(f"{field} type"), cursor.u64(f"{field} offset")


def _tensor_bytes(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int) -> int | None:
    """Size of a tensor in the file; None where the type is not known."""
    try:
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
    except (ValueError, KeyError):
        return None
    if shape[0] % block_elements:
        raise cursor.fail(
            f"tensor {name!r}", f"rows of {shape[0]} are not whole blocks of {block_elements}"
        )
    n_elements = 1
    for extent in shape:
        n_elements *= extent
    return n_elements // block_elements * block_bytes


def _place_tensors(cursor: _Cursor, infos: list[Any], data_offset: int, file_bytes: int,
                   alignment: int) -> tuple[TensorInfo, ...]:  # fmt: skip
    """Check that tensors are aligned, inside the file and apart; give unknown types an extent."""
    offsets = sorted(info[3] for info in infos)
    ends = dict(zip(offsets, [*offsets[1:], file_bytes - data_offset], strict=False))
    tensors = []
    names = set()
    for name, shape, type_id, offset in infos:
        field = f"tensor {name!r}"
        if name in names:
            raise cursor.fail(field, "the name is given twice")
        names.add(name)
        if offset % alignment:
            raise cursor.fail(field, f"offset {offset} is not a multiple of {alignment}")
        n_bytes = _tensor_bytes(cursor, name, shape, type_id)
        ggml_type = None if n_bytes is None else GGMLQuantizationType(type_id)
        if n_bytes is None:
            n_bytes = ends[offset] - offset
        if n_bytes <= 0 or data_offset + offset + n_bytes > file_bytes:
            raise cursor.fail(
                field, f"{n_bytes} bytes at {data_offset + offset} do not lie in the file of "
                f"{file_bytes} bytes"
            )  # fmt: skip
        if offset + n_bytes > ends[offset]:
            raise cursor.fail(field, f"{n_bytes} bytes at {offset} overlap the next tensor")
        tensors.append(TensorInfo(name, type_id, ggml_type, shape, data_offset + offset, n_bytes))
    if len(ends) != len(infos):
        raise cursor.fail("tensor offsets", "two tensors start at the same offset")
    return tuple(tensors)


def parse_header(data: Any, name: str, file_bytes: int | None = None) -> GGUFHeader:
    """Parse the header of a GGUF file.

    Parameters
    ----------
    data
        Bytes that begin with the header.
    name
        What errors call the file.
    file_bytes
        Size of the whole file; `len(data)` if None.

    Raises
    ------
    GGUFShardError
        If anything in the header does not fit or is not supported.
    """
    cursor = _Cursor(data, name)
    file_bytes = len(data) if file_bytes is None else file_bytes
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        raise GGUFShardError(f"{name}: offset 0: magic: {magic!r} is not {MAGIC!r}")
    version = cursor.u32("version")
    if version not in (2, 3):
        big_endian = version and version & 0xFFFF == 0
        reason = "big-endian files are not supported" if big_endian else "only 2 and 3 are"
        raise GGUFShardError(f"{name}: offset 4: version: {version:#x} is not supported: {reason}")
    n_tensors = cursor.count("n_tensors", _SMALLEST_TENSOR_INFO, _MOST_ITEMS)
    n_kv = cursor.count("n_kv", _SMALLEST_KEY_VALUE, _MOST_ITEMS)
    metadata = _read_metadata(cursor, n_kv)
    alignment = _alignment(cursor, metadata)
    infos = [_read_tensor_info(cursor, i) for i in range(n_tensors)]
    header_bytes = cursor.offset
    data_offset = min(-(-header_bytes // alignment) * alignment, file_bytes)
    tensors = _place_tensors(cursor, infos, data_offset, file_bytes, alignment)
    return GGUFHeader(
        name, file_bytes, version, alignment, metadata, tensors, header_bytes, data_offset
    )


def read_gguf(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check the header of the GGUF file at `path`.

    Raises
    ------
    GGUFShardError
        If it is not a GGUF file that can be read here, or an update in place of it was
        interrupted: it may be half old and half new then.
    OSError
        If it cannot be opened.
    """
    if os.path.lexists(journal_path(Path(path))):
        raise GGUFShardError(
            f"{path}: an update in place was interrupted; `gguf-shard apply --in-place` with any "
            f"patch, or `gguf-shard apply --resume {path}`, finishes it"
        )
    with open_input(path) as file:
        found = identity(file.fileno())
        if found.bytes == 0:
            raise GGUFShardError(f"{path}: offset 0: magic: the file is empty")
        header = _read_header(file.fileno(), str(path), found.bytes)
    return replace(header, identity=found)


def _read_header(descriptor: int, path: str, file_bytes: int) -> GGUFHeader:
    """Parse the start of a file; more and more of it, as headers seldom have a MiB."""
    for most in _HEADER_READS:
        data = bytearray(min(most, file_bytes))
        read_fully(descriptor, memoryview(data), 0, path)
        try:
            return parse_header(data, path, file_bytes)
        except GGUFShardError:
            if len(data) == min(MAX_HEADER_BYTES, file_bytes):
                raise
    raise AssertionError  # the last read is of all that counts
