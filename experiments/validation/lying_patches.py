"""Patches that lie of themselves: they are refused whatever the models are.

Each case names a word of the refusal.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from delta.page_coding import ORDERED, RAW
from delta.patch_file import FORWARD
from experiments.validation import hostile_patches as hostile
from experiments.validation.hostile_patches import (
    GIB,
    HUGE,
    MIB,
    ORDERED_GROUP,
    RAW_GROUP,
    SPARSE_GROUP,
    Case,
    Group,
    Patch,
    forward,
    having,
    header_edit,
    in_group,
    material,
    stream,
    target_file,
    two_way,
)


def _named(name: bytes) -> Case:
    return Case(target_file(name=name), "name")


def _zstd_streams() -> dict[str, Case]:
    n = 8960  # bytes of each plane of the raw group
    changes: dict[str, Callable[[bytes], bytes]] = {
        "shorter": lambda s: hostile.bomb(n - 1),
        "longer": lambda s: hostile.bomb(n + 1),
        "stored shorter": lambda s: s[:-1],
        "stored longer": lambda s: s + b"\0",
        "empty": lambda s: b"",
        "junk": lambda s: b"junk" * 20,
        "bomb": lambda s: hostile.bomb(GIB // 64),
        "bomb that says its size": lambda s: hostile.bomb(GIB // 64, GIB // 64),
        "claim of 2^62": lambda s: hostile.bomb(n, HUGE),
        "claim of one more": lambda s: hostile.bomb(n, n + 1),
        "window of 2 GiB": lambda s: hostile.bomb(n, window_log=31),
        "two frames": lambda s: hostile.bomb(n) * 2,
        "bytes behind": lambda s: hostile.bomb(n) + b"\0",
        "half a frame": lambda s: hostile.bomb(n)[:-1],
        "skippable frame": lambda s: b"\x50\x2a\x4d\x18" + bytes(4),
    }
    return {f"stream: {name}": Case(stream(RAW_GROUP, change), "stream")
            for name, change in changes.items()}  # fmt: skip


def _without(number: int, which: int) -> Callable[[Patch], Patch]:
    """A group that lacks a stream."""

    def change(p: Patch) -> Patch:
        group = p.groups[number]
        assert isinstance(group, Group)
        kept = group.streams[:which] + group.streams[which + 1 :]
        return in_group(number, streams=kept)(p)

    return change


def _first_body() -> bytes:
    group = material().groups[0]
    assert isinstance(group, Group)
    return group.body()


HEAD: dict[str, Case] = {
    "other magic": Case(having(magic=b"SGPATCH\1"), "magic"),
    "version 0": Case(having(version=0), "version"),
    "version 2": Case(having(version=2), "version"),
    "version 99": Case(having(version=99), "version"),
    "unknown flag": Case(having(flags=2), "flags"),
    "all flags": Case(having(flags=0xFFFF), "flags"),
    "a way back that is not there": Case(having(flags=1), "header 0"),
    "a way back without its flag": Case(having(flags=0), "plan", two_way),
    "page size 8192": Case(having(page_bytes=8192), "page size"),
    "page size 0": Case(having(page_bytes=0), "page size"),
    "plan longer than the file": Case(having(n_plan_bytes=(1 << 32) - 1), "plan"),
    "plan one shorter": Case(
        lambda p: having(n_plan_bytes=len(p.plan()) - 1)(p), "tables"
    ),
    "no plan": Case(having(n_plan_bytes=0), "base files"),
    "bytes behind the plan": Case(having(behind_plan=b"\0"), "plan"),
}  # fmt: skip

FILES: dict[str, Case] = {
    "no base files": Case(having(base_files=()), "base files"),
    "no target files": Case(having(target_files=()), "target files"),
    "2^62 files": Case(having(n_target=HUGE), "target files"),
    "10^5 files": Case(lambda p: having(target_files=p.target_files * 10**5)(p), "target files"),
    "10^5 files of the base": Case(
        lambda p: having(base_files=p.base_files * 10**5)(p), "base files"
    ),
    "slash": _named(b"../model.gguf"),
    "absolute": _named(b"/tmp/model.gguf"),
    "backslash": _named(b"..\\model.gguf"),
    "NUL": _named(b"a\0b"),
    "..": _named(b".."),
    ".": _named(b"."),
    "no name": _named(b""),
    "300 bytes": _named(b"x" * 300),
    "300 bytes, 150 letters": _named("é".encode() * 150),
    "2^62 bytes": Case(having(target_files=(b"\xff" * 8 + b"\x3fx",)), "name"),
}  # fmt: skip

PLAN: dict[str, Case] = {
    "header of 2^40 bytes": Case(header_edit(1 << 40, b"x"), "header"),
    "header stored in 2^62 bytes": Case(
        forward(headers=(b"\x64" + b"\xff" * 8 + b"\x3f",)), "header"),
    "tables of 2^40 bytes": Case(forward(n_table_bytes=1 << 40), "tables"),
    "tables one longer": Case(
        lambda p: forward(n_table_bytes=len(p.ways[0].tables()) + 1)(p), "tables"),
    "tables one shorter": Case(
        lambda p: forward(n_table_bytes=len(p.ways[0].tables()) - 1)(p), "tables"),
    "tables bomb": Case(forward(n_table_bytes=100, stored=hostile.bomb(GIB // 64)), "tables"),
    "tables bomb that says its size": Case(
        forward(n_table_bytes=1 << 20, stored=hostile.bomb(GIB // 64, GIB // 64)), "tables"),
    "tables with a byte behind": Case(forward(behind=b"\0"), "tables"),
    "2^62 runs": Case(forward(n_runs=HUGE), "runs"),
    "a run too many": Case(forward(n_runs=5), ""),
    "a run too few": Case(forward(n_runs=3), ""),
    "2^62 lost runs": Case(forward(n_lost=HUGE), "lost"),
    "2^62 copies": Case(forward(n_copies=HUGE), "copies"),
    "a copy too many": Case(forward(n_copies=3), "copies"),
    "kind 2": Case(hostile.touched(0, hostile.run("a.weight", 4, kind=2)), "run kind"),
    "name of 64 bytes": Case(hostile.touched(0, hostile.run("a" * 64, 4)), "run name"),
    "unknown ggml type": Case(
        hostile.touched(0, hostile.run("a.weight", 4, type_number=1000)), "run type"),
    "removed ggml type": Case(
        hostile.touched(0, hostile.run("a.weight", 4, type_number=5)), "run type"),
    "2^62 pages": Case(hostile.touched(0, hostile.run("a.weight", HUGE)), "run pages"),
    "more pages unpaired than there are": Case(
        hostile.touched(0, hostile.run("a.weight", 4, 5)), "unpaired"),
    "a run twice": Case(hostile.touched(3, hostile.run("a.weight", 4)), "twice"),
    "copy of no pages": Case(forward(copies=(hostile.copy(8, 0, 0, 2),)), "copy"),
    "copy beyond the end": Case(forward(copies=(hostile.copy(13, 1, 0, 2),)), "copy"),
    "copy longer than what is left": Case(forward(copies=(hostile.copy(8, 6, 0, 2),)), "copy"),
    "copy of 2^62 pages": Case(forward(copies=(hostile.copy(8, HUGE, 0, 2),)), "copy"),
    "copy of kind 2": Case(forward(copies=(hostile.copy(8, 1, 2, 2),)), "copy"),
    "copy from before the first page": Case(forward(copies=(hostile.copy(8, 1, 0, -1),)), "copy"),
    "copy from itself": Case(forward(copies=(hostile.copy(11, 1, 1, 11),)), "out of place"),
    "copy from a later page": Case(forward(copies=(hostile.copy(8, 1, 1, 10),)), "out of place"),
    "copy that reads what it writes": Case(
        forward(copies=(hostile.copy(11, 2, 1, 10),)), "out of place"),
}  # fmt: skip

GROUPS: dict[str, Case] = {
    "mode 9": Case(in_group(RAW_GROUP, mode=9), "mode"),
    "direction 0": Case(in_group(RAW_GROUP, directions=0), "directions"),
    "direction 7": Case(in_group(RAW_GROUP, directions=7), "directions"),
    "unknown ggml type": Case(in_group(RAW_GROUP, type_number=1000), "element type"),
    "no pages": Case(in_group(RAW_GROUP, n_pages=0, gaps=b""), "pages"),
    "no bytes": Case(in_group(RAW_GROUP, n_bytes=0), "pages"),
    "more pages than bytes": Case(in_group(RAW_GROUP, n_bytes=2), "pages"),
    "2^62 pages": Case(in_group(RAW_GROUP, n_pages=HUGE), "pages"),
    "2^62 bytes": Case(in_group(RAW_GROUP, n_bytes=HUGE), "content bytes"),
    "five MiB": Case(in_group(RAW_GROUP, n_bytes=5 * MIB), "content bytes"),
    "edits of raw pages": Case(in_group(RAW_GROUP, n_items=1), "items"),
    "more edits than bytes": Case(in_group(SPARSE_GROUP, n_items=4761), "items"),
    "2^62 edits": Case(in_group(SPARSE_GROUP, n_items=HUGE), "items"),
    "pairs of steps of blocks": Case(in_group(SPARSE_GROUP, mode=ORDERED, n_items=1), "ordered"),
    "a pair more than there are": Case(in_group(ORDERED_GROUP, n_items=3841), "pairs"),
    "2^62 pairs": Case(in_group(ORDERED_GROUP, n_items=HUGE), "items"),
    "pairs without their stream": Case(in_group(ORDERED_GROUP, n_items=1), "stream"),
    "width 0": Case(in_group(RAW_GROUP, width=0), "width"),
    "width 3": Case(in_group(RAW_GROUP, width=3), "width"),
    "width 16": Case(in_group(RAW_GROUP, width=16), "width"),
    "a gap too many": Case(in_group(RAW_GROUP, gaps=bytes(4)), "page numbers"),
    "a gap too few": Case(in_group(RAW_GROUP, gaps=bytes(2)), "page numbers"),
    "gaps bomb": Case(in_group(RAW_GROUP, gaps=hostile.bomb(GIB // 64)), "page numbers"),
    "gaps bomb that says its size": Case(
        in_group(RAW_GROUP, gaps=hostile.bomb(GIB // 64, GIB // 64)), "page numbers"),
    "gap of 2^63": Case(
        in_group(RAW_GROUP, width=8, gaps=struct.pack("<3Q", 7, 2, 1 << 63)), "page numbers"),
    "gap of -1": Case(
        in_group(RAW_GROUP, width=8, gaps=struct.pack("<3q", 7, 2, -1)), "page numbers"),
    "gap of -2": Case(
        in_group(RAW_GROUP, width=8, gaps=struct.pack("<3q", 7, 2, -2)), "page numbers"),
    "a stream too few": Case(_without(RAW_GROUP, 1), "stream"),
    "a stream too many": Case(in_group(RAW_GROUP, behind=b"\0"), "group"),
    "body of one byte": Case(having(groups=(b"\0",)), ""),
    "body that ends anywhere": Case(having(groups=(_first_body()[:20],)), ""),
    "longer than the file": Case(
        having(groups=(), end=struct.pack("<IQ", 1000, 0) + bytes(20)), "group"),
    "longer than any": Case(
        having(groups=(), end=struct.pack("<IQ", 1 << 31, 0) + bytes(20)), "group"),
    "cut off": Case(having(groups=(), end=struct.pack("<I", 9)), "group"),
    "other xxh3-64": Case(
        having(groups=(), end=struct.pack("<IQ", 4, 1) + b"body" + bytes(4)), "xxh3"),
    "no end": Case(having(end=b""), "group"),
    "half an end": Case(having(end=bytes(3)), "group"),
    "bytes behind the end": Case(having(end=bytes(5)), "end"),
    "a group behind the end": Case(
        having(end=bytes(4) + struct.pack("<IQ", 4, 1) + b"body" + bytes(4)), "end"),
} | _zstd_streams()  # fmt: skip

#: Bytes of tables that no model needs, and that are not many in themselves.
_LARGE = 24 * MIB
#: What would take gigabytes if it were believed.
BOMBS: dict[str, Case] = {
    "runs": Case(forward(n_table_bytes=_LARGE, stored=hostile.bomb(
        _LARGE, first=hostile.integer(_LARGE // 6 - 1))), ""),
    "lost runs": Case(forward(n_table_bytes=_LARGE, stored=hostile.bomb(
        _LARGE, first=b"\0" + hostile.integer(_LARGE // 3 - 2))), ""),
    "copies": Case(forward(n_table_bytes=_LARGE, stored=hostile.repeated(
        b"\1" + hostile.run("a.weight", 1 << 40) + b"\0" + hostile.integer(_LARGE // 4 - 10),
        hostile.copy(0, 1, 0, 0), _LARGE)), ""),
    "pages of groups": Case(having(groups=500 * (Group(
        RAW, FORWARD, 0, hostile.GROUP_CONTENT, hostile.GROUP_CONTENT,
        hostile.bomb(hostile.GROUP_CONTENT), ()),)), "page"),
}  # fmt: skip


ALL = {"head": HEAD, "files": FILES, "plan": PLAN, "groups": GROUPS, "bombs": BOMBS}
