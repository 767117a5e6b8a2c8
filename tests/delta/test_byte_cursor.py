"""Numbers and texts of a patch: what is written comes back, and nothing is read past the end."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta.byte_cursor import ByteCursor, integer, signed, text
from forge.errors import GGUFShardError

LARGEST = (1 << 63) - 1
numbers = st.one_of(
    st.integers(0, LARGEST),
    st.integers(0, 62).flatmap(lambda bit: st.integers(max(0, (1 << bit) - 2), (1 << bit) + 2)),
)
texts = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape")),
)


def leb128(value: int) -> bytes:
    """By the book: seven bits a byte, the lowest first, a set high bit where more follow."""
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def cursor(data: bytes, origin: int = 0) -> ByteCursor:
    return ByteCursor(data, "some.patch", origin)


def refusal(data: bytes, method: str, *arguments: object, origin: int = 0) -> str:
    with pytest.raises(GGUFShardError) as caught:
        getattr(cursor(data, origin), method)(*arguments)
    said = str(caught.value)
    assert said.startswith("some.patch: offset ") and "\n" not in said
    return said


@given(numbers)
def test_numbers_come_back(value: int) -> None:
    assert integer(value) == leb128(value)
    read = cursor(integer(value) + b"\xff")
    assert read.integer("x") == value and read.remaining == 1


@given(st.integers(-(1 << 62), (1 << 62) - 1))
def test_signed_numbers_come_back(value: int) -> None:
    read = cursor(signed(value) + b"\xff")
    assert read.signed("x") == value and read.remaining == 1


def test_signed_numbers_alternate() -> None:
    assert [signed(value) for value in (0, -1, 1, -2, 2, -64, 64)] == [
        b"\0", b"\1", b"\2", b"\3", b"\4", b"\x7f", b"\x80\1",
    ]  # fmt: skip


@given(st.lists(texts, max_size=5))
def test_texts_come_back(values: list[str]) -> None:
    read = cursor(b"".join(map(text, values)))
    assert [read.text("x", 200) for _ in values] == values
    read.end("x")


@pytest.mark.parametrize(
    ("value", "n_bytes"),
    [(0, 1), (127, 1), (128, 2), ((1 << 14) - 1, 2), (1 << 14, 3), (1 << 56, 9), (LARGEST, 9)],
)
def test_as_many_bytes_as_are_needed(value: int, n_bytes: int) -> None:
    assert len(integer(value)) == n_bytes
    for length in range(n_bytes):
        assert "needs 1 bytes, 0 remain" in refusal(integer(value)[:length], "integer", "x")


def test_numbers_of_more_than_nine_bytes() -> None:
    assert cursor(b"\x80" * 8 + b"\1").integer("x") == 1 << 56
    assert "longer than 9 bytes" in refusal(b"\x80" * 9 + b"\0", "integer", "x")
    assert "longer than 9 bytes" in refusal(integer(1 << 63), "integer", "x")
    assert "longer than 9 bytes" in refusal(b"\xff" * 100_000, "signed", "x")


def test_numbers_have_a_limit() -> None:
    assert cursor(integer(300)).integer("x", 300) == 300
    assert refusal(integer(301), "integer", "field", 300, origin=50) == (
        "some.patch: offset 52: field: 301 is more than 300"
    )
    assert cursor(b"\0").integer("x", 0) == 0


@pytest.mark.parametrize("smallest", [1, 3, 6])
def test_counts_are_of_what_still_fits(smallest: int) -> None:
    """So that nobody makes room for more."""
    behind = bytes(12)
    assert cursor(integer(12 // smallest) + behind).count("x", smallest) == 12 // smallest
    assert "more than" in refusal(integer(13 // smallest + 1) + behind, "count", "x", smallest)
    assert "more than" in refusal(integer(1 << 62) + behind, "count", "x", smallest)


def test_texts_have_a_limit() -> None:
    assert cursor(text("abc")).text("x", 3) == "abc"
    assert "x length: 3 is more than 2" in refusal(text("abc"), "text", "x", 2)
    assert "needs 4 bytes, 3 remain" in refusal(b"\4abc", "text", "x", 9)
    assert cursor(text("\udcff\udc80")).text("x", 2) == "\udcff\udc80"  # bytes that are not UTF-8


def test_bytes() -> None:
    read = cursor(b"abcdef", origin=100)
    assert (read.take(0, "x"), read.take(4, "x"), read.remaining) == (b"", b"abcd", 2)
    with pytest.raises(GGUFShardError, match=r"offset 104: x: needs 3 bytes, 2 remain$"):
        read.take(3, "x")
    with pytest.raises(GGUFShardError, match="needs -1 bytes"):
        read.take(-1, "x")
    with pytest.raises(GGUFShardError, match=r"offset 104: all: 2 bytes too many$"):
        read.end("all")
    assert read.take(2, "x") == b"ef"
    read.end("all")


def test_nothing_is_allocated_for_what_is_not_there() -> None:
    tracemalloc.start()
    try:
        for method in ("take", "text"):
            data = b"" if method == "take" else integer(1 << 40) + b"abc"
            refusal(data, method, *((1 << 40, "x") if method == "take" else ("x", 1 << 41)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
