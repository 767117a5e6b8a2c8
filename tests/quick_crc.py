"""A page's CRC32 by zlib, for the simulator's tests of what is built on checked pages.

There the real one, a table lookup for every five bits by every lane, would take half of the time.
It has tests of its own (`test_crc32`, `test_gather`, `test_swap`), and scrubs use it always. Every
lane still has to come.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from numba import cuda

from atlas.ops import gather
from atlas.ops.ptx import FULL_WARP
from forge.crc32 import CONTENT_BYTES
from tests.warp_simulator import exchange

_N_LOADS, _N_LANES = 8, 32


def warp_crc32(tables: Any, lane: Any, page: Any) -> np.uint32:
    """`atlas.ops.warp_page.warp_crc32`, of pages in the simulator."""
    pages = exchange(FULL_WARP, page)  # of all lanes, the same for each
    if "crc32" not in pages:
        words = [pages[k][load] for load in range(_N_LOADS) for k in range(_N_LANES)]
        content = np.array(words, np.uint32).tobytes()[:CONTENT_BYTES]
        pages["crc32"] = np.uint32(zlib.crc32(content))  # type: ignore[index]
    return pages["crc32"]  # type: ignore[index,no-any-return]


def share_tables(shared: Any, tables: Any) -> None:
    """`atlas.ops.warp_page.share_tables`, less the tables."""
    cuda.syncthreads()


def install(patch: pytest.MonkeyPatch) -> None:
    """Let gathers check pages this way."""
    patch.setattr(gather, "warp_crc32", warp_crc32)
    patch.setattr(gather, "share_tables", share_tables)
