"""How fast it could be: bandwidths of this machine, measured, and what they allow.

A dense model reads all its weights for every token. With `W` bytes of weights, of which `M` are
moved for each token over a link of bandwidth `B_link` into memory of bandwidth `B_mem`:

    seconds per token >= max(W / B_mem, M / B_link)

On the `cpu` target the link is a read from the file (or the page cache) into the pool. It runs on
the same memory, so the sum of both would be a tighter bound; the maximum is the one that holds
wherever the link is a bus of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from atlas.host_store import FileStore
from atlas.manager import Atlas
from atlas.ops.paged import PageCache
from atlas.ops.read_words import N_PARTS, read_words
from atlas.ops.stopwatch import Stopwatch
from atlas.target import CudaTarget, Target
from forge.pages import PAGE_BYTES
from forge.sgmap import ShardMap

_REPEATS = 3
_LINK_SAMPLE_BYTES = 64 << 20
_MEMORY_SAMPLE_BYTES = 256 << 20
_DEVICE_SAMPLE_BYTES = 1 << 30


def memory_bandwidth(target: Target, cache: PageCache) -> float | None:
    """Bytes a second at which the target's processors read the pool; the best of three.

    A pool that fits a processor's cache is read from there, by this measurement as by the
    mat-vecs. None in the simulator, whose time means nothing.
    """
    if not target.has_clock:
        return None
    sample = _DEVICE_SAMPLE_BYTES if target.is_cuda else _MEMORY_SAMPLE_BYTES
    words = cache.words[: min(cache.words.size, sample // 4)]
    parts = target.empty(N_PARTS, np.uint32)
    return 4 * words.size / _best_seconds(target, lambda: read_words(target, words, parts))


def _best_seconds(target: Target, work: Callable[[], object]) -> float:
    """Time of the fastest run behind one to warm up."""
    seconds = Stopwatch(target).seconds if isinstance(target, CudaTarget) else _seconds_of
    seconds(work)
    return min(seconds(work) for _ in range(_REPEATS))


def _seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def link_bandwidth(atlas: Atlas) -> float | None:
    """Bytes a second at which shards can be brought in from where they are, unchecked; the best of
    three.

    On the CPU target they are read from the file; on a GPU one copy is made from pinned memory to
    the device. None in the simulator.
    """
    if isinstance(atlas.target, CudaTarget):
        return _device_link_bandwidth(atlas.target) if atlas.target.has_clock else None
    return file_bandwidth(atlas)


def file_bandwidth(atlas: Atlas) -> float:
    """Bytes a second at which shards are read from the file into host memory, unchecked; the best
    of three passes over a sample spread over the scheduled shards."""
    store = FileStore(atlas.model)
    buffer = np.empty(store.shard_bytes, np.uint8)
    n = min(max(_LINK_SAMPLE_BYTES // store.shard_bytes, 1), len(atlas.shards.schedule))
    shards = [atlas.shards.schedule[i * len(atlas.shards.schedule) // n] for i in range(n)]
    n_bytes = sum(store.pages_of(shard) * PAGE_BYTES for shard in shards)

    def read() -> None:
        for shard in shards:
            store.read_shard(shard, buffer)

    return n_bytes / min(_seconds_of(read) for _ in range(_REPEATS))


def _device_link_bandwidth(target: CudaTarget) -> float:
    pinned = target.mapped(_LINK_SAMPLE_BYTES, np.uint8)
    pinned.host[:] = 1
    landing = target.empty(_LINK_SAMPLE_BYTES, np.uint8)
    seconds = _best_seconds(
        target, lambda: landing.copy_to_device(pinned.host, stream=target.stream)
    )
    return _LINK_SAMPLE_BYTES / seconds


def weight_bytes_per_pass(shard_map: ShardMap, schedule_shards: int) -> int:
    """Bytes of pages that a pass of a dense model reads."""
    return schedule_shards * shard_map.pages_per_shard * PAGE_BYTES


def decode_limit(
    bytes_read: float, bytes_moved: float, memory: float | None, link: float | None
) -> float:
    """Most tokens a second for one token at a time.

    Parameters
    ----------
    bytes_read, bytes_moved
        Weights read and moved per token.
    memory, link
        Bandwidths in bytes a second; an unknown one bounds nothing.
    """
    seconds = 0.0 if link is None else bytes_moved / link
    if memory is not None:
        seconds = max(seconds, bytes_read / memory)
    return 1.0 / seconds if seconds > 0 else float("inf")
