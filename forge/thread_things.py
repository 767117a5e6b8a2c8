"""What a thread keeps for itself, and leaves to one that starts after it has ended.

Pools of threads come and go with the calls that need them. What takes long to make and serves one
thread at a time, memory above all, need not go with them.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

_MOST_LEFT = 4  # sets that nobody uses


class ThreadThings:
    """A dict for each thread, empty or what an ended thread has left in its own.

    Examples
    --------
    >>> things = ThreadThings()
    >>> thread = threading.Thread(target=lambda: things.mine().update(answer=42))
    >>> thread.start(); thread.join()
    >>> things.mine()
    {'answer': 42}
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._left: list[dict[str, Any]] = []

    def mine(self) -> dict[str, Any]:
        """This thread's."""
        if not hasattr(self._of_thread, "held"):
            self._of_thread.held = _Held(self._left)
        things: dict[str, Any] = self._of_thread.held.things
        return things

    def forget(self) -> None:
        """Let go of this thread's, and of what ended threads have left."""
        self.mine().clear()
        self._left.clear()


class _Held:
    """A thread's things, which are left as this object goes with the thread."""

    def __init__(self, left: list[dict[str, Any]]) -> None:
        self.things: dict[str, Any] = {}
        self._left = left
        with suppress(IndexError):
            self.things = left.pop()

    def __del__(self) -> None:
        if len(self._left) < _MOST_LEFT:
            self._left.append(self.things)
