"""What is fuzzed: for each kind of file its seeds, how it is changed, and what must hold of it.

Changes know the format: digests are made right again, or nothing behind the first check would ever
be reached.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import xxhash
from gguf import GGMLQuantizationType as T

from delta.apply import apply_patch
from delta.describe import describe_patch, patch_text
from delta.diff import create_patch
from delta.patch_file import PatchReader
from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import STRING, U32, Tensor, pair
from experiments.validation.hostile_maps import render, sealed
from experiments.validation.probe import require
from forge.info import describe, describe_text
from forge.restore import restore_model
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model

_NUMBERS = (0, 1, 2, 3, 7, 8, 9, 31, 32, 64, 127, 128, 255, 256, 4088, 4096, 65535, 1 << 16,
            (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 62) - 1, 1 << 62,
            (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)  # fmt: skip
_MOST_BYTES = 1 << 16
_MOST_SOURCE_BYTES = 1 << 26


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes
    ----------
    seeds
        Right files.
    mutate
        Another file, made of one or two.
    try_one
        Gives a file to the tool, in an empty folder: `GGUFShardError` or `OSError` if it is
        refused, `Missed` if it is taken and what comes of it is wrong.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[random.Random, bytes, bytes], bytes]
    try_one: Callable[[Path, bytes], None]


# ---- bytes ----


def mutate_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Some bytes changed, put in, taken out, or taken from another file."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = _mutate_once(rng, data, other)
    return data[:_MOST_BYTES]


def _mutate_once(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    n = min(rng.choice((1, 2, 4, 8, 16, 64)), len(data) - at)
    kind = rng.randrange(6)
    if kind == 0 and n:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        size = rng.choice((1, 2, 4, 8))
        number = rng.choice(_NUMBERS) & ((1 << 8 * size) - 1)
        return data[:at] + number.to_bytes(size, "little") + data[at + size :]
    if kind == 2:
        return data[:at] + data[at + n :]
    if kind == 3:
        return data[:at] + data[at : at + n] + data[at:]
    if kind == 4:
        begin = rng.randrange(len(other) + 1)
        return data[:at] + other[begin : begin + n] + data[at + n :]
    return data[:at] if rng.random() < 0.1 else data[:at] + rng.randbytes(n) + data[at + n :]


# ---- GGUF files ----


def _gguf_seeds() -> list[bytes]:
    tensors = [factory.tensor("a_exps.x", T.F16, (32, 1, 2)), factory.tensor("b", T.Q8_0, (32, 3))]
    pairs = [pair("general.architecture", STRING, "llama"), factory.array("l", STRING, ["a", "b"]),
             factory.array("n", U32, [1, 2]), pair("split.count", U32, 1)]  # fmt: skip
    unknown = Tensor("u", factory.UNKNOWN_TYPE, (7,), bytes(40))
    return [
        factory.gguf(tensors, pairs),
        factory.gguf([unknown, *tensors], alignment=64),
        factory.gguf([], pairs, version=2),
        factory.gguf(tensors, padding=7, tail=b"x"),
    ]


def _try_gguf(folder: Path, data: bytes) -> None:
    path = factory.write(folder / "model.gguf", data)
    describe_text(describe(path))
    made = shard_model(path, folder / "sharded")
    restore_model(made, folder / "back.gguf")
    require((folder / "back.gguf").read_bytes() == data, "restored, it is another file")


# ---- maps ----


@cache
def _sharded() -> tuple[bytes, bytes, bytes]:
    """A small model, its pages and its map."""
    data = _gguf_seeds()[1]
    with TemporaryDirectory() as name:
        path = factory.write(Path(name) / "model.gguf", data)
        shard_map = shard_model(path, name, ShardOptions(pages_per_shard=1))
        return data, shard_map.with_suffix(".gguf").read_bytes(), shard_map.read_bytes()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key of a document."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            items.append((value, key))
            items += _places(value[key])
    return items


def _mutate_map(rng: random.Random, data: bytes, other: bytes) -> bytes:
    try:
        document, second = json.loads(data), json.loads(other)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data, other)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(document)
        if not places:
            return mutate_bytes(rng, data, other)
        holder, key = rng.choice(places)
        _mutate_value(rng, holder, key, second)
    try:
        made = render(sealed(document))
    except (ValueError, RecursionError):  # a value has been put into itself
        return mutate_bytes(rng, data, other)
    return made if rng.random() < 0.9 else mutate_bytes(rng, made, other)


def _mutate_value(rng: random.Random, holder: Any, key: Any, other: Any) -> None:
    kind = rng.randrange(5)
    value = holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, value)
    elif kind == 2 and type(value) is int:
        holder[key] = value + rng.choice((-4088, -32, -1, 1, 32, 4088))
    elif kind == 3 and (places := _places(other)):
        from_holder, from_key = rng.choice(places)
        holder[key] = from_holder[from_key]
    else:
        odd: tuple[Any, ...] = (
            None,
            True,
            -1,
            1.5,
            "",
            "x",
            "0" * 16,
            "../x",
            [],
            {},
            [[]],
            float("inf"),
        )
        holder[key] = rng.choice((*odd, *_NUMBERS))


def _try_map(folder: Path, data: bytes) -> None:
    source, core, _ = _sharded()
    factory.write(folder / "core.gguf", core)
    path = factory.write(folder / "core.sgmap", data)
    describe_text(describe(path))
    if sum(part.bytes for part in load_map(path).source) > _MOST_SOURCE_BYTES:
        return  # zeros behind all that pages hold: right, until the digest is known
    restore_model(path, folder / "back.gguf")
    require((folder / "back.gguf").read_bytes() == source, "restored, it is another file")


# ---- patches ----


@cache
def _models() -> tuple[bytes, bytes]:
    """Two versions of a small model."""
    half = np.random.default_rng(1).normal(0, 0.02, (70, 64)).astype("<f2")
    nudged = half + np.float16(1e-4)
    quants = factory.tensor("q", T.Q8_0, (32, 130), 3)
    other = bytearray(quants.data)
    other[5] ^= 1
    other[4200] ^= 9
    before = [Tensor("h", int(T.F16), (64, 70), half.tobytes()), quants]
    after = [Tensor("h", int(T.F16), (64, 70), nudged.tobytes()),
             Tensor("q", int(T.Q8_0), (32, 130), bytes(other)),
             factory.tensor("new", T.F32, (32,), 4)]  # fmt: skip
    pairs = [pair("general.architecture", STRING, "llama")]
    return factory.gguf(before, pairs), factory.gguf(after, pairs)


@cache
def _patch_seeds() -> list[bytes]:
    seeds = []
    with TemporaryDirectory() as name:
        paths = [factory.write(Path(name) / f"{i}.gguf", data) for i, data in enumerate(_models())]
        for number, reversible in enumerate((False, True)):
            for way, models in enumerate((paths, paths[::-1])):
                path = Path(name) / f"{number}-{way}"
                create_patch(models[0], models[1], path, reversible=reversible)
                seeds.append(path.read_bytes())
    return seeds


def resealed(data: bytes) -> bytes:
    """A patch with the digests of its groups and its own as they should be, as far as it goes."""
    body = bytearray(data[:-32])
    if len(body) >= 20:
        offset = 20 + struct.unpack_from("<I", body, 16)[0]
        while offset + 12 < len(body):
            (n_bytes,) = struct.unpack_from("<I", body, offset)
            group = body[offset + 12 : offset + 12 + n_bytes]
            if n_bytes == 0 or len(group) < n_bytes:
                break
            struct.pack_into("<Q", body, offset + 4, xxhash.xxh3_64_intdigest(bytes(group)))
            offset += 12 + n_bytes
    return bytes(body) + hashlib.sha256(body).digest()


def _mutate_patch(rng: random.Random, data: bytes, other: bytes) -> bytes:
    made = mutate_bytes(rng, data, other)
    return resealed(made) if rng.random() < 0.95 else made


def _try_patch(folder: Path, data: bytes) -> None:
    path = factory.write(folder / "patch", data)
    patch_text(describe_patch(path), path)
    with PatchReader(path) as patch:
        ways = [(False, patch.plan.base, patch.plan.target)]
        if patch.plan.reverse is not None:
            ways.append((True, patch.plan.target, patch.plan.base))
    known = {hashlib.sha256(model).hexdigest(): model for model in _models()}
    for reverse, base, target in ways:
        model = known.get(base[0].sha256, _models()[0])
        factory.write(folder / "base.gguf", model)
        (made,) = apply_patch(folder / "base.gguf", path, folder / "made", reverse=reverse)
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        require(digest == target[0].sha256, "applied, it makes another file than it says")
        made.unlink()


TARGETS: Sequence[Target] = (
    Target("gguf", _gguf_seeds, mutate_bytes, _try_gguf),
    Target("map", lambda: [_sharded()[2]], _mutate_map, _try_map),
    Target("patch", _patch_seeds, _mutate_patch, _try_patch),
)
