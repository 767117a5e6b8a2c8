"""Prompt in, tokens out, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.live_update import ModelUpdatedError
from atlas.stats import CacheStats


@dataclass
class Generation:
    """Tokens and their price.

    Attributes
    ----------
    tokens
        What was generated; a token that ended it is the last one.
    prompt_logits
        float32 [n_vocab] behind the last prompt token.
    prompt_seconds, decode_seconds
        Time of the prompt's passes, and of the passes behind them.
    first_token_seconds
        From the call to the first token.
    n_decode_passes
        Passes of one token each; the first token needs none of its own.
    prompt_stats, decode_stats
        What the cache did in either phase.
    """

    tokens: list[int] = field(default_factory=list)
    prompt_logits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    n_decode_passes: int = 0
    prompt_stats: CacheStats = field(default_factory=CacheStats)
    decode_stats: CacheStats = field(default_factory=CacheStats)

    @property
    def tokens_per_second(self) -> float:
        """Decode passes a second; 0 if there was none."""
        return self.n_decode_passes / self.decode_seconds if self.n_decode_passes else 0.0


def generate(
    model: LlamaModel,
    prompt: Sequence[int],
    n_tokens: int,
    sampler: Sampler,
    *,
    stop: Collection[int] = (),
    on_token: Callable[[int], Any] = lambda token: None,
) -> Generation:
    """Continue a prompt.

    Parameters
    ----------
    model
        The model; the prompt goes behind what it has seen.
    prompt
        Token ids, at least one.
    n_tokens
        At most so many new tokens; fewer if the context is full before.
    sampler
        How to choose them.
    stop
        Tokens that end the text.
    on_token
        Called with each token as it comes.

    Returns
    -------
    Generation
        The tokens and their price.

    Raises
    ------
    CorruptPageError
        If a page failed its check; no token that depends on it has been handed out.
    ModelUpdatedError
        If the model has been updated since the text began; all tokens that have been handed out are
        those of the version before.
    GGUFShardError
        If the prompt does not fit the context.
    """
    result = Generation()
    before = model.atlas.stats.copy()
    started = time.perf_counter()
    with model.atlas.in_use():
        version = model.atlas.version
        logits = model.forward(prompt)
        result.prompt_logits = model.target.get(logits)
        result.prompt_seconds = time.perf_counter() - started
        after_prompt = model.atlas.stats.copy()
        result.prompt_stats = after_prompt.since(before)
        if n_tokens < 1:
            return result
        token = sampler.choose(model.target, logits)
    result.first_token_seconds = time.perf_counter() - started
    decoding = time.perf_counter()
    while True:
        result.tokens.append(token)
        on_token(token)
        is_full = model.position == model.kv_cache.n_context
        if token in stop or is_full or len(result.tokens) == n_tokens:
            break
        with model.atlas.in_use():
            if model.atlas.version != version:  # the position may have been set to 0 since
                raise ModelUpdatedError
            token = sampler.choose(model.target, model.forward([token]))
        result.n_decode_passes += 1
    result.decode_seconds = time.perf_counter() - decoding
    result.decode_stats = model.atlas.stats.since(after_prompt)
    return result
