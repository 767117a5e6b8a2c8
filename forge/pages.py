"""The 4 KiB page: 4088 bytes of content, their CRC32, and the magic `PGCR`.

The content is a whole number of quantisation blocks of one tensor, laid out as
`forge.block_layouts` says, or a run of raw bytes; the rest is zero. See `forge/FORMAT.md`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

from forge.block_layouts import BlockLayout
from forge.crc32 import CONTENT_BYTES, crc32_content, crc32_pages
from forge.jit import cached_njit

PAGE_BYTES = 4096
CRC_OFFSET = CONTENT_BYTES
MAGIC_OFFSET = CONTENT_BYTES + 4
MAGIC = b"PGCR"
MAGIC_WORD = np.uint32(int.from_bytes(MAGIC, "little"))


@intrinsic
def _copy_bytes(typingctx: Any, destination: Any, source: Any, size: Any) -> Any:
    """`memcpy` between two addresses."""

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        pointer = ir.IntType(8).as_pointer()
        size_type = ir.IntType(64)
        memcpy = b.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, size_type])
        addresses = [b.inttoptr(address, pointer) for address in args[:2]]
        b.call(memcpy, [*addresses, args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.none(types.uint64, types.uint64, types.uint64), codegen


@cached_njit()
def _move_block(page: np.uint64, blocks: np.uint64, slot: int, fields: np.ndarray,
                block_bytes: int, to_page: bool) -> None:  # fmt: skip
    """Move the fields of one block between its struct and its places in a page."""
    struct = blocks + np.uint64(slot * block_bytes)
    for f in range(fields.shape[0]):
        size, struct_offset, page_offset, page_stride = fields[f]
        in_struct = struct + np.uint64(struct_offset)
        in_page = page + np.uint64(page_offset + slot * page_stride)
        if to_page:
            _copy_bytes(in_page, in_struct, np.uint64(size))
        else:
            _copy_bytes(in_struct, in_page, np.uint64(size))


@cached_njit()
def _pack_loop(blocks: np.ndarray, pages: np.ndarray, crcs: np.ndarray, fields: np.ndarray,
               block_bytes: int, per_page: int) -> None:  # fmt: skip
    n_blocks = blocks.size // block_bytes
    source = np.uint64(blocks.ctypes.data)
    tags = pages.view(np.uint32)
    for i in range(pages.shape[0]):
        first = i * per_page
        count = min(per_page, n_blocks - first)
        pages[i, :] = 0
        page = np.uint64(pages[i].ctypes.data)
        struct = source + np.uint64(first * block_bytes)
        if fields.shape[0] == 1:
            _copy_bytes(page, struct, np.uint64(count * block_bytes))
        else:
            for slot in range(count):
                _move_block(page, struct, slot, fields, block_bytes, True)
        crcs[i] = crc32_content(page)
        tags[i, CRC_OFFSET // 4] = crcs[i]
        tags[i, MAGIC_OFFSET // 4] = MAGIC_WORD


@cached_njit()
def _unpack_loop(pages: np.ndarray, blocks: np.ndarray, fields: np.ndarray,
                 block_bytes: int, per_page: int) -> None:  # fmt: skip
    n_blocks = blocks.size // block_bytes
    target = np.uint64(blocks.ctypes.data)
    for i in range(pages.shape[0]):
        first = i * per_page
        count = min(per_page, n_blocks - first)
        page = np.uint64(pages[i].ctypes.data)
        struct = target + np.uint64(first * block_bytes)
        if fields.shape[0] == 1:
            _copy_bytes(struct, page, np.uint64(count * block_bytes))
        else:
            for slot in range(count):
                _move_block(page, struct, slot, fields, block_bytes, False)


def _move_blocks(blocks: np.ndarray, pages: np.ndarray, layout: BlockLayout, to_page: bool) -> None:
    """What the loops do to the contents, with the compiler off."""
    blocks = blocks.reshape(-1, layout.bytes)
    for i, page in enumerate(pages):
        part = blocks[i * layout.per_page : (i + 1) * layout.per_page]
        for field in layout.fields:
            in_struct = part[:, field.struct_offset : field.struct_offset + field.bytes]
            in_page = np.lib.stride_tricks.as_strided(
                page[field.page_offset :], in_struct.shape, (field.page_stride, 1)
            )
            if to_page:
                in_page[:] = in_struct
            else:
                in_struct[:] = in_page


def _field_table(layout: BlockLayout) -> np.ndarray:
    """Fields as the loops take them; one of whole blocks where pages hold the bare structs."""
    if layout.memory_layout == "row_major":
        return np.array([(layout.bytes, 0, 0, layout.bytes)], np.int64)
    return np.array(
        [(f.bytes, f.struct_offset, f.page_offset, f.page_stride) for f in layout.fields], np.int64
    )


def tag_pages(pages: np.ndarray) -> np.ndarray:
    """Write CRC32 and magic behind the content of each page; return the CRCs, uint32 [n]."""
    crcs = crc32_pages(pages)
    pages[:, CRC_OFFSET:MAGIC_OFFSET] = crcs.astype("<u4").view(np.uint8).reshape(-1, 4)
    pages[:, MAGIC_OFFSET:] = np.frombuffer(MAGIC, np.uint8)
    return crcs


def pack_blocks(blocks: np.ndarray, layout: BlockLayout, pages: np.ndarray) -> np.ndarray:
    """Lay quantisation blocks out in pages.

    Parameters
    ----------
    blocks
        uint8 [n_blocks * layout.bytes], as in the GGUF file.
    layout
        The blocks' layout.
    pages
        uint8 [layout.pages_for(n_blocks), 4096] to fill, 8-byte aligned.

    Returns
    -------
    numpy.ndarray
        uint32 [n_pages], the CRC32 of each page's content.
    """
    _check_sizes(blocks, layout, pages)
    if config.DISABLE_JIT:
        pages[:] = 0
        _move_blocks(blocks, pages, layout, to_page=True)
        return tag_pages(pages)
    crcs = np.empty(len(pages), np.uint32)
    _pack_loop(blocks, pages, crcs, _field_table(layout), layout.bytes, layout.per_page)
    return crcs


def unpack_blocks(pages: np.ndarray, layout: BlockLayout, blocks: np.ndarray) -> None:
    """The inverse of `pack_blocks`; fills `blocks`, uint8 [n_blocks * layout.bytes]."""
    _check_sizes(blocks, layout, pages)
    if config.DISABLE_JIT:
        _move_blocks(blocks, pages, layout, to_page=False)
    else:
        _unpack_loop(pages, blocks, _field_table(layout), layout.bytes, layout.per_page)


def pack_raw(content: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Lay raw bytes out, 4088 to a page; returns the CRCs, uint32 [n_pages]."""
    pages[:] = 0
    for i, page in enumerate(pages):
        part = content[i * CONTENT_BYTES : (i + 1) * CONTENT_BYTES]
        page[: len(part)] = part
    return tag_pages(pages)


