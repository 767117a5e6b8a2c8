"""`repair_model`: what is damaged of `core.gguf`, and nothing else, is written anew.

The map vouches for everything: for the table of CRCs by its digest, for each shard by its own. A
page of a damaged shard is taken from the source (`forge.repair_source`) if it has the CRC32 that
the table says, and the shard has its digest with it:

    table holds      bad: pages that are not as tag and table say; if the shard is wrong still,
                     every page of it that differs from the source's (a forged CRC32)
    table is lost    bad: pages that do not have their own tag; if the shard is wrong still, every
                     page that differs. The tags of the mended pages are the table

Header and padding need no source. All is collected in a journal (`forge.journal`) and checked
before anything is written. Only a `core.gguf` that is missing, of a wrong size or cannot be read is
written anew as a whole.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from forge.core_file import (
    CoreFile,
    core_bytes,
    core_header,
    crc_table_bytes,
    crc_table_digest,
    page_offset,
)
from forge.errors import GGUFShardError
from forge.journal import JournalWriter, finish_journal
from forge.pages import CRC_OFFSET, PAGE_BYTES, page_fault
from forge.pending_file import PendingFile
from forge.progress import progress_bar
from forge.repair_source import RepairSource, open_repair_source
from forge.sgmap import ShardMap, core_path
from forge.sgmap_reader import load_map
from forge.shard import check_written, write_around_pages
from forge.shard_scan import check_pages, faulty_pages, scan_shards
from forge.sharded_model import ShardedModel
from forge.verify import Fault, verify_model

_MAP_IS_NEEDED = (
    "a damaged map cannot be repaired, since it vouches for all else; "
    "`gguf-shard shard` of the GGUF file makes it anew"
)


@dataclass
class RepairResult:
    """Outcome of `repair_model`.

    Attributes
    ----------
    pages
        Pages that the model has.
    repaired
        What was bad and has been written anew.
    bad
        What is bad all the same: nothing, unless the disk damages what it is given.
    source_differs
        Source files that do not have the SHA-256 in the map, though what was taken of them is
        right; empty if nothing was.
    """

    pages: int = 0
    repaired: list[Fault] = field(default_factory=list)
    bad: list[Fault] = field(default_factory=list)
    source_differs: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.bad

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: `ok`, `pages`, `repaired`, `bad`, `source_differs`."""
        return {
            "ok": self.ok,
            "pages": self.pages,
            "repaired": [vars(fault) for fault in self.repaired],
            "bad": [vars(fault) for fault in self.bad],
            "source_differs": self.source_differs,
        }


