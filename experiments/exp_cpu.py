"""The speed table on a CPU: every figure beside its limit, peers taking turns in the same run.

    python -m experiments.exp_cpu [--preset S|M|L] [--model FILE.gguf] [--only decode,shard]
                                  [--llama-python PYTHON] [--results DIR]

Models are made for the occasion (`experiments.make_model`) unless given. llama.cpp takes part in
`decode` and `prefill` where the `llama_cpp` package can be imported, by this interpreter or by the
one named with `--llama-python`. Rows go to `experiments/results/<machine>/<case>.json`;
`python -m experiments.report` reads them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numba import get_num_threads

from experiments import cpu_inference, cpu_pages
from experiments.bench import RESULTS, machine_name, refuse_in_simulator, write_rows
from experiments.cases import CPU
from experiments.cpu_session import Session
from experiments.llama_peer import has_llama_cpp
from experiments.report import goal_lines, provenance, text_table
from forge.command import run_command
from forge.errors import GGUFShardError

CASES = {
    "decode": cpu_inference.decode,
    "prefill": cpu_inference.prefill,
    "shard": cpu_pages.shard,
    "verify": cpu_pages.verify,
    "budget": cpu_inference.budget,
    "crc32": cpu_pages.checksum,
    "swap": cpu_pages.swap,
}


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CASES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CASES)}")
    return names


def _llama_python(named: str | None) -> str | None:
    if named is not None and not has_llama_cpp(named):
        raise GGUFShardError(f"{named}: cannot import llama_cpp")
    if named is None and not has_llama_cpp(sys.executable):
        print("no llama_cpp here: llama.cpp does not take part", file=sys.stderr)
        return None
    return named or sys.executable


def _run(args: argparse.Namespace) -> int:
    refuse_in_simulator()
    peer = _llama_python(args.llama_python) if {"decode", "prefill"} & set(args.only) else None
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gguf-shard-", dir=args.folder) as folder:
        session = Session(CPU[args.preset], Path(folder), args.threads, peer, args.model)
        for name in args.only:
            print(f"measuring {name}", file=sys.stderr)
            measured = CASES[name](session)
            write_rows(measured, args.machine, args.results)
            rows += measured
    print(text_table(rows))
    print("\n".join(["", *goal_lines(rows), provenance(rows)]))
    return 0 if all(row["validated"] for row in rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 if a result was wrong or after one line about other trouble."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.exp_cpu",
        description="Measure the CPU target and its peers, with limits.",
    )
    parser.add_argument("--preset", choices=CPU, default="M", help="how large (default: M)")
    parser.add_argument("--model", type=Path, action="append", default=[], metavar="FILE.gguf",
                        help="use this model; may be repeated, the first one is for "
                        "everything but decode as well")  # fmt: skip
    parser.add_argument("--only", type=_names, default=list(CASES), metavar="CASE,...",
                        help=f"some of {','.join(CASES)} (default: all)")  # fmt: skip
    parser.add_argument("--llama-python", metavar="PYTHON",
                        help="an interpreter that has llama-cpp-python")  # fmt: skip
    parser.add_argument("--threads", type=int, default=get_num_threads(), metavar="N",
                        help="threads of all variants (default: all)")  # fmt: skip
    parser.add_argument("--machine", default=machine_name(), help="name of the results' folder")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for temporary models")
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
