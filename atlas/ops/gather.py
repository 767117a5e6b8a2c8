"""The data pass of a swap: bring shards into frames, check every page, publish them.

`check_frames` checks pages where they lie in the frames; `gather_pages` first copies them there
from a staging buffer. Neither touches the table: what has failed its check never becomes visible.
`publish` then releases the victims' frames and enters the new shards.

    page of slot i of shard s = s << shard_shift | i, checked if below n_pages
    its place in `frames`     = (frame << shard_shift | i) * 4096 bytes
    its place in `faults`     = index of s in shard_ids << shard_shift | i

A page holds if the CRC32 of its content equals both the tag behind the content and the table that
stands outside the page, and its magic is right: a page that is valid but stale or in the wrong
place differs from the table only. The layout of a page is that of `forge.pages`. On a GPU a block
takes a page, copies it and reads it back as `atlas.ops.crc32` derives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, types

from atlas.ops.checks import check_array
from atlas.ops.crc32 import (
    MAX_BLOCK,
    MAX_GRID,
    PAGE_WORDS,
    block_crc32,
    content_crc32,
    crc32_tables,
)
from atlas.target import Target
from forge.jit import cached_njit
from forge.pages import CRC_OFFSET, MAGIC_OFFSET, MAGIC_WORD, PAGE_BYTES

#: Bits of an entry of `faults`; 0 is a page that holds.
TAG_FAULT = np.uint32(1)  # the content's CRC32 is not the page's tag
MAGIC_FAULT = np.uint32(2)  # the magic is wrong
TABLE_FAULT = np.uint32(4)  # the content's CRC32 is not the table's entry

CRC_WORD = CRC_OFFSET // 4
MAGIC_INDEX = MAGIC_OFFSET // 4


@cached_njit()
def page_at(number, slot, shard_shift):
    """The page in a slot: of the model for the number of a shard, of `frames` for a frame's."""
    return (np.int64(number) << shard_shift) + slot


@cached_njit()
def fault_bits(crc, tag, magic, expected):
    """What is wrong with a page whose content has CRC32 `crc`: an entry of `faults`."""
    bits = np.uint32(0)
    if crc != tag:
        bits |= TAG_FAULT
    if magic != MAGIC_WORD:
        bits |= MAGIC_FAULT
    if crc != expected:
        bits |= TABLE_FAULT
    return bits


@cuda.jit(device=True)
def block_check(frames, start, page, page_crc32, step, place, shares):
    """The fault bits of the page at word `start`, by all threads, known to thread 0."""
    crc = block_crc32(frames, start, step, place, shares)
    return fault_bits(crc, frames[start + CRC_WORD], frames[start + MAGIC_INDEX], page_crc32[page])


@cuda.jit
def check_frames_kernel(
    frames, frame_ids, shard_ids, shard_shift, n_pages, page_crc32, step, place, faults
):
    shares = cuda.shared.array(MAX_BLOCK, np.uint32)
    slots = np.int64(1) << shard_shift
    for i in range(cuda.blockIdx.x, faults.size, cuda.gridDim.x):
        slot = i & (slots - 1)
        page = page_at(shard_ids[i >> shard_shift], slot, shard_shift)
        bits = np.uint32(0)
        if page < n_pages:
            start = page_at(frame_ids[i >> shard_shift], slot, shard_shift) * PAGE_WORDS
            bits = block_check(frames, start, page, page_crc32, step, place, shares)
        if cuda.threadIdx.x == 0:
            faults[i] = bits
        cuda.syncthreads()


@cuda.jit
def gather_pages_kernel(
    frames, frame_ids, staging, shard_ids, shard_shift, n_pages, page_crc32, step, place, faults
):
    shares = cuda.shared.array(MAX_BLOCK, np.uint32)
    slots = np.int64(1) << shard_shift
    for i in range(cuda.blockIdx.x, faults.size, cuda.gridDim.x):
        slot = i & (slots - 1)
        page = page_at(shard_ids[i >> shard_shift], slot, shard_shift)
        bits = np.uint32(0)
        if page < n_pages:
            start = page_at(frame_ids[i >> shard_shift], slot, shard_shift) * PAGE_WORDS
            source = np.int64(i) * PAGE_WORDS
            for w in range(cuda.threadIdx.x, PAGE_WORDS, cuda.blockDim.x):
                frames[start + w] = staging[source + w]
            cuda.syncthreads()
            bits = block_check(frames, start, page, page_crc32, step, place, shares)
        if cuda.threadIdx.x == 0:
            faults[i] = bits
        cuda.syncthreads()


@cuda.jit
def publish_kernel(table, frame_shard, ticks, victims, frame_ids, shard_ids, tick):
    """One block: the barrier keeps releases before entries."""
    for i in range(cuda.threadIdx.x, victims.size, cuda.blockDim.x):
        release(table, frame_shard, victims[i])
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, frame_ids.size, cuda.blockDim.x):
        enter(table, frame_shard, ticks, frame_ids[i], shard_ids[i], tick)


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


# The loops run on one thread: the prefetcher calls them beside compute, and not every threading
# layer of Numba may be entered by two threads at once.


@cached_njit()
def check_page(frames, start, expected):
    """The fault bits of the page at byte `start`."""
    words = frames.view(np.uint32)
    first = start // 4
    crc = content_crc32(frames, start)
    return fault_bits(crc, words[first + CRC_WORD], words[first + MAGIC_INDEX], expected)


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
def gather_pages_loop(
    frames, frame_ids, staging, shard_ids, shard_shift, n_pages, page_crc32, faults
):
    slots = 1 << shard_shift
    words, staged = frames.view(np.uint32), staging.view(np.uint32)
    for i in range(faults.size):
        slot = i & (slots - 1)
        page = page_at(shard_ids[i >> shard_shift], slot, shard_shift)
        faults[i] = 0
        if page < n_pages:
            start = page_at(frame_ids[i >> shard_shift], slot, shard_shift) * PAGE_BYTES
            for w in range(PAGE_WORDS):
                words[start // 4 + w] = staged[i * PAGE_WORDS + w]
            faults[i] = check_page(frames, start, page_crc32[page])


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
    """Check the pages of frames that have just been filled.

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
        tables = crc32_tables(target, target.block)
        check_frames_kernel[min(len(faults), MAX_GRID), target.block](
            frames.view(np.uint32), frame_ids, shard_ids, shard_shift, n_pages, page_crc32,
            *tables, faults,
        )  # fmt: skip
    else:
        check_frames_loop(frames, frame_ids, shard_ids, shard_shift, n_pages, page_crc32, faults)


def gather_pages(
    target: Target,
    frames: Any,
    frame_ids: Any,
    staging: Any,
    shard_ids: Any,
    shard_shift: int,
    n_pages: int,
    page_crc32: Any,
    faults: Any,
) -> None:
    """Copy shards from a staging buffer into frames, and check what has arrived.

    Parameters
    ----------
    staging
        uint8 [m * 4096 << shard_shift], shard `shard_ids[i]` in i-th place.
    target, frames, frame_ids, shard_ids, shard_shift, n_pages, page_crc32, faults
        As for `check_frames`; pages beyond the last one are not copied either.

    Raises
    ------
    TypeError, ValueError
        If an array has another type or shape, or is not contiguous.
    """
    _require_shards(frames, frame_ids, shard_ids, shard_shift, n_pages, page_crc32, faults)
    check_array("staging", staging, np.uint8, (len(faults) * PAGE_BYTES,))
    if len(faults) == 0:
        return
    if target.is_cuda:
        tables = crc32_tables(target, target.block)
        gather_pages_kernel[min(len(faults), MAX_GRID), target.block](
            frames.view(np.uint32), frame_ids, staging.view(np.uint32), shard_ids, shard_shift,
            n_pages, page_crc32, *tables, faults,
        )  # fmt: skip
    else:
        gather_pages_loop(
            frames, frame_ids, staging, shard_ids, shard_shift, n_pages, page_crc32, faults
        )


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
    """Release the victims' frames and make checked shards resident.

    Parameters
    ----------
    target
        Where the arrays live.
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
        If an array has another type or shape, or is not contiguous.
    """
    check_array("table", table, np.int32, (len(table),))
    check_array("frame_shard", frame_shard, np.int32, (len(frame_shard),))
    check_array("ticks", ticks, np.int64, frame_shard.shape)
    check_array("victims", victims, np.int32, (len(victims),))
    check_array("frame_ids", frame_ids, np.int32, (len(frame_ids),))
    check_array("shard_ids", shard_ids, np.int32, frame_ids.shape)
    arguments = (table, frame_shard, ticks, victims, frame_ids, shard_ids, tick)
    if target.is_cuda:
        publish_kernel[1, target.block](*arguments)
    else:
        publish_loop(*arguments)


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


_U32, _I32, _I64 = types.uint32[::1], types.int32[::1], types.int64[::1]
_TABLES = (types.uint32[:, ::1], types.uint32[:, ::1])

KERNELS = {
    "check_frames_kernel": (
        check_frames_kernel,
        (_U32, _I32, _I32, types.int64, types.int64, _U32, *_TABLES, _U32),
    ),
    "gather_pages_kernel": (
        gather_pages_kernel,
        (_U32, _I32, _U32, _I32, types.int64, types.int64, _U32, *_TABLES, _U32),
    ),
    "publish_kernel": (publish_kernel, (_I32, _I32, _I64, _I32, _I32, _I32, types.int64)),
}
