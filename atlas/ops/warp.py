"""What kernels share: sums and maxima over a warp or a block, and how far 16-byte accesses go.

Every thread gets a sum or a maximum, and always the same bits. All lanes of a warp (all threads of
a block, whose size is a multiple of 32) must call.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from atlas.ops.ptx import FULL_WARP

MAX_WARPS = 32  # of a block


@cuda.jit(device=True)
def warp_sum(value):
    """Sum of a float32 over a warp."""
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(FULL_WARP, value, step)
    return value


@cuda.jit(device=True)
def warp_max(value):
    """Largest float32 of a warp."""
    for step in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(FULL_WARP, value, step))
    return value


@cuda.jit(device=True)
def block_sum(value, partial):
    """Sum of a float32 over a block, by way of MAX_WARPS float32 in shared memory; they may be
    used again behind the block's next barrier."""
    thread = np.uint32(cuda.threadIdx.x)
    lane, warp = thread & np.uint32(31), thread >> np.uint32(5)
    value = warp_sum(value)
    if lane == np.uint32(0):
        partial[warp] = value
    cuda.syncthreads()
    value = np.float32(0)
    if lane < np.uint32(cuda.blockDim.x) >> np.uint32(5):
        value = partial[lane]
    return warp_sum(value)


@cuda.jit(device=True)
def aligned_fours(n):
    """How many groups of four elements 16-byte accesses may take of each row of `n`: none unless
    every row starts on 16 bytes."""
    return n >> np.uint32(2) if n & np.uint32(3) == np.uint32(0) else np.uint32(0)
