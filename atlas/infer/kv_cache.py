"""Keys and values of the positions seen so far."""

from __future__ import annotations

from typing import Any

import numpy as np

from atlas.infer.config import LlamaConfig
from atlas.ops.attention import store_kv
from atlas.target import Target


class KVCache:
    """Room for `n_context` positions in every layer, float32 on the target.

    Parameters
    ----------
    target, config
        Where, and the shapes.
    n_context
        Positions there is room for.
    """

    def __init__(self, target: Target, config: LlamaConfig, n_context: int) -> None:
        self.target = target
        self.n_context = n_context
        shape = (n_context, config.n_head_kv, config.head_dim)
        self.keys = [target.empty(shape, np.float32) for _ in range(config.n_layer)]
        self.values = [target.empty(shape, np.float32) for _ in range(config.n_layer)]

    def store(self, layer: int, keys: Any, values: Any, position: int) -> None:
        """Enter keys and values, float32 [n_tokens, n_head_kv, head_dim], from `position` on."""
        store_kv(self.target, self.keys[layer], keys, position)
        store_kv(self.target, self.values[layer], values, position)


def kv_cache_bytes(config: LlamaConfig, n_context: int) -> int:
    """Device memory of a `KVCache`."""
    return 2 * config.n_layer * n_context * config.n_embd_kv * 4
