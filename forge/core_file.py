"""The container `core.gguf`: a valid GGUF v3 file with two tensors.

    header                          padded with zeros to 4096 bytes
    pages       I8  [4096, n]       page i at byte 4096 * (1 + i)
    page_crc32  I32 [n]             the table of expected CRCs, padded with zeros to 4096 bytes

The header depends on n alone, so a reader compares it byte for byte instead of parsing it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from gguf import GGMLQuantizationType

from forge.buffers import read_buffer
from forge.errors import GGUFShardError
from forge.input_file import open_input, read_fully
from forge.pages import PAGE_BYTES

_STRING, _UINT32 = 8, 4


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode("ascii")


def core_header(n_pages: int) -> bytes:
    """The 4096 bytes before the first page."""
    crc_offset = n_pages * PAGE_BYTES
    header = b"".join(
        (
            b"GGUF",
            struct.pack("<IQQ", 3, 2, 2),
            _string("general.architecture"),
            struct.pack("<I", _STRING),
            _string("gguf-shard"),
            _string("general.alignment"),
            struct.pack("<II", _UINT32, PAGE_BYTES),
            _string("pages"),
            struct.pack("<IQQIQ", 2, PAGE_BYTES, n_pages, GGMLQuantizationType.I8, 0),
            _string("page_crc32"),
            struct.pack("<IQIQ", 1, n_pages, GGMLQuantizationType.I32, crc_offset),
        )
    )
    return header.ljust(PAGE_BYTES, b"\0")


def page_offset(page: int) -> int:
    """Byte offset of a page in the file."""
    return PAGE_BYTES * (1 + page)


def page_buffer(first: int, count: int) -> np.ndarray:
    """Memory to read the pages from `first` on into, uint8 [count, 4096]."""
    return read_buffer(page_offset(first), count * PAGE_BYTES).reshape(count, PAGE_BYTES)


def crc_table_bytes(n_pages: int) -> int:
    """Size of the padded table of CRCs."""
    return -(-n_pages * 4 // PAGE_BYTES) * PAGE_BYTES


def core_bytes(n_pages: int) -> int:
    """Size of the whole file."""
    return page_offset(n_pages) + crc_table_bytes(n_pages)


def crc_table_digest(page_crc32: np.ndarray) -> str:
    """xxh3-128 of the table as stored, little-endian; hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(page_crc32.astype("<u4").tobytes()))


class CoreFile:
    """An open `core.gguf`, read by page.

    Parameters
    ----------
    path
        The file.
    n_pages
        Pages it must have, as the map says.

    Raises
    ------
    GGUFShardError
        If the file is missing or its size is not that of `n_pages` pages.
    """

    def __init__(self, path: str | os.PathLike[str], n_pages: int) -> None:
        self.path = Path(path)
        self.n_pages = n_pages
        try:
            self._file = open_input(self.path)
        except OSError as error:
            raise GGUFShardError(f"{self.path}: {error.strerror}") from None
        size = os.fstat(self._file.fileno()).st_size
        if size != core_bytes(n_pages):
            self._file.close()
            raise GGUFShardError(
                f"{self.path}: has {size} bytes, {n_pages} pages need {core_bytes(n_pages)}"
            )

    def __enter__(self) -> CoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def fileno(self) -> int:
        """The descriptor of the open file."""
        return self._file.fileno()

    def read_pages(self, first: int, pages: np.ndarray) -> None:
        """Fill `pages`, uint8 [n, 4096], with the pages from `first` on; nothing is checked."""
        self.read_bytes(page_offset(first), pages)

    def read_bytes(self, offset: int, buffer: np.ndarray) -> None:
        """Fill a contiguous uint8 array from byte `offset` on."""
        read_fully(self._file.fileno(), buffer.data.cast("B"), offset, self.path)

    def header_faults(self) -> list[str]:
        """What is wrong outside the pages and the table's entries."""
        faults: list[str] = []
        header = np.empty(PAGE_BYTES, np.uint8)
        self.read_bytes(0, header)
        _report_difference(header, core_header(self.n_pages), 0, "header", faults.append)
        table = self._read_table()
        padding = table[self.n_pages * 4 :]
        start = page_offset(self.n_pages) + self.n_pages * 4
        _report_difference(padding, bytes(len(padding)), start, "padding", faults.append)
        return faults

    def read_crc_table(self, digest: str) -> np.ndarray:
        """The table of expected CRCs, uint32 [n_pages].

        Raises
        ------
        GGUFShardError
            If it is not the one whose xxh3-128 is `digest`.
        """
        table = self._read_table()[: self.n_pages * 4].view("<u4")
        if crc_table_digest(table) != digest:
            raise GGUFShardError(
                f"{self.path}: offset {page_offset(self.n_pages)}: page_crc32: the table is not "
                "the one whose digest the map holds (digests.page_crc32_xxh3_128)"
            )
        return table.astype(np.uint32)

    def _read_table(self) -> np.ndarray:
        table = np.empty(crc_table_bytes(self.n_pages), np.uint8)
        self.read_bytes(page_offset(self.n_pages), table)
        return table


def _report_difference(found: np.ndarray, expected: bytes, offset: int, what: str,
                       report: Callable[[str], None]) -> None:  # fmt: skip
    different = np.flatnonzero(found != np.frombuffer(expected, np.uint8))
    if different.size:
        at = int(different[0])
        report(f"{what}: byte {offset + at} is {found[at]:#04x}, not {expected[at]:#04x}")
