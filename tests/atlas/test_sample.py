"""The choice of a token on every target, against sorting and walking in Python."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from atlas.ops.sample import Choice, argmax, choice_bytes, choose_token
from atlas.ops.top_k import MAX_TOP_K, NO_KEY, index_of, key_of, logit_of
from atlas.target import CpuTarget, Target
from tests import naive

INFINITY = float("inf")
SIZES = [1, 31, 32, 33, 127, 128, 129, 300]


def normal(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal(n).astype(np.float32)


def largest(target: Target, logits: Sequence[float] | np.ndarray) -> tuple[int, bool]:
    values = np.array(logits, np.float32)
    choice = Choice(target, len(values))
    target.write(choice.result, np.full(2, -77, np.int32))
    argmax(target, target.put(values), choice)
    return choice.read()


def drawn(
    target: Target,
    logits: np.ndarray,
    temperature: float,
    top_k: int,
    top_p: float,
    uniforms: Sequence[float],
) -> list[int]:
    choice, device_logits = Choice(target, len(logits)), target.put(logits)
    tokens = []
    for uniform in uniforms:
        target.write(choice.result, np.full(2, -77, np.int32))
        token, is_finite = choose_token(
            target, device_logits, temperature, top_k, top_p, uniform, choice
        )
        assert is_finite
        tokens.append(token)
    return tokens


# ---- the largest ----


@pytest.mark.parametrize("n", SIZES)
def test_argmax(target: Target, n: int) -> None:
    assert largest(target, normal(n)) == (int(np.argmax(normal(n))), True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 5, 5, 2, 5], (1, True)),
        ([0] * 90 + [7] * 90, (90, True)),
        ([-0.0, 0.0, -1], (0, True)),
        ([-1e-40, -1e-45], (1, True)),
        ([-INFINITY] * 10, (0, False)),
        ([-INFINITY] * 9 + [-1e30], (9, False)),
        ([float("nan"), 1, float("nan")], (1, False)),
        ([float("nan")] * 200, (0, False)),
        ([0, -float("nan"), INFINITY], (2, False)),
        ([3] * 150 + [float("nan")], (0, False)),
    ],
)
def test_argmax_of_ties_and_of_what_is_not_finite(
    target: Target, values: list[float], expected: tuple[int, bool]
) -> None:
    assert largest(target, values) == expected


def test_argmax_again_and_again(target: Target) -> None:
    """What a launch leaves behind is what the next one needs."""
    choice = Choice(target, 200)
    for n in (3, 150, 0):
        logits = np.zeros(200, np.float32)
        logits[n] = 1
        argmax(target, target.put(logits), choice)
        assert choice.read() == (n, True)


# ---- keys ----


def test_keys_rise_with_logits_and_fall_with_indices() -> None:
    logits = [-INFINITY, -3e38, -1.5, -1e-45, 0.0, 1e-45, 1.0, 1.0000001, 3e38, INFINITY]
    keys = [int(key_of(np.float32(v), i)) for v in logits for i in (99, 7, 0)]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    assert min(keys) > int(NO_KEY) == int(key_of(np.float32("nan"), 3))
    for value in logits:
        key = key_of(np.float32(value), 70_000)
        assert (index_of(key), logit_of(key)) == (70_000, np.float32(value))
    assert key_of(np.float32(-0.0), 5) == key_of(np.float32(0.0), 5)


# ---- draws ----

UNIFORMS = [0.0, 0.07, 0.21, 0.5, 0.83, 0.999]


def check(target: Target, logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    """Tokens are those of the walk, but for numbers so near to a bound that rounding decides."""
    walks = [naive.draw(logits, temperature, top_k, top_p, u) for u in UNIFORMS]
    certain = [i for i, (_, margin) in enumerate(walks) if margin > 1e-5]
    assert len(certain) >= len(UNIFORMS) // 2
    uniforms = [UNIFORMS[i] for i in certain]
    expected = [walks[i][0] for i in certain]
    assert drawn(target, logits, temperature, top_k, top_p, uniforms) == expected


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("top_k", [1, 5, 32])
def test_draws_of_every_size(target: Target, n: int, top_k: int) -> None:
    check(target, normal(n), 0.8, top_k, 0.95)


def test_draws_from_many_slices(target: Target) -> None:
    """More than are merged at a time."""
    token, margin = naive.draw(normal(2100), 0.8, 32, 0.95, 0.4)
    assert margin > 1e-5
    assert drawn(target, normal(2100), 0.8, 32, 0.95, [0.4]) == [token]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 40, 1.0), (0.2, 7, 0.9), (5.0, 33, 0.5), (1.0, 20, 1e-9), (1e-6, 10, 1.0),
     (1e30, 3, 0.99), (1.0, 0, 0.9), (1.0, 2000, 1.0)],
)  # fmt: skip
def test_draws_of_every_kind(target: Target, temperature: float, top_k: int, top_p: float) -> None:
    check(target, 3 * normal(101), temperature, top_k, top_p)


def arrangements() -> dict[str, np.ndarray]:
    n = 131
    rising = np.linspace(-2, 2, n, dtype=np.float32)
    two_slices = np.full(n, -5, np.float32)
    two_slices[20:60] = np.linspace(0, 1, 40)
    return {
        "rising": rising,
        "falling": rising[::-1].copy(),
        "all equal": np.zeros(n, np.float32),
        "two values": np.where(np.arange(n) % 3 == 0, 1, 0).astype(np.float32),
        "the largest side by side": two_slices,
        "negative zeros": np.where(np.arange(n) % 2, 0.0, -0.0).astype(np.float32),
    }


@pytest.mark.parametrize("name", arrangements())
@pytest.mark.parametrize("top_k", [1, 6, 40])
def test_the_largest_wherever_they_are(target: Target, name: str, top_k: int) -> None:
    """All in one slice, or one in each: the merge has to go back to a slice, or not."""
    logits = arrangements()[name]
    order = np.argsort(-logits, kind="stable")[:top_k]
    uniforms = ((np.arange(top_k) + 0.5) / top_k).tolist()[:: max(1, top_k // 4)]
    # Hot: all weights are alike, and the token at rank r has the r-th part of them.
    got = drawn(target, logits, 1e30, top_k, 1.0, uniforms)
    assert got == [int(order[int(u * top_k)]) for u in uniforms]


def test_extreme_temperatures_and_logits(target: Target) -> None:
    logits = np.array([3e38, -3e38, 3e38, 0], np.float32)
    assert drawn(target, logits, 0.5, 4, 1.0, [0.0, 0.49, 0.51, 0.99]) == [0, 0, 2, 2]
    for temperature in (5e-324, 1e-300, 1e-38):
        assert (
            drawn(target, normal(40), temperature, 9, 1.0, [0.0, 0.99])
            == [int(np.argmax(normal(40)))] * 2
        )
    assert drawn(target, np.array([1, 2], np.float32), 1e300, 2, 1.0, [0.4, 0.6]) == [1, 0]


@pytest.mark.parametrize("top_k", [0, 1, 40])
@pytest.mark.parametrize("bad", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("at", [0, 70])
def test_logits_that_are_not_finite_are_seen(
    target: Target, top_k: int, bad: float, at: int
) -> None:
    logits = normal(71)
    logits[at] = bad
    choice = Choice(target, 71)
    token, is_finite = choose_token(target, target.put(logits), 1.0, top_k, 0.9, 0.5, choice)
    assert not is_finite and 0 <= token < 71


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 40, 513, MAX_TOP_K])
@pytest.mark.parametrize("n", [1000, 32_000, 128_256])
def test_draws_at_size(target: Target, n: int, top_k: int) -> None:
    check(target, 3 * normal(n), 1.0, top_k, 0.95)
    assert largest(target, normal(n)) == (int(np.argmax(normal(n))), True)


def test_room_is_what_was_said(target: Target) -> None:
    for n_vocab in SIZES:
        before = target.allocated_bytes
        choice = Choice(target, n_vocab)
        taken = target.allocated_bytes - before
        assert taken <= choice_bytes(n_vocab) and (taken == choice_bytes(n_vocab)) == target.is_cuda
        del choice


def test_wrong_arguments_are_refused() -> None:
    target = CpuTarget()
    with pytest.raises(ValueError, match="a choice of no logits"):
        argmax(target, np.zeros(0, np.float32), Choice(target, 0))
    with pytest.raises(ValueError, match="logits has shape"):
        argmax(target, np.zeros(3, np.float32), Choice(target, 4))
    with pytest.raises(TypeError, match="logits has dtype float64"):
        choose_token(target, np.zeros(3), 1.0, 0, 1.0, 0.5, Choice(target, 3))
