"""Bandwidths and the bound they give."""

from __future__ import annotations

from pathlib import Path

import pytest

from atlas.limits import (
    decode_limit,
    link_bandwidth,
    memory_bandwidth,
    weight_bytes_per_pass,
)
from atlas.manager import Atlas
from atlas.target import Target
from tests import cache_factory as cache


@pytest.mark.parametrize(
    ("read", "moved", "memory", "link", "expected"),
    [
        (100, 0, 50, 10, 0.5),  # all resident: memory bounds
        (100, 100, 50, 10, 0.1),  # all moved: the link bounds
        (100, 20, 50, 10, 0.5),  # both take as long
        (100, 50, None, 10, 0.2),  # memory unknown
        (100, 0, None, 10, float("inf")),  # nothing known bounds it
    ],
)
def test_the_slower_of_both_bounds(
    read: float, moved: float, memory: float | None, link: float, expected: float
) -> None:
    assert decode_limit(read, moved, memory, link) == pytest.approx(expected)


def test_bandwidths_are_measured_and_leave_the_cache_alone(target: Target, tmp_path: Path) -> None:
    map_path = cache.shard(tmp_path, cache.dense_model(1), pages_per_shard=2)
    with Atlas.open(map_path, "50%", target, policy="pin") as atlas:
        before = atlas.stats.copy()
        memory, link = memory_bandwidth(target, atlas.cache), link_bandwidth(atlas)
        if target.name == "cuda-simulator":  # whose time means nothing
            assert memory is None and link is None
        else:
            assert memory is not None and 1e3 < memory < 1e13
            assert link is not None and 1e3 < link < 1e13
        assert atlas.stats == before
        cache.assert_at_rest(atlas)
        n_shards = len(atlas.shards.schedule)
        assert weight_bytes_per_pass(atlas.map, n_shards) == n_shards * 2 * 4096
