"""Everything that is measured on a GPU, in one command.

    python -m experiments.gpu_session [--only crc32,matvec] [-o FOLDER] [--commit HASH]
    python -m experiments.gpu_session --dry-run

Sections: the tests that need a GPU, the limits of the device, how near we come to them operation by
operation and swap by swap, and whole models, resident and within budgets. PyTorch takes part in the
same run where it is installed. Nothing is read but the project: all data is random. A result is
checked before it is timed. Rows (`experiments.bench`) go to `FOLDER/<GPU>/<case>.json`, case by
case, so that a session which is cut short keeps what it has; FOLDER is $OUT or
`experiments/results`.

A dry run does the same in the CUDA simulator, on tiny data: what a GPU is to do has been done once
before. It checks results, and keeps no time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from numba import config

from atlas.target import CudaTarget, select_target
from experiments import gpu_inference, gpu_kernels, gpu_limits, gpu_swap
from experiments.bench import RESULTS, describe_environment, refuse_in_simulator, slug, write_rows
from experiments.cases import GPU, GPU_REHEARSAL
from experiments.gpu_bench import GpuBench
from experiments.report import goal_lines, provenance, text_table
from forge.command import run_command
from forge.errors import GGUFShardError

SECONDS = 510
"""After these no section is begun."""

_TEST_SECONDS = 300
#: Each compiles the kernels of its files, which takes longer than to run them.
_TEST_PROCESSES = min(os.cpu_count() or 1, 16)
#: What stands for the tests in a rehearsal: the simulator has its own run of all of them.
_REHEARSED_TESTS = ("tests/atlas/test_read_words.py",)
_PROJECT = Path(__file__).resolve().parent.parent
_SIMULATOR = "tests.warp_simulator"


def gpu_tests(bench: GpuBench) -> list[dict[str, Any]]:
    """`pytest -m gpu`, in a process of its own; its last lines are printed. That no test ran is
    wrong, too."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m"]
    if bench.is_rehearsal:
        command += ["cuda", *_REHEARSED_TESTS]
    else:
        command += ["gpu", "-n", str(_TEST_PROCESSES), "--dist", "loadfile"]
    try:
        done = subprocess.run(
            command, cwd=_PROJECT, capture_output=True, text=True, check=False,
            timeout=_TEST_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        bench.wrong.append(f"tests: not done after {_TEST_SECONDS} s")
        return []
    summary = (done.stdout.splitlines() or ["no output"])[-1]
    if done.returncode == 0:
        bench.right.append(f"tests: {summary}")
    else:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
        bench.wrong.append(f"tests: {summary}")
    return []


SECTIONS: dict[str, Callable[[GpuBench], list[dict[str, Any]]]] = {
    "tests": gpu_tests,
    "limits": gpu_limits.limits,
    "crc32": gpu_kernels.crc32,
    "matvec": gpu_kernels.mat_vec,
    "matmul": gpu_kernels.mat_mul,
    "swap": gpu_swap.swaps,
    "1b": partial(gpu_inference.inference, size="1b"),
    "7b": partial(gpu_inference.inference, size="7b"),
    "13b": partial(gpu_inference.inference, size="13b"),
}


def run_sections(bench: GpuBench, names: Sequence[str]) -> list[dict[str, Any]]:
    """Run sections; what one of them raises does not keep the others from running.

    Parameters
    ----------
    bench
        The session; `wrong` says afterwards what went wrong.
    names
        Keys of `SECTIONS`.

    Returns
    -------
    list of dict
        All rows.
    """
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for name in names:
        elapsed = time.monotonic() - started
        if elapsed > SECONDS:
            bench.wrong.append(f"{name}: not begun after {elapsed:.0f} s")
            continue
        print(f"== {name}", flush=True)
        try:
            rows += SECTIONS[name](bench)
        except Exception as error:  # whatever it is: the device is here now, go on
            traceback.print_exc()
            bench.wrong.append(f"{name}: {type(error).__name__}: {error}")
    return rows


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SECTIONS)}")
    return names


def _rehearse_in_simulator(only: Sequence[str]) -> int:
    """A dry run in a process whose CUDA is the simulator."""
    command = [sys.executable, "-m", _SIMULATOR, "-m", "experiments.gpu_session", "--dry-run"]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "1"}
    command += ["--only", ",".join(only)]
    return subprocess.run(command, cwd=_PROJECT, env=environment, check=False).returncode


def _dry_run(only: Sequence[str]) -> int:
    if not (config.ENABLE_CUDASIM and _SIMULATOR in sys.modules):
        return _rehearse_in_simulator(only)
    target = CudaTarget()
    target.has_tensor_cores = True  # the simulator has them, and a GPU will use them
    bench = GpuBench(target, GPU_REHEARSAL, is_rehearsal=True)
    run_sections(bench, only)
    for line in bench.right:
        print(f"right: {line}")
    return _conclude(bench)


def _conclude(bench: GpuBench) -> int:
    for line in bench.wrong:
        print(f"WRONG: {line}")
    print(f"{len(bench.right)} right, {len(bench.wrong)} wrong")
    return 1 if bench.wrong else 0


def _run(args: argparse.Namespace) -> int:
    if args.dry_run:
        return _dry_run(args.only)
    refuse_in_simulator()
    target = select_target("cuda")
    assert isinstance(target, CudaTarget)
    machine = slug(describe_environment()["gpu"] or "")
    if not machine:
        raise GGUFShardError("nvidia-smi does not say which GPU this is")
    bench = GpuBench(
        target, GPU, is_rehearsal=False, commit=args.commit,
        keep=lambda measured: write_rows(measured, machine, args.output),
    )  # fmt: skip
    rows = run_sections(bench, args.only)
    if rows:
        print(text_table(rows))
        print("\n".join(["", *goal_lines(rows), provenance(rows)]))
    return _conclude(bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 if something was wrong or after one line about other trouble."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu_session",
        description="Measure the CUDA target and its peers, with limits.",
    )
    parser.add_argument("--dry-run", action="store_true",
                        help="everything once on tiny data in the simulator; no times")  # fmt: skip
    parser.add_argument("--only", type=_names, default=list(SECTIONS), metavar="SECTION,...",
                        help=f"some of {','.join(SECTIONS)} (default: all)")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER",
                        default=Path(os.environ.get("OUT") or RESULTS),
                        help="where rows are written (default: $OUT, or the results)")  # fmt: skip
    parser.add_argument("--commit", metavar="HASH",
                        help="commit of the sources, where git cannot tell")  # fmt: skip
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
