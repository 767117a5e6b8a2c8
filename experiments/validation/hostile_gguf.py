"""GGUF files that lie, that do not fit, or that are no files at all.

A `Kind` writes one into a folder. What it is tells whether anything may come of it: most must be
refused by every command; the few that are only odd must be taken, and come back bit for bit.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as T

from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import ARRAY, BOOL, STRING, U8, U32, U64, Tensor, pair

HUGE = (1 << 31, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1)
_MIB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes
    ----------
    fault
        What is wrong in general.
    name
        What is wrong exactly.
    make
        Writes it into a folder, which is empty but for the good model, and returns its path.
    is_odd
        Nothing is wrong with it: it is taken.
    """

    fault: str
    name: str
    make: Callable[[Path], Path]
    is_odd: bool = False


_ARCHITECTURE = pair("general.architecture", STRING, "llama")
_WEIGHT = factory.tensor("a.weight", T.F32, (32, 8), 1)
_SECOND = factory.tensor("b.weight", T.Q8_0, (32, 40), 2)
_RIGHT = factory.gguf([_WEIGHT, _SECOND], [_ARCHITECTURE])


def _file(data: bytes) -> Callable[[Path], Path]:
    return lambda folder: factory.write(folder / "model.gguf", data)


def _kinds(fault: str, files: Mapping[str, bytes], is_odd: bool = False) -> list[Kind]:
    return [Kind(fault, name, _file(data), is_odd) for name, data in files.items()]


def _with_pair(*pairs: bytes) -> bytes:
    return factory.gguf([_WEIGHT], [_ARCHITECTURE, *pairs])


def _with_tensor(**fields: Any) -> bytes:
    return factory.gguf([replace(_WEIGHT, **fields), _SECOND], [_ARCHITECTURE])


def _words(start: bytes, number: int) -> bytes:
    """Bytes followed by a 64-bit number, and by as many as a small file has."""
    return start + struct.pack("<Q", number) + bytes(500)


def _array_head(kind: int, count: int) -> bytes:
    return factory.string("x") + struct.pack("<IIQ", ARRAY, kind, count)


# ---- counts ----


def _counts() -> dict[str, bytes]:
    start = struct.pack("<4sI", b"GGUF", 3)
    files = {}
    for number in HUGE:
        files[f"{number:#x} tensors"] = _words(start, number)
        files[f"{number:#x} keys"] = _words(start + bytes(8), number)
        key = factory.header([], [], n_pairs=1)
        files[f"key of {number:#x} bytes"] = _words(key, number)
        for kind, what in ((STRING, "strings"), (U8, "bytes"), (U64, "numbers"), (ARRAY, "arrays")):
            files[f"array of {number:#x} {what}"] = key + _array_head(kind, number) + bytes(500)
    files["string of 2^50 bytes"] = _words(
        factory.header([], [], n_pairs=1) + factory.string("x") + struct.pack("<I", STRING), 1 << 50
    )
    files["one tensor more than there are"] = factory.gguf([_WEIGHT], [_ARCHITECTURE], n_tensors=2)
    files["one key more than there are"] = factory.gguf([_WEIGHT], [_ARCHITECTURE], n_pairs=2)
    files["one key fewer than there are"] = factory.gguf([_WEIGHT], [_ARCHITECTURE], n_pairs=0)
    return files


