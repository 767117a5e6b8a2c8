"""Updates that fail: nothing has changed, or an error says which page; and never a wrong token.

On the CPU target, and on a GPU or in the simulator.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atlas.device_cache import DeviceCache
from atlas.errors import CorruptPageError
from atlas.infer.generate import generate
from atlas.infer.sampling import Sampler
from atlas.live_update import ModelUpdatedError
from atlas.ops.swap_state import FAULT_KIND, FAULT_ROOM
from atlas.target import CpuTarget, CudaTarget, Target
from forge.errors import GGUFShardError
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.sharded_model import ShardedModel
from tests import cache_factory as cache
from tests.llama_factory import Types, write_llama
from tests.update_factory import (
    EMBEDDING,
    MATRIX,
    N_TOKENS,
    NORM,
    OLD,
    PROMPT,
    ROPE,
    SHAPE,
    Editions,
    answer,
    copy,
    cpu_cache,
    in_thread,
    join,
    page_of,
    running,
)


@pytest.fixture(scope="module", autouse=True)
def background() -> Iterator[None]:
    """Read ahead on a thread, however small the shards are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atlas.shard_cache.MIN_BACKGROUND_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def editions(tmp_path_factory: pytest.TempPathFactory) -> Editions:
    return Editions(tmp_path_factory.mktemp("editions"))


def damaged(map_path: Path, folder: Path, tensor: str | None) -> tuple[Path, int]:
    """A version with a bad page: the first of a tensor, or of the source's header."""
    found = copy(map_path, folder)
    page = load_map(found).raw[0].first_page if tensor is None else page_of(found, tensor)
    cache.flip_bit(found, page)
    return found, page


@pytest.mark.parametrize(("budget", "policy"), [("100%", "lru"), ("50%", "pin")])
@pytest.mark.parametrize("tensor", [MATRIX, NORM, EMBEDDING, ROPE, "blk.0.attn_q.bias"])
def test_a_bad_page_of_the_new_version_never_makes_a_token(
    target: Target, editions: Editions, tmp_path: Path, tensor: str, budget: str, policy: str
) -> None:
    new, page = damaged(editions.new, tmp_path / "new", tensor)
    bad = f"page {page} .*{tensor}"
    with running(editions.old, budget, target, policy=policy) as model:
        model.forward([1])
        try:
            model.atlas.adopt(ShardedModel(new))
        except CorruptPageError as error:
            assert error.page == page and "\n" not in str(error)
        else:
            assert tensor in (MATRIX, EMBEDDING)
        assert model.atlas.version == 1
        assert tensor == ROPE or page not in cache.resident(model.atlas)  # of either version alike
        seen: list[int] = []
        model.position = 0
        with pytest.raises(CorruptPageError, match=bad):
            # The embedding's first page holds the first rows.
            generate(model, [0, *PROMPT[1:]], N_TOKENS, Sampler(0), on_token=seen.append)
        assert seen == []
        cache.flip_bit(new, page)  # it was the disk
        assert answer(model) == editions.answer(editions.new, target)
        cache.assert_at_rest(model.atlas)


@pytest.mark.parametrize("budget", ["100%", "50%"])
def test_a_bad_header_leaves_the_old_version(
    target: Target, editions: Editions, tmp_path: Path, budget: str
) -> None:
    new, page = damaged(editions.new, tmp_path / "new", None)
    with running(editions.old, budget, target) as model, ShardedModel(new) as other:
        model.forward([1])
        with pytest.raises(GGUFShardError, match=f"page {page} .*raw bytes of model.gguf"):
            model.atlas.adopt(other)
        assert model.atlas.version == 0
        assert answer(model) == editions.answer(editions.old, target)


LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "more pages": (
        {"n_vocab": SHAPE.n_vocab + 2000},
        r"pages: \d+, not \d+: a running model keeps its layout",
    ),
    "another type": (
        {"types": {NORM: Types.F16}},
        rf"tensor '{NORM}': F16 \[{SHAPE.n_embd}\], not F32 \[{SHAPE.n_embd}\]",
    ),
    "another architecture": (
        {"metadata": {"general.architecture": "llamb"}},
        "general.architecture: 'llamb' cannot be run",
    ),
    "other heads": (
        {"n_head": 2 * SHAPE.n_head, "n_head_kv": 2 * SHAPE.n_head_kv, "rope_factors": False},
        "n_head: .* a running model keeps its shapes",
    ),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_another_layout_is_refused(editions: Editions, name: str) -> None:
    changes, message = LAYOUTS[name]
    base = replace(SHAPE, rope_factors=changes.get("rope_factors", True))
    old = editions.of(f"base {base.rope_factors}", base)
    refused(editions, old, editions.of(name, replace(base, **changes)), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ShardOptions(pages_per_shard=2), "pages per shard: 2, not 1"),
        (
            ShardOptions(pages_per_shard=1, memory_layout="row_major"),
            "memory layout: row_major, not column_major",
        ),
    ],
)
def test_other_pages_are_refused(
    editions: Editions, tmp_path: Path, options: ShardOptions, message: str
) -> None:
    source = write_llama(tmp_path / "model.gguf", OLD)
    new = shard_model(source, tmp_path / "other", options)
    refused(editions, editions.old, new, message)


