"""Instructions against NumPy: their Python twins in the simulator, and themselves on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import cuda, types

from atlas.ops import ptx
from atlas.ops.kernel import kernel
from atlas.ops.memory import (
    load8_once_at,
    load16,
    load16_at,
    load16_cached_at,
    load16_once,
    load16_once_at,
    store16,
)
from atlas.target import CudaTarget

N = 32
_U32 = types.uint32[::1]


@kernel(_U32, _U32, _U32, _U32, types.uint64[::1])
def words_kernel(out, a, b, c, wide):
    """A row of `out` for each instruction, an element for each thread."""
    i = np.uint32(cuda.threadIdx.x)
    n = np.uint32(cuda.blockDim.x)
    out[i] = ptx.xor3(a[i], b[i], c[i])
    out[np.uint32(n + i)] = ptx.rotate_right(a[i], np.uint32(b[i] & np.uint32(31)))
    out[np.uint32(np.uint32(2) * n + i)] = ptx.divide(a[i], np.uint32(c[i] | np.uint32(1)))
    out[np.uint32(np.uint32(3) * n + i)] = ptx.byte_permute(a[i], b[i], c[i])
    out[np.uint32(np.uint32(4) * n + i)] = ptx.shuffle_xor(a[i], np.uint32(5))
    out[np.uint32(np.uint32(5) * n + i)] = ptx.shift_left(a[i], np.uint32(b[i] & np.uint32(31)))
    out[np.uint32(np.uint32(6) * n + i)] = ptx.shift_right(a[i], np.uint32(b[i] & np.uint32(31)))
    wide[i] = ptx.multiply_add_wide(a[i], b[i], np.uint64(c[i]))


def permuted(a: int, b: int, selector: int) -> int:
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        chosen.append((255 if byte > 127 else 0) if nibble > 7 else byte)
    return int.from_bytes(bytes(chosen), "little")


def random_words(seed: int, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)


def test_words(cuda_target: CudaTarget) -> None:
    a, b, c = (random_words(seed) for seed in (1, 2, 3))
    out, wide = cuda_target.full(7 * N, 9, np.uint32), cuda_target.full(N, 9, np.uint64)
    words_kernel.launch(cuda_target, 1, N, out, *map(cuda_target.put, (a, b, c)), wide)
    found = cuda_target.get(out).reshape(7, N)
    by = b & 31
    expected = [
        a ^ b ^ c,
        (a.astype(np.uint64) << (32 - by).astype(np.uint64) | a >> by) & np.uint64(0xFFFFFFFF),
        a // (c | 1),
        [permuted(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)],
        a[np.arange(N) ^ 5],
        a << by,
        a >> by,
    ]  # fmt: skip
    for row, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(row, np.asarray(right, np.uint32))
    np.testing.assert_array_equal(
        cuda_target.get(wide), a.astype(np.uint64) * b.astype(np.uint64) + c.astype(np.uint64)
    )


@kernel(types.float32[::1], _U32, _U32, _U32, types.float32[::1])
def halves_kernel(unpacked, packed, a, b, floats):
    i = np.uint32(cuda.threadIdx.x)
    n = np.uint32(cuda.blockDim.x)
    unpacked[i], unpacked[np.uint32(n + i)] = ptx.half2_to_floats(a[i])
    packed[i] = ptx.floats_to_half2(floats[i], floats[np.uint32(n + i)])
    packed[np.uint32(n + i)] = ptx.half2_subtract(a[i], b[i])
    packed[np.uint32(np.uint32(2) * n + i)] = ptx.half2_multiply(a[i], b[i])


def test_halves(cuda_target: CudaTarget) -> None:
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal((N, 2)).astype(np.float16) for _ in range(2))
    a[0], b[1] = (6e-8, -0.0), (65504, -1e-4)  # subnormal, the largest
    floats = (rng.standard_normal(2 * N) * 10.0 ** rng.integers(-7, 4, 2 * N)).astype(np.float32)
    unpacked = cuda_target.full(2 * N, np.nan, np.float32)
    packed = cuda_target.full(3 * N, 9, np.uint32)
    words = [cuda_target.put(x.view(np.uint32).reshape(-1)) for x in (a, b)]
    halves_kernel.launch(cuda_target, 1, N, unpacked, packed, *words, cuda_target.put(floats))
    np.testing.assert_array_equal(cuda_target.get(unpacked).reshape(2, N).T, a.astype(np.float32))
    rows = cuda_target.get(packed).view(np.float16).reshape(3, N, 2)
    np.testing.assert_array_equal(rows[0], floats.reshape(2, N).T.astype(np.float16))
    np.testing.assert_array_equal(rows[1], a - b)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(rows[2], a * b)


@kernel(types.float32[::1], _U32, _U32, types.boolean, min_capability=(8, 0))
def tiles_kernel(out, a, b, as_bfloat):
    lane = np.uint32(cuda.threadIdx.x)
    at = np.uint32(lane << np.uint32(2))
    a0, a1, a2, a3 = load16(a, at)
    first = np.uint32(lane << np.uint32(1))
    b0, b1 = b[first], b[np.uint32(first + np.uint32(1))]
    c = np.float32(0.5)
    if as_bfloat:
        sums = ptx.mma_bf16(a0, a1, a2, a3, b0, b1, c, c, c, c)
    else:
        sums = ptx.mma_f16(a0, a1, a2, a3, b0, b1, c, c, c, c)
    for i in range(4):
        out[np.uint32(at + np.uint32(i))] = sums[i]


@kernel(_U32, types.float32[::1], min_capability=(8, 0))
def bfloats_kernel(out, floats):
    i = np.uint32(cuda.threadIdx.x)
    n = np.uint32(cuda.blockDim.x)
    out[i] = ptx.floats_to_bfloat2(floats[i], floats[np.uint32(n + i)])


def require_tensor_cores(target: CudaTarget) -> None:
    if target.name == "cuda" and not target.has_tensor_cores:
        pytest.skip("needs a GPU of compute capability 8.0 or more")


def as_bfloats(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16 values, ties to even, as uint16."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(
        np.uint16
    )


def test_bfloats_are_rounded_to_the_nearest(cuda_target: CudaTarget) -> None:
    require_tensor_cores(cuda_target)
    floats = np.random.default_rng(5).standard_normal(2 * N).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF], np.uint32)
    floats[:4] = ties.view(np.float32)
    out = cuda_target.full(N, 9, np.uint32)
    bfloats_kernel.launch(cuda_target, 1, N, out, cuda_target.put(floats))
    found = cuda_target.get(out).view(np.uint16).reshape(N, 2)
    np.testing.assert_array_equal(found, as_bfloats(floats).reshape(2, N).T)
    assert found[:4, 0].tolist() == [0x3F80, 0x3F82, 0x3F81, 0xBF80]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_tiles_are_multiplied(cuda_target: CudaTarget, kind: str) -> None:
    require_tensor_cores(cuda_target)
    rng = np.random.default_rng(6)
    a = rng.integers(-8, 9, (16, 16)).astype(np.float32) / 4  # exact in both types
    b = rng.integers(-8, 9, (16, 8)).astype(np.float32) / 8

    def pairs(tile: np.ndarray) -> np.ndarray:
        """Neighbours of the last axis, two to a word."""
        halves = as_bfloats(tile) if kind == "bf16" else tile.astype(np.float16).view(np.uint16)
        return np.ascontiguousarray(halves).view(np.uint32)

    g, t = np.arange(N) // 4, np.arange(N) % 4
    rows, columns = pairs(a), pairs(b.T)
    of_a = np.stack([rows[g, t], rows[g + 8, t], rows[g, t + 4], rows[g + 8, t + 4]], axis=1)
    of_b = np.stack([columns[g, t], columns[g, t + 4]], axis=1)
    out = cuda_target.full(4 * N, np.nan, np.float32)
    words: list[Any] = [cuda_target.put(x.reshape(-1)) for x in (of_a, of_b)]
    tiles_kernel.launch(cuda_target, 1, N, out, *words, kind == "bf16")
    found, product = cuda_target.get(out).reshape(N, 4), a @ b + 0.5
    expected = [product[g, 2 * t], product[g, 2 * t + 1],
                product[g + 8, 2 * t], product[g + 8, 2 * t + 1]]  # fmt: skip
    np.testing.assert_array_equal(found, np.stack(expected, axis=1))


@kernel(_U32, _U32, types.uint64)
def copies_kernel(out, words, host):
    i = np.uint32(np.uint32(cuda.threadIdx.x) << np.uint32(2))
    row = np.uint32(np.uint32(cuda.blockDim.x) << np.uint32(2))
    address = np.uint64(host + np.uint64(np.uint64(i) * np.uint64(4)))
    store16(out, i, *load16(words, i))
    store16(out, np.uint32(i + row), *load16_once(words, i))
    store16(out, np.uint32(i + np.uint32(2) * row), *load16_at(address))
    store16(out, np.uint32(i + np.uint32(3) * row), *load16_once_at(address))
    store16(out, np.uint32(i + np.uint32(4) * row), *load16_cached_at(address))
    w0, w1 = load8_once_at(address)
    w2, w3 = load8_once_at(np.uint64(address + np.uint64(8)))
    store16(out, np.uint32(i + np.uint32(5) * row), w0, w1, w2, w3)


def test_loads_and_stores(cuda_target: CudaTarget) -> None:
    words, host = random_words(7, 4 * N), cuda_target.mapped(4 * N, np.uint32)
    host.host[:] = random_words(8, 4 * N)
    out = cuda_target.full(6 * 4 * N, 9, np.uint32)
    copies_kernel.launch(cuda_target, 1, N, out, cuda_target.put(words), host.address)
    found = cuda_target.get(out).reshape(6, 4 * N)
    for row, expected in zip(found, [words] * 2 + [host.host] * 4, strict=True):
        np.testing.assert_array_equal(row, expected)
