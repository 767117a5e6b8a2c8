"""Swaps beside compute, in any order that events permit: what compute reads is there.

In the simulator only: on a GPU the order is the hardware's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import config

from atlas import budget, swap_queue
from atlas.device_cache import DeviceCache
from atlas.errors import CorruptPageError
from atlas.eviction import CacheShape, PoolPlan, plan_pool
from atlas.manager import Atlas
from atlas.model_shards import Band
from atlas.ops.select import DEMAND
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.sharded_model import ShardedModel
from forge.sizes import Size
from tests import cache_factory as cache
from tests.stream_simulator import StreamTarget

pytestmark = pytest.mark.cuda

N_STEPS = 32


class Compute:
    """Steps of compute that look at the shards of their band, when they begin and when they end.

    Attributes
    ----------
    absent, wrong
        What a step did not find, and what it found changed.
    """

    def __init__(self, atlas: Atlas) -> None:
        self.atlas = atlas
        self.absent: list[int] = []
        self.wrong: list[int] = []
        self.table, self.frames = atlas.cache.table._ary, atlas.cache.frames._ary

    def step(self, band: Band) -> None:
        self.atlas.acquire(band)
        for _ in ("begin", "end"):
            self.atlas.target.stream.put(lambda: self._look(band))

    def _look(self, band: Band) -> None:
        n_bytes = self.atlas.shard_bytes
        for shard in range(band.first_shard, band.last_shard + 1):
            frame = int(self.table[shard])
            if frame < 0:
                self.absent.append(shard)
                continue
            expected = self.atlas.model.read_checked(shard, 1).reshape(-1)
            found = self.frames[frame * n_bytes : (frame + 1) * n_bytes]
            if not np.array_equal(found, expected):
                self.wrong.append(shard)


def bands(atlas: Atlas) -> list[Band]:
    """Those of a pass, in order."""
    tensors = [t for t in atlas.shards.cached if t.slices[0].zone != "high"]
    return [band for t in tensors for band in atlas.bands(atlas.matrix(t.name))]


def plan_with_larger_loads(
    shape: CacheShape, n_frames: int, *arguments: Any, **options: Any
) -> PoolPlan:
    """As for a large model: loads of two shards, and frames for two loads kept free."""
    plan = plan_pool(shape, n_frames - 4, *arguments, **options)
    return replace(plan, n_frames=plan.n_frames + 4, reserve=plan.reserve + 3)


def opened(
    tmp_path: Path, patch: pytest.MonkeyPatch, seed: int, host_memory: Size | None = None
) -> tuple[Atlas, StreamTarget, random.Random]:
    """A model of a page a shard, and a plan, of this seed."""
    if not config.ENABLE_CUDASIM:
        pytest.skip("streams of a GPU take the order they like")
    map_path = cache.shard(tmp_path, cache.dense_model(1), pages_per_shard=1)
    draw, target = random.Random(seed), StreamTarget(seed, patch)
    patch.setattr(swap_queue, "_LIST_NUMBERS", 16)
    patch.setattr(swap_queue, "ARE_COPIED", seed >= 5)
    if seed % 5 in (1, 2, 3):
        patch.setattr(budget, "plan_pool", plan_with_larger_loads)
    atlas = Atlas.open(
        map_path, f"{draw.uniform(40, 90):.0f}%", target,
        policy=("lru", "mru", "pin")[seed % 3], prefetch_distance=draw.randrange(5),
        host_memory=host_memory,
    )  # fmt: skip
    return atlas, target, draw


def refuse(source: int, lane: int) -> None:
    raise AssertionError("a page did not hold when it was looked at")


def do_something_else(atlas: Atlas, draw: random.Random) -> None:
    chance = draw.random()
    if chance < 0.1:
        atlas.target.get(atlas.cache.table)
    elif chance < 0.3:
        atlas.scrub(20)
    elif chance < 0.4:
        wanted = draw.sample(atlas.shards.schedule, draw.randint(1, 3))
        try:
            atlas.atomic_swap(wanted)
        except GGUFShardError as error:
            assert "at once" in str(error)


@pytest.mark.parametrize("seed", range(10))
def test_compute_finds_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    small = Size(n_bytes=12 * PAGE_BYTES)
    atlas, _, draw = opened(tmp_path, monkeypatch, seed, small if seed % 2 else None)
    monkeypatch.setattr("atlas.ops.gather.fetch_page_anew", refuse)  # copies have come in time
    with atlas:
        compute, order = Compute(atlas), bands(atlas)
        for i in range(N_STEPS):
            compute.step(order[i % len(order)] if draw.random() < 0.9 else draw.choice(order))
            do_something_else(atlas, draw)
        cache.assert_at_rest(atlas)
        assert atlas.stats.bytes_moved > atlas.stats.bytes_filled
        assert (compute.absent, compute.wrong) == ([], [])


@pytest.mark.parametrize("seed", range(10))
def test_no_result_leaves_once_compute_has_missed_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    atlas, target, draw = opened(tmp_path, monkeypatch, seed)
    result = target.full(1, 7, np.int32)
    n_faults = 0
    with atlas:
        assert isinstance(atlas.shard_cache, DeviceCache)
        compute, order, host = Compute(atlas), bands(atlas), atlas.shard_cache.host
        mend: list[Callable[[], None]] = []
        for i in range(N_STEPS):
            if i % 5 == 4:  # some page that is to come
                absent = [p for p in atlas.shards.schedule if compute.table[p] < 0]
                pages = [page for page in map(host.page, absent) if page is not None]
                mend.append(flip(draw.choice(pages)))
            try:
                compute.step(order[i % len(order)])
                if draw.random() < 0.3 or i == N_STEPS - 1:
                    target.get(result)
                    assert compute.absent == compute.wrong == []  # or the error would have come
            except CorruptPageError:
                n_faults += 1
                for turn_back in mend:
                    turn_back()
                mend.clear()
                # Gathers change nothing behind a fault, copies may.
                assert not compute.wrong or swap_queue.ARE_COPIED
                compute.absent.clear()
                compute.wrong.clear()
                cache.assert_at_rest(atlas)
        assert n_faults > 0


@pytest.mark.parametrize("seed", range(10))
def test_compute_finds_the_version_it_was_queued_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    small = Size(n_bytes=12 * PAGE_BYTES)
    atlas, _, draw = opened(tmp_path, monkeypatch, seed, small if seed % 2 else None)
    (tmp_path / "new").mkdir()
    new = cache.shard(tmp_path / "new", cache.dense_model(1, seed=100), pages_per_shard=1)
    versions = [atlas.model.map_path, new]
    with atlas:
        compute, order = Compute(atlas), bands(atlas)
        for i in range(N_STEPS):
            compute.step(order[i % len(order)])
            if draw.random() < 0.2:
                atlas.adopt(ShardedModel(versions[(atlas.version + 1) % 2]))
        assert atlas.version > 1
        cache.assert_at_rest(atlas)
        assert (compute.absent, compute.wrong) == ([], [])


def flip(page: np.ndarray) -> Callable[[], None]:
    """Flip a bit of a page; returns what turns it back."""

    def turn() -> None:
        page[99] ^= 8

    turn()
    return turn


@pytest.mark.parametrize("seed", [0, 1])
def test_lists_stay_until_their_selects_have_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    atlas, target, _ = opened(tmp_path, monkeypatch, seed)
    with atlas:
        assert isinstance(atlas.shard_cache, DeviceCache)
        queue, table = atlas.shard_cache.queue, target.get(atlas.cache.table)
        streamed = [s for s in atlas.shards.schedule if table[s] < 0]
        monkeypatch.setattr(swap_queue, "_LIST_NUMBERS", 3)
        wanted = [(streamed[i], streamed[i - 2]) for i in range(2, 6)]
        for pair in wanted:  # each takes the place of the one before
            queue.queue(pair, DEMAND, queue.tick, 0, queue.compute_so_far())
        target.synchronize()
        assert {s for pair in wanted for s in pair} <= set(cache.resident(atlas))
        cache.assert_at_rest(atlas)
