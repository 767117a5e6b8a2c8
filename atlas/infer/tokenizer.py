"""Text to token ids and back, from the vocabulary that a GGUF file carries.

Two kinds of vocabulary, named by `tokenizer.ggml.model`:

- `llama`: SentencePiece-style BPE. Spaces become U+2581; of all neighbours whose concatenation is a
  token, the pair with the best-scored token is merged, the leftmost on ties; characters outside the
  vocabulary fall back to their UTF-8 bytes (`<0x00>` .. `<0xFF>`).
- `gpt2`: byte-level BPE by merge ranks after a pre-tokenizer named by `tokenizer.ggml.pre`; this is
  what the `tokenizers` package implements.

Sources: keys and token types from the GGUF specification; what llama.cpp does with them
(`src/llama-vocab.cpp`): defaults and special tokens. The merging itself is in `atlas.infer.bpe`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atlas.infer.bpe import ByteLevelBPE, MergeModel, ScoreBPE
from atlas.infer.vocabulary import (
    BYTE,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    key_error,
    required,
    utf8,
)
from forge.errors import GGUFShardError


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

    def __init__(self, vocabulary: Vocabulary, model: MergeModel, add_bos: bool) -> None:
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
        kind = required(metadata, "model")
        model: MergeModel
        if kind == "llama":
            vocabulary = Vocabulary.from_metadata(metadata, bos=1, eos=2)  # SentencePiece's
            model = ScoreBPE(vocabulary, metadata)
        elif kind == "gpt2":
            vocabulary = Vocabulary.from_metadata(metadata)
            model = ByteLevelBPE(vocabulary, metadata)
        else:
            raise key_error("model", f"{kind!r} is not supported (known: llama, gpt2)")
        add_bos = metadata.get("tokenizer.ggml.add_bos_token")
        if add_bos is None:
            add_bos = model.add_bos and vocabulary.bos is not None
        elif add_bos and vocabulary.bos is None:
            raise key_error("bos_token_id", "missing, but add_bos_token is set")
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
            raise key_error("bos_token_id", "missing, but a BOS was asked for")
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
            return utf8(token)
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
