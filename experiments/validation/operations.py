"""What the tool does to files, each with what must hold whatever becomes of it.

    shard     restore     repair     diff     apply     apply in place

An operation's outputs are old or new, never a third state: what stood there before, or what it is
to make, both known beforehand. Its inputs are never changed. After a failure the same operation
succeeds and nothing but inputs and outputs is left. Each is told to the user in one line.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from delta.apply import apply_patch
from delta.apply_in_place import update_in_place
from delta.diff import create_patch
from experiments.validation import gguf_factory as factory
from experiments.validation.probe import Missed, Outcome, require
from experiments.validation.scene import Scene, sha256
from forge.command import run_command
from forge.core_file import page_offset
from forge.errors import GGUFShardError
from forge.gguf_file import read_gguf
from forge.journal import finish_journal
from forge.pages import PAGE_BYTES
from forge.pending_file import journal_path
from forge.restore import restore_model
from forge.shard import ShardOptions, shard_model
from forge.verify import verify_model

#: Lines that name no file, as there is none to name.
_NAMELESS = ("out of memory", "interrupted")
#: A file, as it is named here: with its whole path.
_FILE = re.compile(r"(^|[ '])/\w")
#: Long ago, for all inputs: a change is seen by its time, which has the grain of a clock's tick.
_LONG_AGO = 1_000_000_000


@dataclass(frozen=True)
class Operation:
    """Something that makes or changes files.

    Attributes
    ----------
    name
        The table's column.
    variant
        Which one of those with this name; may be empty.
    inputs
        What it reads: names in its folder, and their originals.
    old
        What stands where it writes, likewise.
    new
        SHA-256 of what it makes there.
    work
        Does it, in a folder.
    owner
        The output that its model is named by.
    undo
        Makes the old of the new, of what cannot be done twice; None of what can.
    """

    name: str
    variant: str
    inputs: Mapping[str, Path]
    old: Mapping[str, Path]
    new: Mapping[str, str]
    work: Callable[[Path], object]
    owner: str
    undo: Callable[[Path], object] | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, path in (*self.inputs.items(), *self.old.items()):
            self.digests[name] = sha256(path)

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def prepare(self, folder: Path) -> None:
        """Put inputs, and what stands where it writes, into an empty folder."""
        for name, path in (*self.inputs.items(), *self.old.items()):
            copy = folder / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            os.utime(copy, (_LONG_AGO, _LONG_AGO))

    def state(self, folder: Path) -> str:
        """ "old", "new", or "unfinished", which the next to come makes new.

        It is read as everybody would, but in a copy: whoever opens a model may mend it.

        Raises
        ------
        Missed
            If it is none of those.
        """
        copy = folder.with_name(folder.name + "-read")
        shutil.copytree(folder, copy)
        try:
            return self._state(copy)
        finally:
            shutil.rmtree(copy)

    def _state(self, folder: Path) -> str:
        is_unfinished = journal_path(folder / self.owner).exists()
        if is_unfinished and not self.owner.endswith(".sgmap"):
            try:
                read_gguf(folder / self.owner)
            except GGUFShardError as error:
                require("interrupted" in str(error), f"half written and refused as: {error}")
            else:
                raise Missed("half written, and can be read")
        holds = self.open(folder)
        found = {name: _digest(folder / name) for name in self.new}
        if found == self.new:
            require(holds, "new, and does not verify")
            return "unfinished" if is_unfinished else "new"
        old = {name: self.digests.get(name) for name in self.new}
        require(found == old, f"a third state: {_named(found, old, self.new)}")
        require(not is_unfinished, "a change that was committed is lost")
        return "old"

    def open(self, folder: Path) -> bool:
        """Open what it makes, which finishes what a dead process has committed; whether it holds.

        What holds neither before nor afterwards, a damaged model that is repaired, may do so.
        """
        owner = folder / self.owner
        if not owner.exists():
            return True
        if owner.suffix == ".sgmap":
            return verify_model(owner).ok
        finish_journal(owner)
        return True

    def judge(self, folder: Path, line: str | None) -> Outcome:
        """What came of a run that said `line`, or nothing as it succeeded.

        Raises
        ------
        Missed
            If anything does not hold that must.
        """
        self._require_inputs(folder)
        state = self.state(folder)
        require(line is not None or state == "new", f"claims success, and is {state}")
        again = told(lambda: self.again(folder, state))
        require(again is None, f"{state} after {line!r}, and the next run fails: {again}")
        self.require_done(folder)
        return Outcome.HARMLESS if line is None else Outcome.DETECTED

    def again(self, folder: Path, state: str) -> None:
        """Do it once more in a folder where it has come as far as `state`."""
        if state == "new" and self.undo is not None:
            self.undo(folder)
        self.work(folder)

    def require_done(self, folder: Path) -> None:
        """`Missed` unless outputs are new and nothing else is there but the inputs."""
        self._require_inputs(folder)
        found = {name: _digest(folder / name) for name in self.new}
        require(found == self.new, f"wrong at the end: {_named(found, self.new)}")
        expected = {*self.inputs, *self.new}
        expected |= {str(Path(name).parent) for name in expected} - {"."}
        left = {str(path.relative_to(folder)) for path in folder.rglob("*")} - expected
        require(not left, f"left behind: {sorted(left)}")

    def _require_inputs(self, folder: Path) -> None:
        for name in self.inputs:
            require(_digest(folder / name) == self.digests[name], f"{name}: an input has changed")


def _digest(path: Path) -> str | None:
    return sha256(path) if path.exists() else None


def _named(found: Mapping[str, str | None], *states: Mapping[str, str | None]) -> str:
    """Which of the expected states each file is in."""
    names = []
    for name, digest in found.items():
        of = [str(i) for i, state in enumerate(states) if state.get(name) == digest]
        names.append(f"{name} as in {'/'.join(of) or 'none'}" if digest else f"no {name}")
    return ", ".join(names)


def told(work: Callable[[], object]) -> str | None:
    """The line with which a command that does `work` fails; None if it succeeds.

    Raises
    ------
    Missed
        If it is not one line, or does not name a file.
    """

    def run(_: argparse.Namespace) -> int:
        work()
        return 0

    said = io.StringIO()
    with redirect_stderr(said):
        code = run_command(argparse.Namespace(run=run))
    return checked_line(code, said.getvalue())


def checked_line(code: int, text: str) -> str | None:
    """The line of a command that ended so and wrote `text` to stderr; see `told`."""
    require(code in (0, 1), f"exit code {code}: {text}")
    require(text.count("\n") == code, f"exit code {code}, and not one line: {text!r}")
    line = text.strip()
    require(code == 0 or line in _NAMELESS or _FILE.search(line), f"names no file: {line!r}")
    return line if code else None


@contextmanager
def prepared(scene: Scene, operation: Operation) -> Iterator[Path]:
    """A folder in which an operation can be done; gone afterwards."""
    with scene.copies() as folder:
        operation.prepare(folder)
        yield folder


# ---- the table ----


class _Originals:
    """Files that operations start from and end with, beside those of the scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.folder = scene.folder / "operations"
        if not self.folder.exists():
            self.folder.mkdir()
            self._make()

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def _make(self) -> None:
        scene, folder = self.scene, self.folder
        # A sibling keeps every tensor in its place; a grown model has one more.
        data = bytearray(scene.small.read_bytes())
        tensor = read_gguf(scene.small).tensors[0]
        for i in range(tensor.offset, tensor.offset + tensor.bytes, 700):
            data[i] ^= 0x15
        factory.write(self["sibling.gguf"], bytes(data))
        more = factory.tensor("more.weight", GGMLQuantizationType.F32, (32, 40), 9)
        pairs = [factory.pair("general.architecture", factory.STRING, "llama")]
        tensors = [*factory.small_tensors(scene.seed), more]
        factory.write(self["grown.gguf"], factory.gguf(tensors, pairs))
        for name in ("sibling", "grown"):
            target = self[f"{name}.gguf"]
            shard_model(target, folder / name, ShardOptions(pages_per_shard=2))
            create_patch(scene.small, target, self[f"to-{name}"], reversible=True)
        create_patch(scene.small, scene.newer, self["plain-patch"])
        shutil.copytree(scene.small_map.parent, folder / "damaged")
        with open(folder / "damaged/core.gguf", "r+b") as file:
            for page, n_bytes in ((2, PAGE_BYTES), (5, 1), (6, 100)):
                file.seek(page_offset(page))
                file.write(b"\xa5" * n_bytes)


