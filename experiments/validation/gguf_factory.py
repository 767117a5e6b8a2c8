"""Small GGUF files written by hand: right ones of every kind, and wrong ones of any kind.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing is checked here:
counts, types, shapes and offsets are written as they are given.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_NUMBERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B",
            U64: "Q", I64: "q", F64: "d"}  # fmt: skip

#: A type id that no ggml version uses.
UNKNOWN_TYPE = 999


@dataclass(frozen=True)
class Tensor:
    """A tensor to write.

    `offset` is what its info says, counted from the start of the data; None for the next free
    place. `data` lies at that next free place in any case.
    """

    name: str | bytes
    type_id: int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None


def string(text: str | bytes, order: str = "<") -> bytes:
    """A GGUF string: its length and its bytes."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(f"{order}Q", len(data)) + data


def value(kind: int, content: Any, order: str = "<") -> bytes:
    """A value without its type: a number or a string."""
    if kind == STRING:
        return string(content, order)
    return struct.pack(order + _NUMBERS[kind], content)


def pair(key: str | bytes, kind: int, content: Any, order: str = "<") -> bytes:
    """A key and a scalar value."""
    return string(key, order) + struct.pack(f"{order}I", kind) + value(kind, content, order)


def array(key: str | bytes, kind: int, items: Sequence[Any], count: int | None = None) -> bytes:
    """A key and an array; `count` is what the array says of its length."""
    start = struct.pack("<IIQ", ARRAY, kind, len(items) if count is None else count)
    return string(key) + start + b"".join(value(kind, item) for item in items)


def header(
    pairs: Sequence[bytes],
    infos: Sequence[bytes],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    order: str = "<",
) -> bytes:
    """Everything before the padding in front of the data."""
    counts = (
        len(infos) if n_tensors is None else n_tensors,
        len(pairs) if n_pairs is None else n_pairs,
    )
    start = magic + struct.pack(f"{order}IQQ", version, *counts)
    return start + b"".join(pairs) + b"".join(infos)


def info(tensor: Tensor, offset: int, order: str = "<") -> bytes:
    """The tensor info: name, dimensions, type and offset."""
    dims = struct.pack(f"{order}I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
    return string(tensor.name, order) + dims + struct.pack(f"{order}IQ", tensor.type_id, offset)


def gguf(
    tensors: Sequence[Tensor] = (),
    pairs: Sequence[bytes] = (),
    *,
    alignment: int = 32,
    padding: int = 0,
    tail: bytes = b"",
    **options: Any,
) -> bytes:
    """A whole file.

    Parameters
    ----------
    alignment
        Where tensors start; the key `general.alignment` is written if it is not 32.
    padding
        The byte that fills what lies between header and tensors.
    tail
        What follows the last tensor.
    options
        See `header`.
    """
    order = options.get("order", "<")
    if alignment != 32:
        pairs = [*pairs, pair("general.alignment", U32, alignment, order)]
    infos, data = [], b""
    for tensor in tensors:
        data = _pad(data, alignment, padding)
        place = len(data) if tensor.offset is None else tensor.offset
        infos.append(info(tensor, place, order))
        data += tensor.data
    start = header(pairs, infos, **options)
    if tensors:
        start = _pad(start, alignment, padding)
    return start + data + tail


def _pad(data: bytes, alignment: int, byte: int) -> bytes:
    return data + bytes([byte]) * (-len(data) % alignment)


def tensor(
    name: str, ggml_type: GGMLQuantizationType, shape: tuple[int, ...], seed: int = 0
) -> Tensor:
    """A tensor of a known type with random bytes."""
    elements, block_bytes = GGML_QUANT_SIZES[ggml_type]
    n_bytes = int(np.prod(shape)) // elements * block_bytes
    return Tensor(name, int(ggml_type), shape, random_bytes(n_bytes, seed))


def blocks(name: str, ggml_type: GGMLQuantizationType, n_blocks: int, seed: int = 0) -> Tensor:
    """One row of `n_blocks` blocks."""
    return tensor(name, ggml_type, (n_blocks * GGML_QUANT_SIZES[ggml_type][0],), seed)


def random_bytes(n_bytes: int, seed: int = 0) -> bytes:
    """Bytes that are the same for the same seed."""
    return np.random.default_rng(seed).bytes(n_bytes)


def small_tensors(seed: int = 0) -> list[Tensor]:
    """Tensors of about a dozen pages: every zone, two layouts' worth of types, experts."""
    types = GGMLQuantizationType
    return [
        tensor("token_embd.weight", types.Q8_0, (32, 130), seed),
        tensor("blk.0.attn_norm.weight", types.F32, (32,), seed + 1),
        tensor("blk.0.attn_q.weight", types.Q4_0, (32, 240), seed + 2),
        tensor("blk.0.ffn_gate_exps.weight", types.F16, (32, 4, 2), seed + 3),
        Tensor("unknown.weight", UNKNOWN_TYPE, (7,), random_bytes(100, seed + 5)),
        tensor("output.weight", types.Q6_K, (256, 20), seed + 4),
    ]


def small_model(seed: int = 0) -> bytes:
    """A model of those tensors, with bytes behind the last."""
    pairs = [pair("general.architecture", STRING, "llama"), array("some.list", STRING, ["a", "bc"])]
    return gguf(small_tensors(seed), pairs, tail=b"junk")


def newer_small_model(seed: int = 0) -> bytes:
    """Another version of it: changed bytes here and there, a new page, a longer header."""
    tensors = small_tensors(seed)
    scattered = np.frombuffer(tensors[0].data, np.uint8).copy()
    scattered[::1000] ^= 0x15
    tensors[0] = replace(tensors[0], data=scattered.tobytes())
    last = tensors[-1].data
    tensors[-1] = replace(tensors[-1], data=random_bytes(3990, seed + 6) + last[3990:])
    pairs = [
        pair("general.architecture", STRING, "llama"),
        array("some.list", STRING, ["a", "bc"]),
        pair("general.name", STRING, "newer"),
    ]
    return gguf(tensors, pairs, tail=b"junk")


def write(path: Path, data: bytes) -> Path:
    """Write a file; returns its path."""
    path.write_bytes(data)
    return path


def split_model(folder: Path, tensors: Sequence[Sequence[Tensor]], stem: str = "model") -> Path:
    """Write a model of several files as `gguf-split` would; returns the first."""
    total = sum(map(len, tensors))
    paths = []
    for number, of_part in enumerate(tensors):
        pairs = [
            pair("split.no", U16, number),
            pair("split.count", U16, len(tensors)),
            pair("split.tensors.count", I32, total),
        ]
        name = f"{stem}-{number + 1:05d}-of-{len(tensors):05d}.gguf"
        paths.append(write(folder / name, gguf(of_part, pairs)))
    return paths[0]
