"""The planning half of a swap, on the device: what is missing, where it goes, what makes room.

One block looks up the wanted shards. Those that have a frame (hits) get the current tick; the
others (misses) take frames from the front of the ring of free ones, in the order of the list, and
then frames are given up until `n_kept_free` are free again. What shall happen is written into a
record for `atlas.ops.gather`, as `atlas.ops.swap_state` describes.

A victim is a frame that holds a shard, is not pinned, and was last wanted more than `lag` selects
ago. Which ones go, and how they are found, says `atlas.ops.victims`; they enter the ring in the
order in which they go.

What a select waits for is memory: the state and the list of wanted shards; then, at once, all that
the list leads to; then the scan for victims. A shard's place in the list of misses is the number of
misses before it, counted in the ballots of two warps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, types
from numba.core import config

from atlas.ops.checks import check_array
from atlas.ops.gather import write_fault
from atlas.ops.kernel import kernel
from atlas.ops.ptx import FULL_WARP
from atlas.ops.swap_state import (
    FAULT_ROOM,
    FREE_HEAD,
    HITS,
    MAX_INCOMING,
    MISSES,
    N_COUNTS,
    N_FREE,
    N_IN,
    N_OUT,
    N_RECORDS,
    TICK,
    SwapState,
)
from atlas.ops.victims import find_victims
from atlas.target import CudaTarget

#: Why shards are wanted: which words of `SwapState.state` count their hits and misses.
DEMAND = 0  # by compute that comes next
AHEAD = 1  # by compute that comes later
UNCOUNTED = 2  # neither

#: Threads of the block: as many as a block can have, since all the loads of a select are issued by
#: one multiprocessor.
SELECT_THREADS = 64 if config.ENABLE_CUDASIM else 1024
_MISS_WORDS = 2  # a bit for each of MAX_INCOMING shards
_NONE, _LANES = np.uint32(0), np.uint32(31)


@cuda.jit(device=True)
def ring_place(first, offset, n_frames):
    """The place in the ring that lies `offset` (at most `n_frames`) behind another."""
    place = np.uint32(first + offset)
    return np.uint32(place - n_frames) if place >= n_frames else place


@cuda.jit(device=True)
def look_up(planned, free_frames, host_address, shards, head, n_free, wanted):
    """Where the wanted shards are, and all that placing them will need: what is loaded depends on
    nothing but the list. `wanted` has MAX_INCOMING places, frames from the front of the ring and
    addresses, and a bit for each shard that is missing."""
    places, fronts, origins, misses = wanted
    n_frames, n_wanted = np.uint32(free_frames.size), np.uint32(shards.size)
    i = np.uint32(cuda.threadIdx.x)
    while i < MAX_INCOMING:
        is_missing = False
        if i < n_wanted:
            shard = np.uint32(shards[i])
            place = planned[shard]
            places[i] = place
            origins[i] = host_address[shard]
            is_missing = place < 0
        if i < n_free:
            fronts[i] = free_frames[ring_place(head, i, n_frames)]
        votes = np.uint32(cuda.ballot_sync(FULL_WARP, is_missing))
        if i & _LANES == 0:
            misses[i >> np.uint32(5)] = votes
        i = np.uint32(i + np.uint32(cuda.blockDim.x))


@cuda.jit(device=True)
def misses_before(missing, i):
    """How many of the wanted shards before `i` are missing; `missing` has a bit for each."""
    below = np.uint64(np.uint64(np.uint64(1) << np.uint64(i)) - np.uint64(1))
    return np.uint32(cuda.popc(np.uint64(missing & below)))


@cuda.jit(device=True)
def report_no_room(shards, missing, n_free, fault, failed):
    """Write down the first shard for which there is no frame."""
    i = np.uint32(cuda.threadIdx.x)
    while i < np.uint32(shards.size):
        is_missing = np.uint64(missing >> np.uint64(i)) & np.uint64(1) != 0
        if is_missing and misses_before(missing, i) == n_free:
            write_fault(fault, failed, shards[i], np.uint32(0), np.uint32(0), FAULT_ROOM)
        i = np.uint32(i + np.uint32(cuda.blockDim.x))


@cuda.jit(device=True)
def place_wanted(planned, frame_shard, ticks, record, shards, wanted, missing, tick):
    """Touch the hits and give the misses their frames; `record` is incoming, frames and sources
    from some entry on."""
    places, fronts, origins, _ = wanted
    incoming, frames, sources, first_entry = record
    i = np.uint32(cuda.threadIdx.x)
    while i < np.uint32(shards.size):
        place = places[i]
        if place >= 0:
            ticks[np.uint32(place)] = tick
        else:
            nth, shard = misses_before(missing, i), np.uint32(shards[i])
            frame, entry = fronts[nth], np.uint32(first_entry + nth)
            planned[shard] = frame
            frame_shard[np.uint32(frame)] = shard
            ticks[np.uint32(frame)] = tick
            incoming[entry], frames[entry], sources[entry] = shard, frame, origins[i]
        i = np.uint32(i + np.uint32(cuda.blockDim.x))


@cuda.jit(device=True)
def give_up(planned, frame_shard, free_frames, outgoing, first_entry, victims, n_victims, tail):
    """Free the victims' frames, behind those that are free."""
    n_frames, i = np.uint32(frame_shard.size), np.uint32(cuda.threadIdx.x)
    while i < n_victims:
        frame = victims[i]
        shard = frame_shard[frame]
        planned[np.uint32(shard)] = -1
        frame_shard[frame] = -1
        free_frames[ring_place(tail, i, n_frames)] = frame
        outgoing[np.uint32(first_entry + i)] = shard
        i = np.uint32(i + np.uint32(cuda.blockDim.x))


