"""Patches that lie: every digest in them is right, and something else is wrong.

`material` is a right patch of a small model, taken apart in the bytes of its fields, and a `Case`
changes some of them. The writer here is not that of `delta`: it can write what that cannot.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash
import zstandard
from gguf import GGMLQuantizationType as T

from delta.byte_cursor import integer, signed, text
from delta.byte_planes import element_kind
from delta.page_coding import ORDERED, RAW, SPARSE, count_items, encode
from delta.page_grid import TENSOR
from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import STRING, Tensor, pair
from forge.gguf_file import parse_header

FORWARD, REVERSE, BOTH = 1, 2, 3
F16, Q8_0 = int(T.F16) + 1, int(T.Q8_0) + 1
MIB, GIB, HUGE = 1 << 20, 1 << 30, 1 << 62
GROUP_CONTENT = 4 * MIB + 4096  # at most
#: Metadata of the models.
PAIRS = [pair("general.architecture", STRING, "llama"), pair("general.name", STRING, "small")]


# ---- the bytes of a patch ----


@dataclass(frozen=True)
class Group:
    """The fields of a group, whatever they say; `gaps` and `streams` as they are stored."""

    mode: int
    directions: int
    type_number: int
    n_pages: int
    n_bytes: int
    gaps: bytes
    streams: tuple[bytes, ...]
    n_items: int = 0
    width: int = 1
    behind: bytes = b""

    def body(self) -> bytes:
        numbers = (self.mode, self.directions, self.type_number, self.n_pages, self.n_bytes,
                   self.n_items, self.width)  # fmt: skip
        start = b"".join(map(integer, numbers)) + _sized(self.gaps)
        return start + b"".join(map(_sized, self.streams)) + self.behind


def _sized(data: bytes) -> bytes:
    return integer(len(data)) + data


@dataclass(frozen=True)
class Way:
    """The fields of a direction; a count or size is what the lists give unless one is said."""

    headers: tuple[bytes, ...]
    runs: tuple[bytes, ...]
    lost: tuple[bytes, ...] = ()
    copies: tuple[bytes, ...] = ()
    n_runs: int | None = None
    n_lost: int | None = None
    n_copies: int | None = None
    behind: bytes = b""
    n_table_bytes: int | None = None
    stored: bytes | None = None

    def tables(self) -> bytes:
        lists = ((self.n_runs, self.runs), (self.n_lost, self.lost), (self.n_copies, self.copies))
        return b"".join(_counted(count, items) for count, items in lists) + self.behind

    def render(self) -> bytes:
        tables = self.tables()
        size = len(tables) if self.n_table_bytes is None else self.n_table_bytes
        stored = tables if self.stored is None else self.stored
        return b"".join(self.headers) + integer(size) + _sized(stored)


def _counted(count: int | None, items: Sequence[bytes]) -> bytes:
    return integer(len(items) if count is None else count) + b"".join(items)


@dataclass(frozen=True)
class Patch:
    """The fields of a patch, and the models it is for."""

    base: bytes
    target: bytes
    base_files: tuple[bytes, ...]
    target_files: tuple[bytes, ...]
    ways: tuple[Way, ...]
    groups: tuple[Group | bytes, ...]
    magic: bytes = b"SGPATCH\0"
    version: int = 1
    flags: int = 0
    page_bytes: int = 4096
    n_plan_bytes: int | None = None
    n_base: int | None = None
    n_target: int | None = None
    behind_plan: bytes = b""
    end: bytes = bytes(4)

    def plan(self) -> bytes:
        files = _counted(self.n_base, self.base_files) + _counted(self.n_target, self.target_files)
        return files + b"".join(way.render() for way in self.ways) + self.behind_plan

    def data(self) -> bytes:
        plan = self.plan()
        size = len(plan) if self.n_plan_bytes is None else self.n_plan_bytes
        head = (self.magic, self.version, self.flags, self.page_bytes, size)
        parts = [struct.pack("<8sHHII", *head), plan]
        for group in self.groups:
            body = group if isinstance(group, bytes) else group.body()
            parts += [struct.pack("<IQ", len(body), xxhash.xxh3_64_intdigest(body)), body]
        return sealed(b"".join([*parts, self.end]))


def sealed(data: bytes) -> bytes:
    """With the SHA-256 of all before it."""
    return data + hashlib.sha256(data).digest()


def record(data: bytes, name: bytes = b"model.gguf", n_bytes: int | None = None) -> bytes:
    """What is said of a file."""
    size = integer(len(data) if n_bytes is None else n_bytes)
    return _sized(name) + size + hashlib.sha256(data).digest()


def run(name: str, n_pages: int, n_unpaired: int = 0, *, kind: int = TENSOR, index: int = 0,
        type_number: int = F16) -> bytes:  # fmt: skip
    behind = (index, type_number, n_pages, n_unpaired)
    return integer(kind) + text(name) + b"".join(map(integer, behind))


def copy(gap: int, count: int, kind: int, step: int) -> bytes:
    return integer(gap) + integer(count) + integer(kind) + signed(step)


def edit(new: bytes, base: bytes, n_bytes: int | None = None) -> bytes:
    """A header as compressed with the base's."""
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    frame = zstandard.ZstdCompressor(dict_data=dictionary, write_content_size=False).compress(new)
    return integer(len(new) if n_bytes is None else n_bytes) + _sized(frame)


