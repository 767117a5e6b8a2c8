"""Attention over the key-value cache on every target, against softmax in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atlas.ops import split_attention
from atlas.ops.attention import attention, attention_scratch_floats
from atlas.target import CpuTarget, Target
from tests import naive

N_CONTEXT = 70


def random_inputs(
    n_tokens: int,
    n_head: int,
    n_head_kv: int,
    head_dim: int,
    position: int,
    gain: float = 1.0,
    n_context: int = N_CONTEXT,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, keys and values; what lies behind the last token is NaN."""
    rng = np.random.default_rng(position + n_tokens)
    q = gain * rng.standard_normal((n_tokens, n_head, head_dim)).astype(np.float32)
    cache = rng.standard_normal((2, n_context, n_head_kv, head_dim)).astype(np.float32)
    cache[:, position + n_tokens :] = np.nan
    return q.astype(np.float32), cache[0], cache[1]


def run(
    target: Target,
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position: int,
    n_scratch: int | None = None,
) -> np.ndarray:
    """The result; `out` and the scratch memory are NaN before."""
    n_context, n_head_kv, head_dim = keys.shape
    if n_scratch is None:
        n_scratch = attention_scratch_floats(q.shape[1], n_head_kv, head_dim, n_context)
    out = target.full(q.shape, np.nan, np.float32)
    attention(
        target, out, target.put(q), target.put(keys), target.put(values),
        target.full(1, position, np.int32), target.full(n_scratch, np.nan, np.float32),
    )  # fmt: skip
    return target.get(out)


# Lengths about the tile of 32 positions; heads that share and do not; ragged dimensions.
@pytest.mark.parametrize(
    ("n_tokens", "n_head", "n_head_kv", "head_dim", "position"),
    [
        (1, 2, 1, 4, 0),
        (1, 2, 2, 4, 1),
        (1, 4, 2, 5, 30),
        (1, 2, 2, 16, 31),
        (1, 2, 1, 3, 32),
        (1, 3, 1, 8, 33),
        (1, 8, 1, 12, 63),
        (1, 11, 1, 4, 64),
        (3, 2, 1, 4, 0),
        (2, 1, 1, 17, 62),
        (5, 4, 2, 8, 30),
        (9, 2, 2, 4, 0),
        (4, 2, 2, 1, 66),
        (4, 2, 1, 4, 66),
        (1, 4, 1, 64, 36),
        (1, 6, 2, 80, 2),
        (1, 1, 1, 128, 34),
        (1, 1, 1, 132, 17),
        (1, 1, 1, 256, 16),
    ],
)
def test_attention_matches_float64(
    target: Target, n_tokens: int, n_head: int, n_head_kv: int, head_dim: int, position: int
) -> None:
    q, keys, values = random_inputs(n_tokens, n_head, n_head_kv, head_dim, position)
    expected = naive.attention(q, keys, values, position)
    got = run(target, q, keys, values, position)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


# Blocks of one share or none, borders of the shares, and a full context.
@pytest.mark.parametrize("position", [0, 31, 32, 63, 64, 95, 96, 97, 127, 159])
def test_decoding_is_shared_out(target: Target, position: int) -> None:
    q, keys, values = random_inputs(1, 4, 2, 8, position, n_context=160)
    expected = naive.attention(q, keys, values, position)
    got = run(target, q, keys, values, position)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 4), (4, 80), (8, 128)])
