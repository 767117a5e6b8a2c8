"""The command of `delta`: make a patch between two models, and apply it.

Runs as `python delta/incremental_model_updater.py --base A.gguf --target B.gguf --output PATCH`
from the project's root; `diff` and `apply`, also known here, are part of `gguf-shard`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the project's root is one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from delta.apply import apply_patch
from delta.apply_in_place import update_in_place
from delta.describe import patch_facts, patch_text
from delta.diff import DEFAULT_LEVEL, MAX_LEVEL, create_patch
from forge.command import print_json, run_command
from forge.journal import finish_journal

_COMMANDS = ("diff", "apply")


def _level(text: str) -> int:
    try:
        level = int(text)
    except ValueError:
        level = 0
    if not 1 <= level <= MAX_LEVEL:
        raise argparse.ArgumentTypeError(f"{text!r} is not a level within 1..{MAX_LEVEL}")
    return level


def _diff(args: argparse.Namespace) -> int:
    made = create_patch(
        args.base, args.target, args.output, level=args.level, reversible=args.reversible,
        force=args.force, progress=not args.quiet, dry_run=args.dry_run,
    )  # fmt: skip
    facts = patch_facts(made.plan, made.groups, made.n_bytes)
    if args.json:
        print_json(facts | {"written": not args.dry_run})
    elif not args.quiet:
        name = f"{args.output} (not written)" if args.dry_run else args.output
        print(patch_text(facts, name, all_tensors=False))
    return 0


def _apply(args: argparse.Namespace) -> int:
    if args.resume:
        return _resume(args)
    if args.patch is None:
        args.usage_error("a patch is needed: BASE PATCH")
    facts: dict[str, Any]
    if args.in_place:
        result = update_in_place(
            args.base, args.patch, reverse=args.reverse, progress=not args.quiet,
            dry_run=args.dry_run,
        )  # fmt: skip
        facts = {"files": [str(result.path)], "resumed": result.resumed, "changed": result.changed}
        said = "updated, SHA-256 as in the patch"
        if not result.changed:
            said = "is the target already"
    else:
        paths = apply_patch(
            args.base, args.patch, args.output, reverse=args.reverse, force=args.force,
            progress=not args.quiet, dry_run=args.dry_run,
        )  # fmt: skip
        facts = {"files": [str(path) for path in paths], "resumed": False, "changed": True}
        said = "written, SHA-256 as in the patch"
    if args.dry_run:
        facts["changed"] = False
        said = "the patch fits (nothing written)"
    if args.json:
        print_json(facts)
    elif not args.quiet:
        print("\n".join(f"{path}: {said}" for path in facts["files"]))
    return 0


def _resume(args: argparse.Namespace) -> int:
    resumed = finish_journal(Path(args.base), progress=not args.quiet)
    if args.json:
        print_json({"files": [args.base], "resumed": resumed, "changed": resumed})
    elif not args.quiet:
        said = "the interrupted update is finished" if resumed else "no update was interrupted"
        print(f"{args.base}: {said}")
    return 0


def _add_diff_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--level", type=_level, default=DEFAULT_LEVEL, metavar="N",
                   help=f"Zstandard's, 1 to {MAX_LEVEL} (default: {DEFAULT_LEVEL})")  # fmt: skip
    p.add_argument("--reversible", action="store_true", help="hold the way back, too")
    p.add_argument("--force", action="store_true", help="replace an existing patch")
    p.add_argument("--dry-run", action="store_true", help="do all the work and write nothing")
    p.set_defaults(run=_diff)


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    return common


def add_commands(commands: Any) -> None:
    """Add `diff` and `apply` to an argparse sub-parser collection."""
    p = commands.add_parser(
        "diff", parents=[_common()], help="make a patch between two versions of a model",
        description="Make the patch that turns BASE into TARGET: GGUF files (of a split model, the "
        "first part) or sharded models (.sgmap).",
    )  # fmt: skip
    p.add_argument("base", metavar="BASE")
    p.add_argument("target", metavar="TARGET")
    p.add_argument("-o", "--output", metavar="PATCH", required=True)
    _add_diff_options(p)

    p = commands.add_parser(
        "apply", parents=[_common()], help="apply a patch to the model it is for",
        description="Apply a patch. The patch and BASE are checked before anything is written, the "
        "result after.",
    )  # fmt: skip
    p.add_argument("base", metavar="BASE", help="a GGUF file, or the .sgmap of a sharded model")
    p.add_argument("patch", metavar="PATCH", nargs="?", help="needed unless with --resume")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output", metavar="TARGET.gguf", help="write a new GGUF file")
    where.add_argument("--in-place", action="store_true",
                       help="change BASE itself: what a kill interrupts, the same command "
                       "finishes")  # fmt: skip
    where.add_argument("--resume", action="store_true",
                       help="only finish an update in place that was interrupted")  # fmt: skip
    p.add_argument("--reverse", action="store_true",
                   help="from the target back to the base, with a reversible patch")  # fmt: skip
    p.add_argument("--force", action="store_true", help="replace an existing file")
    p.add_argument("--dry-run", action="store_true", help="check everything and write nothing")
    p.set_defaults(run=_apply, usage_error=p.error)


def _flat_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="incremental_model_updater.py",
        parents=[_common()],
        description="Make the patch that turns one version of a model into another.",
        epilog="`incremental_model_updater.py diff BASE TARGET -o PATCH` does the same; "
        "`incremental_model_updater.py apply --help` tells how a patch is applied.",
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help="GGUF file or .sgmap")
    parser.add_argument(
        "--target", required=True, metavar="MODEL", help="likewise, the new version"
    )
    parser.add_argument("--output", required=True, metavar="PATCH")
    _add_diff_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `incremental_model_updater.py`."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] and arguments[0] in _COMMANDS:
        parser = argparse.ArgumentParser(prog="incremental_model_updater.py", description=__doc__)
        add_commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    else:
        parser = _flat_parser()
    return run_command(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
