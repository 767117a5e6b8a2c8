"""Disjoint ranges against a dictionary of single bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge import byte_ranges
from forge.byte_ranges import ByteRanges

_END = 60


def rows(ranges: ByteRanges) -> list[tuple[int, ...]]:
    return [tuple(row) for table in ranges.tables() for row in table.tolist()]


@pytest.fixture(params=[4, 4096], ids=["small chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_ranges, "_CHUNK", request.param)


@given(
    st.lists(st.tuples(st.integers(0, _END), st.integers(1, 9), st.integers(0, 3)), max_size=40),
    st.sampled_from([4, 5, 4096]),
)
def test_any_ranges(adds: list[tuple[int, int, int]], chunk: int) -> None:
    """`positions[b]` is where byte b is kept; a step of 0 keeps a range right behind the last."""
    positions: dict[int, int] = {}
    end = 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(byte_ranges, "_CHUNK", chunk)
        ranges = ByteRanges()
        for begin, size, step in adds:
            covered = range(begin, begin + size)
            if any(byte in positions for byte in covered):
                with pytest.raises(ValueError, match=f"bytes {begin} to {begin + size - 1} over"):
                    ranges.add(begin, size, end + step)
                continue
            ranges.add(begin, size, end + step)
            positions.update((byte, end + step + byte - begin) for byte in covered)
            end += step + size
        found = {b + i: p + i for b, size, p in rows(ranges) for i in range(size)}
        assert found == positions
        assert [row[0] for row in rows(ranges)] == sorted(row[0] for row in rows(ranges))
        assert len(ranges) == len(rows(ranges))
        for begin in range(0, _END + 10, 7):
            for size in (0, 1, 8):
                touching = list(ranges.overlapping(begin, begin + size))
                inside = set(range(begin, begin + size))
                assert touching == [
                    (b, n, p) for b, n, p in rows(ranges) if inside & set(range(b, b + n))
                ]
        for last in (0, 1, 30, _END + 20):
            gaps = [byte for b, e in ranges.gaps(last) for byte in range(b, e)]
            assert gaps == [byte for byte in range(last) if byte not in positions]


def test_what_continues_both_ways_is_one_range(chunk: None) -> None:
    ranges = ByteRanges()
    for i in range(100):
        ranges.add(10 * i, 10, 7 + 10 * i)
    assert rows(ranges) == [(0, 1000, 7)]
    ranges.add(1000, 10, 0)  # continues the file, but is kept elsewhere
    ranges.add(2000, 10, 10)  # the other way round
    assert rows(ranges) == [(0, 1000, 7), (1000, 10, 0), (2000, 10, 10)]


def test_many_ranges_in_any_order_take_little_room() -> None:
    n = 20_000
    for order in (np.arange(n), np.arange(n)[::-1], np.random.default_rng(1).permutation(n)):
        ranges = ByteRanges()
        for position, i in enumerate(order.tolist()):
            ranges.add(8192 * i, 4096, 4096 * position)
        table = np.concatenate(list(ranges.tables()))
        assert table[:, 0].tolist() == [8192 * i for i in range(n)]
        assert (table[order, 2] == 4096 * np.arange(n)).all()
        chunks = [len(chunk.begins) for chunk in ranges._chunks]
        assert max(chunks) <= 4096 and min(chunks[:-1]) >= (4096 if order[0] == 0 else 2048)
