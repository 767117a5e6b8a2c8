"""A running model goes over to another version: the old one's answers before, the new one's after,
and never anything else.

On the CPU target, and on a GPU or in the simulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numba import config

from atlas.device_cache import DeviceCache
from atlas.errors import CorruptPageError
from atlas.infer.generate import generate
from atlas.infer.sampling import Sampler
from atlas.live_update import ModelUpdatedError, changed_shards
from atlas.target import CpuTarget, CudaTarget, Target
from forge.errors import GGUFShardError
from forge.sgmap_reader import load_map
from forge.sharded_model import ShardedModel
from forge.sizes import Size
from tests import cache_factory as cache
from tests.llama_factory import smallest_budget
from tests.update_factory import (
    EMBEDDING,
    MATRIX,
    MIXTURE,
    N_TOKENS,
    NEW_KEYS,
    NORM,
    OLD,
    PROMPT,
    Editions,
    answer,
    copy,
    page_of,
    rewrite,
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


# ---- before and after ----


@pytest.mark.parametrize("policy", ["lru", "pin"])
@pytest.mark.parametrize("budget", ["100%", "50%", "30%", "smallest"])
def test_the_old_answers_before_and_the_new_after(
    target: Target, editions: Editions, budget: str, policy: str
) -> None:
    options = {"policy": policy, "prefetch_distance": 2}
    size: str | Size = budget
    if budget == "smallest":
        n_bytes = smallest_budget(editions.old, target=target, n_context=8, n_batch=2, **options)
        size = Size(n_bytes=n_bytes)
    with running(editions.old, size, target, **options) as model:
        assert answer(model) == editions.answer(editions.old, target)
        further = [editions.with_tensors_of_new(MATRIX, NORM), editions.old]
        for to in (editions.new, *(further if not config.ENABLE_CUDASIM else [])):
            old = model.atlas.model
            model.atlas.adopt(ShardedModel(to))
            assert model.atlas.map == load_map(to)
            assert answer(model) == editions.answer(to, target)
            cache.assert_at_rest(model.atlas)
            with pytest.raises(ValueError, match="closed file"):
                old.read_checked(0, 1)
        assert target.peak_bytes <= model.atlas.budget_bytes


def test_the_versions_differ(editions: Editions) -> None:
    """Or nothing here would show anything."""
    partly = [editions.with_tensors_of_new(name) for name in (MATRIX, NORM, EMBEDDING)]
    answers = [editions.answer(m, CpuTarget()) for m in (editions.old, editions.new, *partly)]
    assert len({bits for _, bits in answers}) == len(answers)
    assert answers[0][0] != answers[1][0]


@pytest.mark.parametrize("n_expert_used", [2] if config.ENABLE_CUDASIM else [1, 2])
def test_mixtures_of_experts(target: Target, editions: Editions, n_expert_used: int) -> None:
    other = replace(MIXTURE, seed=3, n_expert_used=n_expert_used)
    old = editions.of("mixture", MIXTURE)
    new = editions.of(f"mixture {n_expert_used}", other)
    with running(old, "60%", target, policy="pin") as model:
        assert answer(model) == editions.answer(old, target)
        model.atlas.adopt(ShardedModel(new))
        assert answer(model) == editions.answer(new, target)
        cache.assert_at_rest(model.atlas)


@pytest.mark.parametrize("budget", ["100%", "50%"])
def test_files_rewritten_in_place(
    target: Target, editions: Editions, tmp_path: Path, budget: str
) -> None:
    """Each table refuses the other version's pages."""
    map_path = copy(editions.old, tmp_path / "live")
    with running(map_path, budget, target, policy="lru") as model:
        assert answer(model) == editions.answer(editions.old, target)
        with model.atlas.exclusive():
            rewrite(map_path, editions.new)
            with pytest.raises(CorruptPageError, match=r"token_embd\.weight"):
                model.atlas.rows(model.weights.embedding, [0])
            model.atlas.adopt(ShardedModel(map_path))
        assert answer(model) == editions.answer(editions.new, target)
        cache.assert_at_rest(model.atlas)
        rewrite(map_path, editions.old)  # behind its back
        with pytest.raises(CorruptPageError):
            answer(model)


def test_a_version_that_differs_in_its_header_alone(target: Target, editions: Editions) -> None:
    """Nothing moves, and yet all that knows the old header is of no use."""
    new = editions.of("other keys", replace(OLD, metadata=NEW_KEYS))
    with running(new, "100%", type(target)()) as model:
        expected = model.target.get(model.forward([1]))
    with running(editions.old, "100%", target, n_context=12) as model:
        generate(model, PROMPT, 5, Sampler(0))  # long enough to capture a graph
        before = model.atlas.stats.copy()
        model.atlas.adopt(ShardedModel(new))
        assert model.atlas.stats.since(before).bytes_moved == 0
        assert model.config.rms_norm_eps == pytest.approx(0.1)
        for _ in range(3):  # the last of them is replayed
            model.position = 0
            np.testing.assert_array_equal(target.get(model.forward([1])), expected)
        if model.decode_graph is not None:
            assert model.decode_graph.reason == "" and model.decode_graph._graph is not None


# ---- what moves ----


