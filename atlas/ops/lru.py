"""When shards were last used, and which frames to give up: ticks, misses, victims.

    touch           resident shards get the current tick, the others are listed
    hold            frames of shards that are in use are counted up and down
    choose_victims  the `count` frames that are least worth keeping

A victim is a frame that holds a shard, is not in use, and whose shard is not pinned. Frames are
given up in the order (rank of the shard, tick, frame): cold shards before normal ones, and among
those the least recently used first, or the most recently used where the policy is `mru`, which is
the order that helps a cyclic scan. The frame number makes the order total.

These serve pools that the host manages, in its own memory. On a GPU `atlas.ops.select` does all of
it, in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atlas.ops.checks import check_array
from atlas.target import Target
from forge.jit import cached_njit

#: Values of `shard_rank`: what is given up first, what next, and what never.
RANK_COLD = 0
RANK_NORMAL = 1
RANK_PINNED = 255

#: `choose_victims_loop` visits every 64th frame, then every 64th beginning one further, ...
VISIT_STRIDE = 64


@cached_njit()
def goes_before(rank, age, frame, other_rank, other_age, other_frame):
    """Whether the first frame is given up before the other; `age` is +tick (LRU) or -tick (MRU)."""
    if rank != other_rank:
        return rank < other_rank
    if age != other_age:
        return age < other_age
    return frame < other_frame


@cached_njit()
def touch_loop(table, ticks, shards, tick, missing):
    n_missing = 0
    for shard in shards:
        frame = table[shard]
        if frame >= 0:
            ticks[frame] = tick
        else:
            missing[n_missing] = shard
            n_missing += 1
    return n_missing


@cached_njit()
def hold_one(table, held, shard, change):
    """Count a use of a shard up or down, if it is resident."""
    frame = table[shard]
    if frame >= 0:
        held[frame] += change


@cached_njit()
def hold_loop(table, held, shards, change):
    for shard in shards:
        hold_one(table, held, shard, change)


@cached_njit()
def choose_victims_loop(frame_shard, ticks, shard_rank, held, sign, victims):
    """One pass that keeps the best `victims.size` candidates sorted in `victims`.

    Frames are filled in runs, so ticks mostly rise or fall with the frame number. Met in falling
    order, every candidate would displace all that are kept; a coarse pass first leaves only few
    insertions to the following ones.
    """
    found = 0
    worst_rank, worst_age, worst_frame = np.int64(RANK_PINNED), np.int64(0), np.int64(-1)
    for first in range(VISIT_STRIDE):
        for frame in range(first, frame_shard.size, VISIT_STRIDE):
            shard = frame_shard[frame]
            if shard < 0 or held[frame] != 0 or shard_rank[shard] == RANK_PINNED:
                continue
            rank, age = np.int64(shard_rank[shard]), sign * ticks[frame]
            if found < victims.size:
                found += 1
            elif not goes_before(rank, age, frame, worst_rank, worst_age, worst_frame):
                continue
            place = found - 1
            while place > 0:
                other = np.int64(victims[place - 1])
                other_rank = np.int64(shard_rank[frame_shard[other]])
                if goes_before(other_rank, sign * ticks[other], other, rank, age, frame):
                    break
                victims[place] = other
                place -= 1
            victims[place] = frame
            worst_frame = np.int64(victims[found - 1])
            worst_rank = np.int64(shard_rank[frame_shard[worst_frame]])
            worst_age = sign * ticks[worst_frame]
    return found


def _require_host(name: str, target: Target) -> None:
    if target.is_cuda:
        raise TypeError(f"{name} is for pools of the host's, not for target {target.name}")


def touch(target: Target, table: Any, ticks: Any, shards: Any, tick: int, missing: Any) -> int:
    """Mark shards as used now and list those that are not resident.

    Parameters
    ----------
    target
        Where the arrays live; not a CUDA target.
    table
        int32 [n_shards], the frame of each shard or -1.
    ticks
        int64 [n_frames], set to `tick` for the frame of each resident shard.
    shards
        int32 [m], the shards that are used.
    tick
        Now.
    missing
        int32 [>= m], whose first entries become the shards that are not resident, in the order of
        `shards`.

    Returns
    -------
    int
        How many shards are missing.

    Raises
    ------
    TypeError, ValueError
        If the target is a CUDA target, or an array has another type or shape, or is not
        contiguous.
    """
    _require_host("touch", target)
    check_array("table", table, np.int32, (len(table),))
    check_array("ticks", ticks, np.int64, (len(ticks),))
    check_array("shards", shards, np.int32, (len(shards),))
    check_array("missing", missing, np.int32, (len(missing),))
    if len(missing) < len(shards):
        raise ValueError(f"missing: {len(missing)} entries cannot list {len(shards)} shards")
    return int(touch_loop(table, ticks, shards, tick, missing))


def hold(target: Target, table: Any, held: Any, shards: Any, change: int) -> None:
    """Add `change` to the number of uses of each resident shard's frame.

    Parameters
    ----------
    target
        Where the arrays live; not a CUDA target.
    table
        int32 [n_shards], the frame of each shard or -1.
    held
        int32 [n_frames], uses under way; frames with any are never victims.
    shards
        int32 [m], distinct shards.
    change
        +1 when a use begins, -1 when it ends.

    Raises
    ------
    TypeError, ValueError
        If the target is a CUDA target, or an array has another type or shape, or is not
        contiguous.
    """
    _require_host("hold", target)
    check_array("table", table, np.int32, (len(table),))
    check_array("held", held, np.int32, (len(held),))
    check_array("shards", shards, np.int32, (len(shards),))
    hold_loop(table, held, shards, change)


def choose_victims(
    target: Target,
    frame_shard: Any,
    ticks: Any,
    shard_rank: Any,
    held: Any,
    count: int,
    newest_first: bool,
    victims: Any,
) -> int:
    """The frames to give up, first to go first.

    Parameters
    ----------
    target
        Where the arrays live; not a CUDA target.
    frame_shard
        int32 [n_frames], the shard of each frame or -1.
    ticks
        int64 [n_frames], when the shard in each frame was last used.
    shard_rank
        uint8 [n_shards], `RANK_COLD`, `RANK_NORMAL` or `RANK_PINNED`.
    held
        int32 [n_frames], not 0 for frames that are in use.
    count
        How many victims are wanted.
    newest_first
        Give up the most recently used first (MRU), not the least recently used (LRU).
    victims
        int32 [>= count], whose first entries become the victims.

    Returns
    -------
    int
        How many victims there are: fewer than `count` if there are not that many candidates.

    Raises
    ------
    TypeError, ValueError
        If the target is a CUDA target, or an array has another type or shape, or is not
        contiguous.
    """
    _require_host("choose_victims", target)
    check_array("frame_shard", frame_shard, np.int32, (len(frame_shard),))
    check_array("ticks", ticks, np.int64, frame_shard.shape)
    check_array("shard_rank", shard_rank, np.uint8, (len(shard_rank),))
    check_array("held", held, np.int32, frame_shard.shape)
    check_array("victims", victims, np.int32, (len(victims),))
    if not 0 <= count <= len(victims):
        raise ValueError(f"victims: {len(victims)} entries cannot list {count} frames")
    if count == 0:  # the loop looks at the last victim it has found
        return 0
    sign = -1 if newest_first else 1
    return int(choose_victims_loop(frame_shard, ticks, shard_rank, held, sign, victims[:count]))
