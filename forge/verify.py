"""`verify_model`: does every byte of a sharded model hold?"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.errors import GGUFShardError
from forge.input_file import open_input, sha256_of
from forge.progress import progress_bar
from forge.sgmap import ShardMap
from forge.shard_scan import PageCheck, faulty_pages, scan_shards
from forge.sharded_model import ShardedModel
from forge.split_model import part_paths


@dataclass(frozen=True)
class Fault:
    """Something that does not hold.

    Attributes
    ----------
    page, shard, tensor
        Where; None for what lies outside the pages.
    reason
        What, in one line.
    """

    page: int | None
    shard: int | None
    tensor: str | None
    reason: str

    def __str__(self) -> str:
        if self.page is None:
            return self.reason
        return f"page {self.page} (shard {self.shard}, {self.tensor}): {self.reason}"


@dataclass
class VerifyResult:
    """Outcome of `verify_model`: pages looked at, and the faults found."""

    pages: int = 0
    bad: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.bad

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: `ok`, `pages`, `bad`."""
        return {"ok": self.ok, "pages": self.pages, "bad": [vars(fault) for fault in self.bad]}


def verify_model(
    map_path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    progress: bool = False,
    threads: int = 2,
    find_faulty: PageCheck = faulty_pages,
) -> VerifyResult:
    """Check map, header, table, every page and every shard of a sharded model.

    Parameters
    ----------
    map_path
        `core.sgmap`.
    against
        The GGUF file (first part of a split one) that it should have been cut from; its SHA-256
        is compared with the map's.
    progress
        Show a progress bar on stderr.
    threads
        Batches of pages in flight at once.
    find_faulty
        What checks the pages (`forge.shard_scan`): the CPU, or what a GPU brings along.

    Returns
    -------
    VerifyResult
        Damage is reported here, not raised; damage to the map or the table, without which nothing
        else can be checked, is a single fault.
    """
    result = VerifyResult()
    try:
        with ShardedModel(map_path) as model:
            _verify_pages(model, result, progress, threads, find_faulty)
            if against is not None:
                _verify_source(model.map, Path(against), result)
    except GGUFShardError as error:
        result.bad.append(Fault(None, None, None, str(error)))
    return result


def _verify_pages(
    model: ShardedModel,
    result: VerifyResult,
    progress: bool,
    threads: int,
    find_faulty: PageCheck,
) -> None:
    shard_map = model.map
    bad_shards = set()

    def report(page: int, reason: str) -> None:
        shard = page // shard_map.pages_per_shard
        bad_shards.add(shard)
        result.bad.append(Fault(page, shard, shard_map.tensor_of_page(page), reason))

    for reason in model.core.header_faults():
        result.bad.append(Fault(None, None, None, f"{model.core.path}: {reason}"))
    core_size = model.core.path.stat().st_size
    with progress_bar(core_size, "verify", progress) as advance:
        digests = scan_shards(
            model.core, shard_map.pages_per_shard, model.page_crc32, report, advance, threads,
            find_faulty,
        )  # fmt: skip
    result.pages = shard_map.n_pages
    for shard, (found, expected) in enumerate(zip(digests, shard_map.shard_xxh3_64, strict=True)):
        if found != expected and shard not in bad_shards:
            result.bad.append(
                Fault(
                    shard * shard_map.pages_per_shard,
                    shard,
                    shard_map.tensor_of_page(shard * shard_map.pages_per_shard),
                    f"shard has xxh3-64 {found}, the map says {expected} "
                    f"(digests.shard_xxh3_64[{shard}])",
                )
            )


def _verify_source(shard_map: ShardMap, path: Path, result: VerifyResult) -> None:
    paths = part_paths(path, len(shard_map.source))
    if path not in paths:
        result.bad.append(
            Fault(None, None, None, f"{path}: is not the first part of a split model")
        )
        return
    for file, source in zip(paths, shard_map.source, strict=True):
        try:
            with open_input(file) as data:
                sha256 = sha256_of(data)
        except OSError as error:
            result.bad.append(Fault(None, None, None, f"{file}: {error.strerror}"))
            continue
        except GGUFShardError as error:  # not a regular file
            result.bad.append(Fault(None, None, None, str(error)))
            continue
        if sha256 != source.sha256:
            reason = f"{file}: has SHA-256 {sha256}, the map says {source.sha256}"
            result.bad.append(Fault(None, None, None, reason))
