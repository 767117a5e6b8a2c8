"""Models that are right as GGUF files and absurd as language models: only `run` can refuse them.

The right one is a llama of one layer with a vocabulary of 64 pieces; a `LlamaKind` changes some of
its metadata and tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as T

from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import F32, I32, STRING, U32, U64, Tensor

N_EMBD, N_FF, N_VOCAB = 32, 64, 64
_BYTE, _NORMAL, _CONTROL = 6, 1, 3
_NASTY = "1\n\x1b[2J"
_NUMBER, _VOCABULARY, _MATRIX = "absurd number", "wrong vocabulary", "wrong matrix"


@dataclass(frozen=True)
class Value:
    """A metadata value: a scalar or, if `content` is a list, an array."""

    kind: int
    content: Any


@dataclass(frozen=True)
class LlamaKind:
    """What is changed: values by key and tensors' shapes by name, None for what is left out.

    `fault` is what is wrong in general; a kind that `is_odd` runs.
    """

    fault: str
    name: str
    values: Mapping[str, Value | None] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    types: Mapping[str, T] = field(default_factory=dict)
    is_odd: bool = False


def _metadata() -> dict[str, Value]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(32, 64)),
              *(chr(97 + i) for i in range(26)), "ab", "\u2581", "abc"]  # fmt: skip
    kinds = [_NORMAL, _CONTROL, _CONTROL, *[_BYTE] * 32, *[_NORMAL] * 29]
    return {
        "general.architecture": Value(STRING, "llama"),
        "llama.context_length": Value(U32, 64),
        "llama.block_count": Value(U32, 1),
        "llama.embedding_length": Value(U32, N_EMBD),
        "llama.feed_forward_length": Value(U32, N_FF),
        "llama.attention.head_count": Value(U32, 2),
        "llama.attention.layer_norm_rms_epsilon": Value(F32, 1e-5),
        "tokenizer.ggml.model": Value(STRING, "llama"),
        "tokenizer.ggml.tokens": Value(STRING, pieces),
        "tokenizer.ggml.scores": Value(F32, [-float(i) for i in range(N_VOCAB)]),
        "tokenizer.ggml.token_type": Value(I32, kinds),
        "tokenizer.ggml.bos_token_id": Value(U32, 1),
        "tokenizer.ggml.eos_token_id": Value(U32, 2),
    }


def _shapes() -> dict[str, tuple[int, ...]]:
    square = (N_EMBD, N_EMBD)
    block = {"attn_norm": (N_EMBD,), "attn_q": square, "attn_k": square, "attn_v": square,
             "attn_output": square, "ffn_norm": (N_EMBD,), "ffn_gate": (N_EMBD, N_FF),
             "ffn_up": (N_EMBD, N_FF), "ffn_down": (N_FF, N_EMBD)}  # fmt: skip
    return {
        "token_embd.weight": (N_EMBD, N_VOCAB),
        "output_norm.weight": (N_EMBD,),
        "output.weight": (N_EMBD, N_VOCAB),
        **{f"blk.0.{stem}.weight": shape for stem, shape in block.items()},
    }


def llama(kind: LlamaKind) -> bytes:
    """The GGUF file."""
    values = {**_metadata(), **kind.values}
    pairs = [_render(key, value) for key, value in values.items() if value is not None]
    tensors = []
    for i, (name, shape) in enumerate({**_shapes(), **kind.shapes}.items()):
        if shape is not None:
            tensors.append(_tensor(name, shape, kind.types.get(name, T.F32), i))
    return factory.gguf(tensors, pairs)


def _render(key: str, value: Value) -> bytes:
    if isinstance(value.content, list):
        return factory.array(key, value.kind, value.content)
    return factory.pair(key, value.kind, value.content)


def _tensor(name: str, shape: tuple[int, ...], ggml_type: T, seed: int) -> Tensor:
    if ggml_type != T.F32:
        return factory.tensor(name, ggml_type, shape, seed)
    values = np.random.default_rng(seed).normal(0, 0.1, int(np.prod(shape))).astype("<f4")
    return Tensor(name, int(ggml_type), shape, values.tobytes())


def _of(name: str, kind: int, content: Any) -> dict[str, Value | None]:
    return {name: Value(kind, content)}


def _hyperparameters() -> list[LlamaKind]:
    numbers = {
        "block_count": (0, 2, (1 << 31) - 1, 1 << 31, 0xFFFFFFFF),
        "embedding_length": (0, 31, 33, 1 << 30, 0xFFFFFFFF),
        "feed_forward_length": (0, 63, 1 << 30, 0xFFFFFFFF),
        "attention.head_count": (0, 3, 33, 1 << 30, 0xFFFFFFFF),
        "attention.head_count_kv": (0, 3, 1 << 30, 0xFFFFFFFF),
        "attention.key_length": (0, 15, 1 << 30),
        "attention.value_length": (0, 15),
        "rope.dimension_count": (0, 3, 17, 1 << 30),
        "context_length": (0, 1 << 31, 0xFFFFFFFF),
        "expert_count": (1, 8, 1 << 30, 0xFFFFFFFF),
        "expert_used_count": (1, 1 << 30),
    }
    kinds = [
        LlamaKind(_NUMBER, f"{key} {n}", _of(f"llama.{key}", U32, n))
        for key, of_key in numbers.items()
        for n in of_key
    ]
    kinds += [
        LlamaKind(_NUMBER, f"{key} {x}", _of(f"llama.{key}", F32, x))
        for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base")
        for x in (float("nan"), float("inf"), -1.0)
    ]
    for key in ("block_count", "embedding_length", "attention.layer_norm_rms_epsilon"):
        kinds.append(LlamaKind(_NUMBER, f"{key} missing", {f"llama.{key}": None}))
        kinds.append(
            LlamaKind(_NUMBER, f"{key} as a text", _of(f"llama.{key}", STRING, "1\n\x1b[2J"))
        )
    kinds += [
        LlamaKind(_NUMBER, "context_length 2^40", _of("llama.context_length", U64, 1 << 40)),
        LlamaKind(_NUMBER, "block_count as a list", _of("llama.block_count", U32, [1, 2])),
        LlamaKind(_NUMBER, "block_count as a list of nothing", _of("llama.block_count", U32, [])),
        LlamaKind(_NUMBER, "head_count as a list of texts",
                  _of("llama.attention.head_count", STRING, ["2", "2"])),
        LlamaKind(_NUMBER, "scaling of an unknown type",
                  _of("llama.rope.scaling.type", STRING, "yarn\n\x1b[2J")),
        LlamaKind(_NUMBER, "architecture of control characters",
                  _of("general.architecture", STRING, "\x1b[2J\n")),
        LlamaKind(_NUMBER, "no architecture", {"general.architecture": None}),
        LlamaKind(_NUMBER, "architecture as a number", _of("general.architecture", U32, 7)),
    ]  # fmt: skip
    return kinds


def _vocabularies() -> list[LlamaKind]:
    right = _metadata()
    pieces: Sequence[str] = right["tokenizer.ggml.tokens"].content
    key = "tokenizer.ggml"
    merges = {f"{key}.model": Value(STRING, "gpt2"), f"{key}.pre": Value(STRING, "gpt-2")}
    changes: dict[str, dict[str, Value | None]] = {
        "model is unknown": _of(f"{key}.model", STRING, "\x1b[2J\n"),
        "model as a number": _of(f"{key}.model", U32, 7),
        "no tokens": {f"{key}.tokens": None},
        "empty tokens": _of(f"{key}.tokens", STRING, []),
        "tokens as numbers": _of(f"{key}.tokens", U32, list(range(64))),
        "tokens as a text": _of(f"{key}.tokens", STRING, "a b c"),
        "a token twice": _of(f"{key}.tokens", STRING, ["a", *pieces[1:3], *pieces[3:]]),
        "one score too few": _of(f"{key}.scores", F32, [0.0] * 63),
        "scores as texts": _of(f"{key}.scores", STRING, ["0"] * 64),
        "no scores": {f"{key}.scores": None},
        "one type too many": _of(f"{key}.token_type", I32, [1] * 65),
        "types as fractions": _of(f"{key}.token_type", F32, [1.0] * 64),
        "all are bytes": _of(f"{key}.token_type", I32, [_BYTE] * 64),
        "first token behind the end": _of(f"{key}.bos_token_id", U32, 64),
        "first token 2^32 - 1": _of(f"{key}.bos_token_id", U32, 0xFFFFFFFF),
        "last token -1": _of(f"{key}.eos_token_id", I32, -1),
        "last token as a text": _of(f"{key}.eos_token_id", STRING, "2"),
        "no merges": {**merges},
        "merges as numbers": {**merges, f"{key}.merges": Value(U32, [1, 2])},
        "merges without a space": {**merges, f"{key}.merges": Value(STRING, ["ab"])},
        "merges of nothing": {**merges, f"{key}.merges": Value(STRING, [" "])},
        "merges into no token": {**merges, f"{key}.merges": Value(STRING, ["x y"])},
        "merges of no tokens": {**merges, f"{key}.merges": Value(STRING, ["\u4e00 \u4e01"])},
        "a merge of three": {**merges, f"{key}.merges": Value(STRING, ["a b c"])},
        "an unknown pre-tokenizer": {
            **merges, f"{key}.pre": Value(STRING, "\x1b[2J"),
            f"{key}.merges": Value(STRING, ["a b"])},
    }  # fmt: skip
    return [LlamaKind(_VOCABULARY, name, values) for name, values in changes.items()]


def _matrices() -> list[LlamaKind]:
    missing = ("token_embd", "output_norm", "blk.0.attn_q", "blk.0.ffn_norm", "blk.0.ffn_down")
    kinds = [
        LlamaKind(_MATRIX, f"{name} missing", shapes={f"{name}.weight": None}) for name in missing
    ]
    shapes: dict[str, dict[str, tuple[int, ...] | None]] = {
        "embedding of fewer rows than tokens": {
            "token_embd.weight": (N_EMBD, 10), "output.weight": (N_EMBD, 10)},
        "output of fewer rows than the embedding": {"output.weight": (N_EMBD, 10)},
        "embedding of other rows": {"token_embd.weight": (64, N_VOCAB)},
        "a square that is none": {"blk.0.attn_q.weight": (N_EMBD, 33)},
        "a vector too long": {"output_norm.weight": (64,)},
        "a vector of many rows": {"output_norm.weight": (N_EMBD, 4)},
        "factors of a rotation, too few": {"rope_freqs.weight": (1,)},
    }  # fmt: skip
    kinds += [LlamaKind(_MATRIX, name, shapes=changed) for name, changed in shapes.items()]
    flat: dict[str, tuple[int, ...] | None] = {"blk.0.ffn_up.weight": (N_EMBD, 8, 8)}
    kinds.append(LlamaKind("odd matrix", "in three dimensions", shapes=flat, is_odd=True))
    down = "blk.0.ffn_down.weight"
    kinds += [
        LlamaKind(_MATRIX, f"a matrix of {t.name}", shapes={down: (256, N_EMBD)}, types={down: t})
        for t in (T.I32, T.Q8_K, T.IQ1_S)]  # fmt: skip
    return kinds


def kinds() -> list[LlamaKind]:
    """All of them."""
    return [*_hyperparameters(), *_vocabularies(), *_matrices()]