def _in_bulk() -> list[Kind]:
    """Headers that are as long as they say, of more items than any model has."""

    def keys(folder: Path) -> Path:
        items = b"".join(pair(f"{i:08x}", U8, 1) for i in range(300_000))
        return _file(factory.header([], [], n_pairs=300_000) + items)(folder)

    def tensors(folder: Path) -> Path:
        item = factory.info(replace(_WEIGHT, name="x" * 8), 0)
        return _file(factory.header([], [], n_tensors=200_000) + item * 200_000)(folder)

    def strings(folder: Path) -> Path:
        start = factory.header([], [], n_pairs=1) + _array_head(STRING, 4 * _MIB)
        return _file(start + bytes(32 * _MIB))(folder)

    def text(folder: Path) -> Path:
        start = factory.header([], [], n_pairs=1) + factory.string("x")
        return _hole(folder, start + struct.pack("<IQ", STRING, 1 << 30), 2 << 30)

    def numbers(folder: Path) -> Path:
        return _hole(folder, factory.header([], [], n_pairs=1) + _array_head(U64, 1 << 27), 2 << 30)

    makers = {"300,000 keys": keys, "200,000 tensors": tensors, "4 million empty strings": strings,
              "a text of 1 GiB": text, "2^27 numbers": numbers}  # fmt: skip
    return [Kind("header too large", name, make) for name, make in makers.items()]


def _hole(folder: Path, start: bytes, n_bytes: int) -> Path:
    """A file that takes no room behind its start."""
    path = factory.write(folder / "model.gguf", start)
    os.truncate(path, n_bytes)
    return path


# ---- head, values, names ----


def _heads() -> dict[str, bytes]:
    files = {f"version {v}": factory.gguf([_WEIGHT], [], version=v)
             for v in (0, 1, 4, 99, 0xFFFFFFFF)}  # fmt: skip
    files["big-endian"] = factory.gguf([], [pair("x", U32, 1, ">")], order=">")
    files["magic byte-swapped"] = factory.gguf([_WEIGHT], [], magic=b"FUGG")
    files["magic of an older format"] = factory.gguf([_WEIGHT], [], magic=b"ggjt")
    files["a compressed file"] = b"\x1f\x8b\x08" + factory.random_bytes(400)
    files["text"] = b"<!DOCTYPE html>\n<p>Not found\n" * 20
    files["empty"] = b""
    files["zeros"] = bytes(5000)
    return files


def _values() -> dict[str, bytes]:
    key = factory.header([], [], n_pairs=1) + factory.string("x")
    deep = key + struct.pack("<I", ARRAY)
    return {
        "bool of 7": _with_pair(pair("x", BOOL, 7)),
        "bool of 255 in an array": _with_pair(factory.array("x", BOOL, [0, 1, 255])),
        "value type 13": key + struct.pack("<I", 13) + bytes(500),
        "value type 2^32 - 1": key + struct.pack("<I", 0xFFFFFFFF) + bytes(500),
        "item type 13": _with_pair(factory.string("x") + struct.pack("<IIQ", ARRAY, 13, 1)),
        "arrays 3,000 deep": deep + struct.pack("<IQ", ARRAY, 1) * 3000 + bytes(500),
        "arrays of arrays of arrays": deep + struct.pack("<IQ", ARRAY, 1 << 40) * 3 + bytes(500),
        "a key twice": _with_pair(pair("x", U32, 1), pair("x", U32, 2)),
        "an empty key": _with_pair(pair("", U32, 1)),
        "a key of 65,536 bytes": _with_pair(pair("k" * 65536, U32, 1)),
        "a key twice, with control characters": _with_pair(
            pair("\x1b[2J\n", U32, 1), pair("\x1b[2J\n", U32, 2)),
    }  # fmt: skip


def _alignments() -> dict[str, bytes]:
    key = "general.alignment"
    files = {f"alignment {n}": _with_pair(pair(key, U32, n)) for n in (0, 3, 33, 1 << 31)}
    files["alignment of 2^63"] = _with_pair(pair(key, U64, 1 << 63))
    files["alignment of -32"] = _with_pair(pair(key, factory.I32, -32))
    files["alignment as a text"] = _with_pair(pair(key, STRING, "32"))
    files["alignment as a list"] = _with_pair(factory.array(key, U32, [32]))
    files["alignment as a fraction"] = _with_pair(pair(key, factory.F32, 32.0))
    files["alignment as a bool"] = _with_pair(pair(key, BOOL, 1))
    return files


