"""From a prompt to tokens, and what is counted on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numba import config

from atlas.errors import CorruptPageError
from atlas.infer.generate import Generation, generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from experiments.make_model import PRESETS, write_model
from forge.core_file import page_offset
from forge.errors import GGUFShardError
from forge.sgmap import core_path
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.sizes import Size
from tests.llama_factory import LlamaShape, Types, opened, shard_llama, smallest_budget
from tests.naive_llama import NaiveLlama

pytestmark = pytest.mark.skipif(bool(config.DISABLE_JIT), reason="takes minutes without a compiler")
PROMPT = [1, 5, 9, 70, 3]


@pytest.fixture(scope="module", autouse=True)
def background() -> Iterator[None]:
    """Read ahead on a thread, however small the shards are: that is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atlas.shard_cache.MIN_BACKGROUND_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[NaiveLlama, Path]:
    path, map_path = shard_llama(tmp_path_factory.mktemp("model"), LlamaShape())
    return NaiveLlama(path), map_path


@pytest.fixture
def model(made: tuple[NaiveLlama, Path]) -> Iterator[LlamaModel]:
    with opened(made[1], "60%", n_batch=2) as model:
        yield model


def test_tokens_as_they_come(made: tuple[NaiveLlama, Path], model: LlamaModel) -> None:
    seen: list[int] = []
    result = generate(model, PROMPT, 6, Sampler(0), on_token=seen.append)
    assert result.tokens == seen == made[0].greedy(PROMPT, 6)
    # The last token is not run through the model: nobody asked what follows it.
    assert result.n_decode_passes == 5
    assert model.position == len(PROMPT) + 5
    assert model.n_passes == 3 + 5


def test_a_second_prompt_continues_the_text(
    made: tuple[NaiveLlama, Path], model: LlamaModel
) -> None:
    first = generate(model, PROMPT, 3, Sampler(0)).tokens
    second = generate(model, [first[-1], 8, 2], 3, Sampler(0)).tokens
    assert second == made[0].greedy([*PROMPT, *first, 8, 2], 3)


def test_a_stop_token_is_the_last(made: tuple[NaiveLlama, Path], model: LlamaModel) -> None:
    want = made[0].greedy(PROMPT, 6)
    stop = want[3]
    seen: list[int] = []
    result = generate(model, PROMPT, 6, Sampler(0), stop={stop}, on_token=seen.append)
    assert result.tokens == seen == want[: want.index(stop) + 1]


def test_no_tokens_wanted(made: tuple[NaiveLlama, Path], model: LlamaModel) -> None:
    result = generate(model, PROMPT, 0, Sampler(0))
    assert (result.tokens, result.n_decode_passes, result.tokens_per_second) == ([], 0, 0.0)
    want = made[0].logits(PROMPT)[-1]
    np.testing.assert_allclose(result.prompt_logits, want, atol=1e-5)


def test_what_it_cost(model: LlamaModel) -> None:
    before = model.atlas.stats.copy()
    started = time.perf_counter()
    result = generate(model, PROMPT, 4, Sampler(0))
    elapsed = time.perf_counter() - started
    assert 0 < result.prompt_seconds <= result.first_token_seconds
    assert result.first_token_seconds + result.decode_seconds <= elapsed
    assert result.tokens_per_second == 3 / result.decode_seconds
    per_pass = model.atlas.shape.n_scheduled
    # Nobody asks for the logits behind the first two passes of the prompt.
    assert result.prompt_stats.accesses == 3 * per_pass - 2 * model.weights.output.n_pages
    assert result.decode_stats.accesses == 3 * per_pass
    in_phases = result.prompt_stats.bytes_moved + result.decode_stats.bytes_moved
    assert 0 < in_phases <= model.atlas.stats.since(before).bytes_moved


def test_the_price_of_nothing() -> None:
    assert Generation().tokens_per_second == 0.0


def test_a_full_context_ends_the_run_after_the_tokens_that_fit(model: LlamaModel) -> None:
    seen: list[int] = []
    result = generate(model, PROMPT, 30, Sampler(0), on_token=seen.append)
    assert len(seen) == 24 - len(PROMPT) + 1
    assert result.tokens == seen and model.position == 24
    with pytest.raises(GGUFShardError, match="context of 24 is full: 24 positions are taken"):
        model.forward([1])


