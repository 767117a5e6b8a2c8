"""The vocabulary of a GGUF file: tokens, their types, and the keys that speak of them."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from forge.errors import GGUFShardError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""`tokenizer.ggml.token_type`: what a token is."""

# Tokens that end a turn or a text under any model. Files often name only one of theirs by key.
END_TEXTS = frozenset(
    {"</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>",
     "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>"}
)  # fmt: skip


class Vocabulary(NamedTuple):
    """The tokens of a file, checked."""

    tokens: list[str]
    types: np.ndarray  # int64[n_vocab]
    ids: dict[str, int]
    bos: int | None
    eos_ids: frozenset[int]

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], bos: int | None = None, eos: int | None = None
    ) -> Vocabulary:
        """Read and check what both kinds share; `bos` and `eos` hold where the file has none."""
        tokens = strings(metadata, "tokens")
        n_vocab = len(tokens)
        if n_vocab == 0:
            raise key_error("tokens", "empty")
        ids = {token: i for i, token in enumerate(tokens) if token}
        for i, token in enumerate(tokens):
            if token and ids[token] != i:
                raise key_error("tokens", f"tokens {i} and {ids[token]} are both {token!r}")
        types = numbers(metadata, "token_type", n_vocab, "iu").astype(np.int64)
        for i in np.flatnonzero(types == BYTE).tolist():
            if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", tokens[i]):
                raise key_error("tokens", f"token {i} is of type byte but reads {tokens[i]!r}")

        ends = {ids[text] for text in END_TEXTS if text in ids}
        ends = {i for i in ends if types[i] in (CONTROL, USER_DEFINED)}
        types[list(ends)] = CONTROL  # where a converter said user-defined, they would be printed
        named = (
            token_id(metadata, "eos_token_id", n_vocab, eos),
            token_id(metadata, "eot_token_id", n_vocab),
            token_id(metadata, "eom_token_id", n_vocab),
        )
        eos_ids = frozenset(ends.union(i for i in named if i is not None))
        return cls(tokens, types, ids, token_id(metadata, "bos_token_id", n_vocab, bos), eos_ids)

    def special_tokens(self) -> list[tuple[str, int, bool]]:
        """(text, id, recognised always) of tokens looked for in text, longest first."""
        special = [
            (self.tokens[i], i, bool(self.types[i] == USER_DEFINED))
            for i in np.flatnonzero(np.isin(self.types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()
            if self.tokens[i]
        ]
        return sorted(special, key=lambda token: (-len(utf8(token[0])), token[1]))


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def key_error(name: str, reason: str) -> GGUFShardError:
    return GGUFShardError(f"tokenizer.ggml.{name}: {reason}")


def required(metadata: Mapping[str, Any], name: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise key_error(name, "missing")
    return value


def strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = required(metadata, name)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise key_error(name, "not an array of strings")
    return list(value)


def numbers(metadata: Mapping[str, Any], name: str, n_vocab: int, kinds: str) -> np.ndarray:
    """An array with one number per token, of one of NumPy's `kinds`."""
    value = required(metadata, name)
    try:
        array = np.asarray(value)
    except ValueError:
        raise key_error(name, "not a flat array") from None
    if array.ndim != 1 or len(array) != n_vocab:
        raise key_error(name, f"shape {array.shape} for {n_vocab} tokens")
    if array.dtype.kind not in kinds:
        raise key_error(name, f"not an array of numbers of the right kind ({array.dtype})")
    return array


def token_id(
    metadata: Mapping[str, Any], name: str, n_vocab: int, default: int | None = None
) -> int | None:
    """A key that names a token; `default`, if there is such a token, where the key is missing."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return default if default is not None and default < n_vocab else None
    try:
        number = operator.index(value)
    except TypeError:
        raise key_error(name, "not an integer") from None
    if not 0 <= number < n_vocab:
        raise key_error(name, f"{number} is outside the {n_vocab} tokens")
    return number
