"""Choosing the next token: greedy, or by temperature, top-k and top-p with a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from atlas.ops.sample import Choice, choose_token
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
        Seed of the generator, of which each draw takes one number; None for one from the system.

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
        self._choice: Choice | None = None

    def choose(self, target: Target, logits: Any) -> int:
        """The next token from float32 [n_vocab] on the target.

        It takes one small copy from a device; all logits are copied where `top_k` is 0 or more
        than `atlas.ops.top_k.MAX_TOP_K` and the temperature is not 0.

        Raises
        ------
        GGUFShardError
            If the logits are not numbers: the weights are none, or too large.
        """
        uniform = self._random.random() if self.temperature > 0 else 0.0
        token, is_finite = choose_token(
            target, logits, self.temperature, self.top_k, self.top_p, uniform,
            self._room(target, logits.shape[0]),
        )  # fmt: skip
        if not is_finite:
            raise GGUFShardError("logits are not finite: the model's weights are no numbers")
        return token

    def _room(self, target: Target, n_vocab: int) -> Choice:
        """The room to choose in; made at the first choice."""
        room = self._choice
        if room is None or room.target is not target or room.n_vocab != n_vocab:
            room = self._choice = Choice(target, n_vocab)
        return room
