"""The data pass of a swap: bring shards into frames, check every page, publish them.

    page of slot i of shard s = s << shard_shift | i, checked if below n_pages
    its place in `frames`     = (frame << shard_shift | i) * 4096 bytes
    its place in `faults`     = index of s in shard_ids << shard_shift | i

What has failed its check (`atlas.ops.page_faults`) never becomes visible in a table.

`check_frames` checks pages where they lie in the frames, on every target. Where the host manages
the pool it reads shards into frames, checks them, and `publish` then releases the victims' frames
and enters the new shards.

`gather` is the same in one kernel, for a record of `atlas.ops.swap_state`, with no help from the
host, or for pages that copies have brought before it (`atlas.copy_queue`). A warp takes a page: it
reads the page from host memory, eight 16-byte loads for each lane, stores it to its frame and
computes the CRC32 of what it has in registers (`atlas.ops.warp_page`). A page that does not hold is
read once more, past all caches: the bit may have flipped on the way. If it still does not, the
first warp to find one writes the fault down. Bad bytes in a frame that nobody sees do no harm. The
block that finishes last publishes the record if there is no fault.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, types

from atlas.ops.checks import check_array
from atlas.ops.crc32_tables import TABLE_WORDS, device_tables
from atlas.ops.kernel import kernel
from atlas.ops.page_faults import check_page, fault_bits, page_at
from atlas.ops.paged import PageCache
from atlas.ops.ptx import FULL_WARP
from atlas.ops.swap_state import (
    BLOCKS_DONE,
    FAULT_BITS,
    FAULT_CRC,
    FAULT_KIND,
    FAULT_NUMBER,
    FAULT_PAGE,
    GATHERED,
    MAX_INCOMING,
    N_COUNTS,
    N_IN,
    N_OUT,
    N_RECORDS,
    PAGES_IN,
    SwapState,
)
from atlas.ops.warp_page import (
    LAST_LANE,
    PAGE_THREADS,
    PAGE_WORDS,
    fetch_page,
    fetch_page_anew,
    first_warp,
    load_page,
    page_blocks,
    share_tables,
    store_page,
    warp_crc32,
    warps_of_grid,
)
from atlas.target import Target
from forge.jit import cached_njit
from forge.pages import PAGE_BYTES

_U32, _I32 = types.uint32[::1], types.int32[::1]


@kernel(_U32, _I32, _I32, types.int64, types.int64, _U32, _U32, _U32, launch_bounds=(512, 2))
def check_frames_kernel(
    words, frame_ids, shard_ids, shard_shift, n_pages, page_crc32, tables, faults
):
    shared = cuda.shared.array(TABLE_WORDS, np.uint32, 16)
    share_tables(shared, tables)
    lane = np.uint32(np.uint32(cuda.threadIdx.x) & np.uint32(31))
    i = first_warp()
    while i < np.uint32(faults.size):
        index = np.uint32(i >> np.uint32(shard_shift))
        slot = np.uint32(i - np.uint32(index << np.uint32(shard_shift)))
        page = page_at(shard_ids[index], slot, shard_shift)
        bits = np.uint32(0)
        if page < n_pages:
            start = page_at(frame_ids[index], slot, shard_shift) * PAGE_WORDS
            loaded = load_page(words, np.uint64(start), lane)
            crc = warp_crc32(shared, lane, loaded)
            bits = fault_bits(crc, loaded[7][2], loaded[7][3], page_crc32[np.uint32(page)])
        if lane == LAST_LANE:  # which has loaded tag and magic
            faults[i] = bits
        i = np.uint32(i + warps_of_grid())


@cuda.jit(device=True)
def write_fault(fault, failed, page, bits, crc, kind):
    """Write a fault down unless there is one; its kind last, as the host looks at that."""
    if cuda.atomic.cas(failed, 0, np.int32(0), np.int32(1)) == 0:
        fault[FAULT_NUMBER] = np.uint32(page)
        fault[FAULT_BITS] = bits
        fault[FAULT_CRC] = crc
        cuda.threadfence_system()
        fault[FAULT_KIND] = np.uint32(kind)


@cuda.jit(device=True)
def bring_page(shared, lane, first, source, words, start, page, expected, fault, failed):
    """Bring a page from address `source` to word `start`, and see that it holds; by a warp. If
    `first` is another address, it is `start`'s, and the page should be there already."""
    # Twice in a row, not in a loop: NVVM 13.0 does not come to an end with tuples that change.
    loaded = fetch_page(first, lane)
    if first == source:
        store_page(words, start, lane, loaded)
    crc, bits = check_loaded(shared, lane, expected, loaded)
    if cuda.any_sync(FULL_WARP, bits != 0):
        again = fetch_page_anew(source, lane)
        store_page(words, start, lane, again)
        crc, bits = check_loaded(shared, lane, expected, again)
        if bits != 0:
            write_fault(fault, failed, page, bits, crc, FAULT_PAGE)


