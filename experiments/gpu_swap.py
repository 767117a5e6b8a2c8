"""GPU cases about swaps: from pinned host memory into frames, checked and published on the way.

    gpu-swap            select and gather of some shards, GB/s
    gpu-swap-latency    the same, from the host's call until it is done
    gpu-gather          the gather alone, of single pages that lie anywhere
    gpu-select, gpu-publish, gpu-select-publish
                        what a swap costs beside the copy, in a pool of many frames

The limit is one large copy from pinned memory. The peer is the same without the check, by a kernel
that exists for this comparison only.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atlas.ops.gather import gather
from atlas.ops.lru import RANK_NORMAL
from atlas.ops.paged import PageCache
from atlas.ops.select import select
from atlas.ops.swap_state import (
    MAX_INCOMING,
    N_COUNTS,
    N_FAULT,
    N_IN,
    N_RECORDS,
    new_swap_state,
)
from atlas.ops.unchecked_gather import unchecked_gather_kernel
from atlas.ops.warp_page import (
    PAGE_THREADS,
)
from atlas.swap_queue import GATHER_BLOCKS
from experiments.bench import Case, Variant
from experiments.cases import OURS
from experiments.gpu_bench import GpuBench
from experiments.machine_limits import Best
from forge.pages import PAGE_BYTES, tag_pages

UNCHECKED = "without the check"
LINK = "pinned copy"


@dataclass(frozen=True)
class SwapCases:
    """Parameters.

    Attributes
    ----------
    shard_shift
        log2 of the pages of a shard.
    n_frames
        Of the pool, a multiple of all that a list may have (`Scan`); twice as many shards are in
        host memory.
    swap_shards
        Shards of one swap.
    gather_pages, gather_blocks
        Pages and thread blocks of one gather.
    select_frames, select_shards
        Frames of the pool, and shards of a swap, where a select is measured.
    """

    shard_shift: int
    n_frames: int
    swap_shards: tuple[int, ...]
    gather_pages: int
    gather_blocks: tuple[int, ...]
    select_frames: int
    select_shards: int


CASES = SwapCases(8, 256, (1, 4, 16, 64, 256), 1 << 16, (8, GATHER_BLOCKS, 32), 10_000, 16)
REHEARSAL = SwapCases(1, 6, (1, 2), 4, (GATHER_BLOCKS,), 6, 2)


class Pool:
    """Random pages in pinned memory, and frames for some of them.

    Parameters
    ----------
    bench
        The session.
    n_frames, n_shards
        Frames on the device, shards in host memory.
    shard_shift
        log2 of the pages of a shard.

    Attributes
    ----------
    host
        uint8 [n_shards, bytes of a shard], the pages in pinned memory.
    addresses
        uint64 [n_shards], where the device finds them.
    """

    def __init__(self, bench: GpuBench, n_frames: int, n_shards: int, shard_shift: int) -> None:
        target = self.target = bench.target
        self.n_frames, self.n_shards = n_frames, n_shards
        self.shard_bytes = PAGE_BYTES << shard_shift
        self.n_pages = n_shards << shard_shift
        self._pinned = target.mapped(n_shards * self.shard_bytes // 4, np.uint32)
        self._pinned.host[:] = bench.random_words(self._pinned.host.size)
        self.host = self._pinned.host.view(np.uint8).reshape(n_shards, self.shard_bytes)
        self._page_crc32 = target.put(tag_pages(self.host.reshape(-1, PAGE_BYTES)))
        self.addresses = np.uint64(self._pinned.address) + np.uint64(self.shard_bytes) * np.arange(
            n_shards, dtype=np.uint64
        )
        frames = target.empty(n_frames * self.shard_bytes, np.uint8)
        table = target.full(n_shards, -1, np.int32)
        self.cache = PageCache(frames, table, shard_shift, frames.view(np.uint32))
        self._fault = target.mapped(N_FAULT, np.uint32)
        self.empty()
        self._new_state = target.put(target.get(self.state.state))

    def empty(self) -> None:
        """All frames are free."""
        self._fault.host[:] = 0
        self.state = new_swap_state(
            self.target, self.n_frames, np.full(self.n_shards, RANK_NORMAL, np.uint8),
            self.target.put(self.addresses), self._fault,
        )  # fmt: skip
        self.target.write(self.cache.table, np.full(self.n_shards, -1, np.int32))

    def select(self, shards: Any) -> None:
        """Queue a select that keeps as many frames free as there are shards in a list."""
        select(self.target, self.state, shards, 0, len(shards), newest_first=False)

    def gather(self, is_checked: bool, blocks: int = GATHER_BLOCKS) -> None:
        """Queue the gather of the next record."""
        s = self.state
        if is_checked:
            gather(self.target, s, self.cache, self._page_crc32, self.n_pages, blocks)
            return
        unchecked_gather_kernel.launch(
            self.target, blocks, PAGE_THREADS, self.cache.words, self.cache.table,
            self.cache.shard_shift, self.n_pages, s.state, s.counts, s.incoming, s.frames,
            s.outgoing, s.sources, s.failed,
        )  # fmt: skip

    def set_record(self, shards: np.ndarray, frames: np.ndarray) -> None:
        """Let `regather` bring these shards into these frames: a record of any length."""
        target, counts = self.target, np.zeros(N_RECORDS * N_COUNTS, np.int32)
        counts[N_IN] = len(shards)
        self.state = self.state._replace(
            counts=target.put(counts),
            incoming=target.put(shards.astype(np.int32)),
            frames=target.put(frames.astype(np.int32)),
            sources=target.put(self.addresses[shards]),
        )

    def regather(self, is_checked: bool, blocks: int) -> None:
        """Queue the gather of the record that has been set, whatever has been gathered."""
        self.state.state.copy_to_device(self._new_state, stream=self.target.stream)
        self.gather(is_checked, blocks)

    def forget(self) -> None:
        """Nothing is resident, as far as the table says; the frames hold something else."""
        self.target.write(self.cache.table, np.full(self.n_shards, -1, np.int32))
        self.target.write(self.cache.words, np.zeros(self.cache.words.size, np.uint32))

    def holds(self, shards: Sequence[int] | np.ndarray) -> bool:
        """Whether these shards are resident and no others, byte for byte."""
        table = self.target.get(self.cache.table)
        resident = np.flatnonzero(table >= 0)
        if self._fault.host.any() or not np.array_equal(resident, np.sort(np.asarray(shards))):
            return False
        frames = self.target.get(self.cache.frames).reshape(self.n_frames, self.shard_bytes)
        return np.array_equal(frames[table[resident]], self.host[resident])


class Scan:
    """All shards of a pool, again and again in one order, a list at a time.

    With the least recently wanted given up first, and twice as many shards as frames, each of them
    is missing when its turn comes. Lists have `n` shards or, if that is more than one select can
    take, `MAX_INCOMING`; so many frames are kept free, and whole lists are in the others.
    """

    def __init__(self, pool: Pool, n: int, order: np.ndarray) -> None:
        self._pool = pool
        self._order = order
        step = min(n, MAX_INCOMING)
        self._lists = [
            pool.target.put(order[i : i + step].astype(np.int32))
            for i in range(0, len(order), step)
        ]
        self._per_swap = -(-n // step)
        self.n_swaps = len(self._lists) // self._per_swap
        self._n_kept_free = step
        self._endless = itertools.cycle(self._lists)

    def swap(self, is_checked: bool) -> None:
        """Queue the next swap."""
        for shards in self.take(self._per_swap):
            self._pool.select(shards)
            self._pool.gather(is_checked)

    def take(self, n: int) -> Iterator[Any]:
        """The next lists."""
        return itertools.islice(self._endless, n)

    def is_right(self, is_checked: bool) -> bool:
        """Whether the last of all shards are resident after one turn."""
        self._endless = itertools.cycle(self._lists)
        self._pool.empty()  # fewer frames have been kept free by a scan with shorter lists
        for _ in range(self.n_swaps):
            self.swap(is_checked)
        n_resident = self._pool.n_frames - self._n_kept_free
        return self._pool.holds(self._order[-n_resident:])


def swaps(bench: GpuBench) -> list[dict[str, Any]]:
    """All cases of this module."""
    cases = REHEARSAL if bench.is_rehearsal else CASES
    link = Best(bench.capacity.link)
    return [
        *_swap_rows(bench, cases, link),
        *_gather_rows(bench, cases, link),
        *_select_rows(bench, cases),
    ]


def _swap_rows(
    bench: GpuBench, cases: SwapCases, link: Callable[[], float]
) -> list[dict[str, Any]]:
    """Select and gather in turn: how much a second, and how long the host waits."""
    pool = Pool(bench, cases.n_frames, 2 * cases.n_frames, cases.shard_shift)
    rows = []
    for order_name, order in _orders(bench, pool.n_shards).items():
        for n in cases.swap_shards:
            scan = Scan(pool, n, order)
            params = {"shards": n, "order": order_name, "KiB a shard": pool.shard_bytes >> 10}
            rows += bench.measure(
                Case("gpu-swap", "GB/s", params),
                [_swap_variant(bench, scan, n * pool.shard_bytes, c, link) for c in (True, False)],
            )
            rows += bench.measure(
                Case("gpu-swap-latency", "us", params, "lower"),
                [_latency_variant(bench, scan, n * pool.shard_bytes, link)],
            )
    return rows


def _swap_variant(
    bench: GpuBench, scan: Scan, n_bytes: int, is_checked: bool, link: Callable[[], float]
) -> Variant:
    def measured() -> float:
        return n_bytes / bench.stopwatch.seconds(lambda: scan.swap(is_checked)) / 1e9

    return Variant(_name(is_checked), measured, lambda: scan.is_right(is_checked), link, LINK)


def _latency_variant(
    bench: GpuBench, scan: Scan, n_bytes: int, link: Callable[[], float]
) -> Variant:
    def measured() -> float:
        bench.target.synchronize()
        started = time.perf_counter()
        scan.swap(is_checked=True)
        bench.target.synchronize()
        return 1e6 * (time.perf_counter() - started)

    return Variant(
        OURS, measured, lambda: scan.is_right(is_checked=True),
        lambda: n_bytes / (1e3 * (link() or math.inf)), LINK,
    )  # fmt: skip


def _gather_rows(
    bench: GpuBench, cases: SwapCases, link: Callable[[], float]
) -> list[dict[str, Any]]:
    """One kernel, many pages: what the data pass itself can do."""
    n = cases.gather_pages
    pool = Pool(bench, n, n, 0)
    rows = []
    for order_name, order in _orders(bench, n).items():
        pool.set_record(order, np.roll(order, n // 2))
        for blocks in cases.gather_blocks:
            params = {"order": order_name, "pages": n, "blocks": blocks}
            rows += bench.measure(
                Case("gpu-gather", "GB/s", params),
                [_gather_variant(bench, pool, c, blocks, link) for c in (True, False)],
            )
    return rows


def _gather_variant(
    bench: GpuBench, pool: Pool, is_checked: bool, blocks: int, link: Callable[[], float]
) -> Variant:
    def measured() -> float:
        seconds = bench.stopwatch.seconds(lambda: pool.regather(is_checked, blocks))
        return pool.host.nbytes / seconds / 1e9

    def is_right() -> bool:
        pool.forget()
        pool.regather(is_checked, blocks)
        return pool.holds(range(pool.n_shards))

    return Variant(_name(is_checked), measured, is_right, link, LINK)


def _select_rows(bench: GpuBench, cases: SwapCases) -> list[dict[str, Any]]:
    """What is done for pages of 4 KiB, of which there is nothing to speak of to copy."""
    n_frames, n = cases.select_frames, cases.select_shards
    pool = Pool(bench, n_frames, 2 * n_frames, 0)
    scan = Scan(pool, n, _orders(bench, pool.n_shards)["random"])
    n_ahead = N_RECORDS - 1  # selects before their gathers

    def select_all() -> None:
        for shards in scan.take(n_ahead):
            pool.select(shards)

    def gather_all() -> None:
        for _ in range(n_ahead):
            pool.gather(is_checked=True)

    def swap_all() -> None:
        for _ in range(n_ahead):
            scan.swap(is_checked=True)

    def selecting() -> float:
        seconds = bench.stopwatch.seconds(select_all)
        gather_all()
        return 1e6 * seconds / n_ahead

    def publishing() -> float:
        select_all()
        return 1e6 * bench.stopwatch.seconds(gather_all) / n_ahead

    def swapping() -> float:
        return 1e6 * bench.stopwatch.seconds(swap_all) / n_ahead

    params = {"frames": n_frames, "shards": n}
    rows = []
    for name, measured in (
        ("gpu-select", selecting), ("gpu-publish", publishing), ("gpu-select-publish", swapping),
    ):  # fmt: skip
        variant = Variant(OURS, measured, lambda: scan.is_right(is_checked=True))
        rows += bench.measure(Case(name, "us", params, "lower"), [variant])
    return rows


def _orders(bench: GpuBench, n: int) -> dict[str, np.ndarray]:
    return {
        "contiguous": np.arange(n),
        "random": np.random.default_rng(bench.seed).permutation(n),
    }


def _name(is_checked: bool) -> str:
    return OURS if is_checked else UNCHECKED
