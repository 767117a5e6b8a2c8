"""Which pages of two models differ: run by run, by name, not by place in the file.

Of two sharded models with the same pages, the digests of shards in the maps tell which pages need
not be read at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from delta.page_grid import PADDING, TENSOR, Run, RunKey, model_runs, n_paired
from delta.page_hash import sample_pages
from delta.source_model import ShardedSource, SourceModel

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RunChange:
    """A run of a model, held against its namesake in another.

    Attributes
    ----------
    run, other
        The run, and the other's of the same name, or None.
    n_paired
        Pages, from the first on, that have a counterpart.
    changed
        bool [n_pages]: differs from its counterpart; without one, always (but for zero padding).
    samples, other_samples
        uint64 [n_pages], [n_paired]: a hash of a sample of each page that was read, and of its
        counterpart (`delta.page_hash`), or 0.
    """

    run: Run
    other: Run | None
    n_paired: int
    changed: np.ndarray
    samples: np.ndarray
    other_samples: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """All runs of both models, in file order.

    Of a pair both `forward` (the target's runs) and `backward` (the base's) say the same.
    """

    forward: tuple[RunChange, ...]
    backward: tuple[RunChange, ...]


def chunks(run: Run, first: int, end: int, n_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """Pages `first` to `end` - 1 of a run as (first, count), about so many bytes each, or a MiB."""
    step = max((n_bytes or _CHUNK_BYTES) // run.page_bytes, 1)
    for begin in range(first, end, step):
        yield begin, min(step, end - begin)


def read_pages(model: SourceModel, run: Run, first: int, count: int) -> np.ndarray:
    """Bytes of consecutive pages of a run, uint8."""
    offset, n_bytes = run.span(first, count)
    return model.read(run.part, offset, n_bytes)


def read_spans(
    model: SourceModel, spans: Iterable[tuple[Run, int, int]], out: np.ndarray
) -> np.ndarray:
    """Bytes of several stretches (run, first page, pages), one after the other, in all of `out`."""
    begin = 0
    for run, first, count in spans:
        offset, n_bytes = run.span(first, count)
        model.read_into(run.part, offset, out[begin : begin + n_bytes])
        begin += n_bytes
    return out


def different_pages(a: np.ndarray, b: np.ndarray, page_bytes: int) -> np.ndarray:
    """bool [n_pages]: which pages of two runs of bytes of the same length differ."""
    n_full = len(a) // page_bytes
    full = slice(0, n_full * page_bytes)
    width = 8 if page_bytes % 8 == 0 else 2 if page_bytes % 2 == 0 else 1
    words = f"u{width}"
    rows = (a[full].view(words) != b[full].view(words)).reshape(n_full, page_bytes // width)
    differs = rows.any(axis=1)
    if len(a) > full.stop:
        differs = np.append(differs, (a[full.stop :] != b[full.stop :]).any())
    return differs


def compare(base: SourceModel, target: SourceModel, advance: Callable[[int], None]) -> Comparison:
    """Hold every run of two models against its namesake.

    Parameters
    ----------
    base, target
        The models.
    advance
        Called with the bytes of the target done.
    """
    base_runs, target_runs = model_runs(base.headers), model_runs(target.headers)
    unread = _Unread(base, target)
    others = {run.key: run for run in base_runs}
    forward = []
    for run in target_runs:
        change = _compare_run(base, target, run, others.get(run.key), unread, advance)
        forward.append(change)
    return Comparison(tuple(forward), tuple(_mirror(base, base_runs, forward)))


def _compare_run(
    base: SourceModel,
    target: SourceModel,
    run: Run,
    other: Run | None,
    unread: _Unread,
    advance: Callable[[int], None],
) -> RunChange:
    paired = n_paired(run, other)
    changed = np.ones(run.n_pages, np.bool_)
    samples, other_samples = np.zeros(run.n_pages, np.uint64), np.zeros(paired, np.uint64)
    if paired:
        assert other is not None
        for first, count in chunks(run, 0, paired):
            pages = slice(first, first + count)
            if unread.is_same(run, other, first, count):
                changed[pages] = False
            else:
                now = read_pages(target, run, first, count)
                before = read_pages(base, other, first, count)
                changed[pages] = different_pages(now, before, run.page_bytes)
                other_samples[pages] = sample_pages(before, run.page_bytes)
                samples[pages] = other_samples[pages]
                if changed[pages].any():
                    samples[pages] = sample_pages(now, run.page_bytes)
            advance(run.span(first, count)[1])
    if run.kind == PADDING:
        _forget_zeros(target, run, paired, changed)
    advance(run.bytes - run.span(0, paired)[1] if paired else run.bytes)
    return RunChange(run, other, paired, changed, samples, other_samples)


def _forget_zeros(model: SourceModel, run: Run, paired: int, changed: np.ndarray) -> None:
    """Padding without a counterpart is zero unless it is said what it is."""
    for first, count in chunks(run, paired, run.n_pages):
        data = read_pages(model, run, first, count)
        changed[first : first + count] = different_pages(data, np.zeros_like(data), run.page_bytes)


def _mirror(
    base: SourceModel, runs: Sequence[Run], forward: Sequence[RunChange]
) -> Iterator[RunChange]:
    """The comparison from the base's side."""
    by_key: dict[RunKey, RunChange] = {change.run.key: change for change in forward}
    for run in runs:
        change = by_key.get(run.key)
        changed, samples = np.ones(run.n_pages, np.bool_), np.zeros(run.n_pages, np.uint64)
        other, paired, other_samples = None, 0, np.zeros(0, np.uint64)
        if change is not None:
            other, paired = change.run, change.n_paired
            changed[:paired] = change.changed[:paired]
            samples[:paired] = change.other_samples
            other_samples = change.samples[:paired]
        if run.kind == PADDING:
            _forget_zeros(base, run, paired, changed)
        yield RunChange(run, other, paired, changed, samples, other_samples)


