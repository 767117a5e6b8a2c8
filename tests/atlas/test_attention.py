"""Attention over the key-value cache on every target, against softmax in float64."""

from __future__ import annotations

import numpy as np
import pytest

from atlas.ops.attention import attention, store_kv
from atlas.target import CpuTarget, Target
from tests import naive

N_CONTEXT = 70


def random_inputs(
    n_tokens: int, n_head: int, n_head_kv: int, head_dim: int, position: int, gain: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, keys and values; what lies behind the last token is NaN."""
    rng = np.random.default_rng(position + n_tokens)
    q = gain * rng.standard_normal((n_tokens, n_head, head_dim)).astype(np.float32)
    cache = rng.standard_normal((2, N_CONTEXT, n_head_kv, head_dim)).astype(np.float32)
    cache[:, position + n_tokens :] = np.nan
    return q.astype(np.float32), cache[0], cache[1]


# Lengths about the tile of 32 positions; heads that share and do not; ragged dimensions.
@pytest.mark.parametrize(
    ("n_tokens", "n_head", "n_head_kv", "head_dim", "position"),
    [
        (1, 2, 1, 4, 0),
        (1, 4, 2, 5, 30),
        (1, 2, 2, 16, 31),
        (1, 2, 1, 3, 32),
        (3, 2, 1, 4, 0),
        (2, 1, 1, 17, 62),
        (4, 2, 2, 1, 66),
    ],
)
def test_attention_matches_float64(
    target: Target, n_tokens: int, n_head: int, n_head_kv: int, head_dim: int, position: int
) -> None:
    q, keys, values = random_inputs(n_tokens, n_head, n_head_kv, head_dim, position)
    out = target.full(q.shape, np.nan, np.float32)
    attention(target, out, target.put(q), target.put(keys), target.put(values), position)
    expected = naive.attention(q, keys, values, position)
    np.testing.assert_allclose(target.get(out), expected, rtol=0, atol=2e-6)


def test_high_scores_do_not_overflow(target: Target) -> None:
    q, keys, values = random_inputs(1, 2, 1, 4, 40, gain=1000)
    out = target.full(q.shape, np.nan, np.float32)
    attention(target, out, target.put(q), target.put(keys), target.put(values), 40)
    expected = naive.attention(q, keys, values, 40)
    np.testing.assert_allclose(target.get(out), expected, rtol=0, atol=1e-3)


def test_no_tokens() -> None:
    q, keys, values = random_inputs(0, 2, 1, 4, 3)
    before = keys.copy()
    attention(CpuTarget(), np.empty_like(q), q, keys, values, 3)
    store_kv(CpuTarget(), keys, q[:, :1].copy(), N_CONTEXT)
    np.testing.assert_array_equal(keys, before)


@pytest.mark.parametrize(("n_tokens", "position"), [(1, 0), (3, 2), (5, 0), (1, 4)])
def test_store_kv(target: Target, n_tokens: int, position: int) -> None:
    rng = np.random.default_rng(0)
    before = rng.standard_normal((5, 2, 3)).astype(np.float32)
    new = rng.standard_normal((n_tokens, 2, 3)).astype(np.float32)
    cache = target.put(before)
    store_kv(target, cache, target.put(new), position)
    expected = before.copy()
    expected[position : position + n_tokens] = new
    np.testing.assert_array_equal(target.get(cache), expected)


def test_wrong_arguments_are_refused() -> None:
    target = CpuTarget()
    q, keys, values = random_inputs(2, 4, 2, 8, 0)
    out = np.empty_like(q)
    with pytest.raises(ValueError, match=r"positions 69..71 are not within a context of 70"):
        attention(target, out, q, keys, values, 69)
    with pytest.raises(ValueError, match="positions -1"):
        attention(target, out, q, keys, values, -1)
    with pytest.raises(ValueError, match="3 heads do not share 2 key-value heads"):
        attention(target, out[:, :3].copy(), q[:, :3].copy(), keys, values, 0)
    with pytest.raises(ValueError, match="keys has shape"):
        attention(target, out, q, keys[..., :4].copy(), values, 0)
    with pytest.raises(ValueError, match="values has shape"):
        attention(target, out, q, keys, values[:-1], 0)
    with pytest.raises(TypeError, match="q has dtype float64"):
        attention(target, out, q.astype(np.float64), keys, values, 0)
    with pytest.raises(ValueError, match=r"positions 69..71 are not within a context of 70"):
        store_kv(target, keys, q[:, :2].copy(), 69)
    with pytest.raises(ValueError, match="cache has shape"):
        store_kv(target, keys, q, 0)
