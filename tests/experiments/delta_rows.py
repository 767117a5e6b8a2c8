"""Fixture rows of `experiments.exp_delta`."""

from __future__ import annotations

from typing import Any

UNITS = {
    "patch": "bytes", "create": "s", "apply": "s", "create-memory": "MB", "apply-memory": "MB",
}  # fmt: skip


def tool_rows(
    pair: str,
    tool: str,
    figures: tuple[float, float, float, float, float],
    *,
    limits: dict[str, float] | None = None,
    n_bytes: int = 10**8,
    validated: bool = True,
) -> list[dict[str, Any]]:
    """Rows of a tool: bytes, seconds to create and to apply, MB while creating and applying."""
    rows = []
    for (quantity, unit), figure in zip(UNITS.items(), figures, strict=True):
        value = figure if validated else None
        rows.append({
            "case": f"delta-{quantity}", "variant": tool,
            "params": {"pair": pair, "bytes": n_bytes},
            "median": value, "p20": value, "p80": value, "n": int(validated), "unit": unit,
            "better": "lower", "limit": (limits or {}).get(quantity), "limit_by": "",
            "fraction_of_limit": None, "validated": validated, "commit": "0123456789abcdef",
            "dirty": False, "date": "2026-01-02", "seed": 0,
            "host": {"cpu": "Some CPU", "cores": 2}, "gpu": None, "driver": None,
            "versions": {"python": "3.11.7", "numpy": "2.4.0", "numba": "0.68.1", "llvmlite": "0"},
        })  # fmt: skip
    return rows