def _names() -> dict[str, bytes]:
    return {
        "no name": _with_tensor(name=""),
        "64 bytes": _with_tensor(name="n" * 64),
        "2,000 bytes": _with_tensor(name="n" * 2000),
        "twice the same": _with_tensor(name="b.weight"),
        "line feed, out of place": _with_tensor(name="a\nb", offset=1 << 40),
        "escape sequence, out of place": _with_tensor(name="\x1b[31m\x07", offset=1 << 40),
        "not UTF-8, out of place": _with_tensor(name=b"\xff\xfe\xc3", offset=1 << 40),
    }


def _odd_names() -> dict[str, bytes]:
    names: dict[str, str | bytes] = {
        "63 bytes": "n" * 63, "NUL": "a\0b", "line feed": "a\nb", "escape sequence": "\x1b[31m\x07",
        "path": "../../etc/passwd", "not UTF-8": b"\xff\xfe\xc3", "space": " ",
        "right-to-left": "\u202ea.weight", "quotes": "\"'\\",
    }  # fmt: skip
    files = {name: _with_tensor(name=content) for name, content in names.items()}
    files["text that is not UTF-8"] = _with_pair(pair("x", STRING, b"\xff\x1b[2J\n\0"))
    files["key with control characters"] = _with_pair(pair("\x1b[2J\n\0", U32, 1))
    files["not a number"] = _with_pair(pair("x", factory.F32, float("nan")))
    files["a list of nothing"] = _with_pair(factory.array("x", STRING, []))
    return files


# ---- tensors ----


def _shapes() -> dict[str, bytes]:
    shapes = {
        "no dimensions": (), "five dimensions": (32, 2, 2, 2, 2), "a zero": (32, 0),
        "rows of half a block": (16, 4), "2^64 elements": (32, 1 << 32, 1 << 27),
        "2^64 and 32 elements": (32, (1 << 59) + 1), "2^63 rows": (32, 1 << 63),
        "2^250 elements": (1 << 62,) * 4, "one row too many": (32, 1 << 20),
    }  # fmt: skip
    files = {name: _with_tensor(shape=shape, type_id=int(T.Q8_0)) for name, shape in shapes.items()}
    info = factory.string("x") + struct.pack("<I", 0xFFFFFFFF)
    files["2^32 - 1 dimensions"] = factory.header([], [info + bytes(500)])
    return files


def _offsets() -> dict[str, bytes]:
    end = (1 << 64) - 1024
    offsets = {"past the end": 1 << 20, "at 2^40": 1 << 40, "at 2^63": 1 << 63,
               "that wraps 2^64": end, "not aligned": 1, "half aligned": 16}  # fmt: skip
    files = {f"offset {name}": _with_tensor(offset=n) for name, n in offsets.items()}
    files["tensors overlap"] = factory.gguf([_WEIGHT, replace(_SECOND, offset=32)])
    files["tensors in one place"] = factory.gguf([_WEIGHT, replace(_SECOND, offset=0)])
    empty = Tensor("a.weight", factory.UNKNOWN_TYPE, (7,), b"", offset=len(_WEIGHT.data))
    files["an unknown type without a byte"] = factory.gguf([_WEIGHT, replace(empty, name="c")])
    return files


def _odd_types() -> dict[str, bytes]:
    return {f"type {n}": _with_tensor(type_id=n)
            for n in (4, 5, 31, 36, 999, 1 << 31, 0xFFFFFFFF)}  # fmt: skip


# ---- files ----


def _cut_short() -> list[Kind]:
    """At every boundary of a field, and within."""
    header = len(factory.header([_ARCHITECTURE], [factory.info(_WEIGHT, 0)] * 2))
    places = [*range(1, 60), *range(60, header + 1, 7), header, len(_RIGHT) - 1]
    return [
        Kind("cut short", f"{n} of {len(_RIGHT)} bytes", _file(_RIGHT[:n]))
        for n in sorted({*places})
    ]


