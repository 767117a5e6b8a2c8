"""The rows of `experiments.exp_delta` as a table, and how they stand to their goals.

Here a pair of models and a tool have one line; the rows have one for each quantity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.cases import OURS
from forge.sizes import format_bytes

Row = Mapping[str, Any]

PREFIX = "delta-"
OUR_COMMAND = f"{OURS} command"
_HEAD = (
    "pair", "tool", "patch, bytes", "% of target", "create, s", "MB/s", "apply, s", "MB/s",
    "create, peak MB", "apply, peak MB",
)  # fmt: skip

# Goals: the patch in % of the target at most, by pair and level; bytes of the patch of identical
# files; what ours may be of the smallest peer, and how many times as fast; MB/s; MB.
_PATCH_PERCENT = {
    ("pages", OURS): 1.05,
    ("edits", OURS): 0.05,
    ("metadata", OURS): 0.05,
    ("noise", OURS): 32.0,
    ("tales7M-ft-last2-f16", OURS): 16.0,
    ("tales7M-ft-last2-f16", f"{OURS} level 22"): 15.3,
}
_IDENTICAL_BYTES = 2000
_OF_SMALLEST, _TIMES_AS_FAST = 1.05, 3.0
_MEGABYTES_A_SECOND = {"create": 300.0, "apply": 500.0}
_LARGE_PEAK = 400.0


def is_delta(row: Row) -> bool:
    """Whether a row is one of `experiments.exp_delta`."""
    return str(row["case"]).startswith(PREFIX)


def by_pair(rows: Sequence[Row]) -> dict[tuple[str, int], dict[str, dict[str, Row]]]:
    """Rows by pair and its bytes, then tool, then quantity ("patch", "create", ...)."""
    pairs: dict[tuple[str, int], dict[str, dict[str, Row]]] = {}
    for row in filter(is_delta, rows):
        tools = pairs.setdefault((row["params"]["pair"], row["params"]["bytes"]), {})
        tools.setdefault(row["variant"], {})[row["case"].removeprefix(PREFIX)] = row
    return pairs


def delta_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table as text, head first; the last line of a pair is what is possible at best."""
    cells: list[tuple[str, ...]] = [_HEAD]
    for (pair, n_bytes), tools in by_pair(rows).items():
        label = f"{pair}, {format_bytes(n_bytes)}"
        limits: dict[str, float] = {}
        for tool, row in tools.items():
            if not all(quantity["validated"] for quantity in row.values()):
                cells.append((label, tool, "no result", *[""] * (len(_HEAD) - 3)))
                continue
            for name, quantity in row.items():
                if quantity["limit"] is not None:
                    limits[name] = quantity["limit"]
            figures = {name: quantity["median"] for name, quantity in row.items()}
            cells.append((label, tool, *_figures(figures, n_bytes)))
        if limits:
            cells.append((label, "limit", *_figures(limits, n_bytes)))
    return cells


def _figures(figures: Mapping[str, float], n_bytes: int) -> list[str]:
    """The cells of a line behind its tool; empty where there is no figure."""
    cells = []
    patch = figures.get("patch")
    cells += ["", ""] if patch is None else [f"{patch:,.0f}", f"{100 * patch / n_bytes:.3g}"]
    for name in ("create", "apply"):
        seconds = figures.get(name)
        if seconds is None:
            cells += ["", ""]
        else:
            speed = n_bytes / seconds / 1e6
            cells += [f"{seconds:.3g}", f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}"]
    for name in ("create-memory", "apply-memory"):
        peak = figures.get(name)
        cells.append("" if peak is None else f"{peak:.0f}")
    return cells


def delta_verdicts(rows: Sequence[Row]) -> list[str]:
    """Lines that hold every pair against its goals and the peer with the smallest patch."""
    lines = []
    for (pair, n_bytes), tools in by_pair(rows).items():
        medians = {
            tool: {name: float(row["median"]) for name, row in quantities.items()}
            for tool, quantities in tools.items()
            if all(row["validated"] for row in quantities.values())
        }
        peers = [tool for tool in medians if not tool.startswith(OURS)]
        smallest = min(peers, key=lambda tool: medians[tool]["patch"], default=None)
        for tool in medians:
            if tool not in peers:
                verdicts = _goals(pair, tool, medians[tool], n_bytes)
                if smallest is not None:
                    verdicts += _against_peer(tool, medians[tool], smallest, medians[smallest])
                lines += [f"{pair}, {format_bytes(n_bytes)}, {tool}: {text}" for text in verdicts]
    return lines


def _goals(pair: str, tool: str, figures: Mapping[str, float], n_bytes: int) -> list[str]:
    verdicts = []
    patch, percent = figures["patch"], _PATCH_PERCENT.get((pair, tool))
    if percent is not None:
        share = 100 * patch / n_bytes
        verdicts.append(f"patch {share:.3g} % of the target, {_at_most(share, percent)}")
    if (pair, tool) == ("identical", OURS):
        verdicts.append(f"patch {patch:.0f} bytes, {_at_most(patch, _IDENTICAL_BYTES)}")
    if tool == OURS:
        for name, goal in _MEGABYTES_A_SECOND.items():
            speed = n_bytes / figures[name] / 1e6
            verdicts.append(f"{name} {speed:.0f} MB/s, {_at_least(speed, goal)}")
    if pair == "large":
        peak = max(figures["create-memory"], figures["apply-memory"])
        verdicts.append(f"peak memory {peak:.0f} MB, {_at_most(peak, _LARGE_PEAK)}")
    return verdicts


def _against_peer(
    tool: str, figures: Mapping[str, float], peer: str, others: Mapping[str, float]
) -> list[str]:
    ratio, times = figures["patch"] / others["patch"], others["create"] / figures["create"]
    verdicts = []
    if tool != OUR_COMMAND:  # whose patch is that of the library
        verdicts.append(
            f"patch {ratio:.3g} times the smallest peer's ({peer}, {figures['patch']:,.0f} to "
            f"{others['patch']:,.0f} bytes), {_at_most(ratio, _OF_SMALLEST)}"
        )
    return [
        *verdicts,
        f"created {times:.3g} times as fast as by {peer}, {_at_least(times, _TIMES_AS_FAST)}",
    ]


def _at_most(value: float, goal: float) -> str:
    return f"goal at most {goal:g}: {'reached' if value <= goal else 'missed'}"


def _at_least(value: float, goal: float) -> str:
    return f"goal at least {goal:g}: {'reached' if value >= goal else 'missed'}"
