"""The demonstration model end to end: shard, verify, run within budgets, plot.

    python -m experiments.quickstart [-o DIR]

Needs nothing but the installed project. The model (3.8 MB) is so small that speed says little: a
token's time is that of starting loops and of a read per 4 KiB shard, far from what memory and link
allow. What the table and the plot show exactly are the bytes moved and the hits, which behave the
same at every size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from atlas.infer.tokenizer import Tokenizer
from atlas.target import select_target
from experiments.budget_plot import plot_budgets
from experiments.budget_runs import (
    BudgetRun,
    ModelScan,
    best_machine,
    decode_within,
    format_table,
    table_rows,
)
from forge.command import run_command
from forge.errors import GGUFShardError
from forge.sgmap_reader import load_map
from forge.shard import shard_model
from forge.sharded_model import ShardedModel
from forge.verify import verify_model

MODEL = Path(__file__).resolve().parent / "demo" / "demo-2M-f16.gguf"
PROMPT = "Once upon a time, there was a brave rabbit named"
POLICIES = ("lru", "pin")
BUDGETS = (1.0, 0.5, 0.25)


def quickstart(folder: Path, n_tokens: int, target_name: str = "auto") -> list[BudgetRun]:
    """Shard, verify, run, print and plot; `core.gguf`, `core.sgmap` and `quickstart.png` appear in
    `folder`.

    Parameters
    ----------
    folder
        Where to write; made if missing. A demonstration model in it is replaced, another is not.
    n_tokens
        Tokens to generate per run.
    target_name
        "auto", "cpu" or "cuda".

    Returns
    -------
    list of BudgetRun
        One run per policy and budget.

    Raises
    ------
    GGUFShardError
        If a page does not hold, the runs do not give the same tokens, or `folder` holds another
        model.
    """
    map_path = _shard_and_verify(folder)
    target = select_target(target_name)
    with ShardedModel(map_path) as model:
        tokenizer = Tokenizer.from_metadata(model.source_header().metadata)
    prompt = tokenizer.encode(PROMPT)

    started = time.perf_counter()
    decode_within(map_path, target, "lru", min(BUDGETS), prompt, 2)
    print(f"compiled or loaded the loops in {time.perf_counter() - started:.1f} s", flush=True)

    runs: list[BudgetRun] = []
    for policy in POLICIES:
        for budget in BUDGETS:
            run, scan = decode_within(map_path, target, policy, budget, prompt, n_tokens)
            runs.append(run)
    if any(run.tokens != runs[0].tokens for run in runs):
        raise GGUFShardError("quickstart: the runs differ in their tokens; the cache is at fault")
    print(f"\n{tokenizer.decode([*prompt, *runs[0].tokens])} ...\n")
    print(f"the same {n_tokens} tokens from all {len(runs)} runs on target {target.name}\n")
    _report(runs, scan, folder / "quickstart.png")
    return runs


def _shard_and_verify(folder: Path) -> Path:
    map_path = folder / "core.sgmap"
    ours = map_path.exists() and load_map(map_path).source[0].name == MODEL.name
    started = time.perf_counter()
    shard_model(MODEL, folder, force=ours)
    m = load_map(map_path)
    print(
        f"sharded {MODEL.name} into {m.n_pages} pages, {m.n_shards} shards of {m.pages_per_shard}, "
        f"in {time.perf_counter() - started:.1f} s"
    )
    started = time.perf_counter()
    result = verify_model(map_path)
    if not result.ok:
        raise GGUFShardError(f"{map_path}: {result.bad[0]}")
    print(f"verified {result.pages} pages in {1e3 * (time.perf_counter() - started):.0f} ms")
    return map_path


def _report(runs: Sequence[BudgetRun], scan: ModelScan, image: Path) -> None:
    machine = best_machine(runs)
    print(format_table(table_rows(runs, scan)))
    memory = "not measured" if machine.memory is None else f"{machine.memory / 1e9:.1f} GB/s"
    link = "not measured" if machine.link is None else f"{machine.link / 1e9:.1f} GB/s"
    print(f"\nlimit: memory {memory}, link {link}, best of all runs")
    theories = {policy: scan.theory(policy, machine) for policy in POLICIES}
    plot_budgets(runs, theories, image, f"{MODEL.stem}, {len(runs[0].tokens)} tokens, greedy")
    print(f"plot: {image}")


def _run(args: argparse.Namespace) -> int:
    quickstart(args.output, args.n_tokens, args.target)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 after one line about what went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quickstart",
        description="Shard, verify and run the demonstration model within budgets, and plot.",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("quickstart"), metavar="DIR",
                        help="folder to write to (default: quickstart)")  # fmt: skip
    parser.add_argument("-n", dest="n_tokens", type=int, default=48, choices=range(2, 257),
                        metavar="N", help="tokens a run, 2 to 256 (default: 48)")  # fmt: skip
    parser.add_argument("--target", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
