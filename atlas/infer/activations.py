"""Device memory of a llama model beside the pool: the buffers of a pass, and the sum of it all."""

from __future__ import annotations

from typing import Any

import numpy as np

from atlas.infer.config import LlamaConfig
from atlas.infer.kv_cache import kv_cache_bytes
from atlas.infer.weights import vector_bytes
from atlas.model_shards import EMBEDDING
from atlas.ops.attention import attention_scratch_floats
from atlas.ops.round_tokens import GROUP, words_of_group
from atlas.ops.sample import choice_bytes
from atlas.target import Target
from forge.sgmap import ShardMap

_SCRATCH_FLOATS = 1 << 20  # rows dequantised at a time for products with several tokens
_POSITION_BYTES = 4
_BY_HEAD = ("q", "k", "v", "mixed")
_MOST_CUTS = 8  # numbers of tokens whose views are kept


def _scratch_floats(config: LlamaConfig, n_context: int, n_batch: int) -> int:
    """For dequantised rows or all tokens of a pass rounded for tensor cores, and for attention:
    never two at a time."""
    c = config
    widest = max(c.n_ff, c.n_embd, c.n_head * c.head_dim)
    return max(_SCRATCH_FLOATS if c.n_embd >= 512 else 1 << 16, widest,
               -(-n_batch // GROUP) * words_of_group(widest),
               attention_scratch_floats(c.n_head, c.n_head_kv, c.head_dim, n_context),
               )  # fmt: skip


class Activations:
    """Buffers of a pass of up to `n_batch` tokens, one row a token.

    Attributes
    ----------
    logits
        float32 [n_vocab], behind the last token of a pass.
    scratch
        float32, for whatever an operation needs.
    """

    def __init__(
        self, target: Target, config: LlamaConfig, n_context: int, n_batch: int, n_vocab: int
    ) -> None:
        widths = _activation_widths(config)
        self._rows = {name: target.empty((n_batch, n), np.float32) for name, n in widths.items()}
        self.logits = target.empty(n_vocab, np.float32)
        self._heads = {name: n // config.head_dim for name, n in widths.items() if name in _BY_HEAD}
        self._head_dim = config.head_dim
        self._cuts: dict[int, dict[str, Any]] = {}
        n_scratch = _scratch_floats(config, n_context, n_batch)
        self.scratch = target.empty(n_scratch, np.float32)

    def first(self, n_tokens: int) -> dict[str, Any]:
        """Every buffer, cut to `n_tokens` rows: float32 [n_tokens, width]; and as
        `NAME_heads`, float32 [n_tokens, n_heads, head_dim], those that attention works on.

        To make a view on a device takes the host 40 us (seen beside an H100): they are kept.
        """
        if n_tokens not in self._cuts:
            if len(self._cuts) == _MOST_CUTS:
                self._cuts.clear()
            cut = {name: rows[:n_tokens] for name, rows in self._rows.items()}
            for name, n_heads in self._heads.items():
                cut[f"{name}_heads"] = cut[name].reshape(n_tokens, n_heads, self._head_dim)
            self._cuts[n_tokens] = cut
        return self._cuts[n_tokens]


def row_of(buffers: dict[str, Any], token: int, *names: str) -> dict[str, Any]:
    """Buffers of several tokens (`Activations.first`), these cut to one token."""
    if buffers["x"].shape[0] == 1:
        return buffers
    return {name: buffers[name][token : token + 1] for name in names}


def _activation_widths(config: LlamaConfig) -> dict[str, int]:
    c = config
    return {
        "x": c.n_embd, "h": c.n_embd, "delta": c.n_embd,
        "q": c.n_head * c.head_dim, "mixed": c.n_head * c.head_dim,
        "k": c.n_embd_kv, "v": c.n_embd_kv,
        "gate": c.n_ff, "up": c.n_ff,
        **({"router": c.n_expert} if c.n_expert else {}),
    }  # fmt: skip


def reserved_bytes(shard_map: ShardMap, config: LlamaConfig, n_context: int, n_batch: int) -> int:
    """Device memory of a `LlamaModel` beside the pool: activations, keys, values, vectors, and
    what choosing a token takes."""
    n_vocab = next((t.shape[1] for t in shard_map.tensors if t.name == EMBEDDING), 0)
    floats = n_batch * sum(_activation_widths(config).values()) + n_vocab
    floats += _scratch_floats(config, n_context, n_batch)
    # A vector is dequantised while its predecessor's copy still stands: twice is safe.
    small = config.n_rot * 4 + vector_bytes(shard_map) + _POSITION_BYTES + choice_bytes(n_vocab)
    return floats * 4 + kv_cache_bytes(config, n_context) + small