# ---- what the cache does meanwhile ----


@pytest.fixture(scope="module")
def dense_map(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of more than 500 shards."""
    folder = tmp_path_factory.mktemp("dense")
    model = write_model(folder / "m.gguf", replace(PRESETS["tiny"], n_layer=6, n_ctx=64), "F16")
    return shard_model(model, folder, ShardOptions(pages_per_shard=1))


@pytest.mark.parametrize(("policy", "ideal"), [("lru", 0.0), ("pin", 0.5), ("auto", 0.5)])
@pytest.mark.parametrize("distance", [0, 8])
def test_half_the_pages_give_half_the_hits_only_when_pinned(
    dense_map: Path, policy: str, ideal: float, distance: int
) -> None:
    with opened(dense_map, "50%", policy=policy, prefetch_distance=distance) as model:
        result = generate(model, PROMPT, 5, Sampler(0))
        stats, n_passes = result.decode_stats, result.n_decode_passes
        n_scheduled = model.atlas.shape.n_scheduled
        assert n_scheduled >= 500
        assert stats.accesses == n_passes * n_scheduled
        reuse = stats.reuse_hits / stats.accesses
        assert reuse == pytest.approx(ideal, abs=0.02)
        assert reuse == pytest.approx(model.atlas.expected_reuse_ratio, abs=0.02)
        pass_bytes = n_scheduled * model.atlas.shard_bytes
        assert stats.bytes_moved / n_passes == pytest.approx(
            (1 - reuse) * pass_bytes, abs=0.02 * pass_bytes
        )
        assert (stats.prefetch_hits > 0) == (distance > 0)  # how many is a matter of speed


def test_everything_resident_moves_nothing(dense_map: Path) -> None:
    with opened(dense_map, "100%", policy="lru") as model:
        result = generate(model, PROMPT, 4, Sampler(0))
        assert result.decode_stats.bytes_moved == 0
        assert result.decode_stats.reuse_hits == result.decode_stats.accesses > 0


# ---- damage during a run ----


def flip_bit(map_path: Path, tensor: str) -> int:
    """Flip a bit in the first page of a tensor; returns the page's number."""
    page = next(t for t in load_map(map_path).tensors if t.name == tensor).slices[0].first_page
    with open(core_path(map_path), "r+b") as file:
        file.seek(page_offset(page) + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    return page


@pytest.mark.parametrize("distance", [0, 8])
@pytest.mark.parametrize(
    ("shape", "tensor"),
    [
        (LlamaShape(), "blk.1.attn_output.weight"),
        (LlamaShape(), "output.weight"),
        (LlamaShape(tied=True), "token_embd.weight"),
        (LlamaShape(ggml_type=Types.Q8_0), "blk.1.ffn_down.weight"),
    ],
)
def test_a_page_damaged_during_a_run_stops_it(
    tmp_path: Path, shape: LlamaShape, tensor: str, distance: int
) -> None:
    """Every token handed out before is the undisturbed run's, and none comes after."""
    _, map_path = shard_llama(tmp_path, shape)
    with opened(map_path) as model:
        want = generate(model, PROMPT, 8, Sampler(0)).tokens
    smallest = Size(n_bytes=smallest_budget(map_path))
    seen: list[int] = []
    pages: list[int] = []

    def on_token(token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            pages.append(flip_bit(map_path, tensor))

    with (
        opened(map_path, smallest, policy="lru", prefetch_distance=distance) as model,
        pytest.raises(CorruptPageError) as caught,
    ):
        generate(model, PROMPT, 8, Sampler(0), on_token=on_token)
    assert seen == want[:3]
    error = caught.value
    assert (error.page, error.shard, error.tensor) == (pages[0], pages[0], tensor)
    assert error.got != error.expected
    assert f"page {pages[0]} (shard {pages[0]}, {tensor})" in str(error)
    assert "\n" not in str(error)


def test_a_damaged_embedding_row_stops_the_run_that_looks_it_up(
    tmp_path: Path,
) -> None:
    _, map_path = shard_llama(tmp_path, LlamaShape())
    with opened(map_path) as model:
        page = flip_bit(map_path, "token_embd.weight")
        model.forward([95])  # a row of another page
        with pytest.raises(CorruptPageError, match=r"token_embd\.weight") as caught:
            model.forward([0])
    assert caught.value.page == page
