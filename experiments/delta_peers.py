"""Tools that make and apply patches between two files, ours among them, as commands to run.

Ours takes part twice: as a call of the library by a process that has imported and compiled
everything (`experiments.delta_worker`, by its own clock), and as the command at the shell, with the
start of the interpreter. Peers are timed as their users run them, from start to end of the process.
Ours forces what it writes to disk and checks both files' SHA-256 in that time, the peers do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.cases import OURS
from experiments.child_process import Usage, run_measured
from experiments.delta_cases import Pair
from experiments.delta_report import OUR_COMMAND
from forge.errors import GGUFShardError

#: From base, target and patch, or base, patch and output, to a command.
Command = Callable[[Path, Path, Path], Sequence[str | Path]]


@dataclass(frozen=True)
class Tool:
    """A way to make and apply patches.

    Attributes
    ----------
    name
        The variant of its rows.
    create
        From base, target and patch to the command that writes the patch.
    apply
        From base, patch and output to the command that writes the output.
    has_clock
        The command prints {"seconds": s} on its last line, which count in place of its own.
    """

    name: str
    create: Command
    apply: Command
    has_clock: bool = False


@dataclass(frozen=True)
class Turn:
    """A patch made and applied once; the output was right."""

    patch_bytes: int
    create: Usage
    apply: Usage


def take_turn(tool: Tool, pair: Pair, folder: Path, sha256: str) -> Turn:
    """Make and apply the patch of a pair in `folder`.

    Parameters
    ----------
    tool, pair
        Who, between what.
    folder
        For the patch and the output.
    sha256
        Of the pair's target.

    Raises
    ------
    GGUFShardError
        If a command fails, or what comes out is not the target.
    """
    patch, output = folder / "patch", folder / "output.gguf"
    try:
        create = _run(tool, tool.create(pair.base, pair.target, patch))
        patch_bytes = patch.stat().st_size
        apply = _run(tool, tool.apply(pair.base, patch, output))
        if file_sha256(output) != sha256:
            raise GGUFShardError(f"{tool.name}, {pair.name}: the output is not the target")
        return Turn(patch_bytes, create, apply)
    finally:
        patch.unlink(missing_ok=True)
        output.unlink(missing_ok=True)


def _run(tool: Tool, command: Sequence[str | Path]) -> Usage:
    os.sync()  # nobody pays for what another has left to be written
    usage = run_measured([str(word) for word in command])
    if tool.has_clock:
        usage = replace(usage, seconds=json.loads(usage.output.splitlines()[-1])["seconds"])
    return usage


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def our_library(level: int | None = None) -> Tool:
    """Ours as a warm call of the library; at the default level, or another."""
    worker = (sys.executable, "-m", "experiments.delta_worker")
    options = () if level is None else ("--level", str(level))
    return Tool(
        OURS if level is None else f"{OURS} level {level}",
        lambda base, target, patch: (*worker, "create", base, target, patch, *options),
        lambda base, patch, output: (*worker, "apply", base, patch, output),
        has_clock=True,
    )


def our_command() -> Tool:
    """Ours as the command at the shell."""
    cli = (sys.executable, "-m", "atlas.cli")
    return Tool(
        OUR_COMMAND,
        lambda base, target, patch: (*cli, "diff", base, target, "-o", patch),
        lambda base, patch, output: (*cli, "apply", base, patch, "-o", output),
    )


def _zstd(name: str, *options: str) -> Tool:
    def command(base: Path, source: Path, output: Path, *mode: str) -> Sequence[str | Path]:
        return ("zstd", "-q", "-f", *mode, f"--patch-from={base}", source, "-o", output)

    return Tool(
        name,
        lambda base, target, patch: command(base, target, patch, *options),
        lambda base, patch, output: command(base, patch, output, "-d", *options[1:]),
    )


_XDELTA3 = ("xdelta3", "-q", "-f")
PEERS = (
    _zstd("zstd -19", "-19", "--long=27"),
    _zstd("zstd -1", "-1"),
    Tool(
        "xdelta3",
        lambda base, target, patch: (*_XDELTA3, "-e", "-s", base, target, patch),
        lambda base, patch, output: (*_XDELTA3, "-d", "-s", base, patch, output),
    ),
    Tool(
        "bsdiff",
        lambda base, target, patch: ("bsdiff", base, target, patch),
        lambda base, patch, output: ("bspatch", base, output, patch),
    ),
)


def installed_peers(names: Sequence[str]) -> tuple[list[Tool], list[str]]:
    """The named peers whose programs are here, and the names of those that are not."""
    here, missing = [], []
    for tool in PEERS:
        if tool.name in names:
            path = Path()
            programs = {str(command(path, path, path)[0]) for command in (tool.create, tool.apply)}
            if all(map(shutil.which, programs)):
                here.append(tool)
            else:
                missing.append(tool.name)
    return here, missing
