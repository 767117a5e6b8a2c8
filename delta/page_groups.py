"""Pages to be stored, gathered in batches and coded as groups.

A batch holds pages of one element type, in the order of the files; it becomes a group for each mode
that is the smallest for some of its pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from delta.byte_planes import ElementKind, element_kind
from delta.compare import RunChange, read_spans
from delta.compression import SLOW_LEVEL
from delta.mode_choice import STRAY_SHARE, choose_modes
from delta.moved_pages import numbered
from delta.page_coding import (
    GROUP_BYTES,
    ORDERED,
    RAW,
    SPARSE,
    XOR,
    compress_streams,
    count_items,
    encode,
)
from delta.page_grid import consecutive, stretches
from delta.patch_file import BOTH, PageGroup, render_group
from delta.source_model import SourceModel
from forge.buffers import scratch

#: What a batch is made of: element type, and whether its pages have counterparts.
_BatchKey = tuple[GGMLQuantizationType | None, bool]


@dataclass(frozen=True)
class Batch:
    """Stored pages of one element type that go to the coder together.

    `pieces` are runs, the number of their first page over all touched runs, and pages of theirs.
    """

    ggml_type: GGMLQuantizationType | None
    is_paired: bool
    pieces: list[tuple[RunChange, int, np.ndarray]]

    @property
    def pages(self) -> np.ndarray:
        """Numbers of the pages over the touched runs."""
        return np.concatenate([start + own for _, start, own in self.pieces])

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of the pages."""
        return np.concatenate([change.run.page_lengths(own) for change, _, own in self.pieces])

    def spans(self) -> list[tuple[RunChange, int, int]]:
        """The pages as (change, first page, count)."""
        return [
            (change, first, count)
            for change, _, own in self.pieces
            for first, count in consecutive(own)
        ]


def gather(touched: Sequence[RunChange], is_stored: np.ndarray) -> Iterator[Batch]:
    """All stored pages, in batches of about `GROUP_BYTES`, in the order of their first pages.

    Parameters
    ----------
    touched
        The runs.
    is_stored
        bool [pages of all of them].
    """
    waiting: dict[_BatchKey, list[tuple[RunChange, int, np.ndarray]]] = {}
    filled: dict[_BatchKey, int] = {}
    starts = numbered([change.run for change in touched])
    for change, start in zip(touched, starts[:-1].tolist(), strict=True):
        run = change.run
        pages = np.flatnonzero(is_stored[start : start + run.n_pages])
        n_paired = int(np.searchsorted(pages, change.n_paired))
        for is_paired, own in ((True, pages[:n_paired]), (False, pages[n_paired:])):
            key = run.ggml_type, is_paired
            while len(own):
                room = max((GROUP_BYTES - filled.get(key, 0)) // run.page_bytes, 1)
                waiting.setdefault(key, []).append((change, start, own[:room]))
                n_bytes = int(run.page_lengths(own[:room]).sum())
                filled[key] = filled.get(key, 0) + n_bytes
                own = own[room:]
                if filled[key] + run.page_bytes > GROUP_BYTES:
                    yield Batch(*key, waiting.pop(key))
                    filled[key] = 0
    for key, pieces in waiting.items():
        yield Batch(*key, pieces)


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
        spans, pages, lengths = batch.spans(), batch.pages, batch.lengths
        n_bytes = int(lengths.sum())
        runs = ((change.run, first, n) for change, first, n in spans)
        target = read_spans(self.target, runs, scratch("target", n_bytes))
        base = None
        modes = np.full(len(pages), RAW, np.uint8)
        if batch.is_paired:
            others = ((c.other, first, n) for c, first, n in spans if c.other is not None)
            base = read_spans(self.base, others, scratch("base", n_bytes))
            modes = choose_modes(kind, target, base, lengths, self.level >= SLOW_LEVEL)
            if self.directions == BOTH:
                modes[modes == RAW] = XOR  # which can be undone
            _join_strays(modes, lengths)
        groups = []
        for mode in np.unique(modes).tolist():
            chosen = modes == mode
            here = _select(target, lengths, chosen)
            there = None if base is None else _select(base, lengths, chosen)
            groups.append(self._group(kind, mode, pages[chosen], lengths[chosen], here, there))
        return groups, n_bytes

    def _group(
        self, kind: ElementKind, mode: int, pages: np.ndarray, lengths: np.ndarray,
        target: np.ndarray, base: np.ndarray | None,
    ) -> tuple[PageGroup, bytes]:  # fmt: skip
        symmetric = self.directions == BOTH
        streams = encode(kind, mode, target, base, lengths, symmetric=symmetric)
        n_items = count_items(kind, mode, streams)
        group = PageGroup(kind.ggml_type, mode, self.directions, pages, len(target), n_items)
        return group, render_group(group, compress_streams(streams, self.level))


def _join_strays(modes: np.ndarray, lengths: np.ndarray) -> None:
    """Give few pages the mode of most, where they do not lose much. In SPARSE, many changes do. In
    ORDERED, what has nothing to do with the base takes four times as much: it lies scattered among
    small steps."""
    most = int(np.bincount(modes).argmax())
    for mode in np.unique(modes).tolist():
        share = STRAY_SHARE / 16 if (mode, most) == (RAW, ORDERED) else STRAY_SHARE
        few = lengths[modes == mode].sum() <= share * lengths.sum()
        if few and most != SPARSE:
            modes[modes == mode] = most


def _select(data: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The bytes of some of the pages that lie one behind the other."""
    if chosen.all():
        return data
    bounds = np.cumsum([0, *lengths])
    return np.concatenate([data[bounds[i] : bounds[j]] for i, j in stretches(chosen)])
