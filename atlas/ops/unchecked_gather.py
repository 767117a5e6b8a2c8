"""`atlas.ops.gather` without its check, to measure what checking costs. Nothing else may use it."""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from atlas.ops.gather import is_last_to_hold, publish_record
from atlas.ops.kernel import kernel
from atlas.ops.page_faults import page_at
from atlas.ops.swap_state import (
    BLOCKS_DONE,
    GATHERED,
    MAX_INCOMING,
    N_COUNTS,
    N_IN,
    N_OUT,
    N_RECORDS,
)
from atlas.ops.warp_page import PAGE_WORDS, fetch_page, first_warp, store_page, warps_of_grid
from forge.pages import PAGE_BYTES

_U32, _I32 = types.uint32[::1], types.int32[::1]


@kernel(
    _U32, _I32, types.int64, types.int64, types.int64[::1], _I32, _I32, _I32, _I32,
    types.uint64[::1], _I32, launch_bounds=(512, 2),
)  # fmt: skip
def unchecked_gather_kernel(
    words, table, shard_shift, n_pages, state, counts, incoming, frames, outgoing, sources, failed
):
    """`atlas.ops.gather.gather_kernel` without CRCs: what is brought is published as it is."""
    record = np.uint32(np.uint32(state[GATHERED]) % np.uint32(N_RECORDS))
    first = np.uint32(record * np.uint32(MAX_INCOMING))
    of_record = np.uint32(record * np.uint32(N_COUNTS))
    n_in = np.uint32(counts[np.uint32(of_record + np.uint32(N_IN))])
    n_items = np.uint32(n_in << np.uint32(shard_shift))
    lane = np.uint32(np.uint32(cuda.threadIdx.x) & np.uint32(31))
    i = first_warp()
    while i < n_items:
        index = np.uint32(i >> np.uint32(shard_shift))
        slot = np.uint32(i - np.uint32(index << np.uint32(shard_shift)))
        index = np.uint32(index + first)
        if page_at(incoming[index], slot, shard_shift) < n_pages:
            source = np.uint64(sources[index] + np.uint64(np.uint64(slot) * np.uint64(PAGE_BYTES)))
            start = np.uint64(page_at(frames[index], slot, shard_shift) * PAGE_WORDS)
            store_page(words, start, lane, fetch_page(source, lane))
        i = np.uint32(i + warps_of_grid())
    cuda.syncthreads()
    publishes = np.int32(0)
    if cuda.threadIdx.x == 0:
        publishes = is_last_to_hold(failed, counts, np.uint32(of_record + np.uint32(BLOCKS_DONE)))
    if cuda.syncthreads_or(publishes):
        n_out = np.uint32(counts[np.uint32(of_record + np.uint32(N_OUT))])
        publish_record(
            table, state, incoming, frames, outgoing, first, n_in, n_out, shard_shift, n_pages
        )


KERNELS = {"unchecked_gather_kernel": unchecked_gather_kernel}
