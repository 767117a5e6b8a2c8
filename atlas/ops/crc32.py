"""CRC32 of the contents of pages: zlib's checksum of the first 4088 of each page's 4096 bytes.

On the CPU each page goes through `forge.crc32.crc32_content`, pages in parallel. On a GPU a warp
takes a page, and computes the checksum as `atlas.ops.warp_page` derives.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numba import cuda, prange, types
from numba.core import config

from atlas.ops.checks import check_array
from atlas.ops.crc32_tables import TABLE_WORDS, device_tables
from atlas.ops.kernel import kernel
from atlas.ops.warp_page import (
    LAST_LANE,
    PAGE_THREADS,
    PAGE_WORDS,
    first_warp,
    load_page,
    page_blocks,
    share_tables,
    warp_crc32,
    warps_of_grid,
)
from atlas.target import Target
from forge.crc32 import CONTENT_BYTES, crc32_content
from forge.jit import cached_njit
from forge.pages import PAGE_BYTES

if config.DISABLE_JIT:

    def content_crc32(pages: Any, start: int) -> Any:
        """CRC32 of the page content at byte `start` of a flat uint8 array, interpreted."""
        return np.uint32(zlib.crc32(pages[start : start + CONTENT_BYTES]))

else:

    @cached_njit()
    def content_crc32(pages, start):
        """CRC32 of the page content at byte `start` of a flat uint8 array, compiled."""
        return crc32_content(np.uint64(pages.ctypes.data + start))


@kernel(types.uint32[::1], types.uint32[::1], types.uint32[::1], launch_bounds=(512, 2))
def crc32_kernel(words, tables, out):
    shared = cuda.shared.array(TABLE_WORDS, np.uint32, 16)
    share_tables(shared, tables)
    lane = np.uint32(np.uint32(cuda.threadIdx.x) & np.uint32(31))
    page = first_warp()
    while page < np.uint32(out.size):
        loaded = load_page(words, np.uint64(np.uint64(page) * np.uint64(PAGE_WORDS)), lane)
        crc = warp_crc32(shared, lane, loaded)
        if lane == LAST_LANE:
            out[page] = crc
        page = np.uint32(page + warps_of_grid())


@cached_njit(parallel=True)
def crc32_loop(pages, out):
    for page in prange(out.size):
        out[page] = content_crc32(pages, page * PAGE_BYTES)


def crc32_pages(target: Target, pages: Any, out: Any) -> None:
    """CRC32 of the content of each page.

    Parameters
    ----------
    target
        Where the arrays live.
    pages
        uint8 [n_pages, 4096].
    out
        uint32 [n_pages] to fill: `zlib.crc32(page[:4088])` of each page.

    Raises
    ------
    TypeError, ValueError
        If an array has another type or shape, or is not contiguous.
    """
    n_pages = len(pages)
    check_array("pages", pages, np.uint8, (n_pages, PAGE_BYTES))
    check_array("out", out, np.uint32, (n_pages,))
    if n_pages == 0:
        return
    flat = pages.reshape(n_pages * PAGE_BYTES)
    if target.is_cuda:
        crc32_kernel.launch(
            target, page_blocks(n_pages), PAGE_THREADS,
            flat.view(np.uint32), device_tables(target), out,
        )  # fmt: skip
    else:
        crc32_loop(flat, out)


KERNELS = {"crc32_kernel": crc32_kernel}