def _unusual_files() -> list[Kind]:
    def folder_(folder: Path) -> Path:
        (folder / "model.gguf").mkdir()
        return folder / "model.gguf"

    def fifo(folder: Path) -> Path:
        os.mkfifo(folder / "model.gguf")
        return folder / "model.gguf"

    def link(target: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            (folder / "model.gguf").symlink_to(target)
            return folder / "model.gguf"

        return make

    def linked(folder: Path) -> Path:
        factory.write(folder / "elsewhere", _RIGHT)
        return link("elsewhere")(folder)

    makers = {
        "a folder": folder_, "a named pipe": fifo, "missing": lambda folder: folder / "model.gguf",
        "a link to nothing": link("nothing"), "a link to itself": link("model.gguf"),
        "a link to /dev/zero": link("/dev/zero"), "a link to /dev/null": link("/dev/null"),
        "a link to a folder": link("."), "in a file": lambda folder: folder / "good.gguf" / "x",
        "a name of 5,000 letters": lambda folder: folder / ("n" * 5000),
        "a name with a line feed": lambda folder: folder / "a\n\x1b[31mb.gguf",
        "a hole of 1 TiB": lambda folder: _hole(folder, b"GGUF\4\0\0\0", 1 << 40),
    }  # fmt: skip
    kinds = [Kind("not a file", name, make) for name, make in makers.items()]
    return [*kinds, Kind("odd name", "a link to a model", linked, is_odd=True)]


def _part(number: Any, count: Any, tensor: Tensor, total: int = 2) -> bytes:
    pairs = [pair("split.no", U32, number), pair("split.count", U32, count),
             pair("split.tensors.count", U32, total)]  # fmt: skip
    return factory.gguf([tensor], [_ARCHITECTURE, *pairs])


def _split_models() -> list[Kind]:
    def parts(*of_parts: bytes | None, count: int = 2) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            for i, data in enumerate(of_parts):
                if data is not None:
                    factory.write(folder / f"model-{i + 1:05d}-of-{count:05d}.gguf", data)
            return folder / f"model-00001-of-{count:05d}.gguf"

        return make

    first, second = _part(0, 2, _WEIGHT), _part(1, 2, _SECOND)
    text = factory.gguf([_WEIGHT], [pair("split.count", STRING, "2")])
    makers = {
        "a part is missing": parts(first, None),
        "the second part alone": parts(second, None),
        "the second part is empty": parts(first, b""),
        "the second part is the first": parts(first, first),
        "parts the other way round": parts(second, first),
        "parts share a tensor": parts(first, _part(1, 2, _WEIGHT)),
        "a tensor too few": parts(_part(0, 2, _WEIGHT, 3), second),
        "parts of different counts": parts(first, _part(1, 3, _SECOND)),
        "a billion parts": _file(_part(0, 10**9, _WEIGHT)),
        "2^32 - 1 parts": _file(_part(0, 0xFFFFFFFF, _WEIGHT)),
        "99,999 parts of which one is there": parts(_part(0, 99999, _WEIGHT), count=99999),
        "two parts under a plain name": _file(first),
        "the count is a text": _file(text),
        "the first of one, numbered 7": parts(_part(7, 2, _WEIGHT), second),
    }
    return [Kind("parts do not fit", name, make) for name, make in makers.items()]


def kinds() -> list[Kind]:
    """All of them."""
    return [
        *_kinds("count too large", _counts()),
        *_in_bulk(),
        *_kinds("wrong head", _heads()),
        *_kinds("wrong value", _values()),
        *_kinds("wrong alignment", _alignments()),
        *_kinds("wrong tensor name", _names()),
        *_kinds("wrong shape", _shapes()),
        *_kinds("wrong offset", _offsets()),
        *_cut_short(),
        *_unusual_files(),
        *_split_models(),
        *_kinds("odd name", _odd_names(), is_odd=True),
        *_kinds("unknown type", _odd_types(), is_odd=True),
    ]
