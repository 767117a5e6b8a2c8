"""Two ways to merge text into tokens: by the scores of a `llama` vocabulary, or by the ranks of a
`gpt2` one behind its pre-tokenizer.

Why `llama` has its own merge loop: a rank-ordered merge list, as `tokenizers` takes it, is the same
thing only while the scores differ. Tokens that tie must be merged from left to right, whichever
they are, and a list can only put all places of one before all places of the other. Published
vocabularies hold ties (Llama's runs of spaces all score -1e9), and a list has no place for a pair
with a character outside the vocabulary either.

Sources: llama.cpp (`src/llama-vocab.cpp`) for the pre-tokenizers of each name; the byte alphabet
from GPT-2's `encoder.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from atlas.infer.vocabulary import Vocabulary, key_error, numbers, strings, token_id, utf8

SPACE_MARK = "\u2581"


class PreTokenizer(NamedTuple):
    """How a `gpt2` vocabulary cuts text into words before it merges inside them."""

    patterns: tuple[str, ...]  # each applied to the pieces that the one before it left
    ignore_merges: bool = False  # a word that is a token is taken whole, whatever the merges say
    add_bos: bool = False  # where the file has no `tokenizer.ggml.add_bos_token`


_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LATER_WORDS = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS, _QWEN2_WORDS = _LATER_WORDS % "{1,3}", _LATER_WORDS % ""

_NAMES_OF_PRE_TOKENIZERS = {
    PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")): "default",
    PreTokenizer((_GPT2_WORDS,)): "gpt-2 phi-2 olmo mpt jais exaone4 gigachat mellum trillion",
    PreTokenizer((r"\p{N}", _GPT2_WORDS)): (
        "starcoder refact command-r smollm codeshell exaone minerva-7b"
    ),
    PreTokenizer((_LLAMA3_WORDS,), ignore_merges=True, add_bos=True): (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 midm-2.0"
    ),
    PreTokenizer((_LLAMA3_WORDS,)): "dbrx smaug-bpe",
    PreTokenizer((_QWEN2_WORDS,)): (
        "qwen2 deepseek-r1-qwen megrez kormo stablelm2 hunyuan solar-open grok-2"
    ),
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    name: pre for pre, names in _NAMES_OF_PRE_TOKENIZERS.items() for name in names.split()
}


class MergeModel(Protocol):
    """What the two kinds of vocabulary do differently."""

    add_bos: bool  # the default
    adds_space_prefix: bool

    def encode(self, text: str, after_special: bool) -> list[int]: ...

    def normal_piece(self, token: str) -> bytes: ...


class ScoreBPE:
    """SentencePiece-style BPE: the best-scored token first, the leftmost on ties."""

    add_bos = True

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        n_vocab = len(vocabulary.tokens)
        scores = numbers(metadata, "scores", n_vocab, "fiu")
        if np.isnan(scores).any():
            raise key_error("scores", f"the score of token {np.isnan(scores).argmax()} is NaN")
        costs = (-scores.astype(np.float64)).tolist()
        unknown = token_id(metadata, "unknown_token_id", n_vocab) or 0
        self.adds_space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        self._ids = vocabulary.ids
        self._costs = {token: costs[i] for token, i in vocabulary.ids.items()}
        self._byte_ids = [self._ids.get(f"<0x{byte:02X}>", unknown) for byte in range(256)]

    def encode(self, text: str, after_special: bool) -> list[int]:
        """The ids of text without special tokens; `after_special` at its start as well."""
        if after_special and self.adds_space_prefix:
            text = " " + text
        ids: list[int] = []
        for symbol in self._merge(text.replace(" ", SPACE_MARK)):
            token_id = self._ids.get(symbol)
            if token_id is None:
                ids += [self._byte_ids[byte] for byte in symbol.encode()]
            else:
                ids.append(token_id)
        return ids

    def _merge(self, text: str) -> list[str]:
        """Merge characters into tokens; what is no token at the end is a single character."""
        symbols = list(text)  # a merged symbol lies at its first character, the others are empty
        before = list(range(-1, len(symbols) - 1))
        after = list(range(1, len(symbols) + 1))
        queue: list[tuple[float, int, int, str]] = []  # best score first, then leftmost

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols):
                merged = symbols[left] + symbols[right]
                cost = self._costs.get(merged)
                if cost is not None:
                    heapq.heappush(queue, (cost, left, right, merged))

        for right in range(1, len(symbols)):
            offer(right - 1, right)
        while queue:
            _, left, right, merged = heapq.heappop(queue)
            if not (symbols[left] and symbols[right] and symbols[left] + symbols[right] == merged):
                continue  # stale: one side was merged elsewhere since
            symbols[left], symbols[right] = merged, ""
            after[left] = after[right]
            if after[left] < len(symbols):
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [symbol for symbol in symbols if symbol]

    def normal_piece(self, token: str) -> bytes:
        return utf8(token.replace(SPACE_MARK, " "))


def _byte_alphabet() -> dict[int, int]:
    """From GPT-2's printable characters to bytes: themselves, or the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = iter(range(0x100, 0x200))
    return {byte if byte in printable else next(stand_in): byte for byte in range(256)}


_BYTE_OF_CHARACTER = _byte_alphabet()


class ByteLevelBPE:
    """Byte-level BPE: words by regular expressions, then merges by rank inside each word."""

    adds_space_prefix = False

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        name = metadata.get("tokenizer.ggml.pre", "default")
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            raise key_error("pre", f"{name!r} is not supported")
        pre = PRE_TOKENIZERS[name]
        self.add_bos = pre.add_bos
        try:
            "".join(vocabulary.ids).encode()
        except UnicodeEncodeError:
            raise key_error("tokens", "byte-level tokens that are not UTF-8") from None
        merges = _merges(metadata, vocabulary.ids)
        model = models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges)
        self._tokenizer = tokenizers.Tokenizer(model)
        splits = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns
        ]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])

    def encode(self, text: str, after_special: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def normal_piece(self, token: str) -> bytes:
        try:
            return token.translate(_BYTE_OF_CHARACTER).encode("latin-1")
        except UnicodeEncodeError:  # not in the byte alphabet: the token is plain text
            return utf8(token)


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of `tokenizer.ggml.merges`, best rank first."""
    pairs: dict[tuple[str, str], None] = {}  # of a repeated pair, the first rank counts
    for i, merge in enumerate(strings(metadata, "merges")):
        space = merge.find(" ", 1)  # the left part is never empty, but may begin with a space
        left, right = merge[:space], merge[space + 1 :]
        if space < 0 or left not in ids or right not in ids or left + right not in ids:
            raise key_error("merges", f"merge {i} ({merge!r}) does not join two tokens into one")
        pairs[left, right] = None
    return list(pairs)
