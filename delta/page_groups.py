"""Pages to be stored, gathered in batches and coded as groups.

A batch holds pages of one element type, in the order of the files; it becomes a group for each mode
that is the smallest for some of its pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from delta.byte_planes import element_kind
from delta.compare import RunChange, read_spans
from delta.mode_choice import choose_modes
from delta.moved_pages import numbered
from delta.page_coding import (
    GROUP_BYTES,
    RAW,
    SPARSE,
    XOR,
    compress_streams,
    encode,
)
from delta.page_grid import stretches
from delta.patch_file import BOTH, PageGroup, render_group
from delta.source_model import SourceModel

_STRAY_SHARE = 1 / 128

#: What a batch is made of: element type, and whether its pages have counterparts.
_BatchKey = tuple[GGMLQuantizationType | None, bool]


@dataclass(frozen=True)
class Batch:
    """Stored pages of one element type that go to the coder together.

    `spans` are (change, first page, count); `pages` their numbers over the touched runs.
    """

    ggml_type: GGMLQuantizationType | None
    is_paired: bool
    spans: list[tuple[RunChange, int, int]]
    pages: np.ndarray
    lengths: np.ndarray


def gather(touched: Sequence[RunChange], is_stored: np.ndarray) -> Iterator[Batch]:
    """All stored pages, in batches of about `GROUP_BYTES`, in the order of their first pages.

    Parameters
    ----------
    touched
        The runs.
    is_stored
        bool [pages of all of them].
    """
    waiting: dict[_BatchKey, list[tuple[RunChange, int, int, int]]] = {}
    filled: dict[_BatchKey, int] = {}
    starts = numbered([change.run for change in touched])
    for change, start in zip(touched, starts[:-1].tolist(), strict=True):
        run = change.run
        flags = is_stored[start : start + run.n_pages]
        for first, count, is_paired in _spans(flags, change.n_paired):
            key = run.ggml_type, is_paired
            while count:
                room = max((GROUP_BYTES - filled.get(key, 0)) // run.page_bytes, 1)
                n = min(count, room)
                waiting.setdefault(key, []).append((change, start, first, n))
                filled[key] = filled.get(key, 0) + run.span(first, n)[1]
                first, count = first + n, count - n
                if filled[key] + run.page_bytes > GROUP_BYTES:
                    yield _batch(key, waiting.pop(key))
                    filled[key] = 0
    for key, spans in waiting.items():
        yield _batch(key, spans)


def _spans(flags: np.ndarray, n_paired: int) -> Iterator[tuple[int, int, bool]]:
    """Consecutive flagged pages (first, count, paired), cut where the paired ones end."""
    for begin, end in stretches(flags):
        middle = min(max(begin, n_paired), end)
        if begin < middle:
            yield begin, middle - begin, True
        if middle < end:
            yield middle, end - middle, False


def _batch(key: _BatchKey, spans: list[tuple[RunChange, int, int, int]]) -> Batch:
    ggml_type, is_paired = key
    numbers = [np.arange(first, first + n) for _, _, first, n in spans]
    return Batch(
        ggml_type,
        is_paired,
        [(change, first, n) for change, _, first, n in spans],
        np.concatenate([start + n for (_, start, _, _), n in zip(spans, numbers, strict=True)]),
        np.concatenate([s[0].run.page_lengths(n) for s, n in zip(spans, numbers, strict=True)]),
    )


class PageEncoder:
    """Turns batches into groups; used by several threads.

    Parameters
    ----------
    base, target
        The models.
    directions
        What the groups serve.
    level
        Zstandard's.
    """

    def __init__(self, base: SourceModel, target: SourceModel, directions: int, level: int) -> None:
        self.base = base
        self.target = target
        self.directions = directions
        self.level = level

    def encode(self, batch: Batch) -> tuple[list[tuple[PageGroup, bytes]], int]:
        """The groups of a batch, and its bytes."""
        kind = element_kind(batch.ggml_type)
        target = read_spans(self.target, [(c.run, first, n) for c, first, n in batch.spans])
        base = None
        modes = np.full(len(batch.pages), RAW, np.uint8)
        if batch.is_paired:
            others = [(c.other, first, n) for c, first, n in batch.spans if c.other is not None]
            base = read_spans(self.base, others)
            modes = choose_modes(kind, target, base, batch.lengths)
            if self.directions == BOTH:
                modes[modes == RAW] = XOR  # which can be undone
            _join_strays(modes, batch.lengths)
        groups = []
        for mode in np.unique(modes).tolist():
            groups.append(self._group(batch, modes == mode, mode, target, base))
        return groups, len(target)

    def _group(
        self, batch: Batch, chosen: np.ndarray, mode: int, target: np.ndarray,
        base: np.ndarray | None,
    ) -> tuple[PageGroup, bytes]:  # fmt: skip
        kind = element_kind(batch.ggml_type)
        if not chosen.all():
            target = _select(target, batch.lengths, chosen)
            base = None if base is None else _select(base, batch.lengths, chosen)
        lengths = batch.lengths[chosen]
        symmetric = self.directions == BOTH
        streams = encode(kind, mode, target, base, lengths, symmetric=symmetric)
        n_edits = len(streams[-1]) if mode == SPARSE else 0
        pages = batch.pages[chosen]
        group = PageGroup(batch.ggml_type, mode, self.directions, pages, len(target), n_edits)
        return group, render_group(group, compress_streams(streams, self.level))


def _join_strays(modes: np.ndarray, lengths: np.ndarray) -> None:
    """Give few pages the mode of most: they lose little, and a group of their own takes time and
    room. Only in SPARSE could they lose much."""
    most = int(np.bincount(modes).argmax())
    for mode in np.unique(modes).tolist():
        few = lengths[modes == mode].sum() <= _STRAY_SHARE * lengths.sum()
        if few and most != SPARSE:
            modes[modes == mode] = most


def _select(data: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The bytes of some of the pages that lie one behind the other."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    return np.concatenate([data[begins[i] : ends[i]] for i in np.flatnonzero(chosen).tolist()])
