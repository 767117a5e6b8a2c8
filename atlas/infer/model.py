"""The forward pass of a llama-architecture model over cached pages.

    x   = embedding rows of the tokens
    for each layer:
        h = rms_norm(x);  q, k, v = h Wq, h Wk, h Wv;  rotate q, k;  remember k, v
        x = x + attention(q, keys, values) Wo
        h = rms_norm(x);  x = x + (silu(h Wgate) * (h Wup)) Wdown
    logits = rms_norm(x) Woutput

as in H. Touvron et al., "LLaMA" (2023), with grouped keys and values (J. Ainslie et al., "GQA",
2023) and, in models that have them, a mixture of experts in place of the last line of a layer
(A. Jiang et al., "Mixtral of Experts", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atlas.device_cache import DeviceCache
from atlas.infer.config import LlamaConfig
from atlas.infer.decode_graph import DecodeGraph
from atlas.infer.kv_cache import KVCache, kv_cache_bytes
from atlas.infer.weights import Weights, execution_order, vector_bytes
from atlas.manager import Atlas
from atlas.model_shards import EMBEDDING
from atlas.ops.attention import attention, attention_scratch_floats
from atlas.ops.elementwise import add_rows, add_scaled, advance, swiglu
from atlas.ops.norm import add_rms_norm, rms_norm
from atlas.ops.rope import rotate_and_store
from atlas.ops.sample import choice_bytes
from atlas.target import Target
from forge.errors import GGUFShardError
from forge.sgmap import ShardMap
from forge.sharded_model import ShardedModel
from forge.sizes import Size

DEFAULT_BATCH = 64
_SCRATCH_FLOATS = 1 << 20  # rows dequantised at a time for products with several tokens
_POSITION_BYTES = 4


def _scratch_floats(config: LlamaConfig, n_context: int) -> int:
    """For dequantised rows, and for attention: never both at a time."""
    c = config
    return max(_SCRATCH_FLOATS if c.n_embd >= 512 else 1 << 16, c.n_ff, c.n_embd,
               c.n_head * c.head_dim,
               attention_scratch_floats(c.n_head, c.n_head_kv, c.head_dim, n_context),
               )  # fmt: skip


class _Activations:
    """Buffers of a pass of up to `n_batch` tokens, one row a token."""

    def __init__(
        self, target: Target, config: LlamaConfig, n_context: int, n_batch: int, n_vocab: int
    ) -> None:
        widths = _activation_widths(config)
        self._rows = {name: target.empty((n_batch, n), np.float32) for name, n in widths.items()}
        self.logits = target.empty((1, n_vocab), np.float32)
        self.scratch = target.empty(_scratch_floats(config, n_context), np.float32)

    def first(self, n_tokens: int) -> dict[str, Any]:
        """Every buffer, cut to `n_tokens` rows."""
        return {name: rows[:n_tokens] for name, rows in self._rows.items()}


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
    floats += _scratch_floats(config, n_context)
    # A vector is dequantised while its predecessor's copy still stands: twice is safe.
    small = config.n_rot * 4 + vector_bytes(shard_map) + _POSITION_BYTES + choice_bytes(n_vocab)
    return floats * 4 + kv_cache_bytes(config, n_context) + small


class LlamaModel:
    """A model ready to answer; a context manager that closes its Atlas.

    Parameters
    ----------
    model
        The open sharded model; closed with this object.
    target
        Where to run.
    budget
        Device memory for everything: pool, tables, keys and values, activations.
    config
        Its hyperparameters, if they have been read already.
    n_context
        Positions to have room for.
    n_batch
        Tokens of a prompt that go through the layers at once.
    policy, prefetch_distance, host_memory
        As for `Atlas`.
    scrub_pages
        Resident pages to check again after each pass (`Atlas.scrub`).

    Raises
    ------
    GGUFShardError
        If the model is not one that can be run, or the budget is too small.
    """

    def __init__(
        self,
        model: ShardedModel,
        target: Target,
        budget: Size,
        *,
        config: LlamaConfig | None = None,
        n_context: int,
        n_batch: int = DEFAULT_BATCH,
        policy: str | None = None,
        prefetch_distance: int | None = None,
        host_memory: Size | None = None,
        scrub_pages: int = 0,
    ) -> None:
        self.config = config or LlamaConfig.from_metadata(model.source_header().metadata)
        self.n_batch = min(n_batch, n_context)
        self.atlas = Atlas(
            model,
            target,
            budget,
            policy=policy,
            prefetch_distance=prefetch_distance,
            reserved_bytes=reserved_bytes(model.map, self.config, n_context, self.n_batch),
            order=execution_order(model.map, self.config),
            host_memory=host_memory,
        )
        self.target = target
        try:
            self._prepare(n_context)
        except BaseException:
            self.close()
            raise
        self.n_passes = 0
        self.scrub_pages = scrub_pages

    def _prepare(self, n_context: int) -> None:
        """All that lies beside the pool."""
        target = self.target
        n_vocab = self.atlas.matrix(EMBEDDING).n_rows
        self._activations = _Activations(target, self.config, n_context, self.n_batch, n_vocab)
        self.weights = Weights(self.atlas, self.config, self._activations.scratch)
        frequencies = self.config.rope_frequencies(self.weights.rope_factors())
        self._frequencies = target.put(frequencies)
        self.kv_cache = KVCache(target, self.config, n_context)
        self._position = 0
        self._device_position = target.full(1, 0, np.int32)
        self.decode_graph: DecodeGraph | None = None
        if isinstance(self.atlas.shard_cache, DeviceCache) and not self.config.n_expert:
            # A router's choice goes by way of the host.
            self.decode_graph = DecodeGraph(self.atlas.shard_cache.target, self.atlas.shard_cache)

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the Atlas and the model's file."""
        self.atlas.close()

    @property
    def position(self) -> int:
        """Positions seen so far; it may be set back, to go on from there."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self._position = position
        self.target.write(self._device_position, np.array([position], np.int32))

    @property
    def n_vocab(self) -> int:
        return self.weights.n_vocab

    def forward(self, tokens: Sequence[int], want_logits: bool = True) -> Any:
        """Run tokens through the model, behind those it has seen.

        Parameters
        ----------
        tokens
            Token ids; more than `n_batch` go through in several passes.
        want_logits
            Whether the logits behind the last token are needed.

        Returns
        -------
        device array or None
            float32 [n_vocab], valid until the next call.

        Raises
        ------
        CorruptPageError
            If a page failed its check; the model's state is then undefined.
        GGUFShardError
            If a token is not in the vocabulary or the context is full.
        """
        if not tokens:
            raise GGUFShardError("no tokens to run: the prompt is empty")
        if self.position + len(tokens) > self.kv_cache.n_context:
            raise GGUFShardError(
                f"context of {self.kv_cache.n_context} is full: {self.position} positions are "
                f"taken, {len(tokens)} more wanted"
            )
        for token in tokens:
            if not 0 <= token < self.n_vocab:
                raise GGUFShardError(f"token {token}: not within 0..{self.n_vocab - 1}")
        for begin in range(0, len(tokens), self.n_batch):
            batch = tokens[begin : begin + self.n_batch]
            is_last = begin + len(batch) == len(tokens)
            self._pass(batch, want_logits and is_last)
        return self._activations.logits.reshape(self.n_vocab) if want_logits else None

    def _pass(self, tokens: Sequence[int], want_logits: bool) -> None:
        b = self._activations.first(len(tokens))
        self.target.write(b["x"], self.weights.embed(tokens))
        if self.decode_graph is not None and len(tokens) == 1 and want_logits:
            self.decode_graph.run(lambda: self._launch(1, True))
        else:
            self._launch(len(tokens), want_logits)
        self._position += len(tokens)  # as the device has done by itself
        self.n_passes += 1
        self.atlas.scrub(self.scrub_pages)

    def _launch(self, n_tokens: int, want_logits: bool) -> None:
        """All of a pass but what depends on the tokens: they are in x already."""
        b = self._activations.first(n_tokens)
        for number in range(self.config.n_layer):
            self._attend(number, b)
            if self.config.n_expert:
                self._feed_experts(number, b)
            else:
                self._feed_forward(number, b)
        if want_logits:
            last = {name: b[name][n_tokens - 1 :] for name in ("h", "x", "delta")}
            self._normalise(last, self.weights.output_norm, self._leaves_delta)
            self.weights.multiply(self._activations.logits, self.weights.output, last["h"])
        advance(self.target, self._device_position, n_tokens)

    @property
    def _leaves_delta(self) -> bool:
        """Whether a layer's last sum is left to the norm that comes next."""
        return not self.config.n_expert

    def _normalise(self, b: dict[str, Any], weight: Any, with_delta: bool) -> None:
        """h = norm(x), once `delta` has been added to x if it is due."""
        eps = self.config.rms_norm_eps
        if with_delta:
            add_rms_norm(self.target, b["h"], b["x"], b["delta"], weight, eps)
        else:
            rms_norm(self.target, b["h"], b["x"], weight, eps)

    def _attend(self, number: int, b: dict[str, Any]) -> None:
        """Ends with what it adds to x in `delta`."""
        target, config, layer = self.target, self.config, self.weights.layers[number]
        n_tokens = b["x"].shape[0]
        self._normalise(b, layer["attn_norm"], self._leaves_delta and number > 0)
        for name, stem in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v")):
            self._multiply(b[name], layer, stem, b["h"])
        q = b["q"].reshape(n_tokens, config.n_head, config.head_dim)
        k = b["k"].reshape(n_tokens, config.n_head_kv, config.head_dim)
        v = b["v"].reshape(n_tokens, config.n_head_kv, config.head_dim)
        keys, values = self.kv_cache.keys[number], self.kv_cache.values[number]
        position = self._device_position
        rotate_and_store(target, q, k, v, keys, values, position, self._frequencies, True)
        mixed = b["mixed"].reshape(q.shape)
        attention(target, mixed, q, keys, values, position, self._activations.scratch)
        self._multiply(b["delta"], layer, "attn_output", b["mixed"])

    def _multiply(self, y: Any, layer: dict[str, Any], stem: str, x: Any) -> None:
        self.weights.multiply(y, layer[stem], x)
        if f"{stem}.bias" in layer:
            add_rows(self.target, y, layer[f"{stem}.bias"])

    def _feed_forward(self, number: int, b: dict[str, Any]) -> None:
        """Ends with what it adds to x in `delta`."""
        layer = self.weights.layers[number]
        self._normalise(b, layer["ffn_norm"], True)
        self._multiply(b["gate"], layer, "ffn_gate", b["h"])
        self._multiply(b["up"], layer, "ffn_up", b["h"])
        swiglu(self.target, b["gate"], b["gate"], b["up"])
        self._multiply(b["delta"], layer, "ffn_down", b["gate"])

    def _feed_experts(self, number: int, b: dict[str, Any]) -> None:
        """The router chooses `n_expert_used` experts a token; their outputs are weighted by the
        softmax over the chosen ones' logits."""
        target, layer = self.target, self.weights.layers[number]
        self._normalise(b, layer["ffn_norm"], True)
        self._multiply(b["router"], layer, "ffn_gate_inp", b["h"])
        chosen, shares = route(target.get(b["router"]), self.config.n_expert_used)
        for expert in np.unique(chosen).tolist():
            for t in np.flatnonzero((chosen == expert).any(axis=1)).tolist():
                row = {name: b[name][t : t + 1] for name in ("x", "h", "gate", "up", "delta")}
                self.weights.multiply(row["gate"], layer["ffn_gate_exps"][expert], row["h"])
                self.weights.multiply(row["up"], layer["ffn_up_exps"][expert], row["h"])
                swiglu(target, row["gate"], row["gate"], row["up"])
                self.weights.multiply(row["delta"], layer["ffn_down_exps"][expert], row["gate"])
                share = float(shares[t, chosen[t] == expert][0])
                add_scaled(target, row["x"], row["delta"], share)


def route(router_logits: np.ndarray, n_used: int) -> tuple[np.ndarray, np.ndarray]:
    """Which experts each token goes to, and with what weight.

    Parameters
    ----------
    router_logits
        float32 [n_tokens, n_expert].
    n_used
        Experts a token.

    Returns
    -------
    chosen, shares
        int64 and float32 [n_tokens, n_used], best first; the shares of a token add up to 1.
    """
    chosen = np.argsort(-router_logits, axis=1, kind="stable")[:, :n_used]
    logits = np.take_along_axis(router_logits, chosen, axis=1)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return chosen, (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