def bomb(n_bytes: int, claim: int | None = None, first: bytes = b"", window_log: int = 23) -> bytes:
    """A Zstandard frame of `n_bytes`: `first`, then zeros; it says `claim` of its size, if any."""
    head = struct.pack("<IBB", 0xFD2FB528, 0 if claim is None else 0xC0, (window_log - 10) << 3)
    head += b"" if claim is None else struct.pack("<Q", claim)
    blocks = [(len(first) << 3).to_bytes(3, "little") + first] if first else []
    for begin in range(len(first), n_bytes, 1 << 17):
        size = min(1 << 17, n_bytes - begin)
        blocks.append((size << 3 | 1 << 1).to_bytes(3, "little") + b"\0")
    return head + b"".join(blocks[:-1]) + bytes([blocks[-1][0] | 1]) + blocks[-1][1:]


def repeated(first: bytes, pattern: bytes, n_bytes: int) -> bytes:
    """A Zstandard frame of `n_bytes`: `first`, then a pattern over and over."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    start = compressor.compress(first)
    chunk = pattern * (MIB // len(pattern))
    out = [compressor.compress(chunk[: n_bytes - begin])
           for begin in range(len(first), n_bytes, len(chunk))]  # fmt: skip
    return start + b"".join(out) + compressor.flush()


# ---- right patches ----

#: Page numbers over the touched runs of the material: a.weight, b.weight, c.weight, d.weight.
A, B, C, D = 0, 4, 7, 10
#: The same over all runs of the base. It begins with a page of padding, and has one behind b.
BASE_A, BASE_B, BASE_END = 1, 5, 15
ORDERED_GROUP, SPARSE_GROUP, RAW_GROUP = 0, 1, 2


def half_floats(shape: tuple[int, ...], seed: int) -> bytes:
    """F16 weights as models have them."""
    values = np.random.default_rng(seed).normal(0, 0.02, int(np.prod(shape)))
    return values.astype("<f2").tobytes()


def _tensors(is_target: bool) -> list[Tensor]:
    a = half_floats((64, 120), 1)
    b = np.frombuffer(factory.random_bytes(8840, 2), np.uint8).copy()
    c, new = factory.random_bytes(11520, 3), factory.random_bytes(4088, 6)
    added = Tensor("d.weight", int(T.F16), (64, 70), new + new + factory.random_bytes(784, 7))
    if is_target:
        b[[5, 4079, 8839]] ^= 0x41
        c = factory.random_bytes(4088, 5) + a[4088:8176] + c[8176:]
        a = half_floats((64, 120), 4)
    tensors = [
        Tensor("a.weight", int(T.F16), (64, 120), a),
        Tensor("b.weight", int(T.Q8_0), (64, 130), b.tobytes()),
        Tensor("u.weight", factory.UNKNOWN_TYPE, (7,), factory.random_bytes(9024, 8)),
        Tensor("c.weight", int(T.F16), (64, 90), c),
    ]
    return [*tensors, added] if is_target else tensors


def header_bytes(data: bytes) -> bytes:
    """The header of a model."""
    return data[: parse_header(data, "model").header_bytes]


def _group(mode: int, pages: Sequence[int], lengths: Sequence[int], of: Tensor, target: bytes,
           base: bytes | None = None, directions: int = FORWARD) -> Group:  # fmt: skip
    """A right one, its streams not compressed."""
    before = None if base is None else np.frombuffer(base, np.uint8)
    streams = encode(element_kind(T(of.type_id)), mode, np.frombuffer(target, np.uint8), before,
                     np.array(lengths), symmetric=directions == BOTH)  # fmt: skip
    gaps = (np.diff(pages, prepend=-1) - 1).astype(np.uint8)
    n_items = count_items(element_kind(T(of.type_id)), mode, streams)
    return Group(mode, directions, of.type_id + 1, len(pages), len(target), gaps.tobytes(),
                 tuple(stream.tobytes() for stream in streams), n_items)  # fmt: skip


def material() -> Patch:
    """New a.weight, three other bytes in b.weight, a new page and one of a's in c.weight, d.weight
    added, whose second page is its first."""
    before, after = _tensors(False), _tensors(True)
    base, target = factory.gguf(before, PAIRS), factory.gguf(after, PAIRS)
    (old_a, old_b, _, _), (a, b, _, c, d) = before, after
    groups = (
        _group(ORDERED, range(A, B), [4088, 4088, 4088, 3096], a, a.data, old_a.data),
        _group(SPARSE, [B, B + 2], [4080, 680], b, b.data[:4080] + b.data[8160:],
               old_b.data[:4080] + old_b.data[8160:]),
        _group(RAW, [C, D, D + 2], [4088, 4088, 784], c, c.data[:4088] + d.data[4088:]),
    )  # fmt: skip
    way = Way(
        headers=(edit(header_bytes(target), header_bytes(base)),),
        runs=(run("a.weight", 4), run("b.weight", 3, type_number=Q8_0), run("c.weight", 3),
              run("d.weight", 3, 3)),
        copies=(copy(C + 1, 1, 0, BASE_A + 1), copy(D + 1 - C - 2, 1, 1, D - BASE_A - 2)),
    )  # fmt: skip
    return Patch(base, target, (record(base),), (record(target),), (way,), groups)


def two_way() -> Patch:
    """A reversible patch, all of whose pages serve both directions."""
    before, after = _tensors(False), _tensors(True)
    after[1:] = before[1:]
    base, target = factory.gguf(before, PAIRS), factory.gguf(after, PAIRS)
    way = Way((integer(0),), (run("a.weight", 4),))
    group = _group(ORDERED, range(4), [4088, 4088, 4088, 3096], after[0], after[0].data,
                   before[0].data, BOTH)  # fmt: skip
    return Patch(base, target, (record(base),), (record(target),), (way, way), (group,), flags=1)


# ---- what is wrong with a patch ----

Change = Callable[[Patch], Patch]


@dataclass(frozen=True)
class Case:
    """How a right patch is changed, a word of the refusal, and whether it is applied backwards."""

    change: Change
    says: str
    of: Callable[[], Patch] = material
    reverse: bool = False


def having(**fields: Any) -> Change:
    """Other fields of the patch."""
    return lambda p: replace(p, **fields)


def forward(**fields: Any) -> Change:
    """Other fields of its first direction."""
    return lambda p: replace(p, ways=(replace(p.ways[0], **fields), *p.ways[1:]))


def _group_change(number: int, fields: Callable[[Group], dict[str, Any]]) -> Change:
    def change(p: Patch) -> Patch:
        group = p.groups[number]
        assert isinstance(group, Group)
        changed = replace(group, **fields(group))
        return replace(p, groups=(*p.groups[:number], changed, *p.groups[number + 1 :]))

    return change


def in_group(number: int, **fields: Any) -> Change:
    """Other fields of a group."""
    return _group_change(number, lambda group: fields)


def stream(number: int, change: Callable[[bytes], bytes], which: int = 0) -> Change:
    """Another stream of a group."""

    def fields(group: Group) -> dict[str, Any]:
        streams = list(group.streams)
        streams[which] = change(streams[which])
        return {"streams": tuple(streams)}

    return _group_change(number, fields)


def target_file(**fields: Any) -> Change:
    """Another record of the target's file."""
    return lambda p: replace(p, target_files=(record(**{"data": p.target} | fields),))


def header_edit(n_bytes: int, frame: bytes) -> Change:
    """A header of `n_bytes` that is stored as `frame`."""
    return forward(headers=(integer(n_bytes) + _sized(frame),))


def touched(number: int, *new: bytes) -> Change:
    """Other runs in the place of one."""
    at = slice(number), slice(number + 1, None)
    return lambda p: forward(runs=(*p.ways[0].runs[at[0]], *new, *p.ways[0].runs[at[1]]))(p)