@pytest.mark.gpu
def test_decoding_at_size(target: Target, group: int, head_dim: int) -> None:
    """What the simulator has no time for: a few thousand positions, hundreds of blocks."""
    for position in (0, 1, 1000, 4095):
        q, keys, values = random_inputs(1, 4 * group, 4, head_dim, position, n_context=4096)
        expected = naive.attention(q, keys, values, position)
        got = run(target, q, keys, values, position)
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("n_shares", [0, 1, 2, 3])
def test_several_tokens_use_the_shares_there_is_room_for(target: Target, n_shares: int) -> None:
    n_tokens, n_head, head_dim, position = 3, 2, 4, 61
    q, keys, values = random_inputs(n_tokens, n_head, 1, head_dim, position, n_context=192)
    least = attention_scratch_floats(n_head, 1, head_dim, 192)
    n_scratch = max(n_shares * n_tokens * n_head * (head_dim + 2), least)
    expected = naive.attention(q, keys, values, position)
    got = run(target, q, keys, values, position, n_scratch)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_the_position_is_read_when_the_kernel_runs(target: Target) -> None:
    """The same arguments, another position in the array: a recorded launch can be replayed."""
    q, keys, values = random_inputs(1, 2, 1, 4, 69)
    arrays = [target.put(a) for a in (q, keys, values)]
    out, position = target.empty(q.shape, np.float32), target.full(1, 0, np.int32)
    scratch = target.empty(attention_scratch_floats(2, 1, 4, N_CONTEXT), np.float32)
    for place in (40, 69, 3):
        target.write(position, np.array([place], np.int32))
        attention(target, out, *arrays, position, scratch)
        expected = naive.attention(q, keys, values, place)
        np.testing.assert_allclose(target.get(out), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("head_dim", [4, 5])
def test_high_scores_do_not_overflow(target: Target, head_dim: int) -> None:
    q, keys, values = random_inputs(1, 2, 1, head_dim, 40, gain=1000)
    expected = naive.attention(q, keys, values, 40)
    np.testing.assert_allclose(run(target, q, keys, values, 40), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("head_dim", [4, 5])
def test_what_is_not_a_number_stays_so(target: Target, head_dim: int) -> None:
    """Or damage could come out as a likely token."""
    q, keys, values = random_inputs(1, 2, 1, head_dim, 40)
    q[0, 1, 0] = np.nan
    got = run(target, q, keys, values, 40)
    assert np.isfinite(got[0, 0]).all() and np.isnan(got[0, 1]).all()


def test_no_tokens() -> None:
    q, keys, values = random_inputs(0, 2, 1, 4, 3)
    assert run(CpuTarget(), q, keys, values, 3).shape == (0, 2, 4)


def test_scratch_grows_with_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks for all multiprocessors, unless a share would be too short or they are too many."""
    monkeypatch.setattr(split_attention, "_BLOCKS", 396)
    assert attention_scratch_floats(32, 8, 128, 64) == 0
    assert attention_scratch_floats(32, 8, 128, 65) == 32 * 2 * 130
    assert attention_scratch_floats(32, 8, 128, 1 << 20) == 32 * 50 * 130
    assert attention_scratch_floats(32, 32, 128, 1 << 20) == 32 * 13 * 130
    assert attention_scratch_floats(8, 1, 128, 1 << 20) == 8 * 128 * 130
    assert attention_scratch_floats(32, 8, 130, 1 << 20) == 0


def refused(message: str, *arguments: Any, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        attention(CpuTarget(), *arguments)


def test_wrong_arguments_are_refused() -> None:
    q, keys, values = random_inputs(2, 4, 2, 8, 0)
    out, scratch = np.empty_like(q), np.empty(4 * 2 * 10, np.float32)

    def at(position: int) -> np.ndarray:
        return np.array([position], np.int32)

    within = r"positions 69..71 are not within a context of 70"
    refused(within, out, q, keys, values, at(69), scratch)
    refused("positions -1", out, q, keys, values, at(-1), scratch)
    three = out[:, :3].copy(), q[:, :3].copy()
    refused("3 heads do not share 2 key-value heads", *three, keys, values, at(0), scratch)
    refused("keys has shape", out, q, keys[..., :4].copy(), values, at(0), scratch)
    refused("values has shape", out, q, keys, values[:-1], at(0), scratch)
    refused("position has shape", out, q, keys, values, np.zeros(2, np.int32), scratch)
    refused("scratch has 79 elements, expected 80", out, q, keys, values, at(0), scratch[:79])
    wrong = q.astype(np.float64)
    refused("q has dtype float64", out, wrong, keys, values, at(0), scratch, error=TypeError)
    here = np.zeros(1, np.int64)
    refused("position has dtype int64", out, q, keys, values, here, scratch, error=TypeError)
