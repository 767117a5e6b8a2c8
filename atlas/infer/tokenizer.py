"""Text to token ids and back, from the vocabulary that a GGUF file carries.

Two kinds of vocabulary, named by `tokenizer.ggml.model`:

- `llama`: SentencePiece-style BPE. Spaces become U+2581; of all neighbours whose concatenation is a
  token, the pair with the best-scored token is merged, the leftmost on ties; characters outside the
  vocabulary fall back to their UTF-8 bytes (`<0x00>` .. `<0xFF>`).
- `gpt2`: byte-level BPE by merge ranks after a pre-tokenizer named by `tokenizer.ggml.pre`; this is
  what the `tokenizers` package implements.

Why `llama` has its own merge loop: a rank-ordered merge list, as `tokenizers` takes it, is the same
thing only while the scores differ. Tokens that tie must be merged from left to right, whichever
they are, and a list can only put all places of one before all places of the other. Published
vocabularies hold ties (Llama's runs of spaces all score -1e9), and a list has no place for a pair
with a character outside the vocabulary either.

Sources: keys and token types from the GGUF specification; what llama.cpp does with them
(`src/llama-vocab.cpp`: defaults, special tokens, the pre-tokenizers of each name); the byte
alphabet from GPT-2's `encoder.py`.
"""

from __future__ import annotations

import codecs
import heapq
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from forge.errors import GGUFShardError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""`tokenizer.ggml.token_type`: what a token is."""

SPACE_MARK = "\u2581"

# Tokens that end a turn or a text under any model. Files often name only one of theirs by key.
END_TEXTS = frozenset(
    {"</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>",
     "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>"}
)  # fmt: skip


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
"""By `tokenizer.ggml.pre`."""


class Tokenizer:
    """The vocabulary of one model.

    Attributes
    ----------
    n_vocab : int
        Number of tokens; ids are `0 .. n_vocab - 1`.
    bos : int or None
        The token that begins a text.
    eos_ids : frozenset of int
        The tokens at which generation stops: the file's end of text, turn and message, and tokens
        with a well-known name for one of these (`END_TEXTS`).
    add_bos : bool
        Whether `encode` puts `bos` first unless told otherwise.
    """

    def __init__(self, vocabulary: Vocabulary, model: _Model, add_bos: bool) -> None:
        self.n_vocab = len(vocabulary.tokens)
        self.bos = vocabulary.bos
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = add_bos
        self._vocabulary = vocabulary
        self._model = model
        self._special_tokens = vocabulary.special_tokens()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that a GGUF file's key-values describe.

        Parameters
        ----------
        metadata : mapping
            Key-values as plain Python or NumPy values: string arrays as `list[str]`, in which
            bytes that are not UTF-8 are surrogate-escaped.

        Raises
        ------
        GGUFShardError
            A key is missing, malformed, contradicts another, or asks for something unsupported.
        """
        kind = _required(metadata, "model")
        model: _Model
        if kind == "llama":
            vocabulary = Vocabulary.from_metadata(metadata, bos=1, eos=2)  # SentencePiece's
            model = ScoreBPE(vocabulary, metadata)
        elif kind == "gpt2":
            vocabulary = Vocabulary.from_metadata(metadata)
            model = ByteLevelBPE(vocabulary, metadata)
        else:
            raise _key_error("model", f"{kind!r} is not supported (known: llama, gpt2)")
        add_bos = metadata.get("tokenizer.ggml.add_bos_token")
        if add_bos is None:
            add_bos = model.add_bos and vocabulary.bos is not None
        elif add_bos and vocabulary.bos is None:
            raise _key_error("bos_token_id", "missing, but add_bos_token is set")
        return cls(vocabulary, model, bool(add_bos))

    def encode(
        self, text: str, *, add_bos: bool | None = None, parse_special: bool = True
    ) -> list[int]:
        """The token ids of a text.

        Parameters
        ----------
        text : str
            Lone surrogates are read as U+FFFD.
        add_bos : bool, optional
            Whether to begin with `bos`; by default as the model wants it.
        parse_special : bool
            Whether the names of control tokens (`<|eot_id|>`) in the text stand for those tokens.
            User-defined tokens are recognised in any case.

        Raises
        ------
        GGUFShardError
            `add_bos` is asked of a vocabulary that has none.
        """
        add_bos = self.add_bos if add_bos is None else add_bos
        if add_bos and self.bos is None:
            raise _key_error("bos_token_id", "missing, but a BOS was asked for")
        ids = [self.bos] if add_bos and self.bos is not None else []
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        after_special = True
        for fragment in self._split_at_special_tokens(text, parse_special):
            if isinstance(fragment, str):
                ids += self._model.encode(fragment, after_special)
                after_special = False
            else:
                ids.append(fragment)
                after_special = True
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a sequence of token ids; bytes that are not UTF-8 become U+FFFD.

        Control tokens have no text. Ids that begin with `bos` are a whole text: the space that
        encoding put in front is dropped. Other ids continue a text and keep theirs.

        Raises
        ------
        GGUFShardError
            An id is outside the vocabulary.
        """
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self.piece, self.bos if self._model.adds_space_prefix else None)

    def piece(self, token_id: int) -> bytes:
        """The bytes a token adds to a text; none for control tokens."""
        if not 0 <= token_id < self.n_vocab:
            raise GGUFShardError(f"token id {token_id} is outside the {self.n_vocab} tokens")
        token, kind = self._vocabulary.tokens[token_id], self._vocabulary.types[token_id]
        if kind == NORMAL:
            return self._model.normal_piece(token)
        if kind == USER_DEFINED:
            return _utf8(token)
        if kind == BYTE:
            return bytes([int(token[3:5], 16)])
        return b""

    def _split_at_special_tokens(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut at special tokens, the longest everywhere first, as llama.cpp does."""
        fragments: list[str | int] = [text] if text else []
        for name, token_id, always in self._special_tokens:
            if name not in text or not (always or parse_special):
                continue
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                for i, part in enumerate(fragment.split(name)):
                    cut += [token_id] if i else []
                    cut += [part] if part else []
            fragments = cut
        return fragments


