"""Threads beside an update: passes, reading ahead and whoever else uses the model wait for it, and
it for them.

On the CPU target, and on a GPU or in the simulator.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numba import config

from atlas.host_store import FileStore
from atlas.infer.generate import generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.live_update import ModelUpdatedError, UseLock
from atlas.shard_cache import ShardCache
from atlas.target import CpuTarget, Target
from forge.sharded_model import ShardedModel
from forge.sizes import Size
from tests import cache_factory as cache
from tests.update_factory import (
    MATRIX,
    N_TOKENS,
    PROMPT,
    TIMEOUT,
    Answer,
    Editions,
    answer,
    cpu_cache,
    in_thread,
    join,
    running,
    wait_for,
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


# ---- generating ----


@pytest.mark.parametrize("is_reset", [False, True])
def test_generating_ends_with_the_version_it_began_with(
    target: Target, editions: Editions, is_reset: bool
) -> None:
    """Even if the thread that updates the model has set the position to 0 as well."""
    seen: list[int] = []

    with running(editions.old, "50%", target) as model:

        def update() -> None:
            model.atlas.adopt(ShardedModel(editions.new))
            if is_reset:
                model.position = 0

        def on_token(token: int) -> None:
            seen.append(token)
            if len(seen) == N_TOKENS - 1:
                join(in_thread(update))

        with pytest.raises(ModelUpdatedError):
            generate(model, PROMPT, N_TOKENS, Sampler(0), on_token=on_token)
        assert seen == editions.answer(editions.old, target)[0][:-1]
        assert answer(model) == editions.answer(editions.new, target)


@pytest.mark.no_cover
def test_many_updates_under_a_thread_that_generates(target: Target, editions: Editions) -> None:
    """Whole answers of one version, or the clear error behind a part of one; both come up."""
    maps = [editions.old, editions.new]
    answers = [editions.answer(map_path, target) for map_path in maps]
    whole: list[Answer] = []
    parts: list[list[int]] = []
    errors: list[BaseException] = []
    is_over = threading.Event()

    with running(maps[0], "60%", target, policy="lru", prefetch_distance=2) as model:

        def work() -> None:
            while not is_over.is_set():
                seen: list[int] = []
                try:
                    model.position = 0
                    result = generate(model, PROMPT, N_TOKENS, Sampler(0), on_token=seen.append)
                    whole.append((result.tokens, result.prompt_logits.tobytes()))
                except ModelUpdatedError:
                    parts.append(seen)
                except BaseException as error:
                    errors.append(error)
                    return

        def came(n_before: int, wanted: Answer) -> bool:
            return bool(errors) or wanted in whole[n_before:]

        thread = in_thread(work)
        for i in range(1, 4 if config.ENABLE_CUDASIM else 24):
            model.atlas.adopt(ShardedModel(maps[i % 2]))
            if i % 4 in (1, 2):  # wait for a whole answer, of either version in turn
                wait_for(functools.partial(came, len(whole), answers[i % 2]))
        is_over.set()
        join(thread)
        cache.assert_at_rest(model.atlas)
    assert errors == []
    assert set(map(str, whole)) == set(map(str, answers))
    assert all(part in (a[0][: len(part)] for a in answers) for part in parts)


# ---- who waits for whom ----


def test_who_waits_is_next() -> None:
    lock, order = UseLock(), []

    def other() -> None:
        with lock:
            order.append("other")

    lock.__enter__()
    with lock, lock:  # again, by the same thread
        thread = in_thread(other)
        wait_for(lock._next.locked)
    assert order == []
    lock.__exit__()
    with lock:
        order.append("first")
    join(thread)
    assert order == ["other", "first"]


def test_an_update_waits_for_the_pass_under_way(target: Target, editions: Editions) -> None:
    with running(editions.old, "50%", target) as model:
        with model.atlas.in_use():
            thread = in_thread(lambda: model.atlas.adopt(ShardedModel(editions.new)))
            wait_for(model.atlas._use._next.locked)
            assert answer(model) == editions.answer(editions.old, target)
            assert model.atlas.version == 0
        join(thread)
        assert answer(model) == editions.answer(editions.new, target)


def test_an_update_waits_while_a_pass_goes_through_the_layers(
    target: Target, editions: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    with running(editions.old, "50%", target, policy="lru") as model:
        multiply = model.weights.multiply

        def update_meanwhile(*arguments: Any) -> None:
            if not threads:
                threads.append(in_thread(lambda: model.atlas.adopt(ShardedModel(editions.new))))
                wait_for(lambda: model.atlas._use._next.locked() or not threads[0].is_alive())
            multiply(*arguments)

        monkeypatch.setattr(model.weights, "multiply", update_meanwhile)
        logits = target.get(model.forward(PROMPT))
        assert logits.tobytes() == editions.answer(editions.old, target)[1]
        join(threads[0])
        assert answer(model) == editions.answer(editions.new, target)


USES: dict[str, Callable[[LlamaModel], object]] = {
    "forward": lambda model: model.forward([1]),
    "position": lambda model: setattr(model, "position", 0),
    "tensor": lambda model: model.atlas.tensor(MATRIX),
    "rows": lambda model: model.atlas.rows(model.weights.embedding, [0]),
    "swap": lambda model: model.atlas.atomic_swap(model.atlas.shards.schedule[:1]),
    "scrub": lambda model: model.atlas.scrub(1),
    "stats": lambda model: model.atlas.stats,
    "adopt": lambda model: model.atlas.adopt(ShardedModel(model.atlas.model.map_path)),
}


@pytest.mark.parametrize("name", list(USES))
def test_nobody_uses_a_model_whose_files_are_being_rewritten(
    target: Target, editions: Editions, name: str
) -> None:
    with running(editions.old, "50%", target) as model:
        done = threading.Event()
        with model.atlas.exclusive():
            thread = in_thread(lambda: (USES[name](model), done.set()))
            wait_for(model.atlas._use._next.locked)
            assert thread.is_alive() and not done.is_set()
        join(thread)
        assert done.is_set()


def test_nothing_is_read_ahead_while_files_are_rewritten(
    target: Target, editions: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Size(n_bytes=6 * 4096) if target.is_cuda else None
    with running(
        editions.old, "50%", target, policy="lru", prefetch_distance=2, host_memory=small
    ) as model:
        of_host = cpu_cache(model.atlas)
        answer(model)
        with model.atlas.exclusive():
            reads = count_reads(monkeypatch)
            with of_host._lock:
                want_ahead(of_host)
                assert not of_host._fetch_ahead()
            model.atlas.adopt(ShardedModel(editions.old))
            assert reads == []
        wait_for(lambda: bool(reads))  # then it goes on


def want_ahead(cache: ShardCache) -> None:
    """Let all that is not resident be read ahead."""
    with cache._lock:
        cache._wanted = np.flatnonzero(cache._is_cached & ~cache.pool.is_resident).tolist()
        assert cache._wanted
        cache._lock.notify_all()


def count_reads(patch: pytest.MonkeyPatch) -> list[int]:
    """The shards that are read from now on."""
    reads: list[int] = []
    read_shard = FileStore.read_shard

    def counted(store: FileStore, shard: int, buffer: np.ndarray) -> int:
        reads.append(shard)
        return read_shard(store, shard, buffer)

    patch.setattr(FileStore, "read_shard", counted)
    return reads


def test_what_was_being_read_ahead_is_not_there_after_the_update(
    editions: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update waits for a read of the old version, and then gives up what came of it."""
    reading, go_on = threading.Event(), threading.Event()
    read_shard = FileStore.read_shard

    def slow(store: FileStore, shard: int, buffer: np.ndarray) -> int:
        n_bytes = read_shard(store, shard, buffer)
        if threading.current_thread().name == "atlas-prefetch" and not go_on.is_set():
            reading.set()
            assert go_on.wait(TIMEOUT)
        return n_bytes

    with running(editions.old, "50%", policy="lru", prefetch_distance=2) as model:
        of_host = cpu_cache(model.atlas)
        answer(model)
        monkeypatch.setattr(FileStore, "read_shard", slow)
        want_ahead(of_host)
        assert reading.wait(TIMEOUT)
        thread = in_thread(lambda: model.atlas.adopt(ShardedModel(editions.new)))
        wait_for(lambda: of_host._n_pauses > 0)
        assert model.atlas.version == 0 and of_host._loading
        with of_host._lock:
            go_on.set()
            of_host._lock.notify_all()
        join(thread)
        cache.assert_at_rest(model.atlas)
        assert answer(model) == editions.answer(editions.new, CpuTarget())
        assert model.atlas.stats.prefetch_hits > 0