def _tags(pages: np.ndarray) -> np.ndarray:
    """The CRC32 that each page says it has, uint32 [n]."""
    return pages.view("<u4")[:, CRC_OFFSET // 4].astype(np.uint32)


def _not_as_tagged(pages: np.ndarray, page_crc32: np.ndarray) -> np.ndarray:
    """`forge.shard_scan.faulty_pages` without a table: fills in what the tags say instead."""
    page_crc32[:] = _tags(pages)
    return faulty_pages(pages, page_crc32)


@dataclass
class _Damage:
    """What does not hold of a `core.gguf` whose size is right.

    Attributes
    ----------
    outside
        Faults of header and padding.
    stored
        uint32 [n_pages], the table as it lies there.
    page_crc32
        uint32 [n_pages]: the table if it is the map's, or else the pages' own tags.
    pages
        Those that are not as `page_crc32` says, ascending.
    shards
        Those with another digest than the map's, or with such a page; ascending.
    """

    outside: list[str]
    stored: np.ndarray
    has_table: bool
    page_crc32: np.ndarray
    pages: np.ndarray
    shards: list[int]

    def __bool__(self) -> bool:
        return bool(self.outside or self.shards or not self.has_table)


def _find_damage(core: CoreFile, shard_map: ShardMap, progress: bool) -> _Damage:
    outside = [f"{core.path}: {reason}" for reason in core.header_faults()]
    stored = np.empty(core.n_pages, np.uint32)
    core.read_bytes(page_offset(core.n_pages), stored.view(np.uint8))
    stored = stored.view("<u4").astype(np.uint32)
    has_table = crc_table_digest(stored) == shard_map.page_crc32_xxh3_128
    page_crc32 = stored.copy() if has_table else np.zeros_like(stored)
    bad: list[int] = []
    with progress_bar(core.n_pages * PAGE_BYTES, "look", progress) as advance:
        digests = scan_shards(
            core, shard_map.pages_per_shard, page_crc32, lambda page, _: bad.append(page), advance,
            find_faulty=faulty_pages if has_table else _not_as_tagged,
        )  # fmt: skip
    shards = {page >> shard_map.shard_shift for page in bad}
    shards |= {i for i, (a, b) in enumerate(zip(digests, shard_map.shard_xxh3_64, strict=True))
               if a != b}  # fmt: skip
    pages = np.array(sorted(bad), np.int64)
    return _Damage(outside, stored, has_table, page_crc32, pages, sorted(shards))


class _Mender:
    """Pages that are right, from a source, for what is damaged of a model."""

    def __init__(self, shard_map: ShardMap, source: RepairSource) -> None:
        self._map = shard_map
        self._source = source

    def fault(self, page: int, reason: str) -> Fault:
        shard = page >> self._map.shard_shift
        return Fault(page, shard, self._map.tensor_of_page(page), reason)

    def span(self, shard: int) -> tuple[int, int]:
        """First page and number of pages of a shard."""
        first = shard << self._map.shard_shift
        return first, min(self._map.pages_per_shard, self._map.n_pages - first)

    def whole_shard(self, shard: int, table: np.ndarray | None = None) -> np.ndarray:
        """A shard as the source has it, uint8 [n, 4096].

        Raises
        ------
        GGUFShardError
            If a page is not the one in the table, or the shard not the one that the map says.
        """
        first, count = self.span(shard)
        pages = self._take(first, count, table)
        reason = self.shard_fault(shard, pages)
        if reason is not None:
            raise GGUFShardError(f"{self._source.path}: {self.fault(first, reason)}")
        return pages

    def mended(self, shard: int, pages: np.ndarray, damage: _Damage) -> np.ndarray:
        """A damaged shard, uint8 [n, 4096], made right; raises what `whole_shard` does."""
        first, count = self.span(shard)
        table = damage.page_crc32 if damage.has_table else None
        begin, end = np.searchsorted(damage.pages, [first, first + count])
        bad = damage.pages[begin:end]
        right = pages.copy()
        for run in np.split(bad, np.flatnonzero(np.diff(bad) != 1) + 1):
            if run.size:
                right[run - first] = self._take(int(run[0]), run.size, table)
        if self.shard_fault(shard, right) is None:
            return right
        return self.whole_shard(shard, table)  # a page is wrong that seemed to be right

    def _take(self, first: int, count: int, table: np.ndarray | None) -> np.ndarray:
        pages = self._source.pages(first, count)
        if table is not None:
            fault = check_pages(pages, table[first : first + count])
            if fault is not None:
                what = self.fault(first + fault[0], fault[1])
                raise GGUFShardError(f"{self._source.path}: {what}")
        return pages

    def shard_fault(self, shard: int, pages: np.ndarray) -> str | None:
        """Why these pages, uint8 [n, 4096], are not a shard of the model; None if they are."""
        found, expected = xxhash.xxh3_64_hexdigest(pages), self._map.shard_xxh3_64[shard]
        if found == expected:
            return None
        return (
            f"shard has xxh3-64 {found}, the map says {expected} (digests.shard_xxh3_64[{shard}])"
        )


def _check_table(page_crc32: np.ndarray, map_path: Path, shard_map: ShardMap) -> None:
    if crc_table_digest(page_crc32) != shard_map.page_crc32_xxh3_128:
        raise GGUFShardError(
            f"{map_path}: field digests.page_crc32_xxh3_128: is not that of the pages which "
            f"digests.shard_xxh3_64 vouches for: {_MAP_IS_NEEDED}"
        )


def _mend(journal: JournalWriter, core: CoreFile, map_path: Path, damage: _Damage,
          mender: _Mender, shard_map: ShardMap) -> Iterator[Fault]:  # fmt: skip
    """Record what makes everything right; yields what was wrong."""
    for reason in damage.outside:
        yield Fault(None, None, None, reason)
    for shard in damage.shards:
        first, count = mender.span(shard)
        old = np.empty((count, PAGE_BYTES), np.uint8)
        core.read_pages(first, old)
        new = mender.mended(shard, old, damage)
        crcs = _tags(new)
        damage.page_crc32[first : first + count] = crcs
        shard_fault = str(mender.shard_fault(shard, old))
        for i in np.flatnonzero((old != new).any(1)).tolist():
            journal.record(0, page_offset(first + i), new[i])
            yield mender.fault(first + i, page_fault(old[i], int(crcs[i])) or shard_fault)
    _check_table(damage.page_crc32, map_path, shard_map)
    for page in np.flatnonzero(damage.stored != damage.page_crc32).tolist():
        entry, crc = int(damage.stored[page]), int(damage.page_crc32[page])
        yield mender.fault(page, f"its entry in the table is {entry:08x}, not {crc:08x}")
    if damage.outside:
        journal.record(0, 0, np.frombuffer(core_header(core.n_pages), np.uint8))
    if damage.outside or not damage.has_table:
        table = damage.page_crc32.astype("<u4").tobytes()
        table = table.ljust(crc_table_bytes(core.n_pages), b"\0")
        journal.record(0, page_offset(core.n_pages), np.frombuffer(table, np.uint8))


def _check_same_map(map_path: Path, shard_map: ShardMap) -> None:
    """Now that nobody else may change it."""
    if _open_map(map_path) != shard_map:
        raise GGUFShardError(f"{map_path}: changed while it was read")


def _rewrite(core: CoreFile, map_path: Path, damage: _Damage, mender: _Mender,
             shard_map: ShardMap, progress: bool) -> list[Fault]:  # fmt: skip
    """Write what is damaged in its place."""
    room = (len(damage.pages) + len(damage.shards) + 1) * PAGE_BYTES
    room += crc_table_bytes(core.n_pages)
    files = [(core.path.name, core_bytes(core.n_pages))]
    with JournalWriter(map_path, files, room) as journal:
        _check_same_map(map_path, shard_map)
        repaired = list(_mend(journal, core, map_path, damage, mender, shard_map))
        journal.commit()
    finish_journal(map_path, progress=progress)
    return repaired


def _write_anew(map_path: Path, mender: _Mender, shard_map: ShardMap, progress: bool) -> None:
    """Write a whole `core.gguf`; the table last, so that a part of one is never taken for it."""
    path, n_pages = core_path(map_path), shard_map.n_pages
    page_crc32 = np.empty(n_pages, np.uint32)
    with ExitStack() as stack:
        stack.enter_context(PendingFile(map_path, 0, force=True))  # the lock, no more
        _check_same_map(map_path, shard_map)
        file = stack.enter_context(PendingFile(path, core_bytes(n_pages), force=True))
        with suppress(FileNotFoundError):
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        size = 2 * n_pages * PAGE_BYTES  # written, and read back
        advance = stack.enter_context(progress_bar(size, "repair", progress))
        for shard in range(shard_map.n_shards):
            first, count = mender.span(shard)
            pages = mender.whole_shard(shard)
            page_crc32[first : first + count] = _tags(pages)
            file.write(pages, page_offset(first))
            advance(pages.nbytes)
        _check_table(page_crc32, map_path, shard_map)
        file.sync()
        write_around_pages(file, page_crc32)
        check_written(file, shard_map, page_crc32, advance)
        file.commit()


def _open_map(map_path: Path) -> ShardMap:
    """The map, once what an interrupted writer left is finished."""
    finish_journal(map_path)
    try:
        shard_map = load_map(map_path)
    except GGUFShardError as error:
        raise GGUFShardError(f"{error}: {_MAP_IS_NEEDED}") from None
    with suppress(GGUFShardError):
        ShardedModel(map_path).close()  # `core.gguf.sgnew` may be its pages
    return shard_map


def _open_core(path: Path, shard_map: ShardMap, progress: bool) -> tuple[CoreFile, _Damage] | str:
    """The pages and their damage; or why they cannot be mended in place, in one line."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        return f"{path}: {error.strerror}"
    if size != core_bytes(shard_map.n_pages):
        return f"{path}: has {size} bytes, not {core_bytes(shard_map.n_pages)}"
    core = CoreFile(path, shard_map.n_pages)
    try:
        return core, _find_damage(core, shard_map, progress)
    except GGUFShardError as error:  # the disk cannot read it
        core.close()
        return str(error)


def repair_model(
    map_path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    progress: bool = False,
) -> RepairResult:
    """Write anew what is damaged of the pages of a sharded model, and nothing else.

    Parameters
    ----------
    map_path
        `core.sgmap`, which must not be damaged itself.
    source
        The GGUF file that the model was cut from (of a split one, the first part), or another copy
        of `core.gguf` (or the `.sgmap` beside it). It is read only if something is damaged, and has
        to be right only where it is needed.
    progress
        Show progress bars on stderr.

    Returns
    -------
    RepairResult
        What was bad, and what the whole model is like afterwards.

    Raises
    ------
    GGUFShardError
        If the map is damaged, the source does not have what is needed, or the disk refuses: nothing
        has changed then. If a write fails once the change has begun, whoever opens the model next
        finishes it.
    """
    map_path = Path(map_path)
    shard_map = _open_map(map_path)
    opened = _open_core(core_path(map_path), shard_map, progress)
    with ExitStack() as stack:
        if not isinstance(opened, str):
            core, damage = stack.enter_context(opened[0]), opened[1]
            if not damage:
                return RepairResult(shard_map.n_pages)
        pages = stack.enter_context(closing(open_repair_source(source, map_path, shard_map)))
        mender = _Mender(shard_map, pages)
        if isinstance(opened, str):
            _write_anew(map_path, mender, shard_map, progress)
            repaired = [Fault(None, None, None, opened)]
        else:
            repaired = _rewrite(core, map_path, damage, mender, shard_map, progress)
        verified = verify_model(map_path, progress=progress)
        return RepairResult(shard_map.n_pages, repaired, verified.bad, pages.differences())
