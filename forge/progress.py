"""Progress bars: on stderr, only where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(n_bytes: int, label: str, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar of `n_bytes`; yields the function that advances it."""
    disable = not (show and sys.stderr.isatty())
    with tqdm(
        total=n_bytes, desc=label, unit="B", unit_scale=True, disable=disable, leave=False
    ) as bar:

        def advance(n: int) -> None:
            bar.update(n)

        yield advance
