"""Which frames a select gives up, found by one block of a GPU.

A candidate is a frame that holds a shard, is not pinned, and was last wanted more than `lag`
selects ago. Victims are the first n candidates in the order of `atlas.ops.lru.choose_victims`:
(rank, tick, frame), or (rank, -tick, frame) for MRU. Rank and tick make a word, the frame's key:

    bit 31          0 for a cold shard, 1 for a normal one
    bits 0 to 30    the order: age = min(tick - last, 2^31 - 2) for MRU, 2^31 - 2 - age for LRU
    2^32 - 1        no candidate

so that frames older than two thousand million selects count as equally old.

The first n of N keys, where n is at most 64 and N some ten thousand, are found in four steps:

    scan       A key takes three loads, the third of which depends on the first. A thread makes four
               keys at a time, and so has eight loads on the way, then four. Candidates are counted,
               cold and normal ones, and the range of their orders is found.
    bisect     until a bound has n to 128 candidates before it. A step counts those before the
               middle of the range. For N = 10,000 that is three loads of four keys for each of
               1024 threads, from the L1 cache; a warp's sum by five shuffles; an addition for each
               warp; one barrier. Keys spread evenly over their range take log2(10,000 / 128),
               about 7 steps.
    collect    what lies before the bound, into shared memory.
    rank       A thread for each counts those that come before it: its place, if below n.

Radix selection (T. Alabi, J. Blanchard, B. Gordon, R. Steinbach, "Fast k-selection algorithms for
graphics processing units", 2012) passes over the keys less often, but each pass adds to a histogram
for each key, and the leading digits of ticks are all alike: ten thousand additions to one word, one
after the other. n minima, one by one, take n reductions over the block. A step of bisection costs
the same whatever the keys are, and there are at most 64: a bound is a key and a frame, which tells
equal keys apart.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from atlas.ops.lru import RANK_COLD, RANK_PINNED
from atlas.ops.memory import load16, store16
from atlas.ops.ptx import shuffle_xor

#: Bisection stops where so few frames are left: enough to end after some steps, few enough for each
#: to be compared with all others. More than the victims of one select.
MAX_CONTENDERS = 128

_NORMAL = np.uint32(1 << 31)
_NO_KEY = np.uint32(0xFFFFFFFF)
_OLDEST = np.uint32((1 << 31) - 2)
_NONE, _ONE = np.uint32(0), np.uint32(1)
_LANES = np.uint32(31)  # the bits of a thread's number that are its lane

# Words of a block's sums: candidates that are cold, the others, first and last order; contenders.
_COLD, _OTHER, _FIRST, _LAST, _CONTENDERS = 0, 1, 2, 3, 4
_N_SUMS = 5
_MAX_STEPS = 65  # the end of the range, then 63 bits of bounds, and one to spare


# Scan; a thread owns the frames 4 g to 4 g + 3 for g = its number, and on by the size of the block


@cuda.jit(device=True)
def frame_key(shard, rank, last, tick, lag, newest_first):
    """The key of a frame that holds a shard of this rank, wanted last at tick `last`."""
    age = np.int64(tick - last)
    order = np.uint32(min(age, np.int64(_OLDEST)))
    if not newest_first:
        order = np.uint32(_OLDEST - order)
    key = order if rank == RANK_COLD else np.uint32(order | _NORMAL)
    return _NO_KEY if shard < 0 or rank == RANK_PINNED or age <= lag else key


@cuda.jit(device=True)
def tally(cold, normal, first, last, key):
    """Add a key to what a thread has seen: cold ones, normal ones, first and last order."""
    order = np.uint32(key & np.uint32(_NORMAL - _ONE))
    cold = np.uint32(cold + (_ONE if key < _NORMAL else _NONE))
    normal = np.uint32(normal + (_ONE if key >= _NORMAL and key != _NO_KEY else _NONE))
    # The order of no candidate is larger than any.
    return cold, normal, min(first, order), max(last, order if key != _NO_KEY else _NONE)


@cuda.jit(device=True)
def scan(frame_shard, ticks, shard_rank, keys, n_frames, tick, lag, newest_first):
    """Make the keys of all frames; returns what the thread has seen of them."""
    end = np.uint32(n_frames - _ONE)
    # Four variables, not a tuple that changes: NVVM 13.0 does not come to an end with those.
    cold, normal, first, last = _NONE, _NONE, _NO_KEY, _NONE
    f0 = np.uint32(np.uint32(cuda.threadIdx.x) << np.uint32(2))
    while f0 < n_frames:
        f1, f2, f3 = (
            np.uint32(f0 + _ONE),
            np.uint32(f0 + np.uint32(2)),
            np.uint32(f0 + np.uint32(3)),
        )
        # Beyond the end the last one is loaded again, so that no load waits for a branch.
        at1, at2, at3 = min(f1, end), min(f2, end), min(f3, end)
        s0, s1, s2, s3 = frame_shard[f0], frame_shard[at1], frame_shard[at2], frame_shard[at3]
        t0, t1, t2, t3 = ticks[f0], ticks[at1], ticks[at2], ticks[at3]
        r0, r1 = shard_rank[np.uint32(max(s0, 0))], shard_rank[np.uint32(max(s1, 0))]
        r2, r3 = shard_rank[np.uint32(max(s2, 0))], shard_rank[np.uint32(max(s3, 0))]
        k0 = frame_key(s0, r0, t0, tick, lag, newest_first)
        k1 = frame_key(s1, r1, t1, tick, lag, newest_first) if f1 < n_frames else _NO_KEY
        k2 = frame_key(s2, r2, t2, tick, lag, newest_first) if f2 < n_frames else _NO_KEY
        k3 = frame_key(s3, r3, t3, tick, lag, newest_first) if f3 < n_frames else _NO_KEY
        store16(keys, f0, k0, k1, k2, k3)
        cold, normal, first, last = tally(cold, normal, first, last, k0)
        cold, normal, first, last = tally(cold, normal, first, last, k1)
        cold, normal, first, last = tally(cold, normal, first, last, k2)
        cold, normal, first, last = tally(cold, normal, first, last, k3)
        f0 = np.uint32(f0 + np.uint32(4 * cuda.blockDim.x))
    return cold, normal, first, last


@cuda.jit(device=True)
def warp_count(value):
    """Sum of a uint32 over a warp."""
    for lanes in (16, 8, 4, 2, 1):
        value = np.uint32(value + shuffle_xor(value, np.uint32(lanes)))
    return value


@cuda.jit(device=True)
def add_up(sums, seen):
    """What all threads have seen together."""
    cold, normal, first, last = seen
    cold, normal = warp_count(cold), warp_count(normal)
    for lanes in (16, 8, 4, 2, 1):
        first = min(first, shuffle_xor(first, np.uint32(lanes)))
        last = max(last, shuffle_xor(last, np.uint32(lanes)))
    if cuda.threadIdx.x & _LANES == 0:
        cuda.atomic.add(sums, _COLD, cold)
        cuda.atomic.add(sums, _OTHER, normal)
        cuda.atomic.min(sums, _FIRST, first)
        cuda.atomic.max(sums, _LAST, last)
    cuda.syncthreads()


# Selection


@cuda.jit(device=True)
def comes_before(key, frame, bound):
    """Whether a frame is given up before a bound, a key and below it a frame."""
    return np.uint64(np.uint64(np.uint64(key) << np.uint64(32)) | np.uint64(frame)) < bound


@cuda.jit(device=True)
def count_before(keys, n_frames, bound):
    """How many of a thread's frames come before a bound."""
    count, f = _NONE, np.uint32(np.uint32(cuda.threadIdx.x) << np.uint32(2))
    while f < n_frames:
        k0, k1, k2, k3 = load16(keys, f)
        count = np.uint32(count + (_ONE if comes_before(k0, f, bound) else _NONE))
        f = np.uint32(f + _ONE)
        count = np.uint32(count + (_ONE if comes_before(k1, f, bound) else _NONE))
        f = np.uint32(f + _ONE)
        count = np.uint32(count + (_ONE if comes_before(k2, f, bound) else _NONE))
        f = np.uint32(f + _ONE)
        count = np.uint32(count + (_ONE if comes_before(k3, f, bound) else _NONE))
        f = np.uint32(f + np.uint32(4 * cuda.blockDim.x - 3))
    return count


