"""Progress bars: on stderr, only where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(n_bytes: int, label: str, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar of `n_bytes`; yields the function that advances it."""
    if not (show and sys.stderr.isatty()):
        # Not even a bar that is switched off: it would take locks that processes share, and whoever
        # is killed with one of them leaves the others waiting.
        yield lambda n: None
        return
    with tqdm(total=n_bytes, desc=label, unit="B", unit_scale=True, leave=False) as bar:

        def advance(n: int) -> None:
            bar.update(n)

        yield advance
