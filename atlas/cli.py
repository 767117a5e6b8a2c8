"""The `gguf-shard` command.

Only the standard library is imported at the top: linear algebra libraries read their number of
threads when they are loaded, so `--threads` has to be known before NumPy is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def _set_blas_threads(argv: Sequence[str]) -> None:
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--threads")
    threads = early.parse_known_args(argv)[0].threads
    if threads is not None and threads.isdecimal():
        for variable in _THREAD_VARIABLES:
            os.environ[variable] = threads


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: 1,403,...") from None


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return int(text)

    return number


def _size(text: str) -> Any:
    from forge.errors import GGUFShardError
    from forge.sizes import parse_size

    try:
        return parse_size(text)
    except GGUFShardError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _real(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """A number within low..high; with `above`, more than `low`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number within {low:g}..{high:g}")
        return value

    return number


def _run(args: argparse.Namespace) -> int:
    from atlas.run_command import run

    return run(args)


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from forge.sgmap import CACHE_POLICIES

    p = commands.add_parser(
        "run", help="generate text within a budget of memory",
        description="Generate text with a sharded model, within a budget of device memory. Text "
        "goes to stdout as it comes, a summary to stderr.",
    )  # fmt: skip
    p.add_argument("map", metavar="CORE.sgmap")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("-p", "--prompt", metavar="TEXT", help="the text to continue")
    what.add_argument("--prompt-ids", type=_token_ids, metavar="1,403,...",
                      help="the token ids to continue")  # fmt: skip
    p.add_argument("-n", "--n-tokens", type=_at_least(1), default=128, metavar="N",
                   help="tokens to generate, at most (default: 128)")  # fmt: skip
    p.add_argument("--budget", type=_size, default="100%", metavar="SIZE",
                   help="device memory for everything (2.8GB, 400MiB), or a share of the model's "
                   "pages to keep resident (40%%); default: 100%%")  # fmt: skip
    p.add_argument("--target", choices=("auto", "cuda", "cpu"), default="auto",
                   help="where to run (default: auto)")  # fmt: skip
    p.add_argument("--policy", choices=CACHE_POLICIES, default=None,
                   help="what stays resident (default: the map's)")  # fmt: skip
    p.add_argument("--prefetch-distance", type=_at_least(0), default=None, metavar="N",
                   help="shards to read ahead (default: the map's; on a GPU at least what one "
                   "step of compute uses, unless 0)")  # fmt: skip
    p.add_argument("--host-memory", type=_size, default=None, metavar="SIZE",
                   help="cuda target: pinned host memory for pages that do not stay on the device "
                   "(default: 80%% of what is free); the rest is read from the file")  # fmt: skip
    p.add_argument("--scrub", type=_at_least(0), default=0, metavar="PAGES",
                   help="resident pages to check again after each token (default: 0)")  # fmt: skip
    p.add_argument("--temp", type=_real(0, 1e6), default=0.8,
                   help="temperature; 0 is greedy (default: 0.8)")  # fmt: skip
    p.add_argument("--top-k", type=_at_least(0), default=40, help="0 is all (default: 40)")
    p.add_argument(
        "--top-p", type=_real(0, 1, above=True), default=0.95, help="1 is all (default: 0.95)"
    )
    p.add_argument(
        "--seed", type=_at_least(0), default=None, help="seed of the sampler (default: random)"
    )
    p.add_argument("-c", "--context", type=_at_least(1), default=None, metavar="CTX",
                   help="positions to have room for (default: prompt plus -n)")  # fmt: skip
    p.add_argument("--batch", type=_at_least(1), default=64, metavar="N",
                   help="prompt tokens to run at once (default: 64)")  # fmt: skip
    p.add_argument("--threads", type=_at_least(1), default=None, metavar="N",
                   help="threads of the cpu target (default: all)")  # fmt: skip
    p.add_argument("--ignore-eos", action="store_true", help="go on behind an end-of-text token")
    p.add_argument("--logits-out", metavar="FILE.npy",
                   help="save the float32 logits behind the last prompt token")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    p.add_argument("-q", "--quiet", action="store_true", help="no summary")
    p.set_defaults(run=_run)


def _fit(args: argparse.Namespace) -> int:
    from atlas.fit_command import fit

    return fit(args)


def _add_fit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from forge.sgmap import CACHE_POLICIES

    p = commands.add_parser(
        "fit", help="what to expect of a model within a budget",
        description="Compute, without running anything, what stays resident within a budget, what "
        "moves per token, and the most tokens a second that the given bandwidths allow.",
    )  # fmt: skip
    p.add_argument("map", metavar="CORE.sgmap")
    p.add_argument("--budget", type=_size, required=True, metavar="SIZE",
                   help="device memory for everything (2.8GB), or a share (40%%)")  # fmt: skip
    p.add_argument("--target", choices=("cuda", "cpu"), default="cuda",
                   help="where it is to run (default: cuda)")  # fmt: skip
    p.add_argument("--policy", choices=CACHE_POLICIES, default=None,
                   help="what stays resident (default: the map's)")  # fmt: skip
    p.add_argument("-c", "--context", type=_at_least(1), default=None, metavar="CTX",
                   help="positions to have room for (default: the model's)")  # fmt: skip
    p.add_argument("--link", type=_real(0, 1e6, above=True), default=25.0, metavar="GB/S",
                   help="bandwidth to the device (default: 25, PCIe 4 x16)")  # fmt: skip
    p.add_argument("--memory", type=_real(0, 1e6, above=True), default=1008.0, metavar="GB/S",
                   help="bandwidth of its memory (default: 1008, an RTX 4090)")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("-q", "--quiet", action="store_true", help="only the exit code: 0 if it fits")
    p.set_defaults(run=_fit)


def _cuda_check() -> Any:
    from atlas.device_check import DeviceCheck
    from atlas.target import select_target

    return DeviceCheck(select_target("cuda"))


def _describe_patch(path: str) -> tuple[dict[str, Any], str]:
    from delta.describe import describe_patch, patch_text

    facts = describe_patch(path)
    return facts, patch_text(facts, path)


def _parser() -> argparse.ArgumentParser:
    from delta import incremental_model_updater as updater
    from delta.patch_file import MAGIC
    from forge.model_sharding_tool import PAGE_CHECKS, add_commands

    parser = argparse.ArgumentParser(
        prog="gguf-shard",
        description="Run language models that do not fit the memory you have: cut them into "
        "checked 4 KiB pages, and cache those within a budget.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_commands(commands, {**PAGE_CHECKS, "cuda": _cuda_check}, {MAGIC: _describe_patch})
    updater.add_commands(commands)
    _add_run(commands)
    _add_fit(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `gguf-shard`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    _set_blas_threads(argv)
    from forge.command import run_command

    return run_command(_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
