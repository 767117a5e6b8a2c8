"""Patches between two models: size, time and memory, beside limits and other tools.

    python -m experiments.exp_delta [--preset S|M|L] [--only pages,noise] [--plot FILE.png]
    python -m experiments.exp_delta --large 4GB

Pairs are made for the occasion (`experiments.delta_cases`); the fine-tuned one takes part where the
folder of real models is. Tools (`experiments.delta_peers`) take turns. Who needs more than five
seconds has one turn, the others one to warm up and `repeats` more. A turn counts only if the output
has the target's SHA-256. Rows go to `experiments/results/<machine>/delta-*.json`:
`python -m experiments.report --table delta` reads them.

Ours is held against what the machine can do at most, measured beside every pair. Both files have
to be hashed, one on each core, and a SHA-256 cannot be split; both are read and one is written, a
target not before the base is known to be the right one:

    create >= max(longer file / SHA-256, (base + target) / reading, patch / disk)
    apply  >= max(longer file / SHA-256, base / SHA-256 + target / disk, (base + patch) / reading)

with SHA-256 the bytes a second of one thread while another hashes too, reading those of two threads
from the page cache, and disk those of one thread that forces them to disk. All else may overlap.
The limit of a patch's size is its entropy where that is known. `--large` makes a pair of that size
and gives speed and peak memory of the command alone.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.bench import (
    RESULTS,
    Case,
    Variant,
    describe_environment,
    machine_name,
    measure,
    refuse_in_simulator,
    write_rows,
)
from experiments.cases import OURS
from experiments.delta_cases import (
    DELTA,
    FINE_TUNED,
    GENERATED,
    DeltaCases,
    Pair,
    fine_tuned_pairs,
    write_base,
    write_large_pair,
    write_target,
)
from experiments.delta_peers import (
    Tool,
    Turn,
    file_sha256,
    installed_peers,
    our_command,
    our_library,
    take_turn,
)
from experiments.delta_plot import plot_patches
from experiments.delta_report import delta_cells, delta_verdicts
from experiments.machine_limits import Best, file_read_seconds, hash_bandwidth, write_bandwidth
from experiments.report import provenance, text_table
from forge.command import run_command
from forge.errors import GGUFShardError
from forge.sizes import parse_size

CASES = (*GENERATED, *FINE_TUNED)
_SLOW_SECONDS = 5.0
_SEED = 0


class Capacities:
    """What the machine can do, in bytes a second; the best seen so far.

    Parameters
    ----------
    folder
        On the disk that is written to.
    """

    def __init__(self, folder: Path) -> None:
        self._hashing = Best(_hash_bandwidth_each)
        self._writing = Best(lambda: write_bandwidth(folder))
        self._reading = 0.0

    def seconds(self, pair: Pair, patch_bytes: float) -> dict[str, tuple[float, str]]:
        """The least seconds of "create" and "apply", and what sets them."""
        base, target = pair.base.stat().st_size, pair.target.stat().st_size
        read = base / file_read_seconds(pair.base, min(2, os.cpu_count() or 1))
        self._reading = max(self._reading, read)
        hashing, writing = self._hashing(), self._writing()
        longer = max(base, target) if (os.cpu_count() or 1) > 1 else base + target

        costs = {
            "create": {
                "SHA-256": longer / hashing,
                "reading": (base + target) / self._reading,
                "disk": patch_bytes / writing,
            },
            "apply": {
                "SHA-256": longer / hashing,
                "SHA-256, then disk": base / hashing + target / writing,
                "reading": (base + patch_bytes) / self._reading,
            },
        }
        slowest = {action: max(of, key=lambda what: of[what]) for action, of in costs.items()}
        return {action: (costs[action][what], what) for action, what in slowest.items()}


def _hash_bandwidth_each() -> float:
    """Bytes a second that SHA-256 takes on each of two threads at once."""
    with ThreadPoolExecutor(2) as pool:
        return min(pool.map(lambda _: hash_bandwidth(), range(2)))


def race(
    pair: Pair, tools: Sequence[Tool], folder: Path, repeats: int, slow_seconds: float
) -> dict[str, list[Turn]]:
    """The turns of each tool that count; none for a tool whose output was wrong once."""
    sha256 = file_sha256(pair.target)
    turns: dict[str, list[Turn]] = {tool.name: [] for tool in tools}
    waiting = list(tools)
    for turn in range(1 + repeats):
        for tool in list(waiting):
            try:
                done = take_turn(tool, pair, folder, sha256)
            except (GGUFShardError, OSError) as error:
                print(f"{tool.name}, {pair.name}: {error}", file=sys.stderr)
                turns[tool.name] = []
                waiting.remove(tool)
                continue
            if turn == 0 and max(done.create.seconds, done.apply.seconds) > slow_seconds:
                waiting.remove(tool)
            if turn > 0 or tool not in waiting:
                turns[tool.name].append(done)
    return turns


def pair_rows(
    pair: Pair,
    turns: dict[str, list[Turn]],
    capacities: Capacities,
    environment: dict[str, Any],
) -> list[dict[str, Any]]:
    """Rows of all quantities of a pair."""
    params = {"pair": pair.name, "bytes": pair.target.stat().st_size}
    sizes = [done[0].patch_bytes for done in turns.values() if done]
    least = capacities.seconds(pair, min(sizes, default=0))
    rows = []
    for name, done in turns.items():
        quantities: dict[str, tuple[str, list[float], tuple[float | None, str]]] = {
            "patch": ("bytes", [t.patch_bytes for t in done], (pair.least_bytes, "entropy")),
            "create": ("s", [t.create.seconds for t in done], least["create"]),
            "apply": ("s", [t.apply.seconds for t in done], least["apply"]),
            "create-memory": ("MB", [t.create.peak_bytes / 1e6 for t in done], (None, "")),
            "apply-memory": ("MB", [t.apply.peak_bytes / 1e6 for t in done], (None, "")),
        }
        for quantity, (unit, figures, (limit, limit_by)) in quantities.items():
            # What bounds the time of tools that check nothing is not known.
            is_bound = limit is not None and (quantity == "patch" or name.startswith(OURS))
            variant = Variant(
                name, iter(figures).__next__, lambda done=done: bool(done),  # type: ignore[misc]
                limit if is_bound else None, limit_by if is_bound else "",
            )  # fmt: skip
            rows += measure(
                Case(f"delta-{quantity}", unit, params, "lower"), [variant],
                repeats=max(1, len(figures)), warmup=0, seed=_SEED, environment=environment,
            )  # fmt: skip
    return rows


def _pairs(args: argparse.Namespace, cases: DeltaCases, folder: Path) -> Iterator[Pair]:
    """The pairs to measure; a generated target is gone when the next one comes."""
    generated = [name for name in args.only if name in GENERATED]
    if generated:
        base, target = folder / "base.gguf", folder / "target.gguf"
        write_base(base, cases, _SEED)
        for name in generated:
            yield write_target(name, base, target, cases, _SEED)
            target.unlink()
        base.unlink()
    found = {pair.name: pair for pair in fine_tuned_pairs()}
    for name in args.only:
        if name in found:
            yield found[name]
        elif name in FINE_TUNED:
            print(f"{name}: not in the folder of models: left out", file=sys.stderr)


def _tools(pair: Pair, peers: Sequence[Tool]) -> list[Tool]:
    # The library call comes first: it compiles, and what is compiled is kept for the command.
    tools = [our_library(), our_command()]
    if pair.name in FINE_TUNED:
        from delta.diff import MAX_LEVEL

        tools.append(our_library(MAX_LEVEL))
    return [*tools, *peers]


def _measure_pairs(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    cases, environment = DELTA[args.preset], describe_environment()
    capacities = Capacities(folder)
    peers, missing = installed_peers(cases.peers)
    for name in missing:
        print(f"{name} is not installed: it does not take part", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for pair in _pairs(args, cases, folder):
        print(f"measuring {pair.name}", file=sys.stderr)
        turns = race(pair, _tools(pair, peers), folder, cases.repeats, _SLOW_SECONDS)
        measured = pair_rows(pair, turns, capacities, environment)
        write_rows(measured, args.machine, args.results)
        rows += measured
    return rows


def _measure_large(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    n_bytes = parse_size(args.large).n_bytes
    if n_bytes is None:
        raise GGUFShardError(f"--large {args.large}: want a size, not a share")
    print(f"making a pair of {args.large}", file=sys.stderr)
    pair = write_large_pair(folder, n_bytes, _SEED)
    turns = race(pair, [our_command()], folder, 1, math.inf)
    rows = pair_rows(pair, turns, Capacities(folder), describe_environment())
    write_rows(rows, args.machine, args.results)
    return rows


def _run(args: argparse.Namespace) -> int:
    refuse_in_simulator()
    measure_rows = _measure_pairs if args.large is None else _measure_large
    with tempfile.TemporaryDirectory(prefix="gguf-shard-", dir=args.folder) as folder:
        rows = measure_rows(args, Path(folder))
    if not rows:
        raise GGUFShardError("exp_delta: none of the pairs is here")
    print(text_table(rows, delta_cells))
    print("\n".join(["", *delta_verdicts(rows), provenance(rows)]))
    if args.plot is not None:
        plot_patches(rows, args.plot, provenance(rows))
    return 0 if all(row["validated"] for row in rows) else 1


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CASES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CASES)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 if a result was wrong or after one line about other trouble."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.exp_delta",
        description="Measure patches between models, ours and other tools', with limits.",
    )
    parser.add_argument("--preset", choices=DELTA, default="M", help="how large (default: M)")
    parser.add_argument("--only", type=_names, default=list(CASES), metavar="PAIR,...",
                        help=f"some of {','.join(CASES)} (default: all)")  # fmt: skip
    parser.add_argument("--large", metavar="SIZE",
                        help="instead, speed and memory of the command on a pair of this "
                        "size, such as 4GB")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw size against time")
    parser.add_argument("--machine", default=machine_name(), help="name of the results' folder")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for temporary files")
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