@cuda.jit(device=True)
def check_loaded(shared, lane, expected, loaded):
    """The CRC32 of a page that a warp has loaded and, to the last lane, which has loaded tag and
    magic, what is wrong with it."""
    crc = warp_crc32(shared, lane, loaded)
    bits = np.uint32(0)
    if lane == LAST_LANE:
        bits = fault_bits(crc, loaded[7][2], loaded[7][3], expected)
    return crc, bits


@cuda.jit(device=True)
def is_last_to_hold(failed, counts, at):
    """Whether (1 or 0) this block is the last of the grid, and no block has found a fault; by one
    thread, behind a barrier. `counts[at]` counts blocks, and is 0 again in the end."""
    cuda.threadfence()  # what this block has stored, before it counts as done
    if cuda.atomic.add(counts, at, 1) != cuda.gridDim.x - 1:
        return np.int32(0)
    counts[at] = 0
    cuda.threadfence()  # and what the others have, before `failed` is looked at
    return np.int32(cuda.atomic.cas(failed, 0, np.int32(0), np.int32(0)) == 0)


@cuda.jit(device=True)
def publish_record(table, state, incoming, frames, outgoing, first, n_in, n_out, shift, n_pages):
    """Make the entries of a record from `first` on true; by a block. A shard may go and come."""
    i, stride = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
    while i < n_out:
        table[np.uint32(outgoing[np.uint32(first + i)])] = -1
        i = np.uint32(i + stride)
    cuda.syncthreads()
    i = np.uint32(cuda.threadIdx.x)
    while i < n_in:
        entry = np.uint32(first + i)
        shard = incoming[entry]
        table[np.uint32(shard)] = frames[entry]
        left = n_pages - page_at(shard, 0, shift)
        cuda.atomic.add(state, PAGES_IN, min(np.int64(1) << shift, left))
        i = np.uint32(i + stride)
    if cuda.threadIdx.x == 0:
        state[GATHERED] += 1


@kernel(
    _U32, _I32, types.int64, _U32, types.int64, _U32, types.int64[::1], _I32, _I32, _I32, _I32,
    types.uint64[::1], _U32, _I32, types.uint64, launch_bounds=(512, 2),
)  # fmt: skip
def gather_kernel(
    words, table, shard_shift, page_crc32, n_pages, tables, state, counts, incoming, frames,
    outgoing, sources, fault, failed, pool,
):  # fmt: skip
    shared = cuda.shared.array(TABLE_WORDS, np.uint32, 16)
    # Another block may find a fault right now: all threads must have one answer.
    has_failed = cuda.syncthreads_or(failed[0])
    thread = np.uint32(cuda.threadIdx.x)
    record = np.uint32(np.uint32(state[GATHERED]) % np.uint32(N_RECORDS))
    first = np.uint32(record * np.uint32(MAX_INCOMING))
    of_record = np.uint32(record * np.uint32(N_COUNTS))
    n_in = np.uint32(counts[of_record + np.uint32(N_IN)])
    n_items = np.uint32(0) if has_failed else np.uint32(n_in << np.uint32(shard_shift))
    lane = np.uint32(thread & np.uint32(31))
    i = first_warp()
    if np.uint32(i - np.uint32(thread >> np.uint32(5))) < n_items:  # the block has pages to check
        share_tables(shared, tables)
    while i < n_items:
        index = np.uint32(i >> np.uint32(shard_shift))
        slot = np.uint32(i - np.uint32(index << np.uint32(shard_shift)))
        index = np.uint32(index + first)
        page = page_at(incoming[index], slot, shard_shift)
        if page < n_pages:
            source = np.uint64(sources[index] + np.uint64(np.uint64(slot) * np.uint64(PAGE_BYTES)))
            start = np.uint64(page_at(frames[index], slot, shard_shift) * PAGE_WORDS)
            origin = np.uint64(pool + np.uint64(start << np.uint64(2))) if pool != 0 else source
            expected = page_crc32[np.uint32(page)]
            bring_page(shared, lane, origin, source, words, start, page, expected, fault, failed)
        i = np.uint32(i + warps_of_grid())
    cuda.syncthreads()
    publishes = np.int32(0)
    if thread == 0:
        publishes = is_last_to_hold(failed, counts, of_record + np.uint32(BLOCKS_DONE))
    if cuda.syncthreads_or(publishes):
        n_out = np.uint32(counts[of_record + np.uint32(N_OUT)])
        publish_record(
            table, state, incoming, frames, outgoing, first, n_in, n_out, shard_shift, n_pages
        )