def _pair(folder: Path, name: str = "model") -> dict[str, Path]:
    """Both files of a sharded model, as they are called in an operation's folder."""
    return {f"{name}/core.gguf": folder / "core.gguf", f"{name}/core.sgmap": folder / "core.sgmap"}


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: sha256(path) for name, path in files.items()}


def operations(scene: Scene) -> list[Operation]:
    """All operations."""
    made = _Originals(scene)
    small, newer, patch = scene.small, scene.newer, scene.patch
    pages, newer_pages = scene.small_map.parent, scene.newer_map.parent
    options = ShardOptions(pages_per_shard=2)
    table = [
        Operation(
            "shard", "", {"small.gguf": small}, _pair(newer_pages), _digests(_pair(pages)),
            lambda f: shard_model(f / "small.gguf", f / "model", options, force=True),
            "model/core.sgmap",
        ),
        Operation(
            "restore", "", _pair(pages), {"out.gguf": newer}, {"out.gguf": sha256(small)},
            lambda f: restore_model(f / "model/core.sgmap", f / "out.gguf", force=True),
            "out.gguf",
        ),
        Operation(
            "diff", "", {"small.gguf": small, "newer.gguf": newer},
            {"out": made["to-sibling"]}, {"out": sha256(made["plain-patch"])},
            lambda f: create_patch(f / "small.gguf", f / "newer.gguf", f / "out", force=True),
            "out",
        ),
        Operation(
            "apply", "", {"small.gguf": small, "patch": patch},
            {"out.gguf": made["sibling.gguf"]}, {"out.gguf": sha256(newer)},
            lambda f: apply_patch(f / "small.gguf", f / "patch", f / "out.gguf", force=True),
            "out.gguf",
        ),
        *_in_place(scene, made),
    ]  # fmt: skip
    if find_spec("forge.repair") is not None:
        repair_model: Any = import_module("forge.repair").repair_model
        table.append(Operation(
            "repair", "", {"small.gguf": small}, _pair(made["damaged"]), _digests(_pair(pages)),
            lambda f: repair_model(f / "model/core.sgmap", f / "small.gguf"), "model/core.sgmap",
        ))  # fmt: skip
    return table


def _in_place(scene: Scene, made: _Originals) -> Iterator[Operation]:
    """Updates in place: where everything stays, and where files are written anew."""
    small, pages = scene.small, scene.small_map.parent
    for variant, patch, target in (
        ("plain", made["to-sibling"], made["sibling.gguf"]),
        ("plain, written anew", scene.patch, scene.newer),
    ):
        yield _update(variant, patch, {"model.gguf": small}, {"model.gguf": target}, "model.gguf")
    for variant, patch, folder in (
        ("sharded", made["to-sibling"], made["sibling"]),
        ("sharded, written anew", made["to-grown"], made["grown"]),
    ):
        yield _update(variant, patch, _pair(pages), _pair(folder), "model/core.sgmap")


def _update(variant: str, patch: Path, old: Mapping[str, Path], new: Mapping[str, Path],
            owner: str) -> Operation:  # fmt: skip
    return Operation(
        "apply in place", variant, {"patch": patch}, old, _digests(new),
        lambda f: update_in_place(f / owner, f / "patch"), owner,
        lambda f: update_in_place(f / owner, f / "patch", reverse=True),
    )  # fmt: skip
