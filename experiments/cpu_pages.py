"""CPU cases about pages: sharding, verifying, checksums, swaps."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
import zlib
from itertools import cycle, islice
from typing import Any

import numba
import numpy as np

from atlas.limits import file_bandwidth
from atlas.manager import Atlas
from experiments.bench import Case, Variant, measure
from experiments.cases import OURS
from experiments.cpu_session import Session
from experiments.machine_limits import (
    Best,
    file_read_seconds,
    hash_bandwidth,
    read_bandwidth,
    write_bandwidth,
)
from forge import crc32
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.sgmap import core_path
from forge.sgmap_reader import load_map
from forge.shard import shard_model
from forge.verify import verify_model

_SWAPS = 32


def shard(session: Session) -> list[dict[str, Any]]:
    """Sharding against copying the file and hashing it, one after the other."""
    model = session.first_model()
    name, size = session.name(model), model.stat().st_size
    folder = session.folder / "shard-case"
    copy = session.folder / "copy.gguf"

    def timed(work: Any) -> float:
        shutil.rmtree(folder, ignore_errors=True)
        copy.unlink(missing_ok=True)
        os.sync()  # nobody pays for what another has left to be written
        started = time.perf_counter()
        work()
        return size / (time.perf_counter() - started) / 1e6

    def copy_and_hash() -> None:
        subprocess.run(["cp", str(model), str(copy)], check=True)
        subprocess.run(["sha256sum", str(copy)], check=True, capture_output=True)

    def is_right() -> bool:
        map_path = shard_model(model, folder, force=True)
        with open(model, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(8 << 20):
                digest.update(chunk)
        same = load_map(map_path).source[0].sha256 == digest.hexdigest()
        return same and verify_model(map_path, threads=session.threads).ok

    limits = {"SHA-256": hash_bandwidth(), "disk": write_bandwidth(session.folder)}
    slowest = min(limits, key=lambda key: limits[key])
    variants = [
        Variant(
            OURS, lambda: timed(lambda: shard_model(model, folder)), is_right,
            limits[slowest] / 1e6, slowest,
        )
    ]  # fmt: skip
    if shutil.which("cp") and shutil.which("sha256sum"):
        variants.append(
            Variant(
                "cp + sha256sum", lambda: timed(copy_and_hash), lambda: True,
                limits["SHA-256"] / 1e6, "SHA-256",
            )
        )  # fmt: skip
    try:
        return measure(
            Case("shard", "MB/s", {"model": name}), variants,
            repeats=session.cases.repeats, seed=session.seed,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        copy.unlink(missing_ok=True)


def verify(session: Session) -> list[dict[str, Any]]:
    """Verifying pages that are in the page cache."""
    model = session.first_model()
    map_path = session.sharded(model)
    pages = core_path(map_path)
    size = pages.stat().st_size

    def measured() -> float:
        started = time.perf_counter()
        verify_model(map_path, threads=session.threads)
        return size / (time.perf_counter() - started) / 1e9

    ours = Variant(
        OURS, measured, lambda: verify_model(map_path, threads=session.threads).ok,
        lambda: size / file_read_seconds(pages, session.threads) / 1e9, "reading the file",
    )  # fmt: skip
    params = {"model": session.name(model), "threads": session.threads}
    return measure(
        Case("verify", "GB/s", params), [ours], repeats=session.cases.repeats, seed=session.seed
    )


@numba.njit(nogil=True)
def _sliced_loop(pages, out):  # type: ignore[no-untyped-def]
    for i in range(pages.shape[0]):
        out[i] = crc32._crc32_sliced(np.uint64(pages[i].ctypes.data))


def checksum(session: Session) -> list[dict[str, Any]]:
    """CRC32 of pages on one thread: ours, its portable twin, zlib page by page."""
    n_pages = session.cases.crc_bytes // PAGE_BYTES
    rng = np.random.default_rng(session.seed)
    pages = rng.integers(0, 256, (n_pages, PAGE_BYTES), np.uint8)
    out = np.empty(n_pages, np.uint32)
    content = [page[: crc32.CONTENT_BYTES] for page in pages]
    expected = np.array([zlib.crc32(page) for page in content], np.uint32)

    def with_zlib() -> None:
        out[:] = [zlib.crc32(page) for page in content]

    ways = {
        OURS: lambda: crc32.crc32_pages(pages, out),
        "zlib": with_zlib,
        "portable twin": lambda: _sliced_loop(pages, out),
    }

    def variant(name: str) -> Variant:
        work = ways[name]

        def is_right() -> bool:
            out[:] = 0
            work()
            return bool(np.array_equal(out, expected))

        def measured() -> float:
            started = time.perf_counter()
            work()
            return pages.nbytes / (time.perf_counter() - started) / 1e9

        return Variant(name, measured, is_right, memory, "reading memory")

    memory = Best(lambda: read_bandwidth(pages) / 1e9)
    params = {"MiB": pages.nbytes >> 20}
    return measure(
        Case("crc32", "GB/s", params), [variant(name) for name in ways],
        repeats=session.cases.repeats, seed=session.seed,
    )  # fmt: skip


def swap(session: Session) -> list[dict[str, Any]]:
    """Latency of one atomic swap of shards that are not resident."""
    model = session.first_model()
    rows = []
    for n_shards in session.cases.swap_shards:
        with Atlas.open(
            session.sharded(model), "50%", "cpu", policy="lru", prefetch_distance=0
        ) as atlas:
            params = {"model": session.name(model), "shards": n_shards}
            rows += measure(
                Case("swap", "ms", params, "lower"), [_swap_variant(atlas, n_shards)],
                repeats=session.cases.repeats, seed=session.seed,
            )  # fmt: skip
    return rows


def _swap_variant(atlas: Atlas, n_shards: int) -> Variant:
    # Round and round: under LRU, half a model later, none of the shards is there any more.
    upcoming = cycle(atlas.shards.schedule)
    shard_bytes = atlas.shard_bytes

    def measured() -> float:
        groups = [list(islice(upcoming, n_shards)) for _ in range(_SWAPS)]
        moved_before = atlas.stats.bytes_moved
        started = time.perf_counter()
        for group in groups:
            atlas.atomic_swap(group)
        seconds = time.perf_counter() - started
        moved = atlas.stats.bytes_moved - moved_before
        whole = sum(shard != atlas.map.n_shards - 1 for group in groups for shard in group)
        if moved < whole * shard_bytes:
            raise GGUFShardError("swap: some of the shards were resident before")
        return 1e3 * seconds / _SWAPS

    def is_right() -> bool:
        group = list(islice(upcoming, n_shards))
        atlas.atomic_swap(group)
        table = atlas.target.get(atlas.cache.table)
        return bool((table[group] >= 0).all())

    def limit() -> float:
        return 1e3 * n_shards * shard_bytes / file_bandwidth(atlas)

    return Variant(OURS, measured, is_right, limit, "reading the file")
