"""Mutation check: does the suite turn red when a protection is taken away?

    python -m experiments.validation.mutations [--only NAME,...] [--list]

Each mutation changes a line or two of a module as it is loaded, in a process of its own; nothing on
disk changes, and loops that were compiled for the sources stay valid. The parts of the suite that
should notice then run with little effort. A protection that nobody misses is either no protection
or has no test: either way the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.validation.effort import Effort
from experiments.validation.probe import Outcome, run_probe
from experiments.validation.scene import Scene
from forge.command import run_command
from forge.errors import GGUFShardError

_PROJECT = Path(__file__).resolve().parent.parent.parent
_LITTLE = Effort("mutation", flips=16, random_flips=2, every=5, kills=3, fuzz_seconds=0.5,
                 throughput_bytes=1 << 20, repeats=1)  # fmt: skip
_RED, _GREEN = 3, 0  # exit codes of a child; any other is trouble


@dataclass(frozen=True)
class Mutation:
    """A protection taken away.

    Attributes
    ----------
    name
        The protection.
    module
        Where it is.
    old, new
        A piece of that module's text, which occurs in it once, and what takes its place.
    also
        More such pairs: protections that stand in for each other go together.
    parts
        Modules of the suite that notice.
    faults
        If not empty, all probes of these faults are put, and no others.
    """

    name: str
    module: str
    old: str
    new: str
    parts: tuple[str, ...]
    faults: tuple[str, ...] = ()
    also: tuple[tuple[str, str], ...] = ()

    @property
    def changes(self) -> tuple[tuple[str, str], ...]:
        """All pairs of old and new text."""
        return (self.old, self.new), *self.also


MUTATIONS = (
    Mutation("page's tag", "forge.shard_scan",
             "bad = computed != words[:, CRC_OFFSET // 4]", "bad = np.zeros(len(words), bool)",
             ("cached_pages", "damage")),
    Mutation("page's magic", "forge.shard_scan",
             "bad |= words[:, MAGIC_OFFSET // 4] != MAGIC_WORD", "pass",
             ("damage", "cached_pages")),
    Mutation("table entry of a page", "forge.shard_scan",
             "bad |= computed != page_crc32", "pass", ("damage", "integrity")),
    Mutation("digest of the table", "forge.core_file",
             "if crc_table_digest(table) != digest:", "if False:", ("damage", "integrity")),
    Mutation("digests of shards", "forge.verify",
             "if found != expected and shard not in bad_shards:", "if False:",
             ("integrity", "map_damage")),
    Mutation("digests and spelling of the map", "forge.sgmap_reader",
             "if canonical != data:", "if False:", ("map_damage",), ("bit flip",),
             (("if of_sections[name] != _digest(read, name, value):", "if False:"),)),
    Mutation("header and padding of core.gguf", "forge.core_file",
             "different = np.flatnonzero(found != np.frombuffer(expected, np.uint8))",
             "different = np.zeros(0, np.int64)", ("damage",)),
    Mutation("size of core.gguf", "forge.core_file",
             "if size != core_bytes(n_pages):", "if False:", ("damage",)),
    Mutation("SHA-256 of what is restored", "forge.restore",
             "if digest.hexdigest() != source.sha256:", "if False:", ("integrity", "map_damage")),
    Mutation("bounds of a GGUF header", "forge.gguf_file",
             "if value * smallest > self.remaining:", "if False:", ("hostile",),
             ("count too large", "header too large"), (("if value > most:", "if False:"),)),
    Mutation("overlapping tensors", "forge.gguf_file",
             'raise cursor.fail(field, f"{n_bytes} bytes at {offset} overlap the next tensor")',
             "pass", ("hostile",), ("wrong offset",)),
    Mutation("source changed under its reader", "forge.source_file",
             'raise GGUFShardError(f"{self.header.name}: changed while it was read")', "pass",
             ("kills",)),
    Mutation("SHA-256 of a patch", "delta.patch_file",
             "if digest.digest() != self._read(end, _DIGEST_BYTES):", "if False:",
             ("patch_damage", "hostile")),
    Mutation("base of a patch", "delta.source_model",
             "if found != expected:", "if False:", ("patch_damage",)),
    Mutation("target of a patch", "delta.bound_patch",
             "if found != file.sha256:", "if False:", ("hostile",),
             ("patch that lies of models", "patch that lies of itself", "fuzz")),
    Mutation("page given twice by a patch", "delta.bound_patch",
             "if (sources[own] != KEPT).any():", "if False:", ("hostile",),
             ("patch that lies of models",)),
    Mutation("fsync before a rename", "forge.pending_file",
             "            os.fsync(self._descriptor)", "            pass", ("power_cuts",)),
    Mutation("rename of what is complete", "forge.pending_file",
             "        self.pending = pending_path(self.path)", "        self.pending = self.path",
             ("kills",)),
    Mutation("one writer at a time", "forge.pending_file",
             "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", ("kills",)),
    Mutation("digest of a journal", "forge.journal_file",
             "if digest.digest() != self._read(end, _DIGEST_BYTES):", "if False:",
             ("patch_damage",)),
    Mutation("fsync of what a journal changes", "forge.journal",
             "        os.fsync(descriptor)", "        pass", ("power_cuts",)),
    Mutation("bounds of a map's numbers", "forge.sgmap_reader",
             'raise self.fail(field, f"{_shown(value)} is not an integer within {low}..{high}")',
             "pass", ("map_damage",)),
    Mutation("interrupted update", "forge.gguf_file",
             "if os.path.lexists(journal_path(Path(path))):", "if False:", ("kills",)),
    Mutation("page that is read into a frame", "atlas.swap",
             "            if faults.any():\n                raise",
             "            if False:\n                raise", ("cached_pages",)),
    Mutation("page in a frame that is scrubbed", "atlas.shard_cache",
             "                if faults.any():", "                if False:", ("cached_pages",)),
    Mutation("one line for trouble", "forge.command",
             "except (GGUFShardError, OSError) as error:", "except FloatingPointError as error:",
             ("hostile",), ("wrong head",)),
)  # fmt: skip


def _child(mutation: Mutation) -> int:
    """Run what should notice a mutation, in this process; the exit code."""
    effort = replace(_LITTLE, every=1, flips=0) if mutation.faults else _LITTLE
    with tempfile.TemporaryDirectory(prefix="gguf-shard-") as folder:
        scene = Scene(Path(folder), effort)
        for part in mutation.parts:
            for probe in importlib.import_module(f"experiments.validation.{part}").probes(scene):
                if mutation.faults and probe.fault not in mutation.faults:
                    continue
                result = run_probe(probe)
                if result.outcome is Outcome.MISSED:
                    reason = " ".join(result.reason.split())
                    print(f"{probe.fault}, {probe.artefact}, {probe.place}: {reason}")
                    return _RED
    return _GREEN


def who_notices(mutation: Mutation) -> str | None:
    """The first probe that misses a protection, in a line; None if none does.

    Raises
    ------
    GGUFShardError
        If the suite cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="gguf-shard-") as folder:
        change = mutation.module, *mutation.changes
        customize = f"import experiments.validation.mutated_import as m\nm.install(*{change!r})"
        Path(folder, "sitecustomize.py").write_text(customize, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "experiments.validation.mutations", "--child", mutation.name],
            capture_output=True, text=True, check=False, cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(_PROJECT)])},
        )  # fmt: skip
    if done.returncode not in (_RED, _GREEN):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise GGUFShardError(f"{mutation.name}: the suite does not run: {last}")
    return done.stdout.strip().splitlines()[-1] if done.returncode == _RED else None


def _by_name(names: Sequence[str]) -> list[Mutation]:
    known = {mutation.name: mutation for mutation in MUTATIONS}
    for name in names:
        if name not in known:
            raise GGUFShardError(f"{name!r} is none of: {', '.join(known)}")
    return [known[name] for name in names] or list(MUTATIONS)


def _run(args: argparse.Namespace) -> int:
    if args.child is not None:
        return _child(_by_name([args.child])[0])
    unnoticed = 0
    for mutation in _by_name(args.only):
        if args.list:
            print(f"{mutation.name} ({mutation.module})")
            continue
        started = time.perf_counter()
        line = who_notices(mutation)
        unnoticed += line is None
        what = f"{mutation.name} ({time.perf_counter() - started:.0f} s)"
        print(f"{'red' if line else 'GREEN'}  {what}: {line or 'nobody notices'}", flush=True)
    return 1 if unnoticed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every mutation is noticed."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.validation.mutations",
        description="Take protections away, one at a time, and see whether the suite turns red.",
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=[],
                        metavar="NAME,...", help="some of them")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name them and run nothing")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
