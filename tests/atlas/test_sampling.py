"""Choosing tokens: limits, the sets of top-k and top-p, frequencies, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atlas.infer.sampling import Sampler
from atlas.target import CpuTarget, Target
from forge.errors import GGUFShardError

LOGITS = np.array([0.5, 2.0, -1.0, 1.5, 2.5, -3.0, 0.0, 1.0], np.float32)


def draws(sampler: Sampler, logits: np.ndarray, count: int) -> list[int]:
    target = CpuTarget()
    return [sampler.choose(target, logits) for _ in range(count)]


def naive_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> dict[int, float]:
    """Token -> probability: sort, cut, cut, renormalise."""
    weights = [(float(np.exp(float(v) / temperature)), i) for i, v in enumerate(logits)]
    weights.sort(key=lambda item: (-item[0], item[1]))
    if top_k:
        weights = weights[:top_k]
    total = sum(w for w, _ in weights)
    kept, reached = [], 0.0
    for w, i in weights:
        kept.append((w, i))
        reached += w / total
        if reached >= top_p:
            break
    total = sum(w for w, _ in kept)
    return {i: w / total for w, i in kept}


def test_greedy_takes_the_first_of_the_best(target: Target) -> None:
    logits = np.array([1, 3, -2, 3], np.float32)
    assert Sampler(0).choose(target, target.put(logits)) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6])
def test_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert set(draws(Sampler(temperature, 0, 1.0, seed=1), LOGITS, 50)) == {4}


def test_a_high_temperature_makes_all_alike() -> None:
    drawn = draws(Sampler(1e30, 0, 1.0, seed=1), LOGITS, 4000)
    counts = np.bincount(drawn, minlength=len(LOGITS))
    assert (np.abs(counts - 500) < 5 * np.sqrt(500)).all()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.6), (1.3, 5, 0.8), (2.0, 99, 0.05),
     (1.0, 8, 1e-9)],
)  # fmt: skip
def test_draws_follow_the_naive_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """The set is exact; the frequencies pass a chi-square test at about one in a million."""
    n = 4000
    want = naive_distribution(LOGITS, temperature, top_k, top_p)
    drawn = draws(Sampler(temperature, top_k, top_p, seed=7), LOGITS, n)
    counts = {token: drawn.count(token) for token in set(drawn)}
    assert counts.keys() <= want.keys()
    assert all(share * n < 20 for token, share in want.items() if token not in counts)
    chi_square = sum((counts.get(i, 0) - n * p) ** 2 / (n * p) for i, p in want.items())
    freedom = len(want) - 1
    assert chi_square <= freedom + 7 * np.sqrt(2 * freedom)


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8."""
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125])).astype(np.float32)
    for top_p, n_kept in [(0.3, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)]:
        drawn = draws(Sampler(1.0, 0, top_p, seed=2), logits, 400)
        assert set(drawn) == set(range(n_kept)), top_p


def test_top_k_keeps_the_lower_of_equals() -> None:
    drawn = draws(Sampler(1.0, 2, 1.0, seed=2), np.zeros(5, np.float32), 100)
    assert set(drawn) == {0, 1}


def test_the_seed_decides() -> None:
    first, again, other = (draws(Sampler(1.0, 0, 1.0, seed=s), LOGITS, 40) for s in (3, 3, 4))
    assert first == again != other
    assert draws(Sampler(1.0, 0, 1.0), LOGITS, 40) != draws(Sampler(1.0, 0, 1.0), LOGITS, 40)


def test_draws_are_the_same_on_every_target(target: Target) -> None:
    """A draw takes one number of the generator, whatever the target."""
    for top_k in (0, 3):
        sampler = Sampler(1.0, top_k, 0.9, seed=5)
        got = [sampler.choose(target, target.put(LOGITS)) for _ in range(20)]
        assert got == draws(Sampler(1.0, top_k, 0.9, seed=5), LOGITS, 20)


def test_a_sampler_goes_from_model_to_model(target: Target) -> None:
    sampler = Sampler(0)
    for logits in (LOGITS, LOGITS[:3], LOGITS):
        assert sampler.choose(target, target.put(logits.copy())) == int(np.argmax(logits))
        assert sampler.choose(CpuTarget(), logits) == int(np.argmax(logits))


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([3e38, -3e38, 3e38], np.float32)
    assert set(draws(Sampler(0.5, 0, 1.0, seed=1), logits, 50)) == {0, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature: float) -> None:
    for logits in ([np.nan] * 3, [np.inf, 0, 1]):
        with pytest.raises(GGUFShardError, match="logits are not finite"):
            draws(Sampler(temperature, seed=1), np.array(logits, np.float32), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1: not a number of at least 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top-k -1: not a number of at least 0"),
        ({"top_p": 0.0}, r"top-p 0.0: not within 0\.\.1"),
        ({"top_p": 1.01}, "top-p 1.01"),
        ({"top_p": float("nan")}, "top-p nan"),
        ({"seed": -1}, "seed -1: not a number of at least 0"),
    ],
)
def test_bad_parameters(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GGUFShardError, match=message):
        Sampler(**arguments)
