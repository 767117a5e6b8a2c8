"""The command of `forge`: shard, restore, verify, repair, info.

Runs as `python forge/model_sharding_tool.py ...` from the project's root; the same sub-commands are
part of `gguf-shard`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the project's root is one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from forge.block_layouts import MEMORY_LAYOUTS
from forge.command import print_json, run_command
from forge.errors import GGUFShardError
from forge.info import describe, describe_text
from forge.input_file import open_input
from forge.repair import repair_model
from forge.restore import restore_model
from forge.sgmap import CACHE_POLICIES
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.shard_scan import PageCheck, faulty_pages
from forge.sizes import format_bytes
from forge.verify import verify_model

#: Targets of `verify` that need nothing but this package.
PAGE_CHECKS: Mapping[str, Callable[[], PageCheck]] = {"cpu": lambda: faulty_pages}

#: What `info` says about a kind of file: its facts, and those as text.
Describer = Callable[[str], tuple[dict[str, Any], str]]


def _pages_per_shard(text: str) -> int | None:
    if text == "auto":
        return None
    return _checked(lambda n: ShardOptions(pages_per_shard=n), text)


def _prefetch_distance(text: str) -> int:
    return _checked(lambda n: ShardOptions(prefetch_distance=n), text)


def _checked(check: Callable[[int], Any], text: str) -> int:
    """The number in `text`, if `check` takes it: otherwise the usage is wrong, exit code 2."""
    try:
        check(int(text))
    except GGUFShardError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    return int(text)


def _shard(args: argparse.Namespace) -> int:
    options = ShardOptions(args.layout, args.policy, args.prefetch_distance, args.pages_per_shard)
    path = shard_model(args.model, args.output, options, force=args.force, progress=not args.quiet)
    m = load_map(path)
    source_bytes = sum(source.bytes for source in m.source)
    facts = {
        "map": str(path),
        "core": str(path.with_suffix(".gguf")),
        "pages": m.n_pages,
        "shards": m.n_shards,
        "pages_per_shard": m.pages_per_shard,
        "source_bytes": source_bytes,
        "sha256": [source.sha256 for source in m.source],
    }
    if args.json:
        print_json(facts)
    elif not args.quiet:
        print(
            f"{path}: {m.n_pages} pages in {m.n_shards} shards of {m.pages_per_shard} "
            f"from {format_bytes(source_bytes)}"
        )
    return 0


def _restore(args: argparse.Namespace) -> int:
    paths = restore_model(args.map, args.output, force=args.force, progress=not args.quiet)
    if args.json:
        print_json({"files": [str(path) for path in paths], "sha256_matches": True})
    elif not args.quiet:
        print("\n".join(f"{path}: restored, SHA-256 as in the map" for path in paths))
    return 0


def _verify(args: argparse.Namespace) -> int:
    result = verify_model(
        args.map, args.against, progress=not args.quiet, find_faulty=args.page_checks[args.target]()
    )
    if args.json:
        print_json(result.as_dict())
    else:
        for fault in result.bad:
            print(f"{args.map}: {fault}" if fault.page is not None else fault, file=sys.stderr)
        if result.ok and not args.quiet:
            print(f"{args.map}: {result.pages} pages hold")
    return 0 if result.ok else 1


def _repair(args: argparse.Namespace) -> int:
    result = repair_model(args.map, args.source, progress=not args.quiet)
    if args.json:
        print_json(result.as_dict())
    else:
        for fault in result.bad:
            print(f"{args.map}: {fault}" if fault.page is not None else fault, file=sys.stderr)
        if not args.quiet:
            for fault in result.repaired:
                print(f"{args.map}: repaired: {fault}")
            for difference in result.source_differs:
                print(f"{difference}: what was taken from it is right")
            if result.ok:
                what = (
                    f"{len(result.repaired)} repaired" if result.repaired else "nothing to repair"
                )
                print(f"{args.map}: {what}, {result.pages} pages hold")
    return 0 if result.ok else 1


def _info(args: argparse.Namespace) -> int:
    facts, text = _describer(args.file, args.describers)(args.file)
    if args.json:
        print_json(facts)
    elif not args.quiet:
        print(text)
    return 0


def _describer(path: str, others: Mapping[bytes, Describer]) -> Describer:
    """What describes a file: one of the others by its first bytes, or else this package."""

    def describe_model(path: str) -> tuple[dict[str, Any], str]:
        facts = describe(path)
        return facts, describe_text(facts)

    if others:
        with open_input(path) as file:
            start = file.read(max(map(len, others)))
        for magic, describer in others.items():
            if start.startswith(magic):
                return describer
    return describe_model


def _add_shard(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser(
        "shard", parents=[common], help="cut a GGUF model into checked pages",
        description="Cut a GGUF model into 4 KiB pages: writes core.gguf and core.sgmap.",
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL.gguf", help="of a split model, the first part")
    p.add_argument("-o", "--output", metavar="DIR", default=".", help="folder (default: here)")
    p.add_argument("--layout", choices=MEMORY_LAYOUTS, default="column_major",
                   help="how blocks lie in a page (default: column_major)")  # fmt: skip
    p.add_argument("--policy", choices=CACHE_POLICIES, default="lru",
                   help="default cache policy written to the map (default: lru)")  # fmt: skip
    p.add_argument("--prefetch-distance", type=_prefetch_distance, default=8, metavar="N",
                   help="shards to read ahead (default: 8)")  # fmt: skip
    p.add_argument("--pages-per-shard", type=_pages_per_shard, default=None, metavar="N|auto",
                   help="a power of two up to 256 (default: auto)")  # fmt: skip
    p.add_argument("--force", action="store_true", help="replace existing files")
    p.set_defaults(run=_shard)


def _add_repair(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser(
        "repair", parents=[common], help="write damaged pages of a sharded model anew",
        description="Write what is damaged of core.gguf anew, and nothing else. The map vouches "
        "for it: a source that does not have what is needed is refused, and nothing is changed.",
    )  # fmt: skip
    p.add_argument("map", metavar="CORE.sgmap")
    p.add_argument("--from", dest="source", metavar="MODEL.gguf|CORE.gguf|CORE.sgmap",
                   required=True, help="the source, or another copy of the pages")  # fmt: skip
    p.set_defaults(run=_repair)


def add_commands(
    commands: Any,
    page_checks: Mapping[str, Callable[[], PageCheck]] = PAGE_CHECKS,
    describers: Mapping[bytes, Describer] | None = None,
) -> None:
    """Add `shard`, `restore`, `verify`, `repair` and `info` to an argparse sub-parser collection.

    Parameters
    ----------
    commands
        The collection.
    page_checks
        For each target of `verify`, what makes its check of pages.
    describers
        For the first bytes of other kinds of files what `info` says about them.
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")

    _add_shard(commands, common)

    p = commands.add_parser(
        "restore", parents=[common], help="write the original GGUF back, bit for bit",
        description="Write the GGUF file that a sharded model was cut from, bit for bit.",
    )  # fmt: skip
    p.add_argument("map", metavar="CORE.sgmap")
    p.add_argument("-o", "--output", metavar="MODEL.gguf", required=True)
    p.add_argument("--force", action="store_true", help="replace an existing file")
    p.set_defaults(run=_restore)

    p = commands.add_parser(
        "verify", parents=[common], help="check every byte of a sharded model",
        description="Check map, container, table, every page and every shard.",
    )  # fmt: skip
    p.add_argument("map", metavar="CORE.sgmap")
    p.add_argument("--against", metavar="MODEL.gguf", help="compare with the source's SHA-256 too")
    p.add_argument("--target", choices=tuple(page_checks), default="cpu",
                   help="what computes the checksums of pages (default: cpu)")  # fmt: skip
    p.set_defaults(run=_verify, page_checks=page_checks)

    _add_repair(commands, common)

    kinds = "a GGUF file or a sharded model"
    if describers:
        kinds = "a GGUF file, a sharded model or a patch"
    p = commands.add_parser(
        "info", parents=[common], help=f"describe {kinds}", description=f"Describe {kinds}.",
    )  # fmt: skip
    p.add_argument("file", metavar="MODEL.gguf|CORE.sgmap" + ("|PATCH" if describers else ""))
    p.set_defaults(run=_info, describers=describers or {})


def main(argv: list[str] | None = None) -> int:
    """Entry point of `model_sharding_tool.py`."""
    parser = argparse.ArgumentParser(prog="model_sharding_tool.py", description=__doc__)
    add_commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