class _Unread:
    """What two sharded models of the same pages tell by their digests alone."""

    def __init__(self, base: SourceModel, target: SourceModel) -> None:
        self._same: np.ndarray | None = None
        self._first_page: dict[RunKey, tuple[int, int]] = {}
        if not isinstance(base, ShardedSource) or not isinstance(target, ShardedSource):
            return
        a, b = base.model, target.model
        layouts = [
            (m.map.n_pages, m.map.pages_per_shard, m.map.atlas.memory_layout) for m in (a, b)
        ]
        if layouts[0] != layouts[1]:
            return
        self._shift = a.map.shard_shift
        same = np.array(
            [x == y for x, y in zip(a.map.shard_xxh3_64, b.map.shard_xxh3_64, strict=True)]
        )
        per_page = a.page_crc32 == b.page_crc32
        starts = np.arange(0, a.map.n_pages, a.map.pages_per_shard)
        self._same = same & np.logical_and.reduceat(per_page, starts)
        others = slice_pages(base)
        self._first_page = {
            k: place for k, place in slice_pages(target).items() if others.get(k) == place
        }

    def is_same(self, run: Run, other: Run, first: int, count: int) -> bool:
        """Whether pages of both are known to be equal."""
        page, n_pages = self._first_page.get(run.key, (0, 0))
        if self._same is None or not run.n_pages == other.n_pages == n_pages:
            return False
        begin = (page + first) >> self._shift
        end = ((page + first + count - 1) >> self._shift) + 1
        return bool(self._same[begin:end].all())


def slice_pages(model: ShardedSource) -> dict[RunKey, tuple[int, int]]:
    """First page and pages of each slice of a sharded model's tensors."""
    return {
        (TENSOR, tensor.name, i): (piece.first_page, piece.pages)
        for tensor in model.model.map.tensors
        for i, piece in enumerate(tensor.slices)
    }
