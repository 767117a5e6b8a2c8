"""The smallest operations between the products: activations, sums, the count of positions.

    swiglu       out = gate / (1 + exp(-gate)) * up             N. Shazeer, 2020
    add_scaled   x = x + scale * y
    add_rows     x[t] = x[t] + bias for every token t
    advance      position = position + n

The loops are serial: next to the products they take little, and starting threads would cost a
decode step more than it gains.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, types

from atlas.ops.checks import MAX_BLOCKS, check_array
from atlas.ops.kernel import Kernel, kernel
from atlas.ops.memory import load16, store16
from atlas.ops.warp import aligned_fours
from atlas.target import Target
from forge.jit import cached_njit

_VECTOR, _ROWS = types.float32[::1], types.float32[:, ::1]


@cached_njit()
def silu(x):
    """x times its logistic sigmoid, without overflow on either side."""
    decay = np.float32(math.exp(-abs(x)))
    share = np.float32(1) if x >= 0 else decay
    return np.float32(x * share / (np.float32(1) + decay))


# --- swiglu ---


@kernel(_ROWS, _ROWS, _ROWS)
def swiglu_kernel(out, gate, up):
    """A thread takes four elements of a row at once, where rows start on 16 bytes."""
    n = np.uint32(out.shape[1])
    n_items = np.uint32(np.uint32(out.shape[0]) * n)
    step = np.uint32(cuda.gridsize(1))
    fours = np.uint32(np.uint32(out.shape[0]) * aligned_fours(n))
    four = np.uint32(cuda.grid(1))
    while four < fours:
        i = np.uint32(np.uint32(4) * four)
        a, b, c, d = load16(gate, i)
        e, f, g, h = load16(up, i)
        store16(out, i, silu(a) * e, silu(b) * f, silu(c) * g, silu(d) * h)
        four = np.uint32(four + step)
    i = np.uint32(np.uint32(4) * fours + np.uint32(cuda.grid(1)))
    while i < n_items:
        t, column = np.uint32(i // n), np.uint32(i % n)
        out[t, column] = silu(gate[t, column]) * up[t, column]
        i = np.uint32(i + step)


@cached_njit()
def swiglu_loop(out, gate, up):
    for t in range(out.shape[0]):
        for i in range(out.shape[1]):
            out[t, i] = silu(gate[t, i]) * up[t, i]


def swiglu(target: Target, out: Any, gate: Any, up: Any) -> None:
    """out = silu(gate) * up; float32 [n_tokens, n], `out` may be either of the others."""
    check_array("gate", gate, np.float32, (None, None))
    check_array("out", out, np.float32, gate.shape)
    check_array("up", up, np.float32, gate.shape)
    if gate.size == 0:
        return
    if target.is_cuda:
        swiglu_kernel.launch(target, _grid(target, out, 4), target.block, out, gate, up)
    else:
        swiglu_loop(out, gate, up)


def _grid(target: Target, rows: Any, per_thread: int = 1) -> int:
    """Blocks for all elements of `rows`, so many of them a thread."""
    return min(-(-rows.size // (per_thread * target.block)), MAX_BLOCKS)


# --- add_scaled, add_rows ---


@kernel(_ROWS, _ROWS, types.float32)
def add_scaled_kernel(x, y, scale):
    n = np.uint32(x.shape[1])
    n_items, step = np.uint32(np.uint32(x.shape[0]) * n), np.uint32(cuda.gridsize(1))
    i = np.uint32(cuda.grid(1))
    while i < n_items:
        t, column = np.uint32(i // n), np.uint32(i % n)
        x[t, column] += scale * y[t, column]
        i = np.uint32(i + step)


@cached_njit()
def add_scaled_loop(x, y, scale):
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[t, i] += scale * y[t, i]


def add_scaled(target: Target, x: Any, y: Any, scale: float) -> None:
    """x += scale * y; float32 [n_tokens, n]."""
    check_array("x", x, np.float32, (None, None))
    check_array("y", y, np.float32, x.shape)
    if x.size == 0:
        return
    if target.is_cuda:
        add_scaled_kernel.launch(target, _grid(target, x), target.block, x, y, scale)
    else:
        add_scaled_loop(x, y, np.float32(scale))


@kernel(_ROWS, _VECTOR)
def add_rows_kernel(x, bias):
    n = np.uint32(x.shape[1])
    n_items, step = np.uint32(np.uint32(x.shape[0]) * n), np.uint32(cuda.gridsize(1))
    i = np.uint32(cuda.grid(1))
    while i < n_items:
        t, column = np.uint32(i // n), np.uint32(i % n)
        x[t, column] += bias[column]
        i = np.uint32(i + step)


@cached_njit()
def add_rows_loop(x, bias):
    for t in range(x.shape[0]):
        for i in range(bias.size):
            x[t, i] += bias[i]


def add_rows(target: Target, x: Any, bias: Any) -> None:
    """x[t] += bias for every token t; float32 [n_tokens, n] and [n]."""
    check_array("x", x, np.float32, (None, None))
    check_array("bias", bias, np.float32, (x.shape[1],))
    if x.size == 0:
        return
    if target.is_cuda:
        add_rows_kernel.launch(target, _grid(target, x), target.block, x, bias)
    else:
        add_rows_loop(x, bias)


# --- advance ---


@kernel(types.int32[::1], types.int32)
def advance_kernel(position, n):
    if cuda.grid(1) == 0:
        position[0] += n


def advance(target: Target, position: Any, n: int) -> None:
    """position += n; an int32 [1] on the target, so that a pass that is replayed finds it there."""
    check_array("position", position, np.int32, (1,))
    if target.is_cuda:
        advance_kernel.launch(target, 1, 1, position, n)
    else:
        position[0] += n


KERNELS: dict[str, Kernel] = {
    "swiglu_kernel": swiglu_kernel,
    "add_scaled_kernel": add_scaled_kernel,
    "add_rows_kernel": add_rows_kernel,
    "advance_kernel": advance_kernel,
}