# The loops run on one thread: the prefetcher calls them beside compute, and not every threading
# layer of Numba may be entered by two threads at once.


@cached_njit()
def check_frames_loop(frames, frame_ids, shard_ids, shard_shift, n_pages, page_crc32, faults):
    slots = 1 << shard_shift
    for i in range(faults.size):
        slot = i & (slots - 1)
        page = page_at(shard_ids[i >> shard_shift], slot, shard_shift)
        faults[i] = 0
        if page < n_pages:
            start = page_at(frame_ids[i >> shard_shift], slot, shard_shift) * PAGE_BYTES
            faults[i] = check_page(frames, start, page_crc32[page])


@cached_njit()
def release(table, frame_shard, frame):
    """Free a frame. Its shard may have moved to another one, which keeps the table entry."""
    shard = frame_shard[frame]
    if shard >= 0:
        if table[shard] == frame:
            table[shard] = -1
        frame_shard[frame] = -1


@cached_njit()
def enter(table, frame_shard, ticks, frame, shard, tick):
    """Make a shard resident in a frame."""
    table[shard] = frame
    frame_shard[frame] = shard
    ticks[frame] = tick


@cached_njit()
def publish_loop(table, frame_shard, ticks, victims, frame_ids, shard_ids, tick):
    for i in range(victims.size):
        release(table, frame_shard, victims[i])
    for i in range(frame_ids.size):
        enter(table, frame_shard, ticks, frame_ids[i], shard_ids[i], tick)


def check_frames(
    target: Target,
    frames: Any,
    frame_ids: Any,
    shard_ids: Any,
    shard_shift: int,
    n_pages: int,
    page_crc32: Any,
    faults: Any,
) -> None:
    """Check the pages of frames.

    Parameters
    ----------
    target
        Where the arrays live.
    frames
        uint8 [n_frames * 4096 << shard_shift], the pool.
    frame_ids, shard_ids
        int32 [m]: frame `frame_ids[i]` should hold shard `shard_ids[i]`.
    shard_shift
        log2 of the pages per shard.
    n_pages
        Pages of the model. The last shard may be partial: what lies beyond is not looked at.
    page_crc32
        uint32 [n_pages], the CRC32 that each page's content must have.
    faults
        uint32 [m << shard_shift] to fill: 0 for a page that holds (or lies beyond the last), else
        the sum of `TAG_FAULT`, `MAGIC_FAULT` and `TABLE_FAULT`.

    Raises
    ------
    TypeError, ValueError
        If an array has another type or shape, or is not contiguous.
    """
    _require_shards(frames, frame_ids, shard_ids, shard_shift, n_pages, page_crc32, faults)
    if len(faults) == 0:
        return
    if target.is_cuda:
        check_frames_kernel.launch(
            target, page_blocks(len(faults)), PAGE_THREADS, frames.view(np.uint32), frame_ids,
            shard_ids, shard_shift, n_pages, page_crc32, device_tables(target), faults,
        )  # fmt: skip
    else:
        check_frames_loop(frames, frame_ids, shard_ids, shard_shift, n_pages, page_crc32, faults)


