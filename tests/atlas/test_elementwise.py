"""Norms, rotary positions, activations, sums and argmax on every target, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from atlas.ops.elementwise import (
    add,
    add_rows,
    add_scaled,
    argmax,
    cos_sin,
    rms_norm,
    rope,
    swiglu,
)
from atlas.target import CpuTarget, Target
from tests import naive


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("n_tokens", "n"), [(1, 1), (1, 7), (2, 8), (3, 9), (2, 33)])
def test_rms_norm(target: Target, n_tokens: int, n: int) -> None:
    x, weight = 3 * normal(n_tokens, n), normal(n)
    out = target.full(x.shape, np.nan, np.float32)
    rms_norm(target, out, target.put(x), target.put(weight), 1e-5)
    expected = naive.rms_norm(x, weight, 1e-5).reshape(x.shape)
    np.testing.assert_allclose(target.get(out), expected, rtol=1e-6)


def test_rms_norm_in_place_and_of_zeros(target: Target) -> None:
    x = np.stack([normal(9), np.zeros(9, np.float32)])
    device_x = target.put(x)
    rms_norm(target, device_x, device_x, target.full(9, 1, np.float32), 1e-5)
    expected = naive.rms_norm(x, np.ones(9), 1e-5)
    np.testing.assert_allclose(target.get(device_x), expected, rtol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("n_tokens", "n_head", "head_dim", "n_rot", "position"),
    [(1, 1, 2, 2, 0), (2, 3, 8, 8, 5), (3, 1, 7, 4, 8191), (2, 2, 4, 2, 3)],
)
def test_rope(
    target: Target,
    n_tokens: int,
    n_head: int,
    head_dim: int,
    n_rot: int,
    position: int,
    interleaved: bool,
) -> None:
    x = normal(n_tokens, n_head, head_dim)
    frequencies = (10000.0 ** (-2 * np.arange(n_rot // 2) / n_rot)).astype(np.float32)
    device_x = target.put(x)
    rope(target, device_x, position, target.put(frequencies), interleaved)
    result = target.get(device_x)
    expected = naive.rope(x, position, frequencies, interleaved)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(result[..., n_rot:], x[..., n_rot:])


def test_cos_sin_at_far_positions() -> None:
    rng = np.random.default_rng(0)
    for position in [0, 1, *rng.integers(0, 1 << 20, 200).tolist()]:
        frequency = np.float32(rng.random())
        angle = position * float(frequency)
        np.testing.assert_allclose(
            cos_sin(position, frequency), (np.cos(angle), np.sin(angle)), rtol=0, atol=1.5e-7
        )


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 3)])
def test_swiglu(target: Target, shape: tuple[int, ...]) -> None:
    gate, up = 4 * normal(*shape), normal(*shape)
    out = target.full(shape, np.nan, np.float32)
    swiglu(target, out, target.put(gate), target.put(up))
    np.testing.assert_allclose(target.get(out), naive.swiglu(gate, up), rtol=2e-6, atol=1e-7)


def test_swiglu_of_large_values(target: Target) -> None:
    gate = np.array([-1e4, -80, 80, 1e4], np.float32)
    out = target.full(4, np.nan, np.float32)
    swiglu(target, out, target.put(gate), target.full(4, 2, np.float32))
    np.testing.assert_allclose(target.get(out), [0, 0, 160, 2e4], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("shape", [(1,), (9,), (2, 8)])
def test_add_and_add_scaled(target: Target, shape: tuple[int, ...]) -> None:
    x, y = normal(*shape), normal(*shape)[::-1].copy()
    device_x, device_y = target.put(x), target.put(y)
    add(target, device_x, device_y)
    np.testing.assert_array_equal(target.get(device_x), x + y)
    add_scaled(target, device_x, device_y, 0.25)
    np.testing.assert_allclose(target.get(device_x), x + 1.25 * y, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(target.get(device_y), y)


@pytest.mark.parametrize(("n_tokens", "n"), [(1, 1), (2, 7), (3, 8)])
def test_add_rows(target: Target, n_tokens: int, n: int) -> None:
    x, bias = normal(n_tokens, n), normal(n)
    device_x = target.put(x)
    add_rows(target, device_x, target.put(bias))
    np.testing.assert_array_equal(target.get(device_x), x + bias)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 100])
def test_argmax(target: Target, n: int) -> None:
    x = normal(n)
    assert argmax(target, target.put(x)) == int(np.argmax(x))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 5, 5, 2, 5], 1),
        ([0] * 9 + [7] * 9, 9),
        ([-np.inf] * 10, 0),
        ([-np.inf] * 9 + [-1e30], 9),
        ([np.nan, 1, np.nan], 1),
    ],
)
def test_argmax_of_ties_and_infinities(target: Target, values: list[float], expected: int) -> None:
    assert argmax(target, target.put(np.array(values, np.float32))) == expected


def test_nothing_to_do() -> None:
    target = CpuTarget()
    rows, heads = np.empty((0, 4), np.float32), np.empty((0, 2, 4), np.float32)
    vector = normal(4)
    rms_norm(target, rows, rows, vector, 1e-5)
    rope(target, heads, 0, vector[:2].copy(), True)
    swiglu(target, rows, rows, rows)
    add(target, rows, rows)
    add_rows(target, rows, vector)
    x = normal(1, 2, 4)
    kept = x.copy()
    rope(target, x, 7, np.empty(0, np.float32), True)
    np.testing.assert_array_equal(x, kept)


def test_wrong_arguments_are_refused() -> None:
    target = CpuTarget()
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(target, x, x, np.zeros(3, np.float32), 1e-5)
    with pytest.raises(ValueError, match="3 pairs do not fit a head of 4"):
        rope(target, np.zeros((1, 1, 4), np.float32), 0, np.zeros(3, np.float32), True)
    with pytest.raises(ValueError, match="up has shape"):
        swiglu(target, x, x, x[:1])
    with pytest.raises(TypeError, match="y has dtype float64"):
        add(target, x, np.zeros((2, 4)))
    with pytest.raises(ValueError, match="x is not C-contiguous"):
        add_scaled(target, x[:, :2], x[:, :2], 1.0)
    with pytest.raises(ValueError, match="bias has shape"):
        add_rows(target, x, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="argmax of no elements"):
        argmax(target, np.zeros(0, np.float32))
