"""Sizes as people write them: `2.8GB`, `400MiB`, `40%`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from forge.errors import GGUFShardError

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*|%)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Size:
    """A number of bytes, or a fraction of the model's pages (exactly one is set)."""

    n_bytes: int | None = None
    fraction: float | None = None


def parse_size(text: str) -> Size:
    """Read a size: a number with kB, MB, GB, TB, KiB, MiB, GiB, TiB, B, none (bytes) or %.

    Raises
    ------
    GGUFShardError
        If the text is no size, or is zero, or more than 100 %.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or (unit != "%" and unit not in _UNITS):
        raise GGUFShardError(f"size {text!r}: not a number with GB, GiB, MB, MiB, kB, KiB, B or %")
    value = float(match[1])
    if unit == "%":
        if not 0 < value <= 100:
            raise GGUFShardError(f"size {text!r}: not within 0..100 %")
        return Size(fraction=value / 100)
    n_bytes = int(value * _UNITS[unit])
    if not 1 <= n_bytes < 1 << 62:
        raise GGUFShardError(f"size {text!r}: not a size of memory")
    return Size(n_bytes=n_bytes)


def format_bytes(n_bytes: float) -> str:
    """Bytes for people: three digits and a decimal unit."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes:.0f} B"
