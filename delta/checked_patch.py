"""A patch whose base is known to be the right one: from here on something may be written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from delta.bound_patch import BoundPatch
from delta.decode_ahead import DecodedAhead
from delta.page_sink import PageSink
from delta.patch_file import PatchReader
from delta.rehearsal import Rehearsal
from delta.source_model import SourceModel, require
from delta.target_builder import TargetBuilder, groups_in_order
from forge.progress import progress_bar

Result = TypeVar("Result")


class CheckedPatch(BoundPatch):
    """A patch and its base, which has been hashed.

    Parameters
    ----------
    patch, base, reverse
        As of `BoundPatch`.
    advance
        Called with the bytes of the base that have been hashed.

    Raises
    ------
    GGUFShardError
        If the base is not the patch's, the patch does not fit the models it names, or (where that
        is known already) it would not make its target.
    """

    def __init__(
        self,
        patch: PatchReader,
        base: SourceModel,
        reverse: bool = False,
        advance: Callable[[int], None] = lambda n_bytes: None,
    ) -> None:
        self._rehearsal: Rehearsal | None = None
        origin = patch.plan.target if reverse else patch.plan.base
        sizes, sha256 = [f.bytes for f in origin], [f.sha256 for f in origin]
        role = "target" if reverse else "base"
        try:
            super().__init__(patch, base, reverse)
        except Exception:
            require(base, sizes, sha256, role, advance)  # of another base anything may be wrong
            raise
        self._ahead = DecodedAhead(self, groups_in_order(self))
        if Rehearsal.is_worthwhile(self):
            with _beside(Rehearsal(self).run) as rehearsed:
                require(base, sizes, sha256, role, advance)
                self._rehearsal = rehearsed.result()
        else:
            with _beside(self._ahead.run):
                require(base, sizes, sha256, role, advance)

    def build(self, sink: PageSink, advance: Callable[[int], None]) -> None:
        """Put every byte of the target, and check what that has made.

        Parameters
        ----------
        sink
            Where to.
        advance
            Called with the bytes of the target that are complete and checked.

        Raises
        ------
        GGUFShardError
            If the base or the patch cannot be read, the sink refuses, or the result is not what it
            should be.
        """
        if self._rehearsal is not None:
            self._rehearsal.perform(sink, advance)
        else:
            TargetBuilder(self, sink, advance, self._ahead).build()


@contextmanager
def _beside(work: Callable[[threading.Event], Result]) -> Iterator[Future[Result]]:
    """Run something on a thread of its own; whoever leaves before it ends, ends it."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work, stop)
        try:
            yield future
        finally:
            stop.set()


def check_patch(
    patch: PatchReader, base: SourceModel, reverse: bool, progress: bool
) -> CheckedPatch:
    """Hold a patch against its base, with a progress bar while that is hashed."""
    with progress_bar(base.n_bytes, "check base", progress) as advance:
        return CheckedPatch(patch, base, reverse, advance)
