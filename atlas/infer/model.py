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

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from atlas.device_cache import DeviceCache
from atlas.infer.activations import Activations, reserved_bytes, row_of
from atlas.infer.config import LlamaConfig
from atlas.infer.decode_graph import DecodeGraph
from atlas.infer.kv_cache import KVCache
from atlas.infer.weights import Weights, execution_order
from atlas.live_update import ModelUpdatedError
from atlas.manager import Atlas
from atlas.model_shards import EMBEDDING
from atlas.ops.attention import attention
from atlas.ops.elementwise import add_rows, add_scaled, advance, swiglu
from atlas.ops.norm import add_rms_norm, rms_norm
from atlas.ops.rope import rotate_and_store
from atlas.target import Target
from forge.errors import GGUFShardError
from forge.sharded_model import ShardedModel
from forge.sizes import Size

DEFAULT_BATCH = 64
#: Of the hyperparameters, those that another version of a running model may have otherwise.
_MAY_CHANGE = ("n_context", "rms_norm_eps", "rope_freq_base", "rope_scale", "n_expert_used")


class LlamaModel:
    """A model ready to answer; a context manager that closes its Atlas.

    When the Atlas goes over to another version of the model (`Atlas.adopt`), this follows: vectors
    are read again, and a sequence that has begun is over, as its keys and values are of the old
    weights. `forward` refuses to go on with it until `position` is set to 0.

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
        self._activations = Activations(target, self.config, n_context, self.n_batch, n_vocab)
        self.weights = Weights(self.atlas, self.config, self._activations.scratch)
        frequencies = self.config.rope_frequencies(self.weights.rope_factors())
        self._frequencies = target.put(frequencies)
        self.kv_cache = KVCache(target, self.config, n_context)
        self._position = self._n_seen = 0
        self._device_position = target.full(1, 0, np.int32)
        # The versions of the model that vectors are from, and the keys and values.
        self._followed = self._begun = self.atlas.version
        self.atlas.followers.append(self)
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
        """Positions seen so far, by the present version of the model; it may be set back, to go on
        from there, or to 0, for another sequence."""
        return self._position if self._begun == self.atlas.version else 0

    @position.setter
    def position(self, position: int) -> None:
        with self.atlas.in_use():
            if position == 0:
                self._position = 0
            self._require_one_version()
            if not 0 <= position <= self._n_seen:
                raise GGUFShardError(f"position {position}: {self._n_seen} have been seen")
            self._position = position
            self.target.write(self._device_position, np.array([position], np.int32))

    def check(self, metadata: Mapping[str, Any]) -> None:
        """Refuse a version of the model that takes other buffers (`atlas.live_update`).

        Raises
        ------
        GGUFShardError
            If its hyperparameters are not those of a model that can be run, or a shape differs.
        """
        found = asdict(LlamaConfig.from_metadata(metadata))
        for name, value in asdict(self.config).items():
            if found[name] != value and name not in _MAY_CHANGE:
                raise GGUFShardError(
                    f"{name}: {found[name]}, not {value}: a running model keeps its shapes"
                )

    def follow(self, metadata: Mapping[str, Any]) -> None:
        """Compute anew what lies beside the pool, where it lies; the Atlas has gone over to another
        version of the model.

        Raises
        ------
        CorruptPageError
            If a page of a vector fails its check twice; the next pass begins with trying again.
        """
        self.config = self.weights.config = LlamaConfig.from_metadata(metadata)
        if self.decode_graph is not None:
            self.decode_graph.drop()  # its kernels have been given the old `rms_norm_eps`
        self.weights.read_vectors_again()
        frequencies = self.config.rope_frequencies(self.weights.rope_factors())
        self.target.write(self._frequencies, frequencies)
        self._followed = self.atlas.version

    def _require_one_version(self) -> None:
        """Let keys and values be of the present version of the model, or refuse to go on."""
        if self._begun != self.atlas.version:
            if self._position:
                raise ModelUpdatedError
            self._begun, self._n_seen = self.atlas.version, 0

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
            float32 [n_vocab], valid until the next call. If another thread may run or update the
            model, `atlas.in_use()` is to be held until they have been looked at.

        Raises
        ------
        CorruptPageError
            If a page failed its check; the model's state is then undefined.
        ModelUpdatedError
            If the model has been updated since the sequence began.
        GGUFShardError
            If a token is not in the vocabulary or the context is full.
        """
        with self.atlas.in_use():
            self._require_one_version()
            self._require_room(tokens)
            if self._followed != self.atlas.version:
                self.follow(self.atlas.model.source_header().metadata)
            for begin in range(0, len(tokens), self.n_batch):
                batch = tokens[begin : begin + self.n_batch]
                is_last = begin + len(batch) == len(tokens)
                self._pass(batch, want_logits and is_last)
        return self._activations.logits if want_logits else None

    def _require_room(self, tokens: Sequence[int]) -> None:
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

    def _pass(self, tokens: Sequence[int], want_logits: bool) -> None:
        b = self._activations.first(len(tokens))
        self.target.write(b["x"], self.weights.embed(tokens))
        if self.decode_graph is not None and len(tokens) == 1 and want_logits:
            self.decode_graph.run(lambda: self._launch(1, True))
        else:
            self._launch(len(tokens), want_logits)
        self._position += len(tokens)  # as the device has done by itself
        self._n_seen = max(self._n_seen, self._position)
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
            last = row_of(b, n_tokens - 1, "h", "x", "delta")
            self._normalise(last, self.weights.output_norm, self._leaves_delta)
            logits, output = self._activations.logits, self.weights.output
            self.weights.multiply_all([logits], [output], last["h"])
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
        target, layer = self.target, self.weights.layers[number]
        self._normalise(b, layer["attn_norm"], self._leaves_delta and number > 0)
        self._multiply([b["q"], b["k"], b["v"]], layer, ["attn_q", "attn_k", "attn_v"], b["h"])
        q, k, v, mixed = (b[f"{name}_heads"] for name in ("q", "k", "v", "mixed"))
        keys, values = self.kv_cache.keys[number], self.kv_cache.values[number]
        position = self._device_position
        rotate_and_store(target, q, k, v, keys, values, position, self._frequencies, True)
        attention(target, mixed, q, keys, values, position, self._activations.scratch)
        self._multiply([b["delta"]], layer, ["attn_output"], b["mixed"])

    def _multiply(self, ys: list[Any], layer: dict[str, Any], stems: list[str], x: Any) -> None:
        self.weights.multiply_all(ys, [layer[stem] for stem in stems], x)
        for y, stem in zip(ys, stems, strict=True):
            if f"{stem}.bias" in layer:
                add_rows(self.target, y, layer[f"{stem}.bias"])

    def _feed_forward(self, number: int, b: dict[str, Any]) -> None:
        """Ends with what it adds to x in `delta`."""
        layer = self.weights.layers[number]
        self._normalise(b, layer["ffn_norm"], True)
        self._multiply([b["gate"], b["up"]], layer, ["ffn_gate", "ffn_up"], b["h"])
        swiglu(self.target, b["gate"], b["gate"], b["up"])
        self._multiply([b["delta"]], layer, ["ffn_down"], b["gate"])

    def _feed_experts(self, number: int, b: dict[str, Any]) -> None:
        """The router chooses `n_expert_used` experts a token; their outputs are weighted by the
        softmax over the chosen ones' logits."""
        target, layer = self.target, self.weights.layers[number]
        self._normalise(b, layer["ffn_norm"], True)
        self._multiply([b["router"]], layer, ["ffn_gate_inp"], b["h"])
        chosen, shares = route(target.get(b["router"]), self.config.n_expert_used)
        for expert in np.unique(chosen).tolist():
            for t in np.flatnonzero((chosen == expert).any(axis=1)).tolist():
                row = row_of(b, t, "x", "h", "gate", "up", "delta")
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
