"""Patches that lie of models: in themselves they are right, and do not fit what they are for.

Each case names a word of the refusal.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from gguf import GGMLQuantizationType as T

from delta.page_coding import ORDERED, RAW, XOR
from delta.page_grid import PADDING
from experiments.validation import gguf_factory as factory
from experiments.validation import hostile_patches as hostile
from experiments.validation.gguf_factory import Tensor
from experiments.validation.hostile_patches import (
    BASE_A,
    F16,
    HUGE,
    ORDERED_GROUP,
    RAW_GROUP,
    SPARSE_GROUP,
    B,
    C,
    Case,
    Change,
    D,
    Group,
    Patch,
    copy,
    forward,
    having,
    header_bytes,
    header_edit,
    in_group,
    run,
    stream,
    target_file,
    touched,
    two_way,
)


def header(new: Callable[[Patch], bytes], n_file_bytes: int | None = None) -> Change:
    """Another header for the target, in a file of another size."""

    def change(p: Patch) -> Patch:
        edited = forward(headers=(hostile.edit(new(p), header_bytes(p.base)),))(p)
        return target_file(n_bytes=n_file_bytes)(edited)

    return change


_NASTY = b"a\n\x1b[31mb"


def _info(name: str, shape: tuple[int, ...] = (1,)) -> bytes:
    return factory.info(Tensor(name, int(T.F16), shape, b""), 0)


def _one_tensor(name: str, shape: tuple[int, ...]) -> bytes:
    return factory.header([], [_info(name, shape)])


def _strings(n_bytes: int) -> bytes:
    """A frame of a header of that many bytes, of empty strings."""
    count = (n_bytes - len(factory.header([factory.array("x", factory.STRING, [], 0)], []))) // 8
    start = factory.header([factory.array("x", factory.STRING, [], count)], [])
    return hostile.bomb(n_bytes, first=start)


def _tensor_infos(n_bytes: int) -> bytes:
    """Likewise, of infos of the same tensor."""
    start = factory.header([], [], n_tensors=(n_bytes - 24) // len(_info("x")))
    return hostile.repeated(start, _info("x"), n_bytes)


def _large_header(frame: bytes) -> Change:
    """A header of 64 MiB in a file that has room for it."""
    return lambda p: target_file(n_bytes=65 * hostile.MIB)(header_edit(64 * hostile.MIB, frame)(p))


def _twice_the_base(p: Patch) -> Patch:
    """Two files like the base, with all its tensors each."""
    way = hostile.Way((b"\0", b"\0"), ())
    return having(target_files=p.base_files * 2, ways=(way,), groups=())(p)


def _whole_header(p: Patch) -> bytes:
    return header_bytes(p.target)


def _edit(n_more: int, is_other: bool = False) -> Change:
    """The right header with a wrong size, or compressed for another base."""

    def change(p: Patch) -> Patch:
        right, base = header_bytes(p.target), header_bytes(p.base)
        return forward(
            headers=(hostile.edit(right, right if is_other else base, len(right) + n_more),)
        )(p)

    return change


#: The window that a header of 300 bytes may have.
_LOG = 17

HEADERS: dict[str, Case] = {
    "bomb": Case(header_edit(300, hostile.bomb(hostile.GIB, window_log=_LOG)), "header"),
    "bomb that says its size": Case(
        header_edit(300, hostile.bomb(hostile.GIB, hostile.GIB, window_log=_LOG)), "header"),
    "claim of 2^62": Case(header_edit(300, hostile.bomb(300, HUGE, window_log=_LOG)), "header"),
    "claim of 2^40": Case(header_edit(300, hostile.bomb(300, 1 << 40, window_log=_LOG)), "header"),
    "bomb of the size it may have": Case(header_edit(1 << 28, hostile.bomb(1 << 28)), "header"),
    "empty strings": Case(_large_header(_strings(64 * hostile.MIB)), "header"),
    "tensor infos": Case(_large_header(_tensor_infos(64 * hostile.MIB)), "header"),
    "window of 2 GiB": Case(header_edit(300, hostile.bomb(300, window_log=31)), "header"),
    "one byte less than said": Case(_edit(1), "header"),
    "one byte more than said": Case(_edit(-1), "header"),
    "for another base": Case(_edit(0, is_other=True), ""),
    "without a frame": Case(header_edit(300, b""), "header"),
    "junk": Case(header_edit(300, b"junk" * 20), "header"),
    "skippable frame": Case(header_edit(300, b"\x50\x2a\x4d\x18" + bytes(4)), "header"),
    "zeros": Case(header_edit(300, hostile.bomb(300, window_log=_LOG)), "magic"),
    "half of one": Case(header(lambda p: _whole_header(p)[:100]), "offset"),
    "a byte behind": Case(header(lambda p: _whole_header(p) + b"\0"), "header 0"),
    "no tensors": Case(header(lambda p: factory.header([], [])), "a.weight"),
    "longer than the file": Case(header(lambda p: factory.header([], []), 23), "header 0"),
    "2^62 tensors": Case(header(lambda p: factory.header([], [], n_tensors=HUGE)), "n_tensors"),
    "tensor of 2^60 bytes": Case(header(lambda p: _one_tensor("x", (1 << 59,))), "do not lie"),
    "2^40 experts": Case(header(lambda p: _one_tensor("x_exps.y", (1, 1, 1 << 40))), "do not lie"),
    "2^40 experts that fit": Case(
        header(lambda p: _one_tensor("x_exps.y", (1, 1, 1 << 40)), 1 << 50), "too large"),
    "2^19 experts": Case(
        header(lambda p: _one_tensor("x_exps.y", (1, 1, 1 << 19)), 2 * hostile.MIB), "slices"),
    "a tensor twice": Case(header(lambda p: factory.header([], [_info("x"), _info("x")])), "twice"),
    "big-endian": Case(header(lambda p: factory.header([], [], order=">")), "version"),
    "wrong, of a file with a line feed in its name": Case(
        lambda p: target_file(name=_NASTY)(header(lambda p: _whole_header(p)[:100])(p)), "offset"),
    "a tensor with a line feed in its name": Case(
        lambda p: having(groups=())(forward(runs=(), copies=())(
            header(lambda p: _one_tensor(_NASTY.decode(), (32,)), 192)(p))), "page 0"),
    "two files that are no split model": Case(_twice_the_base, "split"),
}  # fmt: skip


def _target(n_more: int) -> Change:
    return lambda p: target_file(n_bytes=len(p.target) + n_more)(p)


MODELS: dict[str, Case] = {
    "base a byte longer": Case(
        lambda p: having(base_files=(hostile.record(p.base, n_bytes=len(p.base) + 1),))(p), "base"),
    "base of another SHA-256": Case(
        lambda p: having(base_files=(hostile.record(p.target, n_bytes=len(p.base)),))(p), "base"),
    "base of two files": Case(lambda p: having(base_files=p.base_files * 2)(p), "base"),
    "target without a byte": Case(target_file(n_bytes=0), "header"),
    "target of 2^60 bytes": Case(target_file(n_bytes=1 << 60), "too large"),
    "target of 2^63 - 1 bytes": Case(target_file(n_bytes=(1 << 63) - 1), "too large"),
    "target of 1 GiB and more": Case(target_file(n_bytes=hostile.GIB + 64 * 70_000), "too large"),
    "target a byte longer": Case(_target(1), "SHA-256"),
    "target a byte shorter": Case(_target(-1), "d.weight"),
    "target of another SHA-256": Case(
        lambda p: target_file(data=p.base, n_bytes=len(p.target))(p), "SHA-256"),
    "another target, line feed in its name": Case(
        lambda p: target_file(data=p.base, n_bytes=len(p.target), name=_NASTY)(p),
        "SHA-256"),
    "target of two files": Case(
        lambda p: forward(headers=p.ways[0].headers * 2)(
            having(target_files=p.target_files * 2)(p)), ""),
    "way back that is not there": Case(lambda p: p, "reversible", reverse=True),
}  # fmt: skip

RUNS: dict[str, Case] = {
    "tensor that is not there": Case(touched(0, run("e.weight", 4)), "e.weight"),
    "slice that is not there": Case(touched(0, run("a.weight", 4, index=1)), "a.weight"),
    "slice of 2^62": Case(touched(0, run("a.weight", 4, index=HUGE)), "a.weight"),
    "padding that is not there": Case(touched(0, run("0.9", 4, kind=PADDING)), "0.9"),
    "padding called like a tensor": Case(
        touched(0, run("a.weight", 4, kind=PADDING)), "a.weight"),
    "other type": Case(touched(0, run("a.weight", 4, type_number=hostile.Q8_0)), "a.weight"),
    "unknown type": Case(touched(0, run("a.weight", 4, type_number=0)), "a.weight"),
    "a page too many": Case(touched(0, run("a.weight", 5)), "a.weight"),
    "a page too few": Case(touched(0, run("a.weight", 3)), "a.weight"),
    "2^40 pages": Case(touched(0, run("a.weight", 1 << 40)), "a.weight"),
    "a counterpart too few": Case(touched(0, run("a.weight", 4, 1)), "a.weight"),
    "a counterpart too many": Case(touched(3, run("d.weight", 3, 2)), "d.weight"),
    "out of order": Case(
        lambda p: forward(runs=(p.ways[0].runs[1], p.ways[0].runs[0], *p.ways[0].runs[2:]))(p),
        "order"),
    "any, of a model without tensors": Case(
        lambda p: touched(0, run("a.weight", 4))(
            header(lambda _: factory.header([], []), len(factory.header([], [])))(p)), "a.weight"),
}  # fmt: skip


def _copies(*copies: bytes) -> Change:
    return forward(copies=copies)


#: The right copies: of page C + 1 from the base, and of D + 1 from the target.
_FIRST = copy(C + 1, 1, 0, BASE_A + 1)
_SECOND = copy(D - C - 1, 1, 1, D - BASE_A - 2)


def _second(source: int, *, from_target: bool = True) -> Change:
    """Page D + 1 from elsewhere."""
    return _copies(_FIRST, copy(D - C - 1, 1, int(from_target), source - BASE_A - 2))


def _far(n_copies: int) -> Change:
    """Each of some copies is from 2^62 - 1 pages further on."""
    copies = [copy(C if i == 0 else 0, 1, 0, HUGE - 1) for i in range(n_copies)]
    return lambda p: having(groups=())(_copies(*copies)(p))


COPIES: dict[str, Case] = {
    "from behind the base": Case(_second(hostile.BASE_END, from_target=False), "copy"),
    "from page 2^61": Case(_second(1 << 61, from_target=False), "copy"),
    "from page 2^62 - 1": Case(_second(HUGE - 1, from_target=False), "copy"),
    "from page 2^62 and more": Case(_far(2), "copy"),
    "from page 2^63 and more": Case(_far(3), "copy"),
    "from page 2^64 and more": Case(_far(5), "copy"),
    "from a copied page": Case(_second(C + 1), "not stored"),
    "from a page that is kept": Case(_copies(copy(D + 1, 1, 1, C + 1)), "not stored"),
    "of another length": Case(_second(BASE_A + 3, from_target=False), "size"),
    "of another page length": Case(_second(hostile.BASE_B, from_target=False), "size"),
    "one of two of another length": Case(
        _copies(copy(C + 1, 2, 0, BASE_A + 1), copy(D - C - 2, 1, 1, D - BASE_A - 3)), "size"),
    "from a run of another type": Case(_second(B), "size"),
    "over a group": Case(
        _copies(copy(C, 2, 0, BASE_A), copy(D - C - 1, 1, 1, D - BASE_A - 2)), "twice"),
    "over the end of its run": Case(
        _copies(copy(C + 1, 3, 0, BASE_A), copy(0, 1, 1, D - BASE_A - 3)), "twice"),
    "of page 1, and nothing of page 2": Case(_copies(_FIRST), "d.weight"),
}  # fmt: skip


def _wide(number: int, *pages: int, **fields: object) -> Change:
    """Pages of a group in gaps of eight bytes."""
    gaps = [page - before - 1 for page, before in zip(pages, (-1, *pages), strict=False)]
    return in_group(number, width=8, gaps=struct.pack(f"<{len(gaps)}Q", *gaps), **fields)


def _with_pairs(patch: Patch) -> Patch:
    """Half a byte more for each of the last steps of the first group."""
    group = patch.groups[0]
    assert isinstance(group, Group)
    return in_group(0, n_items=2, streams=(*group.streams, b"\x21\x43"))(patch)


def _around(last: int) -> dict[str, object]:
    """Pages whose numbers go beyond 2^63, and come back: the last is `last`."""
    gaps = [(1 << 48) - 1] * (1 << 16) + [last]
    return {"n_pages": len(gaps), "n_bytes": 4 * len(gaps), "width": 8, "mode": XOR,
            "gaps": struct.pack(f"<{len(gaps)}Q", *gaps)}  # fmt: skip


PAGES: dict[str, Case] = {
    "behind the last run": Case(_wide(RAW_GROUP, C, D, D + 3), "page"),
    "of the next run": Case(_wide(SPARSE_GROUP, B, C), "type"),
    "at 2^47": Case(_wide(RAW_GROUP, C, D, 1 << 47), "page"),
    "around 2^64": Case(in_group(ORDERED_GROUP, **_around(3)), "page"),
    "in two groups": Case(lambda p: having(groups=(*p.groups, p.groups[0]))(p), "twice"),
    "in a group and a copy": Case(_wide(RAW_GROUP, C, D, D + 1, n_bytes=3 * 4088), "copy"),
    "of a type that the group has not": Case(in_group(SPARSE_GROUP, type_number=F16), "type"),
    "of raw bytes": Case(in_group(RAW_GROUP, type_number=0), "type"),
    "a byte less": Case(in_group(RAW_GROUP, n_bytes=8959), "bytes"),
    "a byte more": Case(in_group(RAW_GROUP, n_bytes=8961), "bytes"),
    "not given": Case(lambda p: having(groups=p.groups[:RAW_GROUP])(p), "d.weight"),
    "raw, both ways": Case(in_group(RAW_GROUP, directions=hostile.BOTH), "both"),
    "raw, backwards alone": Case(in_group(RAW_GROUP, directions=hostile.REVERSE), "d.weight"),
    "xor, nothing to compare with": Case(in_group(RAW_GROUP, mode=XOR), "counterpart"),
    "xor, the first page behind the pairs": Case(
        _wide(RAW_GROUP, C, D, n_pages=2, n_bytes=2 * 4088, mode=XOR), "counterpart"),
    "ordered, nothing to compare with": Case(in_group(RAW_GROUP, mode=ORDERED), "counterpart"),
    "ordered, of blocks": Case(
        in_group(SPARSE_GROUP, mode=ORDERED, n_items=0,
                 streams=(bytes(140), bytes(140), bytes(4480))),
        "ordered"),
    "kept, and not what it should be": Case(
        lambda p: having(groups=p.groups[1:])(p), "SHA-256"),
    "changed twice by another mode": Case(in_group(ORDERED_GROUP, mode=XOR), "SHA-256"),
    "pairs of large steps": Case(_with_pairs, "SHA-256"),
}  # fmt: skip

#: Page 0 of b.weight has the first two edits, at 5 and 4079; its last page, of 680, one at 679.
EDITS: dict[str, Case] = {
    "beyond the page": Case(stream(SPARSE_GROUP, lambda s: s[:2] + b"\xa8", 2), "page"),
    "in the page behind": Case(stream(SPARSE_GROUP, lambda s: s[:1] + b"\xea\xa7", 2), "page"),
    "far beyond": Case(stream(SPARSE_GROUP, lambda s: b"\xff\xff\xff", 3), "page"),
    "of nothing": Case(stream(SPARSE_GROUP, lambda s: b"\0" + s[1:], 4), "page"),
    "one more than there are": Case(stream(SPARSE_GROUP, lambda s: b"\2\2"), "changed bytes"),
    "one less than there are": Case(stream(SPARSE_GROUP, lambda s: b"\1\1"), "changed bytes"),
    "2^16 more than there are": Case(
        stream(SPARSE_GROUP, lambda s: b"\xff\xff", 1), "changed bytes"),
    "of another page": Case(stream(SPARSE_GROUP, lambda s: b"\1\2"), ""),
    "other bytes": Case(stream(SPARSE_GROUP, lambda s: s[:2] + b"\x40", 4), "SHA-256"),
    "none": Case(in_group(SPARSE_GROUP, n_items=0, streams=(b"\0\0", b"\0\0", b"", b"", b"")),
                 "SHA-256"),
}  # fmt: skip

#: Of a reversible patch, applied backwards: what it says of the forward direction is not checked
#: against the models there.
BACK: dict[str, Case] = {
    "page of a run that is not touched": Case(
        lambda p: forward(runs=(run("c.weight", 4),))(p), "c.weight"),
    "page that the base lacks": Case(
        lambda p: forward(runs=(run("a.weight", 4, 1),))(p), "a.weight"),
    "page behind the forward runs": Case(lambda p: forward(runs=(run("a.weight", 3),))(p), "page"),
    "page of a longer run": Case(
        lambda p: _wide(0, 0, 1, 2, 9)(forward(runs=(run("a.weight", 10),))(p)), "page"),
    "pages around 2^64": Case(in_group(0, **_around(3)), "page"),
    "pages around 2^64 and below 0": Case(in_group(0, **_around((1 << 48) - 9)), "page"),
    "raw": Case(in_group(0, mode=RAW), "both"),
    "pairs of steps that are not sorted": Case(_with_pairs, "bytes"),
    "of blocks": Case(in_group(0, type_number=hostile.Q8_0), ""),
    "SHA-256 of another base": Case(
        lambda p: having(base_files=(hostile.record(p.target),))(p), "SHA-256"),
    "too large": Case(
        lambda p: having(base_files=(hostile.record(p.base, n_bytes=1 << 60),))(p), "too large"),
    "header of the other side": Case(
        lambda p: having(ways=(p.ways[0], replace(
            p.ways[1], headers=(hostile.edit(b"GGUF" + bytes(20), header_bytes(p.target)),))))(p),
        "version"),
}  # fmt: skip
BACK = {name: replace(case, of=two_way, reverse=True) for name, case in BACK.items()}

ALL = {"headers": HEADERS, "models": MODELS, "runs": RUNS, "copies": COPIES, "pages": PAGES,
       "edits": EDITS, "back": BACK}  # fmt: skip
