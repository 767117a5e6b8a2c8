"""Checking resident pages again, some at a time, for memory that forgets.

The pages of all frames are taken in order, round and round: page number c of the pool is slot
`c mod 2^shard_shift` of frame `c >> shard_shift`. Frames that hold no published shard are passed
over. What does not hold is written down as a swap's fault is, and like it stops every swap behind
it until the host has looked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, types

from atlas.ops.crc32_tables import TABLE_WORDS, device_tables
from atlas.ops.gather import write_fault
from atlas.ops.kernel import kernel
from atlas.ops.page_faults import fault_bits, page_at
from atlas.ops.paged import PageCache
from atlas.ops.swap_state import FAULT_SCRUB, SwapState
from atlas.ops.warp_page import (
    LAST_LANE,
    PAGE_THREADS,
    PAGE_WORDS,
    first_warp,
    load_page,
    share_tables,
    warp_crc32,
    warps_of_grid,
)
from atlas.target import CudaTarget

# Words of the cursor.
PLACE = 0  # the page of the pool that comes next
DONE = 1  # blocks that have taken theirs
N_CURSOR = 2

_U32, _I32 = types.uint32[::1], types.int32[::1]


@kernel(
    _U32, _I32, _I32, types.int64, types.int64, _U32, _U32, types.int64, types.int64[::1], _U32,
    _I32, launch_bounds=(512, 2),
)  # fmt: skip
def scrub_kernel(
    words, table, frame_shard, shard_shift, n_pages, page_crc32, tables, count, cursor, fault,
    failed,
):  # fmt: skip
    shared = cuda.shared.array(TABLE_WORDS, np.uint32, 16)
    share_tables(shared, tables)
    lane = np.uint32(np.uint32(cuda.threadIdx.x) & np.uint32(31))
    n_places = np.uint64(np.uint64(frame_shard.size) << np.uint64(shard_shift))
    first = np.uint64(cursor[PLACE])
    i = first_warp()
    while i < np.uint32(count):
        place = np.uint64(np.uint64(first + np.uint64(i)) % n_places)
        frame = np.uint32(place >> np.uint64(shard_shift))
        slot = np.uint32(np.uint32(place) - np.uint32(frame << np.uint32(shard_shift)))
        shard = frame_shard[frame]
        page = page_at(shard, slot, shard_shift)
        if shard >= 0 and table[np.uint32(shard)] == np.int32(frame) and page < n_pages:
            loaded = load_page(words, np.uint64(place * np.uint64(PAGE_WORDS)), lane)
            crc = warp_crc32(shared, lane, loaded)
            if lane == LAST_LANE:  # which has loaded tag and magic
                bits = fault_bits(crc, loaded[7][2], loaded[7][3], page_crc32[np.uint32(page)])
                if bits:
                    write_fault(fault, failed, page, bits, crc, FAULT_SCRUB)
        i = np.uint32(i + warps_of_grid())
    cuda.syncthreads()
    if cuda.threadIdx.x == 0 and cuda.atomic.add(cursor, DONE, 1) == cuda.gridDim.x - 1:
        cursor[DONE] = 0
        cursor[PLACE] = np.int64(np.uint64(first + np.uint64(np.uint32(count))) % n_places)


def scrub(
    target: CudaTarget,
    swap: SwapState,
    cache: PageCache,
    page_crc32: Any,
    n_pages: int,
    count: int,
    cursor: Any,
    blocks: int,
    stream: Any = None,
) -> None:
    """Check the next `count` pages of the pool.

    Parameters
    ----------
    target
        The GPU.
    swap, cache
        The state of swaps, and frames and table. No gather may run beside this.
    page_crc32
        uint32 [n_pages], the CRC32 that each page's content must have.
    n_pages
        Pages of the model.
    count
        Pages to check; those of frames that hold nothing are counted, too.
    cursor
        int64 [N_CURSOR] on the device, where the last call has left off; zeros at first.
    blocks
        Blocks of the grid.
    stream
        Where to queue it; None for the target's compute stream.
    """
    if count == 0 or cache.words.size == 0:
        return
    scrub_kernel.launch(
        target, blocks, PAGE_THREADS, cache.words, cache.table, swap.frame_shard,
        cache.shard_shift, n_pages, page_crc32, device_tables(target), count, cursor, swap.fault,
        swap.failed, stream=stream,
    )  # fmt: skip


KERNELS = {"scrub_kernel": scrub_kernel}
