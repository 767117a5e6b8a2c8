"""Root mean square norms on every target, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from atlas.ops.norm import add_rms_norm, rms_norm
from atlas.target import CpuTarget, Target
from tests import naive

# About the threads of a block, with rows that start on 16 bytes and rows that do not.
SHAPES = [(1, 1), (1, 7), (2, 8), (3, 9), (2, 33), (1, 256), (2, 258), (3, 260)]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("n_tokens", "n"), SHAPES)
def test_rms_norm(target: Target, n_tokens: int, n: int) -> None:
    x, weight = 3 * normal(n_tokens, n), normal(n)
    out = target.full(x.shape, np.nan, np.float32)
    rms_norm(target, out, target.put(x), target.put(weight), 1e-5)
    expected = naive.rms_norm(x, weight, 1e-5).reshape(x.shape)
    np.testing.assert_allclose(target.get(out), expected, rtol=1e-6)


@pytest.mark.parametrize("n", [9, 12])
def test_rms_norm_in_place_and_of_zeros(target: Target, n: int) -> None:
    x = np.stack([normal(n), np.zeros(n, np.float32)])
    device_x = target.put(x)
    rms_norm(target, device_x, device_x, target.full(n, 1, np.float32), 1e-5)
    expected = naive.rms_norm(x, np.ones(n), 1e-5)
    np.testing.assert_allclose(target.get(device_x), expected, rtol=1e-6)


@pytest.mark.parametrize(("n_tokens", "n"), SHAPES)
def test_add_rms_norm(target: Target, n_tokens: int, n: int) -> None:
    x, delta, weight = 3 * normal(n_tokens, n), normal(n, n_tokens).T.copy(), normal(n)
    out, device_x = target.full(x.shape, np.nan, np.float32), target.put(x)
    add_rms_norm(target, out, device_x, target.put(delta), target.put(weight), 1e-5)
    np.testing.assert_array_equal(target.get(device_x), x + delta)
    expected = naive.rms_norm(x + delta, weight, 1e-5).reshape(x.shape)
    np.testing.assert_allclose(target.get(out), expected, rtol=1e-6)


def test_what_is_not_a_number_stays_so(target: Target) -> None:
    x = normal(2, 40)
    x[1, 17] = np.inf
    out = target.full(x.shape, 0, np.float32)
    rms_norm(target, out, target.put(x), target.full(40, 1, np.float32), 1e-5)
    assert np.isfinite(target.get(out)[0]).all() and np.isnan(target.get(out)[1, 17])


def test_nothing_to_do() -> None:
    rows, vector = np.empty((0, 4), np.float32), normal(4)
    rms_norm(CpuTarget(), rows, rows, vector, 1e-5)
    add_rms_norm(CpuTarget(), rows.copy(), rows, rows, vector, 1e-5)
    np.testing.assert_array_equal(vector, normal(4))


def test_wrong_arguments_are_refused() -> None:
    target = CpuTarget()
    x, weight = np.zeros((2, 4), np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(target, x, x, weight[:3], 1e-5)
    with pytest.raises(ValueError, match="out has shape"):
        rms_norm(target, x[:1], x, weight, 1e-5)
    with pytest.raises(ValueError, match="delta has shape"):
        add_rms_norm(target, x.copy(), x, x[:1], weight, 1e-5)
    with pytest.raises(ValueError, match="x is not C-contiguous"):
        add_rms_norm(target, x.copy(), x[:, :2], x, weight, 1e-5)
