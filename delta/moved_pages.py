"""Pages that stand elsewhere already, in the base or earlier in the target, are not stored again.

Candidates are found by a hash of their content, which is taken only of pages whose samples agree
with others' (`delta.page_hash`); each is compared byte by byte before it counts. Two sharded models
know a hash of each page without reading it: the tables of CRCs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from delta.compare import RunChange, chunks, read_pages, slice_pages
from delta.page_grid import TENSOR, Run, stretches
from delta.page_hash import SMALLEST_BYTES, hash_pages, sample_pages
from delta.source_model import ShardedSource, SourceModel

_STEP = 1024  # pages compared at once
_THREADS = 2


@dataclass(frozen=True)
class PageSources:
    """Where each of some pages comes from.

    Attributes
    ----------
    pages
        int64 [n], ascending: the changed pages, counted over the touched runs.
    source
        int64 [n]: the page it equals, -1 if it has to be stored.
    from_target
        bool [n]: whether `source` counts over the touched runs, and not over all of the base's.
    """

    pages: np.ndarray
    source: np.ndarray
    from_target: np.ndarray

    @property
    def stored(self) -> np.ndarray:
        """The pages that have to be stored."""
        return self.pages[self.source < 0]


def numbered(runs: Sequence[Run]) -> np.ndarray:
    """Number of the first page of each run, int64 [n_runs + 1], the last one past the end."""
    return np.cumsum([0, *(run.n_pages for run in runs)])


def find_sources(
    base: SourceModel,
    target: SourceModel,
    backward: Sequence[RunChange],
    touched: Sequence[RunChange],
) -> PageSources:
    """Find out which changed pages of the target equal others.

    Parameters
    ----------
    base, target
        The models.
    backward
        All runs of the base.
    touched
        The target's runs that have changed pages.
    """
    runs = [change.run for change in touched]
    first = numbered(runs)
    pages = np.concatenate(
        [np.zeros(0, np.int64)]
        + [first[i] + np.flatnonzero(change.changed) for i, change in enumerate(touched)]
    )
    sources = PageSources(pages, np.full(len(pages), -1, np.int64), np.zeros(len(pages), np.bool_))
    if len(pages) == 0:
        return sources
    base_runs = [change.run for change in backward]
    if _knows_tables(base, target):
        keys, others = _table_keys(target, runs)[pages], _table_keys(base, base_runs)
    else:
        keys, others = _content_keys((target, touched), (base, backward), pages)
    _look_up(sources, keys, others)
    _verify(sources, False, (target, runs), (base, base_runs))
    _look_back(sources, keys)
    _verify(sources, True, (target, runs), (target, runs))
    return sources


def _knows_tables(base: SourceModel, target: SourceModel) -> bool:
    """Whether the tables of CRCs say of both models' pages what they hold."""
    if not isinstance(base, ShardedSource) or not isinstance(target, ShardedSource):
        return False
    return base.model.map.atlas.memory_layout == target.model.map.atlas.memory_layout


def _table_keys(model: SourceModel, runs: Sequence[Run]) -> np.ndarray:
    """The table's CRC of each page of some runs, uint64 [n_pages]; 0 where there is none."""
    assert isinstance(model, ShardedSource)
    places = slice_pages(model)
    keys = [np.zeros(0, np.uint64)]
    for run in runs:
        first, n_pages = places.get(run.key, (0, 0))
        if n_pages == run.n_pages:
            crcs = model.model.page_crc32[first : first + n_pages].astype(np.uint64)
            # The same bits are other pages where a page holds blocks of another size.
            keys.append((crcs << np.uint64(16)) | np.uint64(run.page_bytes))
        else:
            keys.append(np.zeros(run.n_pages, np.uint64))
    return np.concatenate(keys)