def unpack_raw(pages: np.ndarray, n_bytes: int) -> np.ndarray:
    """The first `n_bytes` raw bytes held by `pages`, uint8 [n_bytes]."""
    return np.ascontiguousarray(pages[:, :CONTENT_BYTES]).reshape(-1)[:n_bytes]


def page_fault(page: np.ndarray, expected_crc: int) -> str | None:
    """Why a page cannot be trusted, or None.

    Parameters
    ----------
    page
        uint8 [4096].
    expected_crc
        What the table outside the page says: it finds a valid page in the wrong place.
    """
    crc = zlib.crc32(page[:CONTENT_BYTES])
    tag = int.from_bytes(page[CRC_OFFSET:MAGIC_OFFSET].tobytes(), "little")
    if crc != tag:
        return f"content has CRC32 {crc:08x}, its tag says {tag:08x}"
    if page[MAGIC_OFFSET:].tobytes() != MAGIC:
        return f"magic is {page[MAGIC_OFFSET:].tobytes()!r}, not {MAGIC!r}"
    if crc != expected_crc:
        return f"page is valid but not the one that belongs here: {crc:08x}, not {expected_crc:08x}"
    return None


def _check_sizes(blocks: np.ndarray, layout: BlockLayout, pages: np.ndarray) -> None:
    n_blocks, rest = divmod(blocks.size, layout.bytes)
    if rest or pages.shape != (layout.pages_for(n_blocks), PAGE_BYTES):
        raise ValueError(
            f"{blocks.size} bytes of {layout.ggml_type.name} do not fill pages {pages.shape}"
        )
    for array in (blocks, pages):  # the loops see addresses alone
        if array.dtype != np.uint8 or not array.flags.c_contiguous:
            raise TypeError("blocks and pages must be contiguous uint8")
