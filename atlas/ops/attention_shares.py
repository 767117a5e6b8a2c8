"""How a context is shared out among blocks, and how their parts of the attention become one.

A share's block leaves three things of every query row in scratch memory: for n = n_tokens * n_head
rows, float32 sums of weighted values [n, n_shares, head_dim], the highest scores [n, n_shares],
with which the weights were taken, and the weights' totals [n, n_shares]. With m the highest score
of all (T. Dao et al., "Flash-Decoding for long-context inference", 2023):

    out = sum over s of exp(highest_s - m) sums_s / sum over s of exp(highest_s - m) totals_s
"""

from __future__ import annotations

import math

import numpy as np
from numba import config, cuda, types

from atlas.ops.kernel import Kernel, kernel
from atlas.ops.ptx import divide
from atlas.ops.warp import warp_max, warp_sum

MAX_SHARES = 128
# A dimension a thread.
COMBINE_THREADS = 32 if config.ENABLE_CUDASIM else 128


@cuda.jit(device=True)
def share_length(length, n_shares):
    """Positions of a share: a multiple of 32, and so of every tile."""
    per_32 = np.uint32(np.uint32(32) * n_shares)
    return np.uint32(divide(np.uint32(length + per_32 - np.uint32(1)), per_32) * np.uint32(32))


@cuda.jit(device=True)
def _weigh_shares(weights, scratch, highests, n_sums, used):
    """What the sums of each share weigh, to shared memory, and what they weigh together. Every warp
    computes it for itself, and all write the same."""
    lane = np.uint32(np.uint32(cuda.threadIdx.x) & np.uint32(31))
    highest = np.float32(-np.inf)
    share = lane
    while share < used:
        highest = max(highest, scratch[np.uint32(highests + share)])
        share = np.uint32(share + np.uint32(32))
    highest = warp_max(highest)
    total = np.float32(0)
    share = lane
    while share < used:
        at = np.uint32(highests + share)
        weight = np.float32(math.exp(scratch[at] - highest))
        total += weight * scratch[np.uint32(at + n_sums)]
        weights[share] = weight
        share = np.uint32(share + np.uint32(32))
    cuda.syncthreads()
    return warp_sum(total)


@kernel(
    types.float32[:, :, ::1], types.int32[::1], types.float32[::1], types.uint32, types.uint32
)  # fmt: skip
def combine_kernel(out, position, scratch, n_context, n_shares):
    """A block per row: the weights of its shares, then a thread per dimension."""
    weights = cuda.shared.array(MAX_SHARES, types.float32)
    n_tokens, n_head = np.uint32(out.shape[0]), np.uint32(out.shape[1])
    head_dim, thread = np.uint32(out.shape[2]), np.uint32(cuda.threadIdx.x)
    n_rows = np.uint32(n_tokens * n_head)
    first = np.uint32(position[0])
    length = share_length(np.uint32(min(np.uint32(first + n_tokens), n_context)), n_shares)
    row = np.uint32(cuda.blockIdx.x)
    while row < n_rows:
        token = divide(row, n_head)
        seen = np.uint32(min(np.uint32(first + token + np.uint32(1)), n_context))
        used = divide(np.uint32(seen + length - np.uint32(1)), length)
        highests = np.uint32(n_rows * n_shares * head_dim + row * n_shares)
        total = _weigh_shares(weights, scratch, highests, np.uint32(n_rows * n_shares), used)
        d = thread
        while d < head_dim:
            summed = np.float32(0)
            share = np.uint32(0)
            while share < used:
                at = np.uint32((row * n_shares + share) * head_dim + d)
                summed += weights[share] * scratch[at]
                share = np.uint32(share + np.uint32(1))
            out[token, np.uint32(row - token * n_head), d] = summed / total
            d = np.uint32(d + np.uint32(cuda.blockDim.x))
        cuda.syncthreads()
        row = np.uint32(row + np.uint32(cuda.gridDim.x))


KERNELS: dict[str, Kernel] = {"combine_kernel": combine_kernel}
