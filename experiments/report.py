"""Tables and plots from rows that `experiments.bench` wrote. Measures nothing.

    python -m experiments.report [--machine NAME] [--table cpu|gpu|delta] [--write README.md]
                                 [--plot FILE.png]

`--write` puts the table between the lines `<!-- results:cpu -->` (or the table's name) and
`<!-- /results -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench import RESULTS, machine_name
from experiments.cases import GOALS, OURS, Goal
from experiments.delta_plot import plot_patches
from experiments.delta_report import delta_cells, delta_verdicts, is_delta
from forge.command import run_command
from forge.errors import GGUFShardError

Row = Mapping[str, Any]
Cells = Callable[[Sequence[Row]], list[tuple[str, ...]]]

BEGIN, END = "<!-- results:cpu -->", "<!-- /results -->"
_TABLES = ("cpu", "gpu", "delta")
_HEAD = ("case", "variant", "median", "p20 to p80", "limit", "of limit", "of peer")


def read_rows(machine: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of a machine, case by case.

    Raises
    ------
    GGUFShardError
        If there are none, or a file holds no rows.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted((results / machine).glob("*.json")):
        try:
            rows += json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise GGUFShardError(f"{path}: no JSON rows: {error}") from None
    if not rows:
        raise GGUFShardError(f"{results / machine}: no results (python -m experiments.exp_cpu)")
    return rows


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table as text, head first; a row that was not validated shows no figure."""
    cells: list[tuple[str, ...]] = [_HEAD]
    for row in rows:
        label = _label(row)
        if not row["validated"]:
            cells.append((label, row["variant"], "wrong result", "", "", "", ""))
            continue
        unit = row["unit"]
        spread = f"{_figure(row['p20'])} to {_figure(row['p80'])}" if row["n"] > 1 else ""
        limit = f"{_figure(row['limit'])} {unit}" if row["limit"] is not None else ""
        if limit and row["limit_by"]:
            limit += f" ({row['limit_by']})"
        fraction = row["fraction_of_limit"]
        ratio = of_peer(row, rows)
        cells.append(
            (
                label,
                row["variant"],
                f"{_figure(row['median'])} {unit}",
                spread,
                limit,
                "" if fraction is None else f"{100 * fraction:.0f} %",
                "" if ratio is None else f"{ratio:.2f}",
            )
        )
    return cells


def of_peer(row: Row, rows: Sequence[Row]) -> float | None:
    """How our row compares with its peer, the first other variant of the same case and params:
    1 is level, more is better. None for rows of peers and where there is no peer."""
    if row["variant"] != OURS or not row["validated"]:
        return None
    for other in rows:
        same = other["case"] == row["case"] and other["params"] == row["params"]
        if same and other["variant"] != OURS and other["validated"]:
            ratio = float(row["median"] / other["median"])
            return ratio if row["better"] == "higher" else 1 / ratio
    return None


def markdown_table(rows: Sequence[Row], cells_of: Cells = table_cells) -> str:
    """The rows as a Markdown table, and one line about where they come from."""
    head, *body = cells_of(rows)
    lines = [_markdown_line(head), _markdown_line(("---",) * len(head))]
    lines += [_markdown_line(cells) for cells in body]
    return "\n".join([*lines, "", provenance(rows)])


def text_table(rows: Sequence[Row], cells_of: Cells = table_cells) -> str:
    """The rows as aligned text for a terminal."""
    cells = cells_of(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def provenance(rows: Sequence[Row]) -> str:
    """Machine, commits and dates of the rows, in a sentence."""
    host, gpu = rows[0]["host"], rows[0]["gpu"]
    machine = f"{host['cpu']}, {host['cores']} cores"
    commits = sorted({_commit(row) for row in rows})
    dates = sorted({row["date"] for row in rows})
    versions = rows[0]["versions"]
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{f'{gpu}, {machine}' if gpu else machine}; Python {versions['python']}, "
        f"NumPy {versions['numpy']}, Numba {versions['numba']}; "
        f"commit {', '.join(commits)}; {span}."
    )


def goal_lines(rows: Sequence[Row]) -> list[str]:
    """One line for every measured figure that has a goal."""
    lines = []
    for goal in GOALS:
        for row in rows:
            has_type = goal.type in (None, row["params"].get("type"))
            if row["case"] == goal.case and has_type and row["validated"] and _is_ours(row, rows):
                lines += _goal_line(goal, row, rows)
    return lines