def gather(
    target: Target,
    swap: SwapState,
    cache: PageCache,
    page_crc32: Any,
    n_pages: int,
    blocks: int,
    stream: Any = None,
    are_there: bool = False,
) -> None:
    """Do what the next record of a swap says, or write down which page does not hold.

    The shards of record `state[GATHERED] % N_RECORDS` are brought from host memory into their
    frames. If all their pages hold, the record is published in `cache.table`, outgoing shards
    first, and `GATHERED` goes up. Otherwise `fault` and `failed` say why, and this and all later
    gathers change nothing that can be seen.

    Parameters
    ----------
    target
        A CUDA target, where the arrays live.
    swap
        The records, and what has come of them.
    cache
        Where to.
    page_crc32
        uint32 [n_pages], the CRC32 that each page's content must have.
    n_pages
        Pages of the model. The last shard may be partial: what lies beyond is not read.
    blocks
        Blocks of the kernel, `PAGE_THREADS` threads each: so many SMs at most that others lack.
    stream
        Where to queue it; None for `target.stream`.
    are_there
        Whether copies have brought the pages into their frames already. One that does not hold is
        read again from host memory.

    Raises
    ------
    TypeError, ValueError
        If the target is no CUDA target, there are no blocks, or `page_crc32` has another type or
        shape. What `new_swap_state` has made is trusted.
    """
    if not target.is_cuda:
        raise TypeError(f"gather needs a CUDA target, not {target.name}")
    if blocks < 1:
        raise ValueError(f"gather: {blocks} blocks")
    check_array("page_crc32", page_crc32, np.uint32, (n_pages,))
    gather_kernel.launch(
        target, blocks, PAGE_THREADS, cache.words, cache.table, cache.shard_shift, page_crc32,
        n_pages, device_tables(target), swap.state, swap.counts, swap.incoming, swap.frames,
        swap.outgoing, swap.sources, swap.fault, swap.failed,
        target.address(cache.words) if are_there else 0, stream=stream,
    )  # fmt: skip


def publish(
    target: Target,
    table: Any,
    frame_shard: Any,
    ticks: Any,
    victims: Any,
    frame_ids: Any,
    shard_ids: Any,
    tick: int,
) -> None:
    """Release the victims' frames and make checked shards resident, in a pool of the host's.

    Parameters
    ----------
    target
        Where the arrays live; not a CUDA target, which publishes in `gather`.
    table
        int32 [n_shards], the frame of each shard or -1.
    frame_shard
        int32 [n_frames], the shard of each frame or -1.
    ticks
        int64 [n_frames], when the shard in each frame was last used.
    victims
        int32 [v], frames to free. A shard that already lives in another frame stays resident.
    frame_ids, shard_ids
        int32 [m], shard `shard_ids[i]` becomes resident in frame `frame_ids[i]`.
    tick
        When the new shards were used.

    Raises
    ------
    TypeError, ValueError
        If the target is a CUDA target, or an array has another type or shape, or is not
        contiguous.
    """
    if target.is_cuda:
        raise TypeError(f"publish is for pools of the host's, not for target {target.name}")
    check_array("table", table, np.int32, (len(table),))
    check_array("frame_shard", frame_shard, np.int32, (len(frame_shard),))
    check_array("ticks", ticks, np.int64, frame_shard.shape)
    check_array("victims", victims, np.int32, (len(victims),))
    check_array("frame_ids", frame_ids, np.int32, (len(frame_ids),))
    check_array("shard_ids", shard_ids, np.int32, frame_ids.shape)
    publish_loop(table, frame_shard, ticks, victims, frame_ids, shard_ids, tick)


def _require_shards(
    frames: Any,
    frame_ids: Any,
    shard_ids: Any,
    shard_shift: int,
    n_pages: int,
    page_crc32: Any,
    faults: Any,
) -> None:
    check_array("frames", frames, np.uint8, (len(frames),))
    if len(frames) % (PAGE_BYTES << shard_shift):
        raise ValueError(f"frames: {len(frames)} bytes are no whole number of frames")
    check_array("frame_ids", frame_ids, np.int32, (len(frame_ids),))
    check_array("shard_ids", shard_ids, np.int32, frame_ids.shape)
    check_array("page_crc32", page_crc32, np.uint32, (n_pages,))
    check_array("faults", faults, np.uint32, (len(frame_ids) << shard_shift,))


KERNELS = {"check_frames_kernel": check_frames_kernel, "gather_kernel": gather_kernel}
