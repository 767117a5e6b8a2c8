"""Hyperparameters of a llama-architecture model, read from GGUF metadata.

Keys as in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.errors import GGUFShardError

ARCHITECTURE = "llama"


@dataclass(frozen=True)
class LlamaConfig:
    """What the forward pass needs to know.

    Attributes
    ----------
    n_rot
        Dimensions of a head that are rotated.
    rope_scale
        Divisor of all positions (linear scaling).
    n_expert, n_expert_used
        0 for a dense model.
    """

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    n_context: int
    rms_norm_eps: float
    rope_freq_base: float
    rope_scale: float
    n_expert: int
    n_expert_used: int

    @property
    def n_embd_kv(self) -> int:
        return self.n_head_kv * self.head_dim

    def rope_frequencies(self, factors: np.ndarray | None = None) -> np.ndarray:
        """Angle per position of each rotated pair, float32 [n_rot / 2].

        theta_i = rope_freq_base^(-2 i / n_rot) / (scale * factor_i), J. Su et al., "RoFormer"
        (2021), with the divisors of long-context models.
        """
        exponents = -2.0 * np.arange(self.n_rot // 2) / self.n_rot
        angles = self.rope_freq_base**exponents / self.rope_scale
        return (angles if factors is None else angles / factors).astype(np.float32)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> LlamaConfig:
        """Read and check the hyperparameters.

        Raises
        ------
        GGUFShardError
            If a key is missing, of the wrong kind, or asks for something that is not supported.
        """
        architecture = metadata.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise GGUFShardError(
                f"general.architecture: {architecture!r} cannot be run, only {ARCHITECTURE!r} can"
            )
        read = _Keys(metadata)
        n_embd = read.count("embedding_length")
        n_head = read.count("attention.head_count")
        head_dim = read.count("attention.key_length", n_embd // n_head)
        config = cls(
            n_layer=read.count("block_count"),
            n_embd=n_embd,
            n_ff=read.count("feed_forward_length"),
            n_head=n_head,
            n_head_kv=read.count("attention.head_count_kv", n_head),
            head_dim=head_dim,
            n_rot=read.count("rope.dimension_count", head_dim),
            n_context=read.count("context_length"),
            rms_norm_eps=read.real("attention.layer_norm_rms_epsilon", None),
            rope_freq_base=read.real("rope.freq_base", 10000.0),
            rope_scale=_rope_scale(read),
            n_expert=read.count("expert_count", 0, lowest=0),
            n_expert_used=read.count("expert_used_count", 0, lowest=0),
        )
        config._check(read)
        return config

    def _check(self, read: _Keys) -> None:
        if self.n_head % self.n_head_kv:
            raise read.fail("attention.head_count_kv", f"{self.n_head_kv} does not divide n_head")
        if self.rope_freq_base <= 0:
            raise read.fail("rope.freq_base", f"{self.rope_freq_base} is not positive")
        if self.rms_norm_eps < 0:
            raise read.fail("attention.layer_norm_rms_epsilon", f"{self.rms_norm_eps} is negative")
        if self.n_rot % 2 or self.n_rot > self.head_dim:
            raise read.fail("rope.dimension_count", f"{self.n_rot} of {self.head_dim} dimensions")
        if read.count("attention.value_length", self.head_dim) != self.head_dim:
            raise read.fail("attention.value_length", "differs from the key length")
        if self.n_expert_used > self.n_expert or (self.n_expert > 0) != (self.n_expert_used > 0):
            raise read.fail("expert_used_count", f"{self.n_expert_used} of {self.n_expert} experts")


def _rope_scale(read: _Keys) -> float:
    kind = read.metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "linear")
    if kind not in ("linear", "none"):
        raise read.fail("rope.scaling.type", f"{kind!r} is not supported (linear and none are)")
    if kind == "none":
        return 1.0
    older = read.real("rope.scale_linear", 1.0)
    scale = read.real("rope.scaling.factor", older)
    return scale if scale > 0 else 1.0


class _Keys:
    """Typed access to `llama.*` keys."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def fail(self, key: str, reason: str) -> GGUFShardError:
        return GGUFShardError(f"{ARCHITECTURE}.{key}: {reason}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise self.fail(key, "is missing")
        return value

    def count(self, key: str, default: int | None = None, lowest: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one number a layer, all the same
        if type(value) is not int or not lowest <= value < 1 << 31:
            raise self.fail(key, f"{value!r} is not a whole number of at least {lowest}")
        return value

    def real(self, key: str, default: float | None) -> float:
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or not np.isfinite(value):
            raise self.fail(key, f"{value!r} is not a number")
        return float(value)
