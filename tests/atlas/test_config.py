"""Hyperparameters from metadata: defaults, refusals, rotation frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atlas.infer.config import LlamaConfig
from forge.errors import GGUFShardError

SMALLEST = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def config(**changes: Any) -> LlamaConfig:
    """With keys changed (dots written as two underscores), or left out where None."""
    keys = SMALLEST | {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    return LlamaConfig.from_metadata({k: v for k, v in keys.items() if v is not None})


def test_defaults_for_keys_that_may_be_missing() -> None:
    assert config() == LlamaConfig(
        n_layer=2, n_embd=64, n_ff=96, n_head=4, n_head_kv=4, head_dim=16, n_rot=16, n_context=128,
        rms_norm_eps=1e-5, rope_freq_base=10000.0, rope_scale=1.0, n_expert=0, n_expert_used=0,
    )  # fmt: skip


def test_every_key_is_read() -> None:
    found = config(
        attention__head_count_kv=2, attention__key_length=40, attention__value_length=40,
        rope__dimension_count=24, rope__freq_base=5e5, rope__scaling__factor=8.0,
        rope__scaling__type="linear", expert_count=8, expert_used_count=2,
    )  # fmt: skip
    assert (found.n_head_kv, found.head_dim, found.n_rot, found.n_embd_kv) == (2, 40, 24, 80)
    assert (found.rope_freq_base, found.rope_scale) == (5e5, 8.0)
    assert (found.n_expert, found.n_expert_used) == (8, 2)


def test_one_number_a_layer_if_all_are_the_same() -> None:
    assert config(attention__head_count_kv=np.array([2, 2], np.int32)).n_head_kv == 2
    with pytest.raises(GGUFShardError, match=r"attention\.head_count_kv"):
        config(attention__head_count_kv=np.array([2, 4], np.int32))


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({}, 1.0),
        ({"rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scale_linear": 2.0}, 2.0),
        ({"rope__scale_linear": 2.0, "rope__scaling__factor": 4.0}, 4.0),
        ({"rope__scaling__factor": 0.0}, 1.0),
        ({"rope__scaling__factor": 4.0, "rope__scaling__type": "none"}, 1.0),
    ],
)
def test_linear_scaling(keys: dict[str, Any], scale: float) -> None:
    assert config(**keys).rope_scale == scale


def test_frequencies() -> None:
    found = config(rope__dimension_count=8, rope__freq_base=100.0, rope__scaling__factor=2.0)
    want = np.array([1, 100**-0.25, 100**-0.5, 100**-0.75]) / 2
    assert found.rope_frequencies().dtype == np.float32
    np.testing.assert_allclose(found.rope_frequencies(), want, rtol=1e-7)
    factors = np.array([1.0, 2.0, 4.0, 8.0])
    np.testing.assert_allclose(found.rope_frequencies(factors), want / factors, rtol=1e-7)


@pytest.mark.parametrize("key", SMALLEST)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(GGUFShardError, match=key):
        LlamaConfig.from_metadata({k: v for k, v in SMALLEST.items() if k != key})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", 0, "llama.block_count: 0 is not a whole number of at least 1"),
        ("block_count", 2.0, "llama.block_count: 2.0 is not a whole number"),
        ("block_count", "two", "llama.block_count: 'two' is not a whole number"),
        ("block_count", True, "llama.block_count: True is not a whole number"),
        ("embedding_length", 1 << 31, "llama.embedding_length: 2147483648 is not"),
        ("attention__head_count", 65, "llama.attention.key_length: 0 is not"),
        ("attention__head_count_kv", 3, "head_count_kv: 3 does not divide n_head"),
        ("attention__value_length", 8, "value_length: differs from the key length"),
        ("rope__dimension_count", 15, "dimension_count: 15 of 16 dimensions"),
        ("rope__dimension_count", 18, "dimension_count: 18 of 16 dimensions"),
        ("rope__freq_base", 0.0, "rope.freq_base: 0.0 is not positive"),
        ("rope__freq_base", float("nan"), "rope.freq_base: nan is not a number"),
        ("rope__scaling__type", "yarn", "rope.scaling.type: 'yarn' is not supported"),
        ("attention__layer_norm_rms_epsilon", -1e-5, "epsilon: -1e-05 is negative"),
        ("attention__layer_norm_rms_epsilon", "small", "epsilon: 'small' is not a number"),
        ("expert_count", 4, "expert_used_count: 0 of 4 experts"),
        ("expert_used_count", 2, "expert_used_count: 2 of 0 experts"),
    ],
)
def test_values_that_cannot_be(key: str, value: Any, message: str) -> None:
    with pytest.raises(GGUFShardError, match=message):
        config(**{key: value})


def test_other_architectures_are_refused() -> None:
    with pytest.raises(GGUFShardError, match="'falcon' cannot be run, only 'llama' can"):
        LlamaConfig.from_metadata(SMALLEST | {"general.architecture": "falcon"})
