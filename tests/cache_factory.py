"""Models for the tests of the cache, a store that fails on demand, and what must always hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from atlas.device_cache import DeviceCache
from atlas.frame_pool import FramePool
from atlas.host_store import FileStore
from atlas.manager import Atlas
from atlas.model_shards import is_expert
from atlas.ops.swap_state import FREE_HEAD, GATHERED, N_FREE, TICK
from experiments.validation import gguf_factory as factory
from forge.core_file import page_offset
from forge.shard import ShardOptions, shard_model
from forge.sharded_model import ShardedModel


def dense_model(n_layers: int = 4, seed: int = 0) -> bytes:
    """Layers of 15 pages whose rows lie across pages, and six pages of output."""
    types = GGMLQuantizationType
    tensors = [factory.tensor("token_embd.weight", types.Q8_0, (32, 130), seed + 1)]
    for i in range(n_layers):
        of_layer = seed + 10 * i
        tensors += [
            factory.tensor(f"blk.{i}.attn_norm.weight", types.F32, (32,), of_layer + 2),
            factory.tensor(f"blk.{i}.attn_q.weight", types.F32, (96, 50), of_layer + 3),
            factory.tensor(f"blk.{i}.ffn_down.weight", types.Q8_0, (96, 390), of_layer + 4),
        ]
    tensors.append(factory.tensor("output.weight", types.Q6_K, (256, 100), seed + 5))
    return factory.gguf(tensors)


def shard(folder: Path, data: bytes, **options: Any) -> Path:
    """Shard a model in a folder; returns its map."""
    source = factory.write(folder / "model.gguf", data)
    return shard_model(source, folder, ShardOptions(**options))


def write_page(map_path: Path, page: int, content: bytes) -> None:
    """Overwrite a page of a sharded model in place, under its readers."""
    with open(map_path.with_suffix(".gguf"), "r+b") as core:
        core.seek(page_offset(page))
        core.write(content)
        core.flush()
        os.fsync(core.fileno())


def read_page(map_path: Path, page: int) -> bytes:
    """A page as it is in the file."""
    with open(map_path.with_suffix(".gguf"), "rb") as core:
        core.seek(page_offset(page))
        return core.read(4096)


def flip_bit(map_path: Path, page: int, byte: int = 100) -> None:
    """Flip the lowest bit of a byte of a page."""
    content = bytearray(read_page(map_path, page))
    content[byte] ^= 1
    write_page(map_path, page, bytes(content))


class UnpinnedArray:
    """`MappedArray` without a device."""

    def __init__(self, n: int, dtype: np.dtype[Any]) -> None:
        self.host = np.empty(n, dtype)
        self.address = int(self.host.ctypes.data)


class FaultyStore(FileStore):
    """A store whose reads of some shards come back with a bit flipped.

    Attributes
    ----------
    faults
        How many more reads of a shard fail.
    """

    def __init__(self, model: ShardedModel) -> None:
        super().__init__(model)
        self.faults: dict[int, int] = {}

    def read_shard(self, shard: int, buffer: np.ndarray) -> int:
        n_bytes = super().read_shard(shard, buffer)
        if self.faults.get(shard, 0) > 0:
            self.faults[shard] -= 1
            buffer[7] ^= 16
        return n_bytes


def install_faulty_store(atlas: Atlas) -> FaultyStore:
    """Let an open Atlas read its shards from a store that can fail."""
    store = FaultyStore(atlas.model)
    atlas.shard_cache._swapper.store = store
    return store


def resident(atlas: Atlas) -> list[int]:
    """The shards that the table says are resident."""
    return np.flatnonzero(atlas.target.get(atlas.cache.table) >= 0).tolist()


def assert_consistent(pool: FramePool, model: ShardedModel) -> None:
    """Table, frames, mirror and contents agree; to be called while nothing is under way."""
    table = pool.target.get(pool.table)
    frame_shard = pool.target.get(pool.frame_shard)
    held = pool.target.get(pool.held)
    shards = np.flatnonzero(table >= 0)
    frames = np.flatnonzero(frame_shard >= 0)
    assert dict(zip(shards, table[shards], strict=True)) == dict(
        zip(frame_shard[frames], frames, strict=True)
    )
    np.testing.assert_array_equal(np.flatnonzero(pool.is_resident), shards)
    assert pool.n_free == pool.n_frames - len(shards)
    assert (held >= 0).all() and not held[frame_shard < 0].any()
    per_shard = model.map.pages_per_shard
    for shard in shards.tolist():
        first = shard * per_shard
        expected = model.read_checked(first, min(per_shard, model.map.n_pages - first))
        found = pool.target.get(pool.frame(int(table[shard])))[: expected.size]
        np.testing.assert_array_equal(found, expected.reshape(-1))


def assert_at_rest(atlas: Atlas) -> None:
    """Once nothing is under way: tables, mirrors and contents agree, frames to be kept free are
    free, and held are the shards in use and those read ahead."""
    if isinstance(atlas.shard_cache, DeviceCache):
        _assert_device_at_rest(atlas, atlas.shard_cache)
        return
    with atlas.shard_cache._lock:
        while atlas.shard_cache._loading:
            atlas.shard_cache._lock.wait(10)
        assert_consistent(atlas.shard_cache.pool, atlas.model)
        n_cached = atlas.shape.n_shards
        kept = atlas.plan.reserve if atlas.plan.n_frames < n_cached else 0
        assert atlas.shard_cache.pool.n_free >= kept
        held = {s for s in resident(atlas) if _uses(atlas, s)}
        in_use = set() if atlas.shard_cache._current is None else set(range(*_bounds(atlas)))
        if not atlas.shard_cache._complete:
            assert held == in_use | atlas.shard_cache._ahead


def _assert_device_at_rest(atlas: Atlas, cache: DeviceCache) -> None:
    target, swap = atlas.target, cache.queue.state
    target.synchronize()
    cache.check()
    table = target.get(atlas.cache.table)
    np.testing.assert_array_equal(table, target.get(swap.planned))
    frame_shard, state = target.get(swap.frame_shard), target.get(swap.state)
    shards, frames = np.flatnonzero(table >= 0), np.flatnonzero(frame_shard >= 0)
    assert dict(zip(shards, table[shards], strict=True)) == dict(
        zip(frame_shard[frames], frames, strict=True)
    )
    assert state[TICK] == state[GATHERED] == cache.queue.tick
    n_free = int(state[N_FREE])
    assert n_free == len(frame_shard) - len(frames) and n_free >= cache._kept_free
    ring = target.get(swap.free_frames)
    free = [int(ring[(state[FREE_HEAD] + i) % len(ring)]) for i in range(n_free)]
    assert sorted(free) == np.flatnonzero(frame_shard < 0).tolist()
    content = target.get(atlas.cache.frames).reshape(len(frame_shard), -1)
    per_shard = atlas.map.pages_per_shard
    for shard in shards.tolist():
        first = shard * per_shard
        expected = atlas.model.read_checked(first, min(per_shard, atlas.map.n_pages - first))
        found = content[table[shard]][: expected.size]
        np.testing.assert_array_equal(found, expected.reshape(-1))


def _uses(atlas: Atlas, shard: int) -> int:
    frame = atlas.target.get(atlas.shard_cache.pool.cache.table)[shard]
    return int(atlas.target.get(atlas.shard_cache.pool.held)[frame])


def _bounds(atlas: Atlas) -> tuple[int, int]:
    assert atlas.shard_cache._current is not None
    return atlas.shard_cache._current[0], atlas.shard_cache._current[1] + 1


def walk(atlas: Atlas, n_passes: int = 1) -> None:
    """Use every band of every scheduled tensor in order, as a dense pass does."""
    high = set(atlas.shards.high)
    shift = atlas.map.shard_shift
    for _ in range(n_passes):
        for tensor in atlas.shards.cached:
            if is_expert(tensor) or tensor.slices[0].first_page >> shift in high:
                continue
            for band in atlas.bands(atlas.matrix(tensor.name)):
                atlas.acquire(band)
