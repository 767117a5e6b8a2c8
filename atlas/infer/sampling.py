"""Choosing the next token: greedy, or by temperature, top-k and top-p with a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from atlas.ops.elementwise import argmax
from atlas.target import Target
from forge.errors import GGUFShardError


class Sampler:
    """Chooses tokens from logits.

    Parameters
    ----------
    temperature
        Divisor of the logits; 0 for the most probable token, always.
    top_k
        Only the k most probable tokens; 0 for all.
    top_p
        Only the most probable tokens that together reach this probability (A. Holtzman et al.,
        "The Curious Case of Neural Text Degeneration", 2020); 1 for all.
    seed
        Seed of the generator; None for one from the system.

    Raises
    ------
    GGUFShardError
        If a parameter is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise GGUFShardError(f"temperature {temperature}: not a number of at least 0")
        if top_k < 0:
            raise GGUFShardError(f"top-k {top_k}: not a number of at least 0")
        if not 0 < top_p <= 1:
            raise GGUFShardError(f"top-p {top_p}: not within 0..1")
        if seed is not None and seed < 0:
            raise GGUFShardError(f"seed {seed}: not a number of at least 0")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._random = np.random.default_rng(seed)

    def choose(self, target: Target, logits: Any) -> int:
        """The next token from float32 [n_vocab] on the target.

        Raises
        ------
        GGUFShardError
            If the logits are not numbers: the weights are none, or too large.
        """
        if self.temperature > 0:
            return self._draw(target.get(logits).astype(np.float64))
        token = argmax(target, logits)
        _check_finite(target.get(logits[token : token + 1]))
        return token

    def _draw(self, logits: np.ndarray) -> int:
        _check_finite(logits)
        tokens = np.argsort(-logits, kind="stable")[: self.top_k or None]
        # The highest logit goes first: however small the temperature, it divides 0.
        with np.errstate(over="ignore"):
            shares = np.exp((logits[tokens] - logits[tokens[0]]) / self.temperature)
        shares /= shares.sum()
        # The smallest set that reaches top_p, and never an empty one.
        n_kept = int(np.searchsorted(np.cumsum(shares), self.top_p)) + 1
        shares = shares[:n_kept] / shares[:n_kept].sum()
        return int(tokens[self._random.choice(len(shares), p=shares)])


def _check_finite(logits: np.ndarray) -> None:
    if not np.isfinite(logits).all():
        raise GGUFShardError("logits are not finite: the model's weights are no numbers")