def test_other_tensors_are_refused(editions: Editions) -> None:
    with ShardedModel(editions.old) as other, running(editions.old, "50%") as model:
        tensors = other.map.tensors
        first, *rest = tensors
        moved = replace(first, slices=(replace(first.slices[0], first_page=1234),))
        for found, message in (
            (tensors[1:], f"'{first.name}': none, not F32"),
            ((*tensors, replace(first, name="x")), "'x': F32 .*, not none"),
            ((moved, *rest), f"'{first.name}', slice 0: .* from 1234 on, .* not .* from"),
        ):
            other.map = replace(other.map, tensors=tuple(found))
            with pytest.raises(GGUFShardError, match=rf"^model.gguf: tensor {message}"):
                model.atlas.check_update(other.map, other.source_header().metadata)


def refused(editions: Editions, old: Path, new: Path, message: str) -> None:
    with running(old, "50%", prefetch_distance=0) as model, ShardedModel(new) as other:
        model.forward([1])
        stats, resident = model.atlas.stats.copy(), cache.resident(model.atlas)
        for update in (
            lambda: model.atlas.check_update(other.map, other.source_header().metadata),
            lambda: model.atlas.adopt(other),
        ):
            with pytest.raises(GGUFShardError, match=f"^model.gguf: .*{message}") as caught:
                update()
            assert "\n" not in str(caught.value)
        assert (model.atlas.version, model.position) == (0, 1)
        assert (model.atlas.stats, cache.resident(model.atlas)) == (stats, resident)
        other.read_checked(0, 1)  # is open still
        assert answer(model) == editions.answer(old, model.target)


@pytest.mark.parametrize("step", ["evict", "expect", "fill"])
def test_an_interrupted_update_is_made_up_for(
    editions: Editions, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Wherever it stops, the tokens are one version's, and it can be done again."""
    target = CpuTarget()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with running(editions.old, "50%", target, policy="pin") as model:
        model.forward([1])
        of_host = cpu_cache(model.atlas)
        with monkeypatch.context() as patch:
            patch.setattr(of_host if step == "fill" else of_host.pool, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.atlas.adopt(ShardedModel(editions.new))
        with pytest.raises(ModelUpdatedError):
            model.forward([7])
        present = editions.new if step == "fill" else editions.old
        assert answer(model) == editions.answer(present, target)
        model.atlas.adopt(ShardedModel(editions.new))
        assert answer(model) == editions.answer(editions.new, target)
        cache.assert_at_rest(model.atlas)


# ---- on a GPU ----


def test_a_fault_of_the_update_is_the_updates(
    cuda_target: CudaTarget, editions: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever fetches a result meanwhile waits, and is told nothing."""
    told: list[BaseException] = []
    threads: list[threading.Thread] = []

    with running(editions.old, "50%", cuda_target, policy="lru") as model:
        device = model.atlas.shard_cache
        assert isinstance(device, DeviceCache)
        fetch_back = device._bring_in_staying

        def fetch() -> None:
            try:
                cuda_target.get(model.atlas.cache.table)
            except GGUFShardError as error:
                told.append(error)

        def meet_a_fault() -> None:
            device.queue._fault.host[FAULT_KIND] = FAULT_ROOM
            threads.append(in_thread(fetch))
            threads[0].join(0.05)
            fetch_back()

        monkeypatch.setattr(device, "_bring_in_staying", meet_a_fault)
        with pytest.raises(GGUFShardError, match="no room for shard"):
            model.atlas.adopt(ShardedModel(editions.new))
        join(threads[0])
        assert told == []
        assert answer(model) == editions.answer(editions.new, cuda_target)


def test_a_fault_that_nobody_has_seen_yet_is_not_swallowed(
    cuda_target: CudaTarget, editions: Editions
) -> None:
    with running(editions.old, "50%", cuda_target, policy="lru") as model:
        answer(model)
        model.position = 0
        device = model.atlas.shard_cache
        assert isinstance(device, DeviceCache)
        table = cuda_target.get(model.atlas.cache.table)
        absent = next(s for s in model.atlas.shards.schedule if table[s] < 0)
        page = device.host.page(absent)
        assert page is not None
        page[99] ^= 8
        logits = model.forward(PROMPT)
        with (
            ShardedModel(editions.new) as new,
            pytest.raises(GGUFShardError, match="a page has failed its check in a pass whose resu"),
        ):
            model.atlas.adopt(new)
        assert model.atlas.version == 0
        with pytest.raises(CorruptPageError, match=f"page {absent} "):
            cuda_target.get(logits)
        page[99] ^= 8
        model.atlas.adopt(ShardedModel(editions.new))
        assert answer(model) == editions.answer(editions.new, cuda_target)