class TextStream:
    """Decodes tokens as they come and holds back characters whose bytes are still incomplete.

    What the pushes and the final `flush` return, joined, is what `Tokenizer.decode` returns.
    """

    def __init__(self, piece: Callable[[int], bytes], bos_before_space: int | None) -> None:
        self._piece = piece
        self._bos_before_space = bos_before_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_first = True
        self._drop_space = False

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is complete with it."""
        piece = self._piece(token_id)
        if self._is_first:
            self._drop_space = token_id == self._bos_before_space
            self._is_first = False
        if piece and self._drop_space:
            piece = piece.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """End the text: U+FFFD for bytes that never became a character."""
        return self._utf8.decode(b"", final=True)


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
        tokens = _strings(metadata, "tokens")
        n_vocab = len(tokens)
        if n_vocab == 0:
            raise _key_error("tokens", "empty")
        ids = {token: i for i, token in enumerate(tokens) if token}
        for i, token in enumerate(tokens):
            if token and ids[token] != i:
                raise _key_error("tokens", f"tokens {i} and {ids[token]} are both {token!r}")
        types = _numbers(metadata, "token_type", n_vocab, "iu").astype(np.int64)
        for i in np.flatnonzero(types == BYTE).tolist():
            if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", tokens[i]):
                raise _key_error("tokens", f"token {i} is of type byte but reads {tokens[i]!r}")

        ends = {ids[text] for text in END_TEXTS if text in ids}
        ends = {i for i in ends if types[i] in (CONTROL, USER_DEFINED)}
        types[list(ends)] = CONTROL  # where a converter said user-defined, they would be printed
        named = (
            _token_id(metadata, "eos_token_id", n_vocab, eos),
            _token_id(metadata, "eot_token_id", n_vocab),
            _token_id(metadata, "eom_token_id", n_vocab),
        )
        eos_ids = frozenset(ends.union(i for i in named if i is not None))
        return cls(tokens, types, ids, _token_id(metadata, "bos_token_id", n_vocab, bos), eos_ids)

    def special_tokens(self) -> list[tuple[str, int, bool]]:
        """(text, id, recognised always) of tokens looked for in text, longest first."""
        special = [
            (self.tokens[i], i, bool(self.types[i] == USER_DEFINED))
            for i in np.flatnonzero(np.isin(self.types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()
            if self.tokens[i]
        ]
        return sorted(special, key=lambda token: (-len(_utf8(token[0])), token[1]))


class _Model(Protocol):
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
        scores = _numbers(metadata, "scores", n_vocab, "fiu")
        if np.isnan(scores).any():
            raise _key_error("scores", f"the score of token {np.isnan(scores).argmax()} is NaN")
        costs = (-scores.astype(np.float64)).tolist()
        unknown = _token_id(metadata, "unknown_token_id", n_vocab) or 0
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
        return _utf8(token.replace(SPACE_MARK, " "))


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
            raise _key_error("pre", f"{name!r} is not supported")
        pre = PRE_TOKENIZERS[name]
        self.add_bos = pre.add_bos
        try:
            "".join(vocabulary.ids).encode()
        except UnicodeEncodeError:
            raise _key_error("tokens", "byte-level tokens that are not UTF-8") from None
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
            return _utf8(token)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _key_error(name: str, reason: str) -> GGUFShardError:
    return GGUFShardError(f"tokenizer.ggml.{name}: {reason}")


def _required(metadata: Mapping[str, Any], name: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise _key_error(name, "missing")
    return value


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = _required(metadata, name)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise _key_error(name, "not an array of strings")
    return list(value)


def _numbers(metadata: Mapping[str, Any], name: str, n_vocab: int, kinds: str) -> np.ndarray:
    """An array with one number per token, of one of NumPy's `kinds`."""
    value = _required(metadata, name)
    try:
        array = np.asarray(value)
    except ValueError:
        raise _key_error(name, "not a flat array") from None
    if array.ndim != 1 or len(array) != n_vocab:
        raise _key_error(name, f"shape {array.shape} for {n_vocab} tokens")
    if array.dtype.kind not in kinds:
        raise _key_error(name, f"not an array of numbers of the right kind ({array.dtype})")
    return array


def _token_id(
    metadata: Mapping[str, Any], name: str, n_vocab: int, default: int | None = None
) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return default if default is not None and default < n_vocab else None
    try:
        token_id = operator.index(value)
    except TypeError:
        raise _key_error(name, "not an integer") from None
    if not 0 <= token_id < n_vocab:
        raise _key_error(name, f"{token_id} is outside the {n_vocab} tokens")
    return token_id


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of `tokenizer.ggml.merges`, best rank first."""
    pairs: dict[tuple[str, str], None] = {}  # of a repeated pair, the first rank counts
    for i, merge in enumerate(_strings(metadata, "merges")):
        space = merge.find(" ", 1)  # the left part is never empty, but may begin with a space
        left, right = merge[:space], merge[space + 1 :]
        if space < 0 or left not in ids or right not in ids or left + right not in ids:
            raise _key_error("merges", f"merge {i} ({merge!r}) does not join two tokens into one")
        pairs[left, right] = None
    return list(pairs)
