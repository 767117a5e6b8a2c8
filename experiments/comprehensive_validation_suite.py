"""The validation suite: does this installation, on this machine, lose nothing and let nobody in?

    python experiments/comprehensive_validation_suite.py [--quick|--full] [--only SECTION,...]
                                                         [--json FILE] [--minutes N] [--seed N]

    integrity    right input gives the right bytes by every way; a wrong page is told
    chaos        damage, failing system calls, kills, no memory, no room: old or new, never a third
    hostile      malformed files of every kind, and fuzzing: one line, in bounded time and memory
    throughput   how fast, beside what the machine itself does
    soak         with `--minutes`: run, damage, repair, update, again and again

It ends with a table of what was injected and what came of it, and with exit code 1 if anything was
missed. `experiments.validation.probe` says what the words mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the project's root is one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.bench import refuse_in_simulator
from experiments.validation import (
    cached_pages,
    damage,
    failing_calls,
    hostile,
    integrity,
    kills,
    map_damage,
    patch_damage,
    patch_pairs,
    power_cuts,
    scarcity,
    soak,
)
from experiments.validation.effort import FULL, QUICK
from experiments.validation.probe import Matrix, Outcome, Probe
from experiments.validation.report import as_json, text
from experiments.validation.scene import Scene
from experiments.validation.throughput import measure_throughput
from experiments.validation.throughput import text as throughput_text
from forge.command import run_command

#: Parts of each section, in the order in which they run.
PARTS: dict[str, tuple[Callable[[Scene], Iterator[Probe]], ...]] = {
    "integrity": (integrity.probes, patch_pairs.probes, cached_pages.probes),
    "chaos": (
        damage.probes, map_damage.probes, patch_damage.probes, failing_calls.probes,
        power_cuts.probes, kills.probes, scarcity.probes,
    ),
    "hostile": (hostile.probes,),
}  # fmt: skip
SECTIONS = (*PARTS, "throughput", "soak")


def _sections(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SECTIONS)}")
    return names


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return minutes


def run_section(
    name: str, scene: Scene, matrix: Matrix, parts: Sequence[Callable[[Scene], Iterator[Probe]]]
) -> None:
    """Run parts of a section, with a line on stderr as each is done."""
    for part in parts:
        started, before = time.perf_counter(), sum(row["injected"] for row in matrix.rows())
        missed = matrix.total(Outcome.MISSED)
        matrix.run(name, part(scene))
        count = sum(row["injected"] for row in matrix.rows()) - before
        label = getattr(part, "__module__", "").rpartition(".")[2]
        line = f"{name}: {label or 'rounds'}: {count} faults"
        line += f", {matrix.total(Outcome.MISSED) - missed} missed"
        print(f"{line}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def _run(args: argparse.Namespace) -> int:
    refuse_in_simulator()
    effort = args.effort
    if args.seconds is not None:
        effort = replace(effort, fuzz_seconds=args.seconds)
    sections = args.only
    if args.minutes is not None and "soak" not in sections:
        sections = [*sections, "soak"]
    matrix = Matrix()
    throughput: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gguf-shard-", dir=args.folder) as folder:
        scene = Scene(Path(folder), effort, args.seed)
        for name in sections:
            if name == "throughput":
                throughput = measure_throughput(scene)
            elif name == "soak":
                run_section(name, scene, matrix, [partial(soak.probes, minutes=args.minutes or 1)])
            else:
                run_section(name, scene, matrix, PARTS[name])
    if throughput:
        print(throughput_text(throughput), end="\n\n")
    if matrix.counts:
        print(text(matrix))
    if args.json is not None:
        found = as_json(matrix, throughput, effort.name, args.seed)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    is_right = all(row["validated"] for row in throughput)
    return 0 if is_right and not matrix.total(Outcome.MISSED) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 if a fault was missed or after one line about other trouble."""
    parser = argparse.ArgumentParser(
        prog="comprehensive_validation_suite.py",
        description="Put faults of every kind into models, files and system calls, and see whether "
        "each is detected or harmless.",
    )
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", dest="effort", action="store_const", const=QUICK,
                          default=QUICK, help="a sample of everything (default)")  # fmt: skip
    how_much.add_argument("--full", dest="effort", action="store_const", const=FULL,
                          help="everything")  # fmt: skip
    parser.add_argument("--only", type=_sections, metavar="SECTION,...",
                        default=[name for name in SECTIONS if name != "soak"],
                        help=f"some of {','.join(SECTIONS)} (default: all but soak)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    parser.add_argument("--minutes", type=_minutes, metavar="N", help="soak for so long as well")
    parser.add_argument("--seconds", type=float, metavar="N",
                        help="how long each kind of file is fuzzed")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for temporary files")
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
