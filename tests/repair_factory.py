"""Damage to a small sharded model, and what a repair must make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.repair import RepairResult, repair_model
from forge.sgmap import core_path

N_PAGES = 15
TABLE = PAGE_BYTES * (1 + N_PAGES)
#: CRC32 is linear: adding a multiple of its polynomial leaves tag and table as they are.
POLYNOMIAL = int(f"{0x104C11DB7:033b}"[::-1], 2).to_bytes(5, "little")


def edit(path: Path, *changes: tuple[int, bytes]) -> bytes:
    """Overwrite bytes of a file at offsets; returns what it held before."""
    before = path.read_bytes()
    after = bytearray(before)
    for offset, data in changes:
        after[offset : offset + len(data)] = data
    path.write_bytes(after)
    return before


def page(number: int, content: bytes) -> bytes:
    return content[PAGE_BYTES * (1 + number) : PAGE_BYTES * (2 + number)]


def at(number: int, within: int = 0) -> int:
    """Offset of a byte of a page."""
    return PAGE_BYTES * (1 + number) + within


def flipped(path: Path, offset: int, bit: int = 0) -> tuple[int, bytes]:
    return offset, bytes([path.read_bytes()[offset] ^ 1 << bit])


def added(path: Path, offset: int, data: bytes) -> tuple[int, bytes]:
    """A change that XORs `data` in."""
    old = path.read_bytes()[offset : offset + len(data)]
    return offset, bytes(a ^ b for a, b in zip(old, data, strict=True))


def assert_repairs(map_path: Path, source: Path, good: bytes) -> RepairResult:
    """Everything is right afterwards, nothing is left behind, and another call finds nothing."""
    result = repair_model(map_path, source)
    assert result.ok and result.repaired
    assert core_path(map_path).read_bytes() == good
    assert sorted(p.name for p in map_path.parent.iterdir()) == ["core.gguf", "core.sgmap"]
    assert repair_model(map_path, source) == RepairResult(N_PAGES)
    return result


def assert_refused(map_path: Path, source: Path, reason: str) -> str:
    """One line, and nothing has changed or is left behind."""
    files = {p.name: p.read_bytes() for p in map_path.parent.iterdir()}
    with pytest.raises(GGUFShardError) as error:
        repair_model(map_path, source)
    assert reason in str(error.value) and "\n" not in str(error.value), error.value
    assert {p.name: p.read_bytes() for p in map_path.parent.iterdir()} == files
    return str(error.value)
