"""A draw from the k largest logits, on a device.

Logits are compared by a key of 64 bits, the value's bits in rising order above the complement of
the index: no two are equal, and of equal logits the one with the lowest index is the largest.

Every block sorts a slice of the logits and keeps its k largest keys. Then one block has the k best
so far, merges the next few of every slice that may still hold one of the k, and again, until none
does. The draw itself is described in `atlas.ops.sample`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import config, cuda, types

from atlas.ops.kernel import Kernel, kernel
from atlas.ops.ptx import FULL_WARP
from atlas.ops.warp import MAX_WARPS
from forge.jit import cached_njit

#: The largest set that is drawn from on a device.
MAX_TOP_K = 1024

# Logits a block sorts, and how many blocks' keys can be merged.
_MAX_SLICE, MAX_SLICES = 1024, 1024
SLICE = 32 if config.ENABLE_CUDASIM else _MAX_SLICE
SORT_THREADS = SLICE // 2
# Keys that the last block sorts at a time: at least as many new ones as it keeps.
_MAX_MERGED = 2 * MAX_TOP_K
LEAST_MERGED = 64 if config.ENABLE_CUDASIM else 1024

TOKEN, IS_FINITE = range(2)  # of a result
NO_KEY = np.int64(-(1 << 63))  # of NaN, and of what is not there
_LOGITS, _KEYS, _INT32 = types.float32[::1], types.int64[::1], types.int32[::1]


@cached_njit()
def key_of(logit, index):
    """A key that orders logits, and equal ones by falling index; that of NaN is the smallest."""
    if math.isnan(logit):
        return NO_KEY
    # Zero has two signs, which are equal.
    bits = np.float32(logit + np.float32(0)).view(np.int32)
    rising = bits ^ np.int32(0x7FFFFFFF) if bits < 0 else bits
    return np.int64(np.int64(rising) << np.int64(32)) | np.int64(np.int64(0xFFFFFFFF) - index)


@cached_njit()
def index_of(key):
    """The index in a key; 0 of none."""
    if key == NO_KEY:
        return np.int32(0)
    return np.int32(np.int64(0xFFFFFFFF) - (key & np.int64(0xFFFFFFFF)))


@cached_njit()
def logit_of(key):
    """The logit in a key."""
    rising = np.int32(key >> np.int64(32))
    bits = rising ^ np.int32(0x7FFFFFFF) if rising < 0 else rising
    return np.int32(bits).view(np.float32)


@cuda.jit(device=True)
def _sort_keys(keys, n):
    """The largest first: a bitonic sort (K. Batcher, "Sorting networks and their applications",
    1968) of the first `n`, a power of two, by the block."""
    size = np.uint32(2)
    while size <= n:
        step = np.uint32(size >> np.uint32(1))
        while step > np.uint32(0):
            pair = np.uint32(cuda.threadIdx.x)
            while pair < n >> np.uint32(1):
                low = np.uint32(np.uint32(2) * pair - (pair & np.uint32(step - np.uint32(1))))
                high = np.uint32(low + step)
                a, b = keys[low], keys[high]
                if (a < b) == (low & size == np.uint32(0)):
                    keys[low], keys[high] = b, a
                pair = np.uint32(pair + np.uint32(cuda.blockDim.x))
            cuda.syncthreads()
            step = np.uint32(step >> np.uint32(1))
        size = np.uint32(size << np.uint32(1))


@kernel(_LOGITS, _KEYS, _INT32, types.uint32, types.uint32, launch_bounds=512)
def sort_slices_kernel(logits, keys, flaws, length, n_kept):
    """A block per slice of `length` logits, a power of two: its `n_kept` largest keys in order, and
    whether a logit is not finite."""
    ordered = cuda.shared.array(_MAX_SLICE, types.int64)
    thread, n_threads = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
    n = np.uint32(logits.size)
    part = np.uint32(cuda.blockIdx.x)
    while part * length < n:
        is_flawed = np.int32(0)
        i = thread
        while i < length:
            at = np.uint32(part * length + i)
            ordered[i] = NO_KEY
            if at < n:
                ordered[i] = key_of(logits[at], np.int64(at))
                if not math.isfinite(logits[at]):
                    is_flawed = np.int32(1)
            i = np.uint32(i + n_threads)
        is_flawed = np.int32(cuda.syncthreads_or(is_flawed))
        _sort_keys(ordered, length)
        i = thread
        while i < n_kept:
            keys[np.uint32(part * n_kept + i)] = ordered[i]
            i = np.uint32(i + n_threads)
        if thread == np.uint32(0):
            flaws[part] = is_flawed
        cuda.syncthreads()
        part = np.uint32(part + np.uint32(cuda.gridDim.x))


@cuda.jit(device=True)
def _merge_slices(best, taken, filled, keys, n_slices, n_kept, top_k, n_merged):
    """The `top_k` largest of all slices' keys to the front of `best`, in order."""
    thread, n_threads = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockDim.x)
    i = thread
    while i < n_merged:
        best[i] = NO_KEY
        i = np.uint32(i + n_threads)
    part = thread
    while part < n_slices:
        taken[part] = np.uint32(0)
        part = np.uint32(part + n_threads)
    room = np.uint32(n_merged - top_k)
    n_open = n_slices
    cuda.syncthreads()
    while n_open > np.uint32(0):
        # A slice's next key would have to be larger than the last of the best.
        least = best[np.uint32(top_k - np.uint32(1))]
        share = np.uint32(max(room // n_open, np.uint32(1)))
        i = np.uint32(top_k + thread)
        while i < n_merged:
            best[i] = NO_KEY
            i = np.uint32(i + n_threads)
        if thread == np.uint32(0):
            filled[0] = top_k
        cuda.syncthreads()
        part = thread
        while part < n_slices:
            start = taken[part]
            if start < n_kept and keys[np.uint32(part * n_kept + start)] > least:
                # Who comes first is first, and who finds no room comes again: they are sorted.
                at = np.uint32(cuda.atomic.add(filled, 0, share))
                if at + share <= n_merged:
                    end = np.uint32(min(np.uint32(start + share), n_kept))
                    taken[part] = end
                    while start < end:
                        best[at] = keys[np.uint32(part * n_kept + start)]
                        at, start = np.uint32(at + np.uint32(1)), np.uint32(start + np.uint32(1))
            part = np.uint32(part + n_threads)
        cuda.syncthreads()
        _sort_keys(best, n_merged)
        least = best[np.uint32(top_k - np.uint32(1))]
        n_open, first = np.uint32(0), np.uint32(0)
        while first < n_slices:
            part = np.uint32(first + thread)
            is_open = (
                part < n_slices
                and taken[part] < n_kept
                and keys[np.uint32(part * n_kept + taken[part])] > least
            )
            n_open = np.uint32(n_open + np.uint32(cuda.syncthreads_count(np.int32(is_open))))
            first = np.uint32(first + n_threads)


@cuda.jit(device=True)
def _running_sum(value, partial):
    """Sums of a float32 over the threads of a block up to this one, and over all."""
    thread = np.uint32(cuda.threadIdx.x)
    lane, warp = np.uint32(thread & np.uint32(31)), np.uint32(thread >> np.uint32(5))
    for step in (1, 2, 4, 8, 16):
        other = cuda.shfl_up_sync(FULL_WARP, value, step)
        if lane >= np.uint32(step):
            value += other
    if lane == np.uint32(31):
        partial[warp] = value
    cuda.syncthreads()
    total, before = np.float32(0), np.float32(0)
    i = np.uint32(0)
    while i < np.uint32(cuda.blockDim.x) >> np.uint32(5):
        before += partial[i] if i < warp else np.float32(0)
        total += partial[i]
        i = np.uint32(i + np.uint32(1))
    return before + value, total


@kernel(
    _KEYS, _INT32, _LOGITS, _INT32, types.uint32, types.uint32, types.uint32, types.uint32,
    types.float32, types.float32, launch_bounds=1024,
)  # fmt: skip
def draw_kernel(
    keys, flaws, uniform, result, n_slices, n_kept, top_k, n_merged, temperature, top_p
):
    """One block, of `top_k` threads at least: from sorted slices to a token."""
    best = cuda.shared.array(_MAX_MERGED, types.int64)
    taken = cuda.shared.array(MAX_SLICES, types.uint32)
    filled = cuda.shared.array(1, types.uint32)
    partial = cuda.shared.array(MAX_WARPS, types.float32)
    kept_sum = cuda.shared.array(1, types.float32)
    thread = np.uint32(cuda.threadIdx.x)
    _merge_slices(best, taken, filled, keys, n_slices, n_kept, top_k, n_merged)

    weight = np.float32(0)
    if thread < top_k:
        fall = np.float32(logit_of(best[thread]) - logit_of(best[0]))
        weight = np.float32(math.exp(fall / temperature))
    reached, total = _running_sum(weight, partial)
    is_before = thread < top_k and reached < top_p * total
    last = min(cuda.syncthreads_count(np.int32(is_before)), np.int32(top_k) - np.int32(1))
    if np.int32(thread) == last:
        kept_sum[0] = reached
    cuda.syncthreads()
    is_before = thread < top_k and reached <= uniform[0] * kept_sum[0]
    chosen = min(cuda.syncthreads_count(np.int32(is_before)), last)

    is_flawed = np.int32(0)
    part = thread
    while part < n_slices:
        is_flawed |= flaws[part]
        part = np.uint32(part + np.uint32(cuda.blockDim.x))
    is_flawed = np.int32(cuda.syncthreads_or(is_flawed))
    if np.int32(thread) == chosen:
        result[TOKEN], result[IS_FINITE] = index_of(best[thread]), np.int32(1) - is_flawed


KERNELS: dict[str, Kernel] = {
    "sort_slices_kernel": sort_slices_kernel,
    "draw_kernel": draw_kernel,
}
