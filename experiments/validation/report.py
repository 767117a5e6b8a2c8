"""What the validation suite found, as text, as JSON, and as the matrix of the README.

    python -m experiments.validation.report FULL.json [AGAIN.json ...] [--write README.md]

Sections of a later file take the place of those of an earlier one: what was run again counts.
`--write` puts the matrix between the lines `<!-- results:validation -->` and `<!-- /results -->`.
A cell says how many faults were detected, and how many were harmless: "120 + 3". What was missed
stands in bold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench import describe_environment
from experiments.report import insert_table, provenance
from experiments.validation.probe import Matrix, Outcome, Result
from forge.command import run_command
from forge.errors import GGUFShardError

BEGIN = "<!-- results:validation -->"
_MOST_LINES = 40  # of misses in the text
_OUTCOMES = (Outcome.DETECTED, Outcome.HARMLESS, Outcome.MISSED, Outcome.UNAVAILABLE)
#: Columns of the first matrix of a section; whatever else there is makes the second.
_FILES = ("model.gguf", "core.gguf", "core.sgmap", "patch", "journal", "frames")

Row = Mapping[str, Any]


def as_json(matrix: Matrix, throughput: Sequence[Row], effort: str, seed: int) -> dict[str, Any]:
    """Everything a run found, for `--json`."""
    return {
        **describe_environment(),
        "effort": effort,
        "seed": seed,
        "seconds": {section: round(seconds, 1) for section, seconds in matrix.seconds.items()},
        "injected": sum(row["injected"] for row in matrix.rows()),
        **{outcome.value: matrix.total(outcome) for outcome in _OUTCOMES},
        "rows": matrix.rows(),
        "misses": [_miss(result) for result in matrix.misses],
        "unavailable": matrix.unavailable,
        "throughput": list(throughput),
    }


def _miss(result: Result) -> dict[str, str]:
    probe = result.probe
    return {"section": probe.section, "fault": probe.fault, "artefact": probe.artefact,
            "place": probe.place, "reason": result.reason}  # fmt: skip


def text(matrix: Matrix) -> str:
    """The table, what was not possible, what was missed, and the sum; for a terminal."""
    head = ("section", "fault", "artefact", "injected", "detected", "harmless", "MISSED")
    cells = [head]
    for row in matrix.rows():
        cells.append(
            (row["section"], row["fault"], row["artefact"],
             *(str(row[name] or "") for name in head[3:]))
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    lines += [f"not possible here: {what}: {why}" for what, why in matrix.unavailable.items()]
    for result in matrix.misses[:_MOST_LINES]:
        probe = result.probe
        lines.append(f"MISSED: {probe.fault}, {probe.artefact}, {probe.place}: {result.reason}")
    if len(matrix.misses) > _MOST_LINES:
        lines.append(f"MISSED: and {len(matrix.misses) - _MOST_LINES} more")
    return "\n".join([*(line.rstrip() for line in lines), "", summary(matrix)])


def summary(matrix: Matrix) -> str:
    """One line."""
    counts = {outcome: matrix.total(outcome) for outcome in _OUTCOMES}
    line = f"{sum(counts.values()) - counts[Outcome.UNAVAILABLE]} faults injected"
    for outcome in (Outcome.DETECTED, Outcome.HARMLESS, Outcome.MISSED):
        line += f", {counts[outcome]} {outcome.value}"
    if counts[Outcome.UNAVAILABLE]:
        line += f"; {counts[Outcome.UNAVAILABLE]} not possible here"
    return line


def markdown(found: Row) -> str:
    """The matrices of a run that `as_json` told, and where they come from."""
    rows = found["rows"]
    blocks = []
    for section in dict.fromkeys(row["section"] for row in rows):
        of_section = [row for row in rows if row["section"] == section]
        for is_file in (True, False):
            block = [row for row in of_section if (row["artefact"] in _FILES) == is_file]
            if block:
                blocks.append(_matrix(section, block))
    blocks.append(
        f"{found['injected']:,} faults injected: "
        f"{found['detected']:,} detected, {found['harmless']:,} harmless, "
        f"{found['MISSED']} missed (`--{found['effort']}`, seed {found['seed']}). "
        f"{provenance(found['runs'])}"
    )
    return "\n\n".join(blocks)


def _matrix(section: str, rows: Sequence[Row]) -> str:
    artefacts = list(dict.fromkeys(row["artefact"] for row in rows))
    if artefacts[0] in _FILES:
        artefacts.sort(key=_FILES.index)
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        counts.setdefault((row["fault"], row["artefact"]), Counter()).update(
            {outcome.value: row[outcome.value] for outcome in _OUTCOMES}
        )
    lines = [[section, *artefacts], ["---"] * (len(artefacts) + 1)]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        lines.append([fault, *(_cell(counts.get((fault, name))) for name in artefacts)])
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _cell(counts: Counter[str] | None) -> str:
    if counts is None:
        return ""
    detected, harmless, missed, unavailable = (counts[outcome.value] for outcome in _OUTCOMES)
    if not detected + harmless + missed:
        return "n/a" if unavailable else ""
    cell = f"{detected:,} + {harmless:,}" if detected and harmless else ""
    if not cell and detected + harmless:
        cell = f"{detected:,}" if detected else f"0 + {harmless:,}"
    return cell + (f" **{missed:,} missed**" if missed else "")


def merged(runs: Sequence[Row]) -> dict[str, Any]:
    """Runs as one, with each section from the last that has it."""
    last = {row["section"]: i for i, run in enumerate(runs) for row in run["rows"]}
    rows = [row for i, run in enumerate(runs) for row in run["rows"] if last[row["section"]] == i]
    names = ["injected", *(outcome.value for outcome in _OUTCOMES)]
    return {**runs[0], "runs": list(runs), "rows": rows,
            **{name: sum(row[name] for row in rows) for name in names}}  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    runs = []
    for path in args.found:
        try:
            runs.append(json.loads(path.read_text(encoding="utf-8")))
            table = markdown(merged(runs))
        except (ValueError, KeyError, TypeError) as error:
            raise GGUFShardError(f"{path}: not what the suite writes: {error!r}") from None
    if args.write is None:
        print(table)
        return 0
    document = args.write.read_text(encoding="utf-8")
    args.write.write_text(insert_table(document, table, args.write.name, BEGIN), encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 after one line about what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.validation.report",
        description="The matrix of a recorded run of the validation suite.",
    )
    parser.add_argument("found", type=Path, nargs="+", metavar="FOUND.json",
                        help="what --json wrote")  # fmt: skip
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put it in this file")
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
