"""Tokenizers against llama.cpp's vectors, a naive twin, and on vocabularies made by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.infer.bpe import PRE_TOKENIZERS
from atlas.infer.tokenizer import Tokenizer
from forge.errors import GGUFShardError
from forge.gguf_file import read_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
VOCABULARIES = ("llama-spm", "llama-bpe", "gpt-2", "qwen2")
SEPARATOR = "\n__ggml_vocab_test__\n"
LLAMA_EMOJI = "\N{LLAMA}"  # four bytes: F0 9F A6 99


@lru_cache
def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_metadata(read_gguf(path).metadata)


# --- llama.cpp's vectors and recorded runs -------------------------------------------------------


@pytest.mark.parametrize("name", VOCABULARIES)
def test_llama_cpp_vectors(models: Path, name: str) -> None:
    path = models / "vocab" / f"ggml-vocab-{name}.gguf"
    tokenizer = tokenizer_of(path)
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)
    expected = path.with_suffix(".gguf.out").read_text().split("\n")
    assert len(texts) == len(expected) > 40
    for text, line in zip(texts, expected, strict=True):
        ids = [int(word) for word in line.split()]
        assert tokenizer.encode(text, add_bos=False) == ids, text
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        assert tokenizer.decode(begin + ids) == text
        assert streamed(tokenizer, begin + ids) == text


@pytest.mark.parametrize(
    ("name", "bos", "eos_ids", "add_bos"),
    [
        ("llama-spm", 1, {2}, True),
        ("llama-bpe", 128000, {128001, 128009}, True),  # end of text, end of turn
        ("gpt-2", 50256, {50256}, False),
        ("qwen2", 151643, {151643, 151645}, False),
    ],
)
def test_special_ids_of_known_vocabularies(
    models: Path, name: str, bos: int, eos_ids: set[int], add_bos: bool
) -> None:
    tokenizer = tokenizer_of(models / "vocab" / f"ggml-vocab-{name}.gguf")
    assert (tokenizer.bos, tokenizer.eos_ids, tokenizer.add_bos) == (
        bos,
        frozenset(eos_ids),
        add_bos,
    )
    assert (tokenizer.encode("Hello")[0] == bos) == add_bos


def test_chat_markers_become_tokens_only_when_parsed(models: Path) -> None:
    tokenizer = tokenizer_of(models / "vocab" / "ggml-vocab-llama-bpe.gguf")
    text = "Hello<|eot_id|>"
    assert tokenizer.encode(text, add_bos=False) == [9906, 128009]
    spelled = tokenizer.encode(text, add_bos=False, parse_special=False)
    assert 128009 not in spelled
    assert tokenizer.decode(spelled) == text


def test_recorded_runs(models: Path, reference: Path) -> None:
    paths = sorted(reference.glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        tokenizer = tokenizer_of(models / f"{path.name.split('.')[0]}.gguf")
        assert tokenizer.n_vocab == record["n_vocab"]
        for run in record["runs"]:
            assert tokenizer.encode(run["prompt"]) == run["prompt_ids"]
            assert tokenizer.decode(run["prompt_ids"]) == run["prompt"]
            assert tokenizer.decode(run["greedy_ids"]) == run["greedy_text"]
            assert streamed(tokenizer, run["greedy_ids"]) == run["greedy_text"]


# --- vocabularies made by hand -------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stream = tokenizer.stream()
    return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()


def llama_metadata(
    pieces: dict[str, float], special: dict[str, int] | None = None, **overrides: Any
) -> dict[str, Any]:
    """Three control tokens, 256 byte tokens, `special` tokens (text: type), scored pieces."""
    special = special or {}
    heads = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    byte_tokens = {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    types = {**heads, **byte_tokens, **special, **dict.fromkeys(pieces, NORMAL)}
    values = {
        "model": "llama",
        "tokens": list(types),
        "token_type": np.array(list(types.values()), np.int32),
        "scores": np.array([pieces.get(token, 0.0) for token in types], np.float32),
        **overrides,
    }
    return {f"tokenizer.ggml.{k}": value for k, value in values.items() if value is not None}


def gpt2_metadata(
    words: Sequence[str], special: dict[str, int] | None = None, **overrides: Any
) -> dict[str, Any]:
    """Visible ASCII, space (U+0120), the bytes of an emoji; `words`, merged letter by letter."""
    merges: dict[str, str] = {}
    for word in words:
        for end in range(2, len(word) + 1):
            merges[word[:end]] = f"{word[: end - 1]} {word[end - 1]}"
    alphabet = [chr(c) for c in range(0x21, 0x7F)] + ["\u0120", "ð", "\u0141", "¦", "\u013b"]
    tokens = alphabet + list(merges)
    special = special or {}
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens + list(special),
        "token_type": [NORMAL] * len(tokens) + list(special.values()),
        "merges": list(merges.values()),
        **overrides,
    }
    return {f"tokenizer.ggml.{k}": value for k, value in values.items() if value is not None}


def pieces_of(metadata: dict[str, Any], text: str, **how: Any) -> list[str]:
    ids = Tokenizer.from_metadata(metadata).encode(text, add_bos=False, **how)
    return [metadata["tokenizer.ggml.tokens"][i] for i in ids]


ABC = {"a": -10.0, "b": -11.0, "c": -12.0, "\u2581": -13.0}


def test_best_score_merges_first() -> None:
    for ab, bc, expected in [(-1, -2, ["ab", "c"]), (-2, -1, ["a", "bc"])]:
        metadata = llama_metadata({**ABC, "ab": ab, "bc": bc}, add_space_prefix=False)
        assert pieces_of(metadata, "abc") == expected


def test_ties_merge_from_the_left() -> None:
    """No order of the two merges gives both of these."""
    metadata = llama_metadata({**ABC, "ab": -1, "bc": -1, "ca": -1}, add_space_prefix=False)
    assert pieces_of(metadata, "abc") == ["ab", "c"]
    assert pieces_of(metadata, "bca") == ["bc", "a"]
    assert pieces_of(metadata, "cab") == ["ca", "b"]


def test_a_pair_may_hold_a_character_outside_the_vocabulary() -> None:
    metadata = llama_metadata({"a": -2, "az": -1}, add_space_prefix=False)
    assert pieces_of(metadata, "zaz") == ["<0x7A>", "az"]


def naive_merge(text: str, scores: dict[str, float]) -> list[str]:
    """Look at every pair again after each merge."""
    symbols = list(text)
    while True:
        pairs = [a + b for a, b in itertools.pairwise(symbols)]
        known = [pair for pair in pairs if pair in scores]
        if not known:
            return symbols
        i = pairs.index(max(known, key=lambda pair: scores[pair]))  # max: the leftmost of the best
        symbols[i : i + 2] = [pairs[i]]


@given(
    pieces=st.dictionaries(st.text("abc", min_size=2, max_size=5), st.integers(-4, 0), max_size=20),
    text=st.text("abc", max_size=30),
)
def test_merges_equal_the_naive_loop(pieces: dict[str, int], text: str) -> None:
    scores = {**ABC, **{piece: float(score) for piece, score in pieces.items()}}
    assert pieces_of(llama_metadata(scores, add_space_prefix=False), text) == naive_merge(
        text, scores
    )


@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" ab\u2581")))
def test_any_text_round_trips_through_bytes(text: str) -> None:
    tokenizer = Tokenizer.from_metadata(llama_metadata({**ABC, "\u2581a": -1.0}))
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos == 1
    if not any(name in text for name in ("<unk>", "<s>", "</s>")):
        expected = text.replace("\u2581", " ")  # the mark itself reads as a space
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == expected


def test_byte_fallback_and_streaming_of_split_characters() -> None:
    metadata = llama_metadata(ABC, add_space_prefix=False)
    assert pieces_of(metadata, f"a{LLAMA_EMOJI}") == ["a", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode(f"a{LLAMA_EMOJI}b", add_bos=False)
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["a", "", "", "", LLAMA_EMOJI, "b"]
    assert stream.flush() == ""


def test_bytes_that_never_become_a_character() -> None:
    tokenizer = Tokenizer.from_metadata(llama_metadata(ABC))
    first_byte, a = tokenizer.encode(LLAMA_EMOJI, add_bos=False)[1], 2 + 256 + 1
    stream = tokenizer.stream()
    assert [stream.push(first_byte), stream.push(a)] == ["", "\ufffda"]
    assert [stream.push(first_byte), stream.flush()] == ["", "\ufffd"]
    assert tokenizer.decode([first_byte, a, first_byte]) == "\ufffda\ufffd"


def test_without_byte_tokens_a_character_is_unknown() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["a", "<unk>"],
        "tokenizer.ggml.token_type": [NORMAL, UNKNOWN],
        "tokenizer.ggml.scores": [0.0, 0.0],
        "tokenizer.ggml.unknown_token_id": np.uint32(1),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert Tokenizer.from_metadata(metadata).encode("aza") == [0, 1, 0]


def test_space_prefix_comes_and_goes() -> None:
    metadata = llama_metadata({**ABC, "\u2581a": -1.0})
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode("a b")
    assert [metadata["tokenizer.ggml.tokens"][i] for i in ids] == ["<s>", "\u2581a", "\u2581", "b"]
    assert tokenizer.decode(ids) == "a b"
    assert tokenizer.decode(ids[1:]) == " a b"  # a continuation keeps its space
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"
    unprefixed = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.add_space_prefix": False})
    assert unprefixed.decode(unprefixed.encode(" a")) == " a"
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", add_bos=False) == []


def test_special_tokens_in_text() -> None:
    special = {"<|user|>": CONTROL, "<b>": USER_DEFINED, "<unused>": UNUSED}
    metadata = llama_metadata({**ABC, "\u2581a": -1.0}, special)
    assert pieces_of(metadata, "a<|user|>a<b>") == ["\u2581a", "<|user|>", "\u2581a", "<b>"]
    spelled = pieces_of(metadata, "<|user|><b>", parse_special=False)
    assert spelled[-1] == "<b>"
    assert spelled[0] == "\u2581" and "<|user|>" not in spelled
    assert "<unused>" not in pieces_of(metadata, "<unused>")
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode("a<|user|><b>")) == "a<b>"


def test_longer_special_tokens_are_cut_first() -> None:
    """As llama.cpp: by length, not by where they begin."""
    metadata = llama_metadata(ABC, {"ab": USER_DEFINED, "bca": USER_DEFINED})
    assert pieces_of(metadata, "abca") == ["\u2581", "a", "bca"]
    assert pieces_of(metadata, "abab") == ["ab", "ab"]


def test_tokens_that_are_not_utf8_keep_their_bytes() -> None:
    piece = b"\xf0\x9f".decode("utf-8", "surrogateescape")
    tokenizer = Tokenizer.from_metadata(llama_metadata({piece: -1.0}))
    ids = [3 + 256, 3 + 0xA6, 3 + 0x99]
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == LLAMA_EMOJI


@pytest.mark.parametrize("make", [lambda: llama_metadata(ABC), lambda: gpt2_metadata(["ab"])])
def test_lone_surrogates_in_text(make: Any) -> None:
    tokenizer = Tokenizer.from_metadata(make())
    assert tokenizer.encode("a\udcffb") == tokenizer.encode("a\ufffdb")


def test_ends_of_generation() -> None:
    special = {"<|im_end|>": USER_DEFINED, "<turn>": CONTROL, "<message>": CONTROL}
    metadata = llama_metadata(ABC, special, eot_token_id=260, eom_token_id=np.uint32(261))
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.eos_ids == {2, 259, 260, 261}
    assert tokenizer.decode([259]) == ""
    plain = gpt2_metadata(["ab"], {"<eos>": NORMAL})
    assert Tokenizer.from_metadata(plain).eos_ids == frozenset()


def test_byte_level_merges_by_rank() -> None:
    metadata = gpt2_metadata(["\u0120the", "he"])
    assert pieces_of(metadata, "he the") == ["he", "\u0120the"]
    merges = metadata["tokenizer.ggml.merges"]
    repeated = {**metadata, "tokenizer.ggml.merges": [*merges, merges[0]]}
    assert pieces_of(repeated, "he the") == ["he", "\u0120the"]


def test_byte_level_emoji_is_streamed_whole() -> None:
    tokenizer = Tokenizer.from_metadata(gpt2_metadata(["ab"]))
    ids = tokenizer.encode(f"ab{LLAMA_EMOJI}")
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["ab", "", "", "", LLAMA_EMOJI]
    assert tokenizer.decode(ids) == f"ab{LLAMA_EMOJI}"


def test_byte_level_special_tokens() -> None:
    metadata = gpt2_metadata(
        ["ab"], {"<|end|>": CONTROL, "\u2713": USER_DEFINED, "<0x0A>": BYTE, "\u2714": NORMAL}
    )
    assert pieces_of(metadata, "ab<|end|>\u2713") == ["ab", "<|end|>", "\u2713"]
    tokenizer = Tokenizer.from_metadata(metadata)
    end = metadata["tokenizer.ggml.tokens"].index("<|end|>")
    assert tokenizer.decode([end, end + 1, end + 2, end + 3]) == "\u2713\n\u2714"
    assert tokenizer.eos_ids == {end}


def test_whole_words_ignore_merges_only_under_llama_bpe() -> None:
    metadata = gpt2_metadata(["ab"], {"abcd": NORMAL})
    assert pieces_of(metadata, "abcd") == ["ab", "c", "d"]
    assert pieces_of({**metadata, "tokenizer.ggml.pre": "llama-bpe"}, "abcd") == ["abcd"]
    assert pieces_of({**metadata, "tokenizer.ggml.pre": "dbrx"}, "abcd") == ["ab", "c", "d"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1234", "\u0120", "\u0120ab'", "S"]),
        ("llama-bpe", ["123", "4", "\u0120", "\u0120ab", "'S"]),
        ("qwen2", ["1", "2", "3", "4", "\u0120", "\u0120ab", "'S"]),
        ("starcoder", ["1", "2", "3", "4", "\u0120", "\u0120ab'", "S"]),
        ("default", ["123", "4", "\u0120", "\u0120ab", "'", "S"]),
    ],
)
def test_pre_tokenizers_cut_words(pre: str, expected: list[str]) -> None:
    """Every stretch of the text is a token here, so that only the cuts show."""
    words = ["1234", "\u0120\u0120ab", "\u0120ab'S", "'S"]
    got = pieces_of(gpt2_metadata(words, pre=pre), "1234  ab'S")
    if pre in ("gpt-2", "starcoder"):  # their contractions are lower case only
        expected = [piece.removesuffix("'") for piece in expected]
        expected[-1:] = ["'", "S"]
    assert got == expected


def test_every_pre_tokenizer_compiles_and_keeps_the_text() -> None:
    text = "I'll pay $1,234.50 to y'ALL:  ok?\tab"
    alphabet = {"\u010a": NORMAL, "\u0109": NORMAL}  # newline and tab
    for pre in PRE_TOKENIZERS:
        tokenizer = Tokenizer.from_metadata(gpt2_metadata(["ab"], alphabet, pre=pre))
        assert tokenizer.decode(tokenizer.encode(text)) == text, pre


def test_bos_of_a_byte_level_vocabulary() -> None:
    metadata = gpt2_metadata(["ab"], {"<bos>": CONTROL})
    bos = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert Tokenizer.from_metadata(metadata).bos is None
    with pytest.raises(GGUFShardError, match="bos_token_id: missing"):
        Tokenizer.from_metadata(metadata).encode("ab", add_bos=True)
    metadata["tokenizer.ggml.bos_token_id"] = np.uint32(bos)
    assert Tokenizer.from_metadata(metadata).encode("ab")[0] != bos
    metadata["tokenizer.ggml.add_bos_token"] = np.bool_(True)
    assert Tokenizer.from_metadata(metadata).encode("ab")[0] == bos
    llama3 = gpt2_metadata(["ab"], {"<bos>": CONTROL}, pre="llama-bpe", bos_token_id=bos)
    assert Tokenizer.from_metadata(llama3).encode("ab")[0] == bos
    del llama3["tokenizer.ggml.bos_token_id"]
    assert Tokenizer.from_metadata(llama3).add_bos is False


# --- bad metadata --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model: missing"),
        ({"model": "bert"}, "tokenizer.ggml.model: 'bert' is not supported"),
        ({"tokens": None}, "tokenizer.ggml.tokens: missing"),
        ({"tokens": []}, "tokenizer.ggml.tokens: empty"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens: not an array of strings"),
        ({"tokens": ["a", 1, "b"]}, "tokenizer.ggml.tokens: not an array of strings"),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens: tokens 0 and 2 are both 'a'"),
        ({"token_type": None}, "tokenizer.ggml.token_type: missing"),
        ({"token_type": [1, 1]}, r"tokenizer.ggml.token_type: shape \(2,\) for 3 tokens"),
        ({"token_type": [1, 1, 6]}, "tokenizer.ggml.tokens: token 2 is of type byte but reads"),
        ({"token_type": [1.5, 1.0, 1.0]}, "tokenizer.ggml.token_type: not an array of numbers"),
        ({"token_type": [[1], [1, 1], [1]]}, "tokenizer.ggml.token_type: not a flat array"),
        ({"scores": None}, "tokenizer.ggml.scores: missing"),
        ({"scores": 1.0}, r"tokenizer.ggml.scores: shape \(\) for 3 tokens"),
        ({"scores": ["x", "y", "z"]}, "tokenizer.ggml.scores: not an array of numbers"),
        ({"scores": [0.0, float("nan"), 0.0]}, "tokenizer.ggml.scores: the score of token 1 is"),
        ({"bos_token_id": 3}, "tokenizer.ggml.bos_token_id: 3 is outside the 3 tokens"),
        ({"eos_token_id": -1}, "tokenizer.ggml.eos_token_id: -1 is outside the 3 tokens"),
        ({"eot_token_id": "2"}, "tokenizer.ggml.eot_token_id: not an integer"),
        ({"unknown_token_id": 9}, "tokenizer.ggml.unknown_token_id: 9 is outside the 3 tokens"),
    ],
)
def test_bad_llama_metadata(overrides: dict[str, Any], message: str) -> None:
    values = {
        "model": "llama", "tokens": ["a", "b", "c"], "token_type": [1, 1, 1], "scores": [0, 0, 0]
    } | overrides  # fmt: skip
    metadata = {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}
    with pytest.raises(GGUFShardError, match=f"^{message}") as caught:
        Tokenizer.from_metadata(metadata)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pre": "klingon"}, "tokenizer.ggml.pre: 'klingon' is not supported"),
        ({"pre": ["gpt-2"]}, "tokenizer.ggml.pre: "),
        ({"merges": None}, "tokenizer.ggml.merges: missing"),
        ({"merges": ["a b", "ab"]}, r"tokenizer.ggml.merges: merge 1 \('ab'\)"),
        ({"merges": ["a c"]}, r"tokenizer.ggml.merges: merge 0 \('a c'\)"),
        ({"add_bos_token": True}, "tokenizer.ggml.bos_token_id: missing, but add_bos_token is set"),
    ],
)
def test_bad_gpt2_metadata(overrides: dict[str, Any], message: str) -> None:
    metadata = gpt2_metadata(["ab"], **overrides)
    with pytest.raises(GGUFShardError, match=f"^{message}"):
        Tokenizer.from_metadata(metadata)


def test_byte_level_tokens_must_be_utf8() -> None:
    with pytest.raises(GGUFShardError, match=r"^tokenizer.ggml.tokens: .* not UTF-8"):
        Tokenizer.from_metadata(gpt2_metadata(["ab"], {"\udcff": NORMAL}))


@pytest.mark.parametrize("token_id", [-1, 263])
def test_ids_outside_the_vocabulary(token_id: int) -> None:
    tokenizer = Tokenizer.from_metadata(llama_metadata(ABC))
    with pytest.raises(GGUFShardError, match=f"token id {token_id} is outside the 263 tokens"):
        tokenizer.decode([token_id])
