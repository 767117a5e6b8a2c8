"""Groups that are decoded while the base is hashed.

One core hashes the base, which cannot be split; until it is done nothing may be written. What is
decoded by then need not be decoded later.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from delta.bound_patch import BoundPatch, Piece
from forge.errors import GGUFShardError

_MOST_BYTES = 32 << 20


class DecodedAhead:
    """The pages of some groups.

    Parameters
    ----------
    bound
        The patch and its base, which need not have been checked yet.
    groups
        Which, in the order in which they will be needed.
    """

    def __init__(self, bound: BoundPatch, groups: Iterable[int]) -> None:
        self._bound = bound
        self._groups = groups
        self._pieces: dict[int, list[Piece]] = {}

    def run(self, stop: threading.Event) -> DecodedAhead:
        """Decode until `stop` is set, or what is held is much; returns this object."""
        n_bytes = 0
        for group in self._groups:
            stored = self._bound.groups[group]
            n_bytes += stored.group.n_bytes
            if stop.is_set() or n_bytes > _MOST_BYTES:
                break
            try:
                self._pieces[group] = self._bound.decode(stored)
            except GGUFShardError:  # whoever needs the group will meet it, if the base is right
                break
        return self

    def take(self, group: int) -> list[Piece]:
        """The pages of a group, decoded now if they were not before; errors as of
        `BoundPatch.decode`. May be called by several threads."""
        pieces = self._pieces.pop(group, None)
        return self._bound.decode(self._bound.groups[group]) if pieces is None else pieces