@cuda.jit(device=True)
def bisect(keys, n_frames, sums, before, n_victims):
    """A bound with `n_victims` to `MAX_CONTENDERS` candidates before it.

    `low` has fewer than `n_victims` before it, and `high` has enough. `before` is a count of zero
    for each step.
    """
    half = _NONE if sums[_COLD] >= n_victims else _NORMAL
    low = np.uint64(np.uint64(np.uint32(half + sums[_FIRST])) << np.uint64(32))
    high = np.uint64(np.uint64(np.uint32(half + sums[_LAST] + _ONE)) << np.uint64(32))
    bound, step, count = high, _NONE, _NONE
    while count < n_victims or count > MAX_CONTENDERS:
        count = warp_count(count_before(keys, n_frames, bound))
        if cuda.threadIdx.x & _LANES == 0:
            cuda.atomic.add(before, step, count)
        cuda.syncthreads()
        count = before[step]
        found = bound
        if count < n_victims:
            low = bound
        else:
            high = bound
        bound = np.uint64(low + np.uint64(np.uint64(high - low) >> np.uint64(1)))
        step = np.uint32(step + _ONE)
    return found


@cuda.jit(device=True)
def collect_one(key, frame, bound, sums, contenders):
    if comes_before(key, frame, bound):
        place = np.uint32(cuda.atomic.add(sums, _CONTENDERS, _ONE))
        contenders[place] = np.uint64(np.uint64(np.uint64(key) << np.uint64(32)) | np.uint64(frame))


