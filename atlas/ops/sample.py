"""The choice of a token from logits: the largest, or a draw from the largest.

    weight_i = exp((logit_i - logit_0) / temperature), the largest logit first
    kept     = the fewest of them that reach top_p of their sum
               (A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020)
    token    = the first at which the running sum passes uniform * (sum of those kept)

The result stays on the target and is read in one copy. On a device the uniform number lies in host
memory that is mapped there: choosing can be recorded once and replayed for every token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import config, cuda, types

from atlas.ops.checks import check_array
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.ptx import FULL_WARP
from atlas.ops.top_k import (
    IS_FINITE,
    LEAST_MERGED,
    MAX_SLICES,
    MAX_TOP_K,
    NO_KEY,
    SLICE,
    SORT_THREADS,
    TOKEN,
    draw_kernel,
    index_of,
    key_of,
    sort_slices_kernel,
)
from atlas.ops.warp import MAX_WARPS
from atlas.target import CudaTarget, Target
from forge.jit import cached_njit

# 128 Ki logits are four to a thread of the blocks below: one trip to memory, not a queue of them.
_ARGMAX_BLOCKS, _ARGMAX_THREADS = (2, 64) if config.ENABLE_CUDASIM else (128, 256)
_LOGITS, _KEYS, _INT32 = types.float32[::1], types.int64[::1], types.int32[::1]


# --- argmax ---


@cuda.jit(device=True)
def _warp_largest(key):
    for step in (16, 8, 4, 2, 1):
        key = max(key, cuda.shfl_xor_sync(FULL_WARP, key, step))
    return key


@cuda.jit(device=True)
def _block_largest(key, partial):
    """The largest key of a block, for its first warp."""
    thread = np.uint32(cuda.threadIdx.x)
    key = _warp_largest(key)
    if thread & np.uint32(31) == np.uint32(0):
        partial[thread >> np.uint32(5)] = key
    cuda.syncthreads()
    if thread < np.uint32(32):
        there = thread < np.uint32(cuda.blockDim.x) >> np.uint32(5)
        key = _warp_largest(partial[thread] if there else NO_KEY)
    return key


@kernel(_LOGITS, _INT32, _KEYS, _INT32, _INT32, launch_bounds=256)
def argmax_kernel(logits, result, keys, flaws, done):
    """Each block finds the largest key of its part; the last to finish, that of all."""
    partial = cuda.shared.array(MAX_WARPS, types.int64)
    is_last = cuda.shared.array(1, types.boolean)
    thread, block = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockIdx.x)
    key, is_flawed = NO_KEY, np.int32(0)
    i = np.uint32(cuda.grid(1))
    while i < np.uint32(logits.size):
        key = max(key, key_of(logits[i], np.int64(i)))
        if not math.isfinite(logits[i]):
            is_flawed = np.int32(1)
        i = np.uint32(i + np.uint32(cuda.gridsize(1)))
    is_flawed = np.int32(cuda.syncthreads_or(is_flawed))
    key = _block_largest(key, partial)
    if thread == np.uint32(0):
        keys[block], flaws[block] = key, is_flawed
        cuda.threadfence()
        is_last[0] = cuda.atomic.add(done, 0, np.int32(1)) == cuda.gridDim.x - 1
    cuda.syncthreads()
    if is_last[0]:
        cuda.threadfence()
        key, is_flawed = NO_KEY, np.int32(0)
        i = thread
        while i < np.uint32(cuda.gridDim.x):
            key = max(key, keys[i])
            is_flawed |= flaws[i]
            i = np.uint32(i + np.uint32(cuda.blockDim.x))
        is_flawed = np.int32(cuda.syncthreads_or(is_flawed))
        key = _block_largest(key, partial)
        if thread == np.uint32(0):
            result[TOKEN], result[IS_FINITE] = index_of(key), np.int32(1) - is_flawed
            done[0] = np.int32(0)  # for the next launch


@cached_njit()
def argmax_loop(logits, result):
    best, index, is_finite = np.float32(-np.inf), 0, True
    for i in range(logits.size):
        if logits[i] > best:
            best, index = logits[i], i
        is_finite &= math.isfinite(logits[i])
    result[TOKEN], result[IS_FINITE] = index, is_finite


# --- draws ---


def sample_on_host(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, uniform: float
) -> int:
    """The same draw in float64; `logits` are finite, and `top_k` may be 0 for all."""
    logits = logits.astype(np.float64)
    tokens = np.argsort(-logits, kind="stable")[: top_k or None]
    # The highest logit goes first: however small the temperature, it divides 0.
    with np.errstate(over="ignore"):
        weights = np.exp((logits[tokens] - logits[tokens[0]]) / temperature)
    sums = np.cumsum(weights)
    last = min(int(np.searchsorted(sums, top_p * sums[-1])), len(sums) - 1)
    chosen = int(np.searchsorted(sums, uniform * sums[last], side="right"))
    return int(tokens[min(chosen, last)])


# --- launchers ---


def _n_slices(n_vocab: int) -> int:
    return -(-n_vocab // SLICE)


def choice_bytes(n_vocab: int) -> int:
    """Device memory of a `Choice`."""
    n_slices = _n_slices(n_vocab)
    return max(n_slices * SLICE, _ARGMAX_BLOCKS) * 8 + max(n_slices, _ARGMAX_BLOCKS) * 4 + 3 * 4


class Choice:
    """Where a choice is made and left.

    Parameters
    ----------
    target
        Where to choose.
    n_vocab
        Logits there will be.

    Attributes
    ----------
    result
        int32 [2] on the target: a token, and whether (1) or not (0) all logits were finite.
    """

    def __init__(self, target: Target, n_vocab: int) -> None:
        self.target = target
        self.n_vocab = n_vocab
        self.result = target.empty(2, np.int32)
        if isinstance(target, CudaTarget):
            n_slices = _n_slices(n_vocab)
            self.keys = target.empty(max(n_slices * SLICE, _ARGMAX_BLOCKS), np.int64)
            self.flaws = target.empty(max(n_slices, _ARGMAX_BLOCKS), np.int32)
            self.done = target.full(1, 0, np.int32)
            self.uniform = target.mapped(1, np.float32)

    def read(self) -> tuple[int, bool]:
        """The token and whether all logits were finite: one copy."""
        token, is_finite = self.target.get(self.result).tolist()
        return token, bool(is_finite)


def argmax(target: Target, logits: Any, choice: Choice) -> None:
    """Choose the largest logit, the first of several. NaN never wins.

    Parameters
    ----------
    target
        Where to run.
    logits
        float32 [n_vocab], not empty.
    choice
        Takes the result.
    """
    _check_logits(logits, choice)
    if target.is_cuda:
        argmax_kernel.launch(
            target, _ARGMAX_BLOCKS, _ARGMAX_THREADS, logits, choice.result, choice.keys,
            choice.flaws, choice.done,
        )  # fmt: skip
    else:
        argmax_loop(logits, choice.result)


def sample(
    target: Target, logits: Any, temperature: float, top_k: int, top_p: float, choice: Choice
) -> None:
    """Queue a draw on a device, by the number in `choice.uniform`.

    Parameters
    ----------
    target
        A CUDA target.
    logits
        float32 [n_vocab], not empty.
    temperature
        Divisor of the logits, greater than 0.
    top_k
        How many of the largest logits are in the draw, 1 to MAX_TOP_K.
    top_p
        Share of their weight that is kept, greater than 0 and at most 1.
    choice
        Takes the result.
    """
    _check_logits(logits, choice)
    top_k = min(top_k, choice.n_vocab)
    n_slices, n_kept = _n_slices(choice.n_vocab), min(top_k, SLICE)
    sort_slices_kernel.launch(
        target, n_slices, SORT_THREADS, logits, choice.keys, choice.flaws, SLICE, n_kept
    )
    n_merged = max(LEAST_MERGED, 1 << (2 * top_k - 1).bit_length())
    n_threads = n_merged if config.ENABLE_CUDASIM else 1024
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    draw_kernel.launch(
        target, 1, n_threads, choice.keys, choice.flaws, choice.uniform, choice.result, n_slices,
        n_kept, top_k, n_merged, min(max(temperature, smallest), largest), top_p,
    )  # fmt: skip


def choose_token(
    target: Target,
    logits: Any,
    temperature: float,
    top_k: int,
    top_p: float,
    uniform: float,
    choice: Choice,
) -> tuple[int, bool]:
    """Choose a token; on a device at the cost of one small copy, unless `top_k` is 0 or greater
    than MAX_TOP_K: then all logits are copied.

    Parameters
    ----------
    target
        Where the logits are.
    logits
        float32 [n_vocab], not empty.
    temperature
        Divisor of the logits; 0 for the largest of them.
    top_k
        Only so many of the largest; 0 for all.
    top_p
        Only the fewest that together have this share of the weight; 1 for all.
    uniform
        A number of at least 0, less than 1, that decides; of no interest at temperature 0.
    choice
        Room to choose in.

    Returns
    -------
    token, is_finite
        The second says whether all logits are finite; if not, the first means nothing.
    """
    if temperature == 0:
        argmax(target, logits, choice)
        return choice.read()
    if target.is_cuda and 1 <= top_k <= MAX_TOP_K and _n_slices(choice.n_vocab) <= MAX_SLICES:
        choice.uniform.host[0] = uniform
        sample(target, logits, temperature, top_k, top_p, choice)
        return choice.read()
    _check_logits(logits, choice)
    host = target.get(logits)
    if not np.isfinite(host).all():
        return 0, False
    return sample_on_host(host, temperature, top_k, top_p, uniform), True


def _check_logits(logits: Any, choice: Choice) -> None:
    check_array("logits", logits, np.float32, (choice.n_vocab,))
    if choice.n_vocab == 0:
        raise ValueError("a choice of no logits")


KERNELS: dict[str, Kernel] = {"argmax_kernel": argmax_kernel}
