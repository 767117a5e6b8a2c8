"""Keys and values of the positions seen so far."""

from __future__ import annotations

import numpy as np

from atlas.infer.config import LlamaConfig
from atlas.target import Target


class KVCache:
    """Room for `n_context` positions in every layer, on the target.

    Parameters
    ----------
    target, config
        Where, and the shapes.
    n_context
        Positions there is room for.

    Attributes
    ----------
    keys, values
        For every layer float32 [n_context, n_head_kv, head_dim].
    """

    def __init__(self, target: Target, config: LlamaConfig, n_context: int) -> None:
        self.n_context = n_context
        shape = (n_context, config.n_head_kv, config.head_dim)
        self.keys = [target.empty(shape, np.float32) for _ in range(config.n_layer)]
        self.values = [target.empty(shape, np.float32) for _ in range(config.n_layer)]


def kv_cache_bytes(config: LlamaConfig, n_context: int) -> int:
    """Device memory of a `KVCache`."""
    return 2 * config.n_layer * n_context * config.n_embd_kv * 4