@pytest.mark.parametrize("policy", ["lru", "pin"])
def test_only_what_differs_is_read_again(target: Target, editions: Editions, policy: str) -> None:
    new = editions.with_tensors_of_new(MATRIX, NORM, EMBEDDING)
    with running(editions.old, "100%", target, policy=policy) as model:
        atlas = model.atlas
        answer(model)
        with ShardedModel(editions.old) as old, ShardedModel(new) as another:
            changed = changed_shards(old, another)
        cached = {*atlas.shards.high, *atlas.shards.schedule}
        n_looked_up = len(set(changed) - cached)
        assert 0 < n_looked_up < len(changed) < len(cached)
        before = atlas.stats.copy()
        atlas.adopt(ShardedModel(new))
        moved = atlas.stats.since(before).bytes_moved
        n_pinned = len(set(changed) & set(atlas.shards.high))
        expected = len(changed) - n_looked_up if policy == "pin" or target.is_cuda else n_pinned
        assert moved == expected * atlas.shard_bytes
        assert answer(model) == editions.answer(new, target)
        spent = atlas.stats.since(before)
        assert spent.bytes_moved == (len(changed) - n_looked_up) * atlas.shard_bytes
        cache.assert_at_rest(atlas)


def test_pinned_shards_come_in_again_at_once(target: Target, editions: Editions) -> None:
    options = {"policy": "pin", "prefetch_distance": 0}
    with running(editions.old, "80%", target, **options) as model:
        atlas = model.atlas
        assert 0 < atlas.plan.n_pinned < len(atlas.shards.schedule)
        atlas.adopt(ShardedModel(editions.new))
        n_resident = len(cache.resident(atlas))
        assert n_resident >= len(atlas.shards.high) + atlas.plan.n_pinned
        cache.assert_at_rest(atlas)


def test_shards_that_differ(editions: Editions) -> None:
    """By their digests, or by their CRCs should the digests say nothing."""
    new = editions.with_tensors_of_new(MATRIX)
    pages = range(page_of(new, MATRIX), page_of(new, MATRIX) + 1)
    with ShardedModel(editions.old) as old, ShardedModel(new) as other:
        changed = changed_shards(old, other)
        assert set(pages) <= set(changed)
        tensors = {old.map.tensor_of_page(page) for page in changed}
        assert tensors == {MATRIX}
        assert changed_shards(old, old) == []
        for by_crcs, by_digests in ((True, False), (False, True), (False, False)):
            with ShardedModel(new) as alike:
                if not by_crcs:
                    alike.page_crc32 = old.page_crc32
                if not by_digests:
                    alike.map = replace(alike.map, shard_xxh3_64=old.map.shard_xxh3_64)
                assert changed_shards(old, alike) == (changed if by_crcs or by_digests else [])


@pytest.mark.parametrize("room", [None, 7])
def test_host_memory_goes_over_as_well(
    cuda_target: CudaTarget, editions: Editions, room: int | None
) -> None:
    memory = None if room is None else Size(n_bytes=room * 4096)
    with running(editions.old, "50%", cuda_target, policy="lru", host_memory=memory) as model:
        answer(model)
        model.atlas.adopt(ShardedModel(editions.new))
        assert answer(model) == editions.answer(editions.new, cuda_target)
        device = model.atlas.shard_cache
        assert isinstance(device, DeviceCache)
        cache.assert_consistent(device.host.pool, model.atlas.model)
        kept = np.flatnonzero(device.host.addresses)
        assert (len(kept) == len(model.atlas.shards.schedule)) == (room is None)
        for shard in kept.tolist():
            frame = device.host.pool.frame_of(shard)
            assert device.host.addresses[shard] == device.host.pool.address(frame)
        addresses = cuda_target.get(device.queue._host_address)
        np.testing.assert_array_equal(addresses, device.host.addresses)


# ---- sequences ----


def test_a_sequence_that_has_begun_is_over(target: Target, editions: Editions) -> None:
    with running(editions.old, "50%", target) as model:
        model.forward([1, 7])
        model.atlas.adopt(ShardedModel(editions.new))
        for _ in range(2):
            assert model.position == 0
            with pytest.raises(ModelUpdatedError, match="the model was updated: its sequence star"):
                model.forward([3])
        with pytest.raises(ModelUpdatedError):
            model.position = 1
        with pytest.raises(ModelUpdatedError):
            generate(model, PROMPT, N_TOKENS, Sampler(0))
        model.position = 0
        with pytest.raises(GGUFShardError, match="position 1: 0 have been seen"):
            model.position = 1  # the keys there are of the old version
        assert answer(model) == editions.answer(editions.new, target)


def test_a_sequence_that_has_not_begun_begins(target: Target, editions: Editions) -> None:
    with running(editions.old, "50%", target) as model:
        model.atlas.adopt(ShardedModel(editions.new))
        result = generate(model, PROMPT, N_TOKENS, Sampler(0))
        assert result.tokens == editions.answer(editions.new, target)[0]


def test_positions_that_have_been_seen(editions: Editions) -> None:
    with running(editions.old, "100%") as model:
        model.forward([1, 7, 3])
        for position in (3, 1, 0, 3):
            model.position = position
            assert model.position == position
        for position in (4, -1):
            with pytest.raises(GGUFShardError, match=f"^position {position}: 3 have been seen$"):
                model.position = position