def _is_ours(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a row is no peer's."""
    return row["variant"] == OURS or not any(
        (other["case"], other["params"], other["variant"]) == (row["case"], row["params"], OURS)
        for other in rows
    )


def _goal_line(goal: Goal, row: Row, rows: Sequence[Row]) -> list[str]:
    label = f"{_label(row)}, {row['variant']}"
    value, unit = row["median"], row["unit"]
    if goal.of_limit is not None:
        fraction = row["fraction_of_limit"]
        if fraction is None:
            return []
        ok = fraction >= goal.of_limit
        text = f"{100 * fraction:.0f} % of the limit, goal {100 * goal.of_limit:g} %"
    elif goal.of_peer is not None:
        ratio = of_peer(row, rows)
        if ratio is None:
            return []
        ok, text = ratio >= goal.of_peer, f"{ratio:.2f} of the peer, goal {goal.of_peer:g}"
    elif goal.at_least is not None:
        ok = value >= goal.at_least
        text = f"{_figure(value)} {unit}, goal at least {goal.at_least:g}"
    else:
        assert goal.at_most is not None
        ok = value <= goal.at_most
        text = f"{_figure(value)} {unit}, goal at most {goal.at_most:g}"
    return [f"{label}: {text}: {'reached' if ok else 'missed'}"]


def insert_table(text: str, table: str, name: str, begin: str = BEGIN) -> str:
    """A document with the table between its markers in place of what stood there.

    Raises
    ------
    GGUFShardError
        If the document `name` does not hold the markers once, in order.
    """
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end or begin in rest:
        raise GGUFShardError(f"{name}: want one line {begin} and behind it a line {END}")
    return f"{before}{begin}\n{table}\n{END}{after}"


def plot_fractions(rows: Sequence[Row], path: Path) -> None:
    """Bars: how near each timed row comes to its limit; peers in grey.

    Raises
    ------
    GGUFShardError
        If no row has a limit.
    """
    from matplotlib.figure import Figure  # which the tables do without

    shown = [row for row in rows if row["fraction_of_limit"] is not None and row["n"] > 1]
    if not shown:
        raise GGUFShardError(f"{path}: no timed row has a limit to be drawn against")
    raced = {row["case"] for row in rows if row["variant"] == OURS}
    is_peer = [row["case"] in raced and row["variant"] != OURS for row in shown]
    shares = [100 * row["fraction_of_limit"] for row in shown]
    places = range(len(shown))
    figure = Figure(figsize=(9.5, 1.4 + 0.45 * len(shown)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(places, shares, color=["#999999" if peer else "#0072B2" for peer in is_peer])
    axes.bar_label(bars, [f" {_figure(row['median'])} {row['unit']}" for row in shown], fontsize=8)
    axes.axvline(100, color="black", linewidth=1)
    labels = [f"{_label(row)}\n{row['variant']}" for row in shown]
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set(xlabel="% of the limit (line)", xlim=(0, 1.25 * max(100, *shares)))
    figure.suptitle(textwrap.fill(provenance(rows), 100), fontsize=8)
    figure.savefig(path, dpi=110)


def _commit(row: Row) -> str:
    commit = (row["commit"] or "unknown")[:7]
    return f"{commit} with changes" if row["dirty"] else commit


def _label(row: Row) -> str:
    """Case and params: "decode: random 1b Q8_0, 2 threads"."""
    params = [
        f"{value} {key.replace('_', ' ')}" if isinstance(value, int) else str(value)
        for key, value in row["params"].items()
    ]
    return f"{row['case']}: {', '.join(params)}" if params else str(row["case"])


def _figure(value: float) -> str:
    """Three digits."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _table_of(row: Row) -> str:
    if is_delta(row):
        return "delta"
    return "gpu" if row["case"].startswith("gpu-") else "cpu"


def _run(args: argparse.Namespace) -> int:
    about_delta = args.table == "delta"
    rows = [r for r in read_rows(args.machine, args.results) if _table_of(r) == args.table]
    if not rows:
        raise GGUFShardError(f"{args.results / args.machine}: no rows for the table {args.table}")
    table = markdown_table(rows, delta_cells if about_delta else table_cells)
    if args.plot is not None and about_delta:
        plot_patches(rows, args.plot, provenance(rows))
    elif args.plot is not None:
        plot_fractions(rows, args.plot)
    if args.write is None:
        print(table)
    else:
        text = args.write.read_text(encoding="utf-8")
        begin = BEGIN.replace("cpu", args.table)
        text = insert_table(text, table, args.write.name, begin)
        args.write.write_text(text, encoding="utf-8")
    for line in delta_verdicts(rows) if about_delta else goal_lines(rows):
        print(line, file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 after one line about what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Tables and plots from recorded rows."
    )
    parser.add_argument("--machine", default=machine_name(), help="default: this one")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--table", choices=_TABLES, default="cpu",
                        help="of gpu_session, of patches, or all else (default)")  # fmt: skip
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table in this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png",
                        help="draw shares of limits; of patches, size against time")  # fmt: skip
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