_I32, _I64, _U32, _U64 = (
    types.int32[::1], types.int64[::1], types.uint32[::1], types.uint64[::1],
)  # fmt: skip


@kernel(
    _I32, _I32, _I64, types.uint8[::1], _I32, _I64, _I32, _I32, _I32, _I32, _U64, _U64, _U32, _I32,
    _U32, _I32, types.int64, types.uint32, types.boolean, types.uint32,
    launch_bounds=(1024, 1),
)  # fmt: skip
def select_kernel(
    planned, frame_shard, ticks, shard_rank, free_frames, state, counts, incoming, frames, outgoing,
    sources, host_address, fault, failed, keys, shards, lag, n_kept_free, newest_first, kind,
):  # fmt: skip
    """One block of whole warps."""
    places = cuda.shared.array(MAX_INCOMING, np.int32)
    fronts = cuda.shared.array(MAX_INCOMING, np.int32)
    origins = cuda.shared.array(MAX_INCOMING, np.uint64)
    misses = cuda.shared.array(_MISS_WORDS, np.uint32)
    victims = cuda.shared.array(MAX_INCOMING, np.uint32)
    wanted = places, fronts, origins, misses
    tick, head, n_free = state[TICK], np.uint32(state[FREE_HEAD]), np.uint32(state[N_FREE])
    n_frames, n_wanted = np.uint32(frame_shard.size), np.uint32(shards.size)
    slot = np.uint32(np.uint64(tick) % np.uint64(N_RECORDS))
    first_entry = np.uint32(slot * np.uint32(MAX_INCOMING))

    look_up(planned, free_frames, host_address, shards, head, n_free, wanted)
    # A gather may be failing right now: all threads must have one answer.
    if cuda.syncthreads_or(failed[0]):
        return
    missing = np.uint64(np.uint64(np.uint64(misses[1]) << np.uint64(32)) | np.uint64(misses[0]))
    n_missing = np.uint32(cuda.popc(missing))
    if n_missing > n_free:
        report_no_room(shards, missing, n_free, fault, failed)
        return
    record = incoming, frames, sources, first_entry
    place_wanted(planned, frame_shard, ticks, record, shards, wanted, missing, tick)

    left = np.uint32(n_free - n_missing)
    n_victims = np.uint32(n_kept_free - left) if left < n_kept_free else _NONE
    if n_victims > 0:
        n_victims = find_victims(
            frame_shard, ticks, shard_rank, keys, tick, lag, newest_first, n_victims, victims
        )
    tail = ring_place(head, n_free, n_frames)
    give_up(planned, frame_shard, free_frames, outgoing, first_entry, victims, n_victims, tail)

    if cuda.threadIdx.x == 0:
        counts[np.uint32(slot * np.uint32(N_COUNTS) + np.uint32(N_IN))] = n_missing
        counts[np.uint32(slot * np.uint32(N_COUNTS) + np.uint32(N_OUT))] = n_victims
        state[TICK] = tick + 1
        state[FREE_HEAD] = ring_place(head, n_missing, n_frames)
        state[N_FREE] = np.uint32(left + n_victims)
        if kind < UNCOUNTED:
            state[np.uint32(HITS) + kind] += np.uint32(n_wanted - n_missing)
            state[np.uint32(MISSES) + kind] += n_missing


def select(
    target: CudaTarget,
    swap: SwapState,
    shards: Any,
    lag: int,
    n_kept_free: int,
    newest_first: bool,
    kind: int = DEMAND,
    stream: Any = None,
) -> None:
    """Queue the planning of a swap: record `tick % N_RECORDS`, and the state behind it.

    If there are too few free frames for what is missing, a fault of the kind `FAULT_ROOM` with the
    first shard that has none is written and nothing else changes. After a fault of any kind
    nothing changes at all.

    Parameters
    ----------
    target
        The GPU.
    swap
        What the select works on.
    shards
        int32 [n], distinct shards that are wanted, n at most `MAX_INCOMING`.
    lag
        Frames whose shards were wanted by one of the last `lag` selects are not given up, and
        neither are those of this one.
    n_kept_free
        How many frames should be free afterwards, at most `MAX_INCOMING`. There are fewer if there
        are not enough candidates, and more if more were free.
    newest_first
        Give up the most recently wanted first (MRU), not the least recently wanted (LRU).
    kind
        `DEMAND`, `AHEAD` or `UNCOUNTED`: where hits and misses are counted.
    stream
        Where to queue it; None for `target.stream`.

    Raises
    ------
    TypeError, ValueError
        If the target is no CUDA target, `shards` has another type or shape, or a number is out of
        range.
    """
    if not target.is_cuda:
        raise TypeError(f"select needs a CUDA target, not {target.name}")
    check_array("shards", shards, np.int32, (None,))
    if len(shards) > MAX_INCOMING:
        raise ValueError(f"shards: {len(shards)} are wanted at once, at most {MAX_INCOMING} can be")
    if not 0 <= n_kept_free <= MAX_INCOMING:
        raise ValueError(f"n_kept_free: {n_kept_free} is not within 0..{MAX_INCOMING}")
    if lag < 0:
        raise ValueError(f"lag: {lag} is negative")
    if not DEMAND <= kind <= UNCOUNTED:
        raise ValueError(f"kind: {kind} is none of DEMAND, AHEAD, UNCOUNTED")
    select_kernel.launch(
        target, 1, SELECT_THREADS, *swap, shards, lag, n_kept_free, newest_first, kind,
        stream=stream,
    )  # fmt: skip


KERNELS = {"select_kernel": select_kernel}
