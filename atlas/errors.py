"""What can go wrong with cached pages."""

from __future__ import annotations

from forge.errors import GGUFShardError


class CorruptPageError(GGUFShardError):
    """A page failed its check twice; nothing computed from it has been used.

    Attributes
    ----------
    page, shard, tensor
        Which page, the shard that was being brought in, and what the page belongs to.
    expected, got
        CRC32 of the content: what the table says, and what was found.
    """

    def __init__(
        self, path: object, page: int, shard: int, tensor: str, expected: int, got: int, reason: str
    ) -> None:
        super().__init__(f"{path}: page {page} (shard {shard}, {tensor}): {reason}")
        self.page = page
        self.shard = shard
        self.tensor = tensor
        self.expected = expected
        self.got = got


class BudgetError(GGUFShardError):
    """The budget cannot hold what a run needs.

    Attributes
    ----------
    smallest_bytes
        The smallest budget that works.
    """

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes
