"""A llama model's forward pass in float64, straight from a GGUF file: no pages, no cache.

Everything is computed anew for the whole sequence, one position and one head at a time, from the
formulas of the papers that `atlas.infer.model` names. The file is read by the `gguf` package.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize


class NaiveLlama:
    """A llama-architecture model, dense or a mixture of experts, in float64."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        reader = GGUFReader(path)
        self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        self.tensors = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }

    def _key(self, name: str, default: float | None = None) -> float:
        value = self.metadata.get(f"llama.{name}", default)
        assert value is not None, name
        return value

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits behind every token, float64 [n_tokens, n_vocab]."""
        x = self.tensors["token_embd.weight"][list(tokens)]
        for layer in range(int(self._key("block_count"))):
            x = x + self._attention(layer, self._norm(x, f"blk.{layer}.attn_norm"))
            x = x + self._feed_forward(layer, self._norm(x, f"blk.{layer}.ffn_norm"))
        h = self._norm(x, "output_norm")
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return h @ output.T

    def greedy(self, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """The most probable continuation, token by token."""
        tokens = list(prompt)
        for _ in range(n_tokens):
            tokens.append(int(np.argmax(self.logits(tokens)[-1])))
        return tokens[len(prompt) :]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        eps = self._key("attention.layer_norm_rms_epsilon")
        mean_square = np.mean(x * x, axis=1, keepdims=True)
        return x / np.sqrt(mean_square + eps) * self.tensors[f"{name}.weight"]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.tensors[f"{name}.weight"].T
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _attention(self, layer: int, h: np.ndarray) -> np.ndarray:
        n_head = int(self._key("attention.head_count"))
        n_head_kv = int(self._key("attention.head_count_kv", n_head))
        head_dim = int(self._key("attention.key_length", h.shape[1] // n_head))
        q, k, v = (
            self._linear(h, f"blk.{layer}.attn_{role}").reshape(len(h), -1, head_dim)
            for role in "qkv"
        )
        q, k = self._rotate(q), self._rotate(k)
        mixed = np.zeros(q.shape)
        for t in range(len(h)):
            for head in range(n_head):
                kv = head * n_head_kv // n_head
                scores = np.array([q[t, head] @ k[s, kv] for s in range(t + 1)])
                shares = _softmax(scores / np.sqrt(head_dim))
                mixed[t, head] = sum(share * v[s, kv] for s, share in enumerate(shares))
        return self._linear(mixed.reshape(len(h), -1), f"blk.{layer}.attn_output")

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """Neighbouring values of each head as complex numbers, turned by position x frequency."""
        n_rot = int(self._key("rope.dimension_count", x.shape[2]))
        frequencies = self._key("rope.freq_base", 10000.0) ** (-np.arange(0, n_rot, 2) / n_rot)
        if self.metadata.get("llama.rope.scaling.type", "linear") == "linear":
            frequencies = frequencies / self._key("rope.scaling.factor", 1.0)
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self.tensors["rope_freqs.weight"]
        turned = x.copy()
        for t in range(len(x)):
            pairs = x[t, :, 0:n_rot:2] + 1j * x[t, :, 1:n_rot:2]
            pairs = pairs * np.exp(1j * t * frequencies)
            turned[t, :, 0:n_rot:2], turned[t, :, 1:n_rot:2] = pairs.real, pairs.imag
        return turned

    def _feed_forward(self, layer: int, h: np.ndarray) -> np.ndarray:
        block = f"blk.{layer}"
        if "llama.expert_count" not in self.metadata:
            gate, up = (self._linear(h, f"{block}.ffn_{stem}") for stem in ("gate", "up"))
            return self._linear(_silu(gate) * up, f"{block}.ffn_down")
        gates, ups, downs = (
            self.tensors[f"{block}.ffn_{stem}_exps.weight"] for stem in ("gate", "up", "down")
        )
        out = np.zeros(h.shape)
        router = self._linear(h, f"{block}.ffn_gate_inp")
        for t in range(len(h)):
            best = np.argsort(-router[t])[: int(self._key("expert_used_count"))]
            for expert, share in zip(best, _softmax(router[t, best]), strict=True):
                inner = _silu(gates[expert] @ h[t]) * (ups[expert] @ h[t])
                out[t] += share * (downs[expert] @ inner)
        return out


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