@cuda.jit(device=True)
def collect(keys, n_frames, bound, sums, contenders):
    """List the frames before a bound with their keys, in whatever order threads come by."""
    f = np.uint32(np.uint32(cuda.threadIdx.x) << np.uint32(2))
    while f < n_frames:
        k0, k1, k2, k3 = load16(keys, f)
        collect_one(k0, f, bound, sums, contenders)
        collect_one(k1, np.uint32(f + _ONE), bound, sums, contenders)
        collect_one(k2, np.uint32(f + np.uint32(2)), bound, sums, contenders)
        collect_one(k3, np.uint32(f + np.uint32(3)), bound, sums, contenders)
        f = np.uint32(f + np.uint32(4 * cuda.blockDim.x))
    cuda.syncthreads()


@cuda.jit(device=True)
def rank_among(contenders, n_contenders, contender):
    """How many contenders come before one of them."""
    rank, j = _NONE, _NONE
    while j < n_contenders:
        rank = np.uint32(rank + (_ONE if contenders[j] < contender else _NONE))
        j = np.uint32(j + _ONE)
    return rank


@cuda.jit(device=True)
def find_victims(frame_shard, ticks, shard_rank, keys, tick, lag, newest_first, n_wanted, victims):
    """Up to `n_wanted` frames (at least one, less than `MAX_CONTENDERS`) in the order in which they
    go, into shared memory; returns how many. `keys` is scratch for all frames and four more.

    By all threads of a block of whole warps. What they have written before is seen.
    """
    sums = cuda.shared.array(_N_SUMS, np.uint32)
    before = cuda.shared.array(_MAX_STEPS, np.uint32)
    contenders = cuda.shared.array(MAX_CONTENDERS, np.uint64)
    thread, stride = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
    n_frames, i = np.uint32(frame_shard.size), thread
    while i < _MAX_STEPS:
        before[i] = 0
        i = np.uint32(i + stride)
    if thread < _N_SUMS:
        sums[thread] = _NO_KEY if thread == _FIRST else _NONE
    cuda.syncthreads()

    add_up(sums, scan(frame_shard, ticks, shard_rank, keys, n_frames, tick, lag, newest_first))
    n_victims = min(n_wanted, np.uint32(sums[_COLD] + sums[_OTHER]))
    if n_victims > 0:
        bound = bisect(keys, n_frames, sums, before, n_victims)
        collect(keys, n_frames, bound, sums, contenders)
        n_contenders, i = sums[_CONTENDERS], thread
        while i < n_contenders:
            nth = rank_among(contenders, n_contenders, contenders[i])
            if nth < n_victims:
                victims[nth] = np.uint32(contenders[i] & np.uint64(0xFFFFFFFF))
            i = np.uint32(i + stride)
        cuda.syncthreads()
    return n_victims
