"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.errors import GGUFShardError
from forge.sizes import Size, format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1", 1), ("512B", 512), ("4kB", 4000), ("4 KiB", 4096), ("2.8GB", 2_800_000_000),
        (" 400mb ", 400_000_000), ("1.5MiB", 1_572_864), ("1.GiB", 1 << 30), (".5TB", 5 * 10**11),
        ("2TiB", 2 << 40),
    ],
)  # fmt: skip
def test_bytes(text: str, n_bytes: int) -> None:
    assert parse_size(text) == Size(n_bytes=n_bytes)


@pytest.mark.parametrize(("text", "fraction"), [("40%", 0.4), ("100 %", 1.0), ("0.5%", 0.005)])
def test_fractions(text: str, fraction: float) -> None:
    assert parse_size(text) == Size(fraction=fraction)


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1GB", "1e9", "0", "0.4", "0%", "100.1%", "1XB", "1 G B", "nan", "9999999999TiB"],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(GGUFShardError, match=r"^size "):
        parse_size(text)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except GGUFShardError as error:
        assert str(error).startswith("size ")
    else:
        assert (size.n_bytes or 0) >= 1 or 0 < (size.fraction or 0) <= 1


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (281_760, "281.76 kB"),
     (4_200_000, "4.20 MB"), (2_800_000_000, "2.80 GB")],
)  # fmt: skip
def test_format(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text
