"""One warm call of `delta`: a process that does it once to compile, then again by the clock.

    python -m experiments.delta_worker create BASE TARGET PATCH [--level N]
    python -m experiments.delta_worker apply BASE PATCH OUTPUT

It prints {"seconds": s}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from forge.command import run_command


def _run(args: argparse.Namespace) -> int:
    from delta.apply import apply_patch
    from delta.diff import DEFAULT_LEVEL, create_patch

    seconds = 0.0
    for _ in range(2):
        args.output.unlink(missing_ok=True)
        started = time.perf_counter()
        if args.action == "create":
            create_patch(args.base, args.source, args.output, level=args.level or DEFAULT_LEVEL)
        else:
            apply_patch(args.base, args.source, args.output)
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 after one line about what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.delta_worker", description="Time one warm call of delta."
    )
    parser.add_argument("action", choices=("create", "apply"))
    parser.add_argument("base", type=Path)
    parser.add_argument("source", type=Path, metavar="TARGET|PATCH")
    parser.add_argument("output", type=Path, metavar="PATCH|OUTPUT")
    parser.add_argument("--level", type=int, metavar="N", help="of create (default: delta's)")
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
