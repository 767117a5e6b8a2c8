"""The demonstration model: its vocabulary, its training rows, its file. No PyTorch is needed."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, TokenType

from atlas.infer.bpe import SPACE_MARK
from experiments import train_demo_model
from experiments.story_grammar import stories
from experiments.train_demo_model import (
    BOS,
    DEMO,
    EOS,
    Schedule,
    Vocabulary,
    load_torch,
    main,
    rows_of_stories,
    train_vocabulary,
    write_gguf,
)
from forge.errors import GGUFShardError

DEMO_FILE = Path(train_demo_model.__file__).parent / "demo" / "demo-2M-f16.gguf"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_vocabulary(DEMO.n_vocab, itertools.islice(stories(1), 500))


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Key-values and tensors, read by the gguf package."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor.data for tensor in reader.tensors}


def test_vocabulary_is_laid_out_as_in_llama_files(vocabulary: Vocabulary) -> None:
    tokens, scores, types = vocabulary.tokens, vocabulary.scores, vocabulary.types
    assert len(tokens) == len(scores) == len(types) == DEMO.n_vocab == len(set(tokens))
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert tokens[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert set(types[3:259]) == {TokenType.BYTE}
    assert set(types[259:]) == {TokenType.NORMAL}
    assert scores[259:] == [-float(rank) for rank in range(len(tokens) - 259)]


def test_tokens_are_words_or_punctuation_without_inner_space(vocabulary: Vocabulary) -> None:
    for token in vocabulary.tokens[259:]:
        assert re.fullmatch(f"{SPACE_MARK}?([A-Za-z]*|[^A-Za-z{SPACE_MARK}]*)", token), token


def test_every_token_longer_than_a_character_is_made_of_two(vocabulary: Vocabulary) -> None:
    ranks = {token: rank for rank, token in enumerate(vocabulary.tokens[259:])}
    for token, rank in ranks.items():
        if len(token) > 1:
            halves = [(token[:i], token[i:]) for i in range(1, len(token))]
            # characters come last in the file but are there from the start
            assert any(
                all(half in ranks and (len(half) == 1 or ranks[half] < rank) for half in pair)
                for pair in halves
            ), token


def test_stories_survive_encoding(vocabulary: Vocabulary) -> None:
    tokenizer = vocabulary.tokenizer()
    for story in itertools.islice(stories(2), 20):
        ids = tokenizer.encode(story)
        assert tokenizer.decode(ids) == story
        assert min(ids[1:]) >= 259  # no byte tokens
        assert len(ids) < 2 * len(story.split())
    assert tokenizer.decode(tokenizer.encode("42 \N{SNOWMAN}")) == "42 \N{SNOWMAN}"


def test_rows_hold_whole_stories_between_bos_and_eos(vocabulary: Vocabulary) -> None:
    tokenizer = vocabulary.tokenizer()
    texts = list(itertools.islice(stories(3), 20))
    rows = list(itertools.islice(rows_of_stories(tokenizer, 513, iter(texts)), 3))
    told = 0
    for row in rows:
        assert len(row) == 513
        assert row[0] == BOS
        ends = [i for i, token in enumerate(row) if token == EOS]
        starts = [0] + [i + 1 for i in ends if i + 1 < len(row)]
        for start, end in itertools.zip_longest(starts, ends, fillvalue=len(row) - 1):
            ids = row[start : end + 1]
            # whole where it ends with EOS, else a beginning: both as the tokenizer gives them
            assert [*tokenizer.encode(texts[told]), EOS][: len(ids)] == ids
            told += 1


def test_schedule_warms_up_and_falls_along_a_cosine() -> None:
    schedule = Schedule(steps=1100, learning_rate=1.0, final_share=0.1, warmup=100)
    rates = [schedule.rate(step) for step in range(1100)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99] == rates[100] == max(rates) == 1.0
    assert rates[600] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert np.all(np.diff(rates[100:]) < 0)


def test_written_file_holds_the_arrays(tmp_path: Path, vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "token_embd.weight": rng.standard_normal((768, 192)).astype(np.float16),
        "output_norm.weight": rng.standard_normal(192, np.float32),
    }
    path = tmp_path / "model.gguf"
    write_gguf(path, DEMO, vocabulary, arrays)
    keys, tensors = contents(path)
    assert keys["tokenizer.ggml.tokens"] == vocabulary.tokens
    assert keys["llama.attention.head_count_kv"] == DEMO.n_head_kv
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name], array)
        assert tensors[name].dtype == array.dtype
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_without_pytorch_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(GGUFShardError, match="pip install torch"):
        load_torch()
    assert main(["--output", str(tmp_path / "x.gguf")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_demo_file_is_small_and_complete() -> None:
    assert DEMO_FILE.stat().st_size <= 4_000_000
    keys, tensors = contents(DEMO_FILE)
    assert keys["general.architecture"] == "llama"
    assert keys["general.name"] == "gguf-shard-demo"
    assert keys["general.license"] == "mit"
    assert keys["llama.context_length"] == DEMO.n_ctx
    assert len(tensors) == 3 + 9 * DEMO.n_layer
    for name, data in tensors.items():
        assert data.dtype == (np.float32 if "norm" in name else np.float16)
        assert np.isfinite(data).all()


def test_demo_vocabulary_is_the_one_that_the_script_learns() -> None:
    keys, _ = contents(DEMO_FILE)
    texts = itertools.islice(stories(1), train_demo_model.TOKENIZER_STORIES)
    learned = train_vocabulary(DEMO.n_vocab, texts)
    assert keys["tokenizer.ggml.tokens"] == learned.tokens
    assert keys["tokenizer.ggml.scores"] == learned.scores
    assert keys["tokenizer.ggml.token_type"] == learned.types