def _content_keys(
    here: tuple[SourceModel, Sequence[RunChange]],
    there: tuple[SourceModel, Sequence[RunChange]],
    pages: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the given pages here, and of all there, from their bytes: uint64, and 0 for those
    whose samples say that nothing equals them."""
    wanted = np.zeros(sum(change.run.n_pages for change in here[1]), np.bool_)
    wanted[pages] = True
    samples, others = _samples(*here, wanted), _samples(*there)
    wanted &= samples != 0
    wanted[wanted] = _is_among(samples[wanted], _repeated(samples[wanted], others))
    # A page and its counterpart are known to differ, however alike they are.
    n_like = _occurrences(samples[wanted], samples[wanted]) - 1
    n_like += _occurrences(samples[wanted], others)
    n_like -= samples[wanted] == _counterparts(here[1])[wanted]
    wanted[wanted] = n_like > 0
    keys = _hashes(*here, wanted, hash_pages)
    return keys[pages], _hashes(*there, np.isin(others, samples[wanted]), hash_pages)


def _repeated(*values: np.ndarray) -> np.ndarray:
    """Values that occur more than once in all arrays together, ascending."""
    ordered = np.sort(np.concatenate(values))
    return ordered[1:][ordered[1:] == ordered[:-1]]


def _is_among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are among others, which ascend: bool [n]."""
    if len(ordered) == 0:
        return np.zeros(len(values), np.bool_)
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values


def _occurrences(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """How often each value occurs among others, int64 [n]."""
    if len(values) == 0 or len(among) == 0:
        return np.zeros(len(values), np.int64)
    distinct, count = np.unique(among, return_counts=True)
    place = np.minimum(np.searchsorted(distinct, values), len(distinct) - 1)
    return np.where(distinct[place] == values, count[place], 0)


def _counterparts(changes: Sequence[RunChange]) -> np.ndarray:
    """Samples of the counterparts of all pages, uint64; 0 where there is none."""
    samples = [np.zeros(0, np.uint64)]
    for change in changes:
        alone = change.run.n_pages - change.n_paired
        samples.append(np.pad(change.other_samples, (0, alone)))
    return np.concatenate(samples)


def _samples(
    model: SourceModel, changes: Sequence[RunChange], wanted: np.ndarray | None = None
) -> np.ndarray:
    """Samples of all pages, or of the wanted ones; those not taken yet are."""
    samples = np.concatenate([np.zeros(0, np.uint64), *(change.samples for change in changes)])
    missing = samples == 0
    if wanted is not None:
        missing &= wanted
    return samples | _hashes(model, changes, missing, sample_pages)


def _hashes(
    model: SourceModel,
    changes: Sequence[RunChange],
    wanted: np.ndarray,
    hash_of: Callable[[np.ndarray, int], np.ndarray],
) -> np.ndarray:
    """Hashes of the wanted ones of some runs' pages, uint64 [n_pages]; 0 for the others."""
    keys = np.zeros(len(wanted), np.uint64)

    def hash_chunk(piece: tuple[Run, int, int, int]) -> None:
        run, start, first, count = piece
        for begin, end in stretches(wanted[start + first : start + first + count]):
            data = read_pages(model, run, first + begin, end - begin)
            keys[start + first + begin : start + first + end] = hash_of(data, run.page_bytes)

    pieces = list(_pieces_with(wanted, [change.run for change in changes]))
    with ThreadPoolExecutor(_THREADS) as threads:
        for done in [threads.submit(hash_chunk, piece) for piece in pieces]:
            done.result()
    return keys


def _pieces_with(wanted: np.ndarray, runs: Sequence[Run]) -> Iterator[tuple[Run, int, int, int]]:
    """Pieces of tensors that hold wanted pages which have a hash: run, number of its first page,
    first page and pages of the piece."""
    for run, start in zip(runs, numbered(runs).tolist(), strict=False):
        has_hash = run.n_pages - (run.span(run.n_pages - 1, 1)[1] < SMALLEST_BYTES)
        if run.kind == TENSOR and wanted[start : start + has_hash].any():
            for first, count in chunks(run, 0, has_hash):
                if wanted[start + first : start + first + count].any():
                    yield run, start, first, count


def _look_up(sources: PageSources, keys: np.ndarray, others: np.ndarray) -> None:
    """Pages of the base with the same hash."""
    if len(others) == 0:
        return
    order = np.argsort(others, kind="stable")
    place = np.searchsorted(others[order], keys)
    found = order[np.minimum(place, len(order) - 1)]
    is_hit = (keys != 0) & (others[found] == keys)
    sources.source[is_hit] = found[is_hit]


def _look_back(sources: PageSources, keys: np.ndarray) -> None:
    """Earlier pages with the same hash among those that have to be stored."""
    open_ones = np.flatnonzero((sources.source < 0) & (keys != 0))
    _, first, which = np.unique(keys[open_ones], return_index=True, return_inverse=True)
    earlier = open_ones[first[which]]
    is_later = earlier != open_ones
    sources.source[open_ones[is_later]] = sources.pages[earlier[is_later]]
    sources.from_target[open_ones[is_later]] = True


def _verify(
    sources: PageSources,
    from_target: bool,
    here: tuple[SourceModel, Sequence[Run]],
    there: tuple[SourceModel, Sequence[Run]],
) -> None:
    """Take back what only the hash said."""
    candidates = np.flatnonzero((sources.source >= 0) & (sources.from_target == from_target))
    starts = numbered(here[1]), numbered(there[1])
    for index, count in _spans(sources, candidates, *starts):
        (run, page), (other, source) = (
            _locate(runs, start, int(number))
            for (_, runs), start, number in zip(
                (here, there), starts, (sources.pages[index], sources.source[index]), strict=True
            )
        )
        same = np.zeros(count, np.bool_)
        if run.page_bytes == other.page_bytes:
            a = read_pages(here[0], run, page, count)
            b = read_pages(there[0], other, source, count)
            for i in range(count):
                at = slice(i * run.page_bytes, (i + 1) * run.page_bytes)
                same[i] = a[at].data == b[at].data  # those of different lengths are not
        sources.source[index : index + count][~same] = -1
        sources.from_target[index : index + count][~same] = False


def _spans(
    sources: PageSources, candidates: np.ndarray, starts: np.ndarray, other_starts: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Candidates (index, count) that follow each other, here and there, within a run."""
    if len(candidates) == 0:
        return
    page, source = sources.pages[candidates], sources.source[candidates]
    breaks = (np.diff(candidates) != 1) | (np.diff(page) != 1) | (np.diff(source) != 1)
    run = np.searchsorted(starts, page, "right")
    other = np.searchsorted(other_starts, source, "right")
    breaks |= (np.diff(run) != 0) | (np.diff(other) != 0)
    begins = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(candidates)]])
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        for i in range(begin, end, _STEP):
            yield int(candidates[i]), min(_STEP, end - i)


def _locate(runs: Sequence[Run], starts: np.ndarray, number: int) -> tuple[Run, int]:
    """The run of a page, and its number there."""
    i = int(np.searchsorted(starts, number, "right")) - 1
    return runs[i], number - int(starts[i])
