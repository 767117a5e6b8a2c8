"""What the cache did, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass
class CacheStats:
    """Counts since a cache was opened.

    An access is one use of a shard by one step of a pass; using it again in the very next step
    (neighbouring bands share a shard) is the same access.

    Attributes
    ----------
    reuse_hits
        Accesses to shards that an earlier access (or the first filling) left resident.
    prefetch_hits
        Accesses to shards that were brought in ahead for this access.
    demand_misses
        Accesses that had to wait for a read of their own.
    late_prefetches
        Those of the prefetch hits that had to wait for a read already under way.
    bytes_moved
        Bytes brought into frames, filling included.
    bytes_filled
        Those of `bytes_moved` that filled the pool before the first pass.
    pages_checked
        Pages whose CRC32 was compared with their tag and the table.
    swaps, swap_seconds
        Loads, and the time in them (reading, checking, publishing), on any thread.
    wait_seconds
        Time that compute waited for shards.
    """

    reuse_hits: int = 0
    prefetch_hits: int = 0
    demand_misses: int = 0
    late_prefetches: int = 0
    bytes_moved: int = 0
    bytes_filled: int = 0
    pages_checked: int = 0
    swaps: int = 0
    swap_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def accesses(self) -> int:
        return self.reuse_hits + self.prefetch_hits + self.demand_misses

    def copy(self) -> CacheStats:
        """The counts as they are now."""
        return dataclasses.replace(self)

    def since(self, earlier: CacheStats) -> CacheStats:
        """What has been added since `earlier`."""
        return CacheStats(
            **{
                field.name: getattr(self, field.name) - getattr(earlier, field.name)
                for field in dataclasses.fields(self)
            }
        )
