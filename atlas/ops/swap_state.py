"""What the kernels of a swap work on: which shard is where, now and soon.

A swap is two kernels in stream order, `atlas.ops.select` and `atlas.ops.gather`:

    select   lists which of the wanted shards are missing, gives each a free frame, and chooses
             frames to free in their place: a record of what shall happen
    gather   copies the missing shards from host memory into those frames, checks every page on the
             way, and if all hold makes the record true: publishes the table's entries

`select` may run ahead of `gather` by some records, on a stream of its own, so it works on the state
as planned (`planned`, `frame_shard`), as if every swap before it had succeeded. What computing
kernels see (`PageCache.table`) is changed by `gather` alone. When a page does not hold, nothing of
its record is published, the fault is written down, and every later select and gather does nothing
until the host has looked: then what was planned is made equal to what was published.

What the kernels share with each other lies in one piece, `SwapState.state` first, so that the host
can have all of it in one copy (`LOG_BYTES`, `read_record`).

Frames to be freed enter the free list at once, behind those that were free, and a gather that
overwrites one of them runs behind the gather that takes its shard out of the table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from atlas.ops.checks import check_array
from atlas.ops.lru import RANK_COLD, RANK_NORMAL, RANK_PINNED
from atlas.pinned import MappedArray
from atlas.target import CudaTarget

MAX_INCOMING = 64  # shards of a record
N_RECORDS = 8  # selects run ahead of gathers by less than this

# Words of `SwapState.state`.
TICK = 0  # selects so far; the time of the cache
GATHERED = 1  # gathers so far
FREE_HEAD = 2  # place in `free_frames` (a ring) of the first free frame
N_FREE = 3  # how many are free
HITS = 4  # wanted shards that were there (or on their way), a word for each kind of select
MISSES = 6  # those that were not, likewise
PAGES_IN = 8  # pages that gathers have brought in
N_STATE = 16

# Words of `SwapState.fault`.
FAULT_KIND = 0  # 0: none; FAULT_PAGE; FAULT_ROOM; FAULT_SCRUB
FAULT_NUMBER = 1  # the page of the model that does not hold; or the shard there is no frame for
FAULT_BITS = 2  # as in `atlas.ops.page_faults`
FAULT_CRC = 3  # the CRC32 its content has
N_FAULT = 4

FAULT_PAGE = 1
FAULT_ROOM = 2
FAULT_SCRUB = 3  # a resident page

# Words of a record's `counts`.
N_IN = 0  # shards coming in
N_OUT = 1  # shards given up
BLOCKS_DONE = 2  # of the gather that is under way
N_COUNTS = 4


_SIZES = (2 * N_STATE, N_RECORDS * N_COUNTS, *3 * (N_RECORDS * MAX_INCOMING,))
_ENDS = np.cumsum(_SIZES).tolist()  # in int32 words: state, counts, incoming, frames, outgoing
LOG_BYTES = 4 * _ENDS[-1]


class Record(NamedTuple):
    """What a select has decided.

    Attributes
    ----------
    tick
        Of the select.
    incoming, frames
        Shards that come, and where to.
    outgoing
        Shards that go.
    """

    tick: int
    incoming: list[int]
    frames: list[int]
    outgoing: list[int]


def read_record(log: np.ndarray, tick: int) -> Record | None:
    """The record of a select, of which it was the latest when `LOG_BYTES` from `SwapState.state` on
    were copied to `log`, int32; None if, behind a fault, it has done nothing."""
    state, counts, incoming, frames, outgoing = np.split(log, _ENDS[:-1])
    if int(state.view(np.int64)[TICK]) != tick + 1:
        return None
    slot = tick % N_RECORDS
    n_in, n_out = (int(counts[slot * N_COUNTS + word]) for word in (N_IN, N_OUT))
    first = slot * MAX_INCOMING
    return Record(
        tick, incoming[first : first + n_in].tolist(), frames[first : first + n_in].tolist(),
        outgoing[first : first + n_out].tolist(),
    )  # fmt: skip


class SwapState(NamedTuple):
    """Device arrays, but for `fault`.

    Attributes
    ----------
    planned
        int32 [n_shards], the frame a shard is in or is coming to, or -1.
    frame_shard
        int32 [n_frames], the reverse, or -1.
    ticks
        int64 [n_frames], the select that last wanted the frame's shard.
    shard_rank
        uint8 [n_shards], the order in which shards are given up (`atlas.ops.lru`).
    free_frames
        int32 [n_frames], a ring.
    state
        int64 [N_STATE].
    counts
        int32 [N_RECORDS * N_COUNTS]; record `tick % N_RECORDS` is that of select `tick`.
    incoming, frames, outgoing
        int32 [N_RECORDS * MAX_INCOMING]: shards coming in, their frames, and shards given up.
    sources
        uint64 [N_RECORDS * MAX_INCOMING]: where each incoming shard lies in host memory.
    host_address
        uint64 [n_shards], where every shard lies in host memory, or 0.
    fault
        uint32 [N_FAULT] in host memory that is mapped for the device.
    failed
        int32 [1], on the device: not 0 once `fault` has been written.
    keys
        uint32 [n_frames + 4], scratch of `select`, which works on four frames at a time.
    """

    planned: Any
    frame_shard: Any
    ticks: Any
    shard_rank: Any
    free_frames: Any
    state: Any
    counts: Any
    incoming: Any
    frames: Any
    outgoing: Any
    sources: Any
    host_address: Any
    fault: Any
    failed: Any
    keys: Any


_BYTES_PER_SHARD = 4 + 1  # planned, shard_rank
_BYTES_PER_FRAME = 4 + 8 + 4 + 4  # frame_shard, ticks, free_frames, keys
_BYTES_PER_RECORD = 4 * N_COUNTS + (3 * 4 + 8) * MAX_INCOMING
_FIXED_BYTES = 8 * N_STATE + 4 + 4 * 4  # state, failed, the end of keys


def new_swap_state(
    target: CudaTarget,
    n_frames: int,
    shard_rank: np.ndarray,
    host_address: Any,
    fault: MappedArray,
) -> SwapState:
    """The state of a cache that holds nothing: all frames are free, in ascending order.

    Parameters
    ----------
    target
        The GPU.
    n_frames
        Frames of the pool, at least one.
    shard_rank
        uint8 [n_shards] on the host, each `RANK_COLD`, `RANK_NORMAL` or `RANK_PINNED`.
    host_address
        uint64 [n_shards] on the device, kept: where every shard lies in host memory, or 0.
    fault
        uint32 [N_FAULT], mapped; kept.

    Raises
    ------
    TypeError, ValueError
        If an array has another type or shape, there are no frames, or a rank is none of the three.
    """
    check_array("shard_rank", shard_rank, np.uint8, (None,))
    check_array("host_address", host_address, np.uint64, shard_rank.shape)
    if n_frames < 1:
        raise ValueError(f"n_frames: {n_frames} is not positive")
    odd = np.flatnonzero(~np.isin(shard_rank, (RANK_COLD, RANK_NORMAL, RANK_PINNED)))
    if odd.size:
        raise ValueError(f"shard_rank: shard {odd[0]} has rank {shard_rank[odd[0]]}")
    state = np.zeros(N_STATE, np.int64)
    state[N_FREE] = n_frames
    log = np.zeros(_ENDS[-1], np.int32)
    log[: _ENDS[0]] = state.view(np.int32)
    log[_ENDS[1] :] = -1
    shared = target.put(log)
    parts = [shared[end - size : end] for size, end in zip(_SIZES, _ENDS, strict=True)]
    return SwapState(
        planned=target.full(len(shard_rank), -1, np.int32),
        frame_shard=target.full(n_frames, -1, np.int32),
        ticks=target.full(n_frames, 0, np.int64),
        shard_rank=target.put(shard_rank),
        free_frames=target.put(np.arange(n_frames, dtype=np.int32)),
        state=parts[0].view(np.int64),
        counts=parts[1],
        incoming=parts[2],
        frames=parts[3],
        outgoing=parts[4],
        sources=target.full(N_RECORDS * MAX_INCOMING, 0, np.uint64),
        host_address=host_address,
        fault=fault,
        failed=target.full(1, 0, np.int32),
        keys=target.empty(n_frames + 4, np.uint32),
    )


def swap_state_bytes(n_shards: int, n_frames: int) -> int:
    """Device memory that `new_swap_state` allocates."""
    fixed = _FIXED_BYTES + N_RECORDS * _BYTES_PER_RECORD
    return fixed + n_shards * _BYTES_PER_SHARD + n_frames * _BYTES_PER_FRAME


def replan(target: CudaTarget, swap: SwapState, table: Any) -> None:
    """After a fault, plan anew from what is published, and clear the fault.

    The host must have stopped queueing; what is queued is waited for. Hits and misses stay as they
    are counted, and frames as recently used as they are.

    Parameters
    ----------
    target
        The GPU.
    swap
        The state to put right.
    table
        int32 [n_shards] on the device, what gathers have published (`PageCache.table`).
    """
    target.synchronize()
    swap.fault.host[:] = 0
    # Not `get`: the guard of another cache on this target would leave this one half put right.
    planned, state = target.fetch(table), target.fetch(swap.state)
    frame_shard = np.full(len(swap.frame_shard), -1, np.int32)
    resident = np.flatnonzero(planned >= 0)
    frame_shard[planned[resident]] = resident
    free = np.flatnonzero(frame_shard < 0).astype(np.int32)
    ring = np.full(len(frame_shard), -1, np.int32)
    ring[: len(free)] = free
    state[GATHERED], state[FREE_HEAD], state[N_FREE] = state[TICK], 0, len(free)
    target.write(swap.planned, planned)
    target.write(swap.frame_shard, frame_shard)
    target.write(swap.free_frames, ring)
    target.write(swap.state, state)
    target.write(swap.counts, np.zeros(N_RECORDS * N_COUNTS, np.int32))
    target.write(swap.failed, np.zeros(1, np.int32))
