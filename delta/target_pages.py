"""The bytes of a target, put together in memory.

What the target keeps is read from the base; what the patch stores is decoded once, and stays. So
any part of the target can be made before there is a file, and made again.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from delta.bound_patch import COPIED, KEPT, BoundPatch, Piece, RunEdits
from delta.mode_choice import SPARSE
from delta.page_grid import Run, RunKey, n_paired, stretches
from delta.patch_file import PageGroup

_EDIT_BYTES = 9  # of memory: a place and a value


def _first_page(piece: Piece) -> int:
    return piece.first_page


def _is_of_few_edits(group: PageGroup) -> bool:
    """Whether a group says what it changes in less memory than the pages take."""
    return group.mode == SPARSE and _EDIT_BYTES * group.n_items < group.n_bytes


class TargetPages:
    """Pages of a target.

    Parameters
    ----------
    bound
        The patch and its base.
    """

    def __init__(self, bound: BoundPatch) -> None:
        self._bound = bound
        self._pieces: dict[RunKey, list[Piece]] = defaultdict(list)
        self._edits: dict[tuple[int, RunKey], RunEdits] = {}
        is_sparse = [_is_of_few_edits(stored.group) for stored in bound.groups]
        # Whether pages are made from the base's, by their source; COPIED is the last but one, KEPT
        # the last.
        self._is_of_base = np.array([*is_sparse, False, True])

    def decode(self, group: int) -> list[Piece] | list[RunEdits]:
        """What a group says; may be called by several threads.

        Raises
        ------
        GGUFShardError
            As of `BoundPatch.decode`.
        """
        stored = self._bound.groups[group]
        if self._is_of_base[group]:
            return self._bound.decode_edits(stored)
        return self._bound.decode(stored)

    def store(self, group: int, decoded: list[Piece] | list[RunEdits]) -> None:
        """Keep what a group says."""
        for part in decoded:
            if isinstance(part, RunEdits):
                self._edits[group, part.run.key] = part
            else:
                insort(self._pieces[part.run.key], part, key=_first_page)

    def groups_of(self, index: int, first: int, count: int) -> list[int]:
        """The groups that hold the pages of a stretch, or what is copied there; ascending."""
        bound = self._bound
        sources = bound.sources[index][first : first + count]
        if (sources == KEPT).all():  # mostly
            return []
        groups = [sources[sources >= 0]]
        for _, n, source, page, from_target in self._copies(index, first, count):
            if from_target:
                groups.append(bound.sources[bound.index_of(source)][page : page + n])
        return np.unique(np.concatenate(groups)).tolist()

    def fill(self, index: int, first: int, out: np.ndarray) -> None:
        """Make consecutive pages of a run, whose groups are stored.

        Parameters
        ----------
        index
            Of the run among the target's.
        first
            The first page.
        out
            uint8, contiguous, as long as the pages.

        Raises
        ------
        GGUFShardError
            If the base cannot be read.
        """
        run = self._bound.runs[index]
        count = -(-len(out) // run.page_bytes)
        sources = self._bound.sources[index][first : first + count]
        self._keep(index, first, out, sources)
        if (sources == KEPT).all():
            return
        for page, data in self._stored_of(run, first, count):
            begin = (page - first) * run.page_bytes
            out[begin : begin + len(data)] = data
        for group in np.unique(sources[self._is_of_base[sources] & (sources != KEPT)]).tolist():
            edits = self._edits[group, run.key]
            begin = first * run.page_bytes
            here = slice(*np.searchsorted(edits.places, [begin, begin + len(out)]))
            out[edits.places[here] - begin] ^= edits.values[here]
        for to, n, source, page, from_target in self._copies(index, first, count):
            offset, n_bytes = source.span(page, n)
            begin = (to - first) * run.page_bytes
            there = out[begin : begin + n_bytes]
            if from_target:
                self.fill(self._bound.index_of(source), page, there)  # which are no copies
            else:
                self._bound.base.read_into(source.part, offset, there)

    def _keep(self, index: int, first: int, out: np.ndarray, sources: np.ndarray) -> None:
        """The base's pages of the same places, where they count, and zero where it has none."""
        run, other = self._bound.runs[index], self._bound.others[index]
        end = min(n_paired(run, other) - first, len(sources))
        n_bytes = 0
        if other is not None and end > 0:
            offset, n_bytes = other.span(first, end)
            if self._is_of_base[sources[:end]].any():
                self._bound.base.read_into(other.part, offset, out[:n_bytes])
        out[n_bytes:] = 0

    def _copies(
        self, index: int, first: int, count: int
    ) -> Iterator[tuple[int, int, Run, int, bool]]:
        """What `BoundPatch.copied` says of those pages of a stretch that are copied."""
        sources = self._bound.sources[index][first : first + count]
        if not (sources == COPIED).any():
            return
        for begin, end in stretches(sources == COPIED):
            yield from self._bound.copied(self._bound.runs[index], first + begin, end - begin)

    def _stored_of(self, run: Run, first: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """What is stored of a stretch: first page and bytes of each piece."""
        pieces = self._pieces.get(run.key, [])
        at = max(bisect_right(pieces, first, key=_first_page) - 1, 0)
        while at < len(pieces) and pieces[at].first_page < first + count:
            piece = pieces[at]
            begin = max(first, piece.first_page)
            places = slice(
                (begin - piece.first_page) * run.page_bytes,
                (first + count - piece.first_page) * run.page_bytes,
            )
            if len(piece.data[places]):
                yield begin, piece.data[places]
            at += 1
