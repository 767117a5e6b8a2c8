"""Activations, sums and the count of positions on every target, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from atlas.ops.elementwise import add_rows, add_scaled, advance, swiglu
from atlas.target import CpuTarget, Target
from tests import naive


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 8), (3, 3), (2, 36), (3, 33)])
def test_swiglu(target: Target, shape: tuple[int, ...]) -> None:
    gate, up = 4 * normal(*shape), normal(*shape)
    out = target.full(shape, np.nan, np.float32)
    swiglu(target, out, target.put(gate), target.put(up))
    np.testing.assert_allclose(target.get(out), naive.swiglu(gate, up), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("n", [4, 5])
def test_swiglu_in_place_and_of_large_values(target: Target, n: int) -> None:
    gate = target.put(np.array([[-1e4, -80, 80, 1e4, 1e4][:n]], np.float32))
    swiglu(target, gate, gate, target.full((1, n), 2, np.float32))
    np.testing.assert_allclose(target.get(gate), [[0, 0, 160, 2e4, 2e4][:n]], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 8)])
def test_add_scaled(target: Target, shape: tuple[int, ...]) -> None:
    x, y = normal(*shape), normal(*shape)[::-1].copy()
    device_x, device_y = target.put(x), target.put(y)
    add_scaled(target, device_x, device_y, 0.25)
    np.testing.assert_allclose(target.get(device_x), x + 0.25 * y, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(target.get(device_y), y)


@pytest.mark.parametrize(("n_tokens", "n"), [(1, 1), (2, 7), (3, 8)])
def test_add_rows(target: Target, n_tokens: int, n: int) -> None:
    x, bias = normal(n_tokens, n), normal(n)
    device_x = target.put(x)
    add_rows(target, device_x, target.put(bias))
    np.testing.assert_array_equal(target.get(device_x), x + bias)


def test_advance(target: Target) -> None:
    position = target.full(1, 5, np.int32)
    advance(target, position, 1)
    advance(target, position, 64)
    assert target.get(position).tolist() == [70]


def test_nothing_to_do() -> None:
    target = CpuTarget()
    rows, vector = np.empty((0, 4), np.float32), normal(4)
    swiglu(target, rows, rows, rows)
    add_scaled(target, rows, rows, 1.0)
    add_rows(target, rows, vector)
    np.testing.assert_array_equal(vector, normal(4))


def test_wrong_arguments_are_refused() -> None:
    target = CpuTarget()
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="up has shape"):
        swiglu(target, x, x, x[:1])
    with pytest.raises(TypeError, match="y has dtype float64"):
        add_scaled(target, x, np.zeros((2, 4)), 1.0)
    with pytest.raises(ValueError, match="x is not C-contiguous"):
        add_scaled(target, x[:, :2], x[:, :2], 1.0)
    with pytest.raises(ValueError, match="bias has shape"):
        add_rows(target, x, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="position has shape"):
        advance(target, np.zeros(2, np.int32), 1)
