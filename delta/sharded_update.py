"""A sharded model becomes the target of a patch: only touched pages are rewritten, with their CRCs,
the table, the digests and the map.

The pages are planned as sharding the target would; where that moves no tensor, the result is byte
for byte what sharding the target gives. Where it does (tensors were added or removed), the target
is built beside the model and sharded anew.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from delta.apply import write_target
from delta.bound_patch import KEPT, total_bytes
from delta.checked_patch import CheckedPatch
from delta.page_grid import PADDING, Run
from delta.page_sink import PageSink
from forge.block_layouts import block_layout
from forge.core_file import core_bytes, core_header, crc_table_bytes, crc_table_digest, page_offset
from forge.crc32 import CONTENT_BYTES
from forge.errors import GGUFShardError
from forge.journal import JournalWriter, finish_journal
from forge.page_plan import plan_pages
from forge.pages import PAGE_BYTES
from forge.pending_file import take_lock
from forge.progress import progress_bar
from forge.sgmap import ShardMap, SourcePart, TensorEntry, render_map
from forge.sgmap_reader import parse_map
from forge.shard import ShardOptions, build_map, pack_pages, shard_model
from forge.shard_scan import check_pages
from forge.sharded_model import ShardedModel
from forge.source_bytes import SourceBytes
from forge.split_model import part_paths

_CORE, _MAP = 0, 1  # files of the journal


class _FuturePages:
    """The pages of a sharded model as they will be: the old ones with the journal over them."""

    def __init__(self, old: ShardedModel, journal: JournalWriter, shard_map: ShardMap) -> None:
        self.map = shard_map
        self.page_crc32 = np.zeros(shard_map.n_pages, np.uint32)
        n_kept = min(old.map.n_pages, shard_map.n_pages)
        self.page_crc32[:n_kept] = old.page_crc32[:n_kept]
        self._old = old
        self._journal = journal

    def read(self, first: int, count: int) -> np.ndarray:
        """Pages, uint8 [count, 4096]; what the old model does not have is zero or recorded."""
        pages = np.zeros((count, PAGE_BYTES), np.uint8)
        n_old = min(max(self._old.map.n_pages - first, 0), count)
        self._old.core.read_pages(first, pages[:n_old])
        self._journal.overlay(_CORE, page_offset(first), pages.reshape(-1))
        return pages

    def read_checked(self, first: int, count: int) -> np.ndarray:
        """As `read`; GGUFShardError about the first page that does not hold."""
        pages = self.read(first, count)
        fault = check_pages(pages, self.page_crc32[first : first + count])
        if fault is not None:
            raise GGUFShardError(self._old.describe_fault(first + fault[0], fault[1]))
        return pages


class _PagesSink(PageSink):
    """Source bytes as pages of `core.gguf`, in a journal."""

    has_base = True

    def __init__(self, bound: CheckedPatch, journal: JournalWriter, future: _FuturePages) -> None:
        self.touched: set[int] = set()
        self._bound = bound
        self._journal = journal
        self._future = future
        self._source = SourceBytes(future)
        self._lock = threading.Lock()
        shard_map = future.map
        self._slices = {
            (tensor.name, i): piece.first_page
            for tensor in shard_map.tensors
            for i, piece in enumerate(tensor.slices)
        }
        self._raw = {(raw.part, raw.offset): raw.first_page for raw in shard_map.raw}
        self._layout = shard_map.atlas.memory_layout

    def put_header(self, part: int, data: bytes) -> None:
        if data == self._bound.base.header_bytes(part):
            return
        self._record(self._raw[part, 0], *pack_pages(np.frombuffer(data, np.uint8), None))

    def put(self, run: Run, first_page: int, data: np.ndarray) -> None:
        if run.kind == PADDING and (run.part, run.offset) not in self._raw:
            return  # zero, as its pages would be
        if run.ggml_type is None:
            place, layout = self._raw[run.part, run.offset], None
        else:
            place = self._slices[run.name, run.index]
            layout = block_layout(run.ggml_type, self._layout)
        self._record(place + first_page, *pack_pages(np.ascontiguousarray(data), layout))

    def read_into(self, part: int, offset: int, buffer: np.ndarray) -> None:
        buffer[:] = self._source.read(part, offset, len(buffer))

    def _record(self, first: int, pages: np.ndarray, crcs: np.ndarray) -> None:
        shift = self._future.map.shard_shift
        with self._lock:
            self._future.page_crc32[first : first + len(pages)] = crcs
            self._journal.record(_CORE, page_offset(first), pages.reshape(-1))
            self.touched.update(range(first >> shift, ((first + len(pages) - 1) >> shift) + 1))


def _target_map(bound: CheckedPatch, old: ShardMap) -> ShardMap | None:
    """The map that sharding the target gives, with blank digests; None where that cannot be told
    without reading padding."""
    padding: list[list[tuple[int, int]]] = [[] for _ in bound.files]
    kept = {(raw.part, raw.offset) for raw in old.raw}
    for run, other, sources in zip(bound.runs, bound.others, bound.sources, strict=True):
        if run.kind != PADDING:
            continue
        if (sources != KEPT).any():
            return None
        if other is not None and (other.part, other.offset) in kept:
            if run.bytes != other.bytes:
                return None
            padding[run.part].append((run.offset, run.bytes))
    layout = old.atlas.memory_layout
    plan = plan_pages(bound.headers, padding, layout, old.pages_per_shard)
    source = [SourcePart(file.name, file.bytes, file.sha256) for file in bound.files]
    options = ShardOptions(
        layout, old.atlas.cache_policy, old.atlas.prefetch_distance, old.pages_per_shard
    )
    digests = ["0" * 16] * -(-plan.n_pages // plan.pages_per_shard)
    return build_map(plan, bound.headers, source, options, digests, "0" * 32)


def _keeps_pages(old: ShardMap, new: ShardMap) -> bool:
    """Whether no page has to move: only the last raw segment may have another size."""

    def places(tensors: Sequence[TensorEntry]) -> dict[str, TensorEntry]:
        return {tensor.name: replace(tensor, offset=0) for tensor in tensors}

    raw = [
        [(segment.part, segment.first_page, segment.bytes) for segment in m.raw] for m in (old, new)
    ]
    is_same_size = len(raw[0]) == len(raw[1]) and raw[0][:-1] == raw[1][:-1]
    return (
        places(old.tensors) == places(new.tensors)
        and is_same_size
        and raw[0][-1][:2] == raw[1][-1][:2]
        and old.atlas == new.atlas
        and len(old.source) == len(new.source)
    )


class ShardedUpdate:
    """An update of a sharded model, from plan to commit; a context manager.

    Nothing of the model changes before `commit`.

    Attributes
    ----------
    map
        The map of the target; its digests are right once it is built.
    changed_shards
        Shards with another content, ascending; known then, too.
    """

    def __init__(self, bound: CheckedPatch, old: ShardedModel, shard_map: ShardMap) -> None:
        self.changed_shards: list[int] = []
        self.map = shard_map
        self._bound = bound
        self._old = old
        self._n_map_bytes = len(render_map(shard_map))
        changed = sum(int((sources != KEPT).sum()) for sources in bound.sources)
        raw = sum(-(-len(data) // CONTENT_BYTES) for data in bound.header_bytes)
        room = (changed + raw + 2) * PAGE_BYTES + crc_table_bytes(shard_map.n_pages)
        files = [
            (old.core.path.name, core_bytes(shard_map.n_pages)),
            (old.map_path.name, self._n_map_bytes),
        ]
        self._journal = JournalWriter(old.map_path, files, room + self._n_map_bytes)
        try:
            self._future = _FuturePages(old, self._journal, shard_map)
        except BaseException:
            self._journal.__exit__()
            raise

    @classmethod
    def plan(cls, bound: CheckedPatch, old: ShardedModel) -> ShardedUpdate | None:
        """The update; None if pages would have to move."""
        shard_map = _target_map(bound, old.map)
        if shard_map is None or not _keeps_pages(old.map, shard_map):
            return None
        return cls(bound, old, shard_map)

    def __enter__(self) -> ShardedUpdate:
        self._journal.__enter__()
        return self

    def __exit__(self, *what: object) -> None:
        self._journal.__exit__(*what)

    def build(self, progress: bool = False) -> None:
        """Record all changes and check what they make.

        Raises
        ------
        GGUFShardError
            If the patch or a page of the model is damaged, or the result is not the target.
        """
        self._bound.base.check_in_place()  # now that nobody else may change it
        with progress_bar(total_bytes(self._bound.files), "check target", progress) as advance:
            sink = _PagesSink(self._bound, self._journal, self._future)
            self._bound.build(sink, advance)
        future, old = self._future, self._old.map
        n_pages = future.map.n_pages
        touched = sink.touched
        if n_pages != old.n_pages:
            touched |= set(range(min(old.n_shards, future.map.n_shards) - 1, future.map.n_shards))
            self._journal.record(_CORE, 0, np.frombuffer(core_header(n_pages), np.uint8))
        self.changed_shards = sorted(touched)
        table = future.page_crc32.astype("<u4").tobytes().ljust(crc_table_bytes(n_pages), b"\0")
        if touched:
            self._journal.record(_CORE, page_offset(n_pages), np.frombuffer(table, np.uint8))
        self.map = self._final_map()
        text = render_map(self.map)
        assert len(text) == self._n_map_bytes
        parse_map(text, self._old.map_path)
        self._journal.record(_MAP, 0, np.frombuffer(text, np.uint8))

    def commit(self, progress: bool = False) -> None:
        """Let the changes happen.

        Raises
        ------
        GGUFShardError
            If the disk refuses. Once the journal is in its place, whoever opens the model next
            finishes what is left.
        """
        self._journal.commit()
        finish_journal(self._old.map_path, progress=progress)

    def _final_map(self) -> ShardMap:
        future = self._future
        per_shard = future.map.pages_per_shard
        digests = list(self._old.map.shard_xxh3_64[: future.map.n_shards])
        digests += [""] * (future.map.n_shards - len(digests))
        for shard in self.changed_shards:
            first = shard * per_shard
            pages = future.read_checked(first, min(per_shard, future.map.n_pages - first))
            digests[shard] = xxhash.xxh3_64_hexdigest(pages)
        return replace(
            future.map,
            page_crc32_xxh3_128=crc_table_digest(future.page_crc32),
            shard_xxh3_64=tuple(digests),
        )


def reshard(bound: CheckedPatch, old: ShardedModel, progress: bool = False) -> None:
    """Build a target beside the sharded model it replaces, and shard it anew.

    Raises
    ------
    GGUFShardError
        If there is no room, or the model's files do not have the names that `shard` gives them.
    """
    folder = old.map_path.parent
    if old.map_path.name != "core.sgmap":
        raise GGUFShardError(
            f"{old.map_path}: the patch adds or removes pages: only a model called core.sgmap can "
            "be sharded anew"
        )
    with _scratch_folder(old.map_path.with_name("core.target.sgnew")) as scratch:
        first = scratch / Path(bound.files[0].name)
        paths = part_paths(first, len(bound.files))
        write_target(bound, paths, False, progress)
        bound.base.check_in_place()
        settings = old.map.atlas
        options = ShardOptions(
            settings.memory_layout, settings.cache_policy, settings.prefetch_distance,
            old.map.pages_per_shard,
        )  # fmt: skip
        shard_model(first, folder, options, force=True, progress=progress)


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    """A folder, empty and under a lock; gone afterwards, and with it what a dead process left."""
    path.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        take_lock(descriptor, path)
        try:
            for left in path.iterdir():
                left.unlink()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
