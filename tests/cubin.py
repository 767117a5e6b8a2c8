"""What a cubin says of its functions: registers, local and shared memory, size of the code.

A cubin is an ELF64 file (System V ABI). Its section `.nv.info` is a list of attributes, of which
`cuobjdump -elf` shows the names used below; `.text.K` and `.nv.shared.K` are code and shared memory
of kernel K.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SYMBOL_BYTES = 24
_INFO_FORMAT_SIZED = 4  # EIFMT_SVAL: the attribute's size in bytes follows, then its value
_ATTRIBUTES = {0x2F: "registers", 0x11: "frame", 0x12: "stack"}
# EIATTR_REGCOUNT, EIATTR_FRAME_SIZE, EIATTR_MIN_STACK_SIZE


@dataclass(frozen=True)
class Resources:
    """What a function in a cubin takes: registers and, in bytes, memory and code.

    `frame` is the local memory of a thread: the function's own, or with all it calls if that is
    more.
    """

    registers: int
    frame: int
    shared: int
    code: int


def cubin_resources(cubin: bytes) -> dict[str, Resources]:
    """The resources of every function in a cubin, by its symbol.

    Raises
    ------
    ValueError
        If the bytes are no ELF64 file with the sections of a cubin.
    """
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("cubin: not a little-endian ELF64 file")
    try:
        sections = _sections(cubin)
        attributes = _attributes(cubin, sections)
    except (struct.error, KeyError, IndexError) as error:
        raise ValueError(f"cubin: broken or cut short ({error!r})") from error
    nothing = _Section(0, 0, 0)
    return {
        name: Resources(
            registers=found["registers"],
            frame=max(found.get("frame", 0), found.get("stack", 0)),
            shared=sections.get(f".nv.shared.{name}", nothing).size,
            code=sections[f".text.{name}"].size,
        )
        for name, found in attributes.items()
        if f".text.{name}" in sections and "registers" in found
    }


@dataclass(frozen=True)
class _Section:
    offset: int
    size: int
    link: int  # of a symbol table: the index of the section with its names


def _sections(cubin: bytes) -> dict[str, _Section]:
    """The sections by name, in the order of their indices."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQII", cubin, table + i * entry_bytes) for i in range(count)
    ]
    names_offset = headers[names_index][4]
    return {
        _string(cubin, names_offset + name): _Section(offset, size, link)
        for name, _, _, _, offset, size, link, _ in headers
    }


def _attributes(cubin: bytes, sections: dict[str, _Section]) -> dict[str, dict[str, int]]:
    """What `.nv.info` says of each symbol."""
    symbols = _symbols(cubin, sections)
    info = sections[".nv.info"]
    found: dict[str, dict[str, int]] = {}
    at, end = info.offset, info.offset + info.size
    while at < end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form != _INFO_FORMAT_SIZED:
            continue  # the value is in the two bytes where others have their size
        if attribute in _ATTRIBUTES:
            symbol, value = struct.unpack_from("<II", cubin, at)
            found.setdefault(symbols[symbol], {})[_ATTRIBUTES[attribute]] = value
        at += size
    return found


def _symbols(cubin: bytes, sections: dict[str, _Section]) -> list[str]:
    table = sections[".symtab"]
    names = list(sections.values())[table.link]
    return [
        _string(cubin, names.offset + struct.unpack_from("<I", cubin, at)[0])
        for at in range(table.offset, table.offset + table.size, _SYMBOL_BYTES)
    ]


def _string(data: bytes, start: int) -> str:
    end = data.find(b"\0", start)
    if end < 0:
        raise IndexError(start)
    return data[start:end].decode()
