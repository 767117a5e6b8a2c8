"""Rotary positions and the way into the key-value cache, against complex numbers in float64."""

from __future__ import annotations

import numpy as np
import pytest

from atlas.ops.rope import cos_sin, rotate_and_store
from atlas.target import CpuTarget, Target
from tests import naive


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def frequencies_of(n_rot: int) -> np.ndarray:
    return (10000.0 ** (-2 * np.arange(n_rot // 2) / max(n_rot, 1))).astype(np.float32)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("n_tokens", "n_head", "n_head_kv", "head_dim", "n_rot", "position"),
    [
        (1, 1, 1, 2, 2, 0),
        (1, 4, 2, 8, 8, 1),
        (2, 3, 3, 8, 8, 5),
        (3, 2, 1, 7, 4, 4),
        (2, 2, 2, 4, 2, 3),
        (1, 3, 1, 5, 0, 6),
        (7, 1, 1, 6, 6, 0),
    ],
)
def test_rotate_and_store(
    target: Target,
    n_tokens: int,
    n_head: int,
    n_head_kv: int,
    head_dim: int,
    n_rot: int,
    position: int,
    interleaved: bool,
) -> None:
    n_context = 7
    q = normal(n_tokens, n_head, head_dim)
    k, v = normal(n_tokens, n_head_kv, head_dim), normal(n_head_kv, n_tokens, head_dim)
    v = v.transpose(1, 0, 2).copy()
    frequencies = frequencies_of(n_rot)
    cache = normal(2, n_context, n_head_kv, head_dim)
    device_q, keys, values = target.put(q), target.put(cache[0]), target.put(cache[1])
    rotate_and_store(
        target, device_q, target.put(k), target.put(v), keys, values,
        target.full(1, position, np.int32), target.put(frequencies), interleaved,
    )  # fmt: skip
    got = target.get(device_q)
    expected = naive.rope(q, position, frequencies, interleaved)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got[..., n_rot:], q[..., n_rot:])
    new = slice(position, position + n_tokens)
    expected_cache = cache.astype(np.float64)
    expected_cache[0, new] = naive.rope(k, position, frequencies, interleaved)
    expected_cache[1, new] = v
    np.testing.assert_allclose(target.get(keys), expected_cache[0], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(target.get(values), expected_cache[1].astype(np.float32))


def test_far_positions(target: Target) -> None:
    q = normal(2, 1, 8)
    k = normal(2, 1, 8)
    keys = target.full((8193, 1, 8), 0, np.float32)
    position, frequencies = target.full(1, 8191, np.int32), target.put(frequencies_of(8))
    device_q = target.put(q)
    rotate_and_store(
        target, device_q, target.put(k), target.put(k), keys, keys, position, frequencies, True
    )
    expected = naive.rope(q, 8191, frequencies_of(8), True)
    np.testing.assert_allclose(target.get(device_q), expected, rtol=0, atol=1e-6)


def test_cos_sin_at_far_positions() -> None:
    rng = np.random.default_rng(0)
    for position in [0, 1, *rng.integers(0, 1 << 20, 200).tolist()]:
        frequency = np.float32(rng.random())
        angle = position * float(frequency)
        np.testing.assert_allclose(
            cos_sin(position, frequency), (np.cos(angle), np.sin(angle)), rtol=0, atol=1.5e-7
        )


def test_no_tokens() -> None:
    heads, cache = np.empty((0, 2, 4), np.float32), normal(3, 2, 4)
    kept, position = cache.copy(), np.array([3], np.int32)
    rotate_and_store(
        CpuTarget(), heads, heads, heads, cache, cache, position, frequencies_of(4), True
    )
    np.testing.assert_array_equal(cache, kept)


def test_wrong_arguments_are_refused() -> None:
    q, k = np.zeros((2, 4, 8), np.float32), np.zeros((2, 2, 8), np.float32)
    cache, frequencies = np.zeros((5, 2, 8), np.float32), frequencies_of(8)

    def refused(message: str, position: int = 0, **changed: np.ndarray) -> None:
        given = {
            "q": q, "k": k, "v": k, "keys": cache, "values": cache,
            "position": np.array([position], np.int32), "frequencies": frequencies, **changed,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            rotate_and_store(CpuTarget(), *given.values(), interleaved=True)

    refused("5 pairs do not fit a head of 8", frequencies=frequencies_of(10))
    refused(r"positions 4..6 are not within a context of 5", position=4)
    refused("positions -1", position=-1)
    refused("k has shape", k=k[:1])
    refused("v has shape", v=k[..., :4].copy())
    refused("keys has shape", keys=cache[:, :1].copy())
    refused("values has shape", values=cache[:4])
