"""Hostile input: each malformed file is refused in one line, quickly and in little memory.

A file goes to every command that could meet it. A refusal is exit code 1 and one printable line on
stderr, and it leaves everything as it was; what is taken must come out right. Either way a command
has one second of CPU time (wall-clock time on a shared machine says nothing) and 200 MiB more than
an idle process with the same modules.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from experiments.validation import gguf_factory as factory
from experiments.validation import (
    hostile_gguf,
    hostile_llama,
    hostile_maps,
    lying_patches,
    unbound_patches,
)
from experiments.validation.fuzz import fuzz_probes
from experiments.validation.hostile_llama import LlamaKind, llama
from experiments.validation.hostile_maps import MapKind
from experiments.validation.hostile_patches import Case
from experiments.validation.probe import Missed, Outcome, Probe, require
from experiments.validation.scene import Scene
from forge.shard import ShardOptions, shard_model

K = TypeVar("K")

MOST_CPU_SECONDS = 1.0
MOST_BYTES = 200 << 20
_LONGEST_LINE = 6000
_QUICK_OF_A_FAULT = 2
_SLOW_FAULTS = ("header too large", "text too large")  # whose files are of many megabytes
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Step:
    """A command on a hostile file.

    Attributes
    ----------
    arguments
        As behind `gguf-shard`.
    needs
        Index of the step without whose success it makes no sense.
    same
        Two files that must be equal if it goes through.
    must_refuse
        It may not go through.
    """

    arguments: Sequence[str]
    needs: int | None = None
    same: tuple[str, str] | None = None
    must_refuse: bool = False


class Examiner:
    """Runs steps in a server's children (`experiments.validation.hostile_worker`); a context
    manager. The server is started when it is first needed."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.close()
            self._server.wait()
            self._server.stdout.close()

    def examine(self, folder: Path, steps: Sequence[Step]) -> list[bool]:
        """Do the steps in a folder; which of them went through.

        Raises
        ------
        Missed
            If one broke the promise.
        """
        request = {
            "folder": str(folder),
            "steps": [{"arguments": step.arguments, "needs": step.needs} for step in steps],
        }
        answers = self._ask(request)
        for step, answer in zip(steps, answers, strict=False):
            if answer is not None:
                _judge(folder, step, answer)
        require(len(answers) == len(steps), f"{len(answers)} of {len(steps)} steps were run")
        return [answer is not None and answer["code"] == 0 for answer in answers]

    def _ask(self, request: object) -> list[dict[str, object] | None]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "experiments.validation.hostile_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT,
                env=os.environ | {"NUMBA_THREADING_LAYER": "workqueue"},  # which stands a fork
            )  # fmt: skip
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        line = self._server.stdout.readline()
        if not line:
            raise Missed("the process that runs commands has died")
        answers: list[dict[str, object] | None] = json.loads(line)
        return answers


def _judge(folder: Path, step: Step, answer: dict[str, object]) -> None:
    """`Missed` unless an answer is as promised."""
    what = " ".join(step.arguments)
    require("died" not in answer, f"{what}: ended by signal {answer.get('died')}, or stuck")
    out, err = str(answer["out"]), str(answer["err"])
    code, changed = answer["code"], answer["changed"]
    for text in (out, err):
        bad = next((line for line in text.splitlines() if not line.isprintable()), None)
        require(bad is None, f"{what}: prints {bad!r}")
    seconds, grown = float(str(answer["seconds"])), int(str(answer["grown_bytes"]))
    require(seconds < MOST_CPU_SECONDS, f"{what}: took {seconds:.2f} s")
    require(grown < MOST_BYTES, f"{what}: took {grown >> 20} MiB")
    if code == 0:
        require(not step.must_refuse, f"{what}: goes through")
        if step.same is not None:
            made, expected = ((folder / name).read_bytes() for name in step.same)
            require(made == expected, f"{what}: {step.same[0]} is not {step.same[1]}")
        return
    require(code == 1, f"{what}: exit code {code}: {err.splitlines()[-1:]}")
    lines = err.splitlines()
    many = step.arguments[0] in ("verify", "repair")  # which list what is bad
    require(len(lines) == 1 or (many and lines), f"{what}: not one line: {err[:300]!r}")
    require(max(map(len, lines)) < _LONGEST_LINE, f"{what}: a line of {max(map(len, lines))}")
    require(lines != ["out of memory"], f"{what}: runs out of memory")
    require(not changed, f"{what}: refuses, and changes {changed}")


# ---- one probe a kind ----


def _quietly(*arguments: str) -> list[str]:
    return [*arguments, "-q"]


def _gguf_steps(name: str, must_refuse: bool) -> list[Step]:
    """A GGUF file, as source of a sharded model, as base and target, and as the base of a patch
    that is not for it."""
    good, patch = "good.gguf", "patch"
    shard_map, made = "sharded/core.sgmap", "made.gguf"
    return [
        Step(["info", name], must_refuse=must_refuse),
        Step(_quietly("shard", name, "-o", "sharded"), must_refuse=must_refuse),
        Step(_quietly("restore", shard_map, "-o", "back.gguf"), 1, ("back.gguf", name)),
        Step(_quietly("diff", good, name, "-o", "to"), must_refuse=must_refuse),
        Step(_quietly("apply", good, "to", "-o", made), 3, (made, name)),
        Step(_quietly("diff", name, good, "-o", "from"), must_refuse=must_refuse),
        Step(_quietly("apply", name, "from", "-o", "other.gguf"), 5, ("other.gguf", good)),
        Step(_quietly("apply", name, patch, "-o", "new.gguf"), must_refuse=True),
        Step(_quietly("apply", name, patch, "--in-place"), must_refuse=True),
    ]


def _outcome(steps: Sequence[Step], went_through: Sequence[bool], is_odd: bool) -> Outcome:
    """What it is for a file that is to be refused, or taken."""
    if is_odd:
        for step, through in zip(steps, went_through, strict=True):
            require(through or step.must_refuse, f"{' '.join(step.arguments)}: refuses it")
        return Outcome.HARMLESS
    return Outcome.DETECTED


def _try_gguf(scene: Scene, examiner: Examiner, kind: hostile_gguf.Kind) -> Outcome:
    with scene.copies(scene.small, scene.patch) as folder:
        (folder / "small.gguf").rename(folder / "good.gguf")
        path = kind.make(folder)
        steps = _gguf_steps(str(path.relative_to(folder)), must_refuse=not kind.is_odd)
        return _outcome(steps, examiner.examine(folder, steps), kind.is_odd)


def _try_llama(scene: Scene, examiner: Examiner, kind: LlamaKind) -> Outcome:
    with scene.copies() as folder:
        (folder / "model.gguf").write_bytes(llama(kind))
        run = ["run", "core.sgmap", "-p", "ab", "-n", "2", "--target", "cpu", "--json"]
        steps = [
            Step(_quietly("shard", "model.gguf")),
            Step(run, needs=0, must_refuse=not kind.is_odd),
        ]
        went_through = examiner.examine(folder, steps)
        require(went_through[0], "shard: refuses it")
        return _outcome(steps, went_through, kind.is_odd)


def _try_map(scene: Scene, examiner: Examiner, kind: MapKind) -> Outcome:
    with scene.copies(scene.small_map, scene.small, scene.newer, scene.patch) as folder:
        path = folder / "core.sgmap"
        path.write_bytes(kind.change(path.read_bytes()))
        kind.prepare(folder)
        name, made, other = path.name, "made.gguf", "other.gguf"
        steps = [
            Step(["info", name]),
            Step(_quietly("verify", name)),
            Step(_quietly("restore", name, "-o", "back.gguf"), None, ("back.gguf", "small.gguf")),
            Step(_quietly("diff", name, "newer.gguf", "-o", "from")),
            Step(_quietly("apply", "small.gguf", "from", "-o", made), 3, (made, "newer.gguf")),
            Step(_quietly("diff", "newer.gguf", name, "-o", "to")),
            Step(_quietly("apply", "newer.gguf", "to", "-o", other), 5, (other, "small.gguf")),
            Step(_quietly("apply", name, "patch", "-o", "n.gguf"), None, ("n.gguf", "newer.gguf")),
            Step(["run", name, "--prompt-ids", "1", "--target", "cpu"], must_refuse=True),
            Step(_quietly("repair", name, "--from", "small.gguf")),
            Step(_quietly("restore", name, "-o", "again.gguf"), 9, ("again.gguf", "small.gguf")),
            Step(_quietly("apply", name, "patch", "--in-place")),
            Step(_quietly("restore", name, "-o", "newest.gguf"), 11, ("newest.gguf", "newer.gguf")),
        ]
        went_through = examiner.examine(folder, steps)
        # A map may lie of what nothing rests on, as long as all that comes of it is right.
        is_harmless = kind.is_odd or all(
            through or step.must_refuse for step, through in zip(steps, went_through, strict=True)
        )
        return _outcome(steps, went_through, is_harmless)


def _try_patch(scene: Scene, examiner: Examiner, case: Case) -> Outcome:
    lie = case.change(case.of())
    with scene.copies() as folder:
        base = lie.target if case.reverse else lie.base
        for name, data in {"model.gguf": base, **sharded(base), "hostile": lie.data()}.items():
            (folder / name).write_bytes(data)
        back = ["--reverse"] * case.reverse
        steps = [Step(["info", "hostile"])]  # which cannot know of lies about models
        for of in ("model.gguf", "core.sgmap"):
            for how in (["-o", "new.gguf"], ["--in-place"]):
                steps.append(Step(_quietly("apply", of, "hostile", *how, *back), must_refuse=True))
        return _outcome(steps, examiner.examine(folder, steps), is_odd=False)


@cache
def sharded(data: bytes) -> dict[str, bytes]:
    """The files of a sharded model, by name."""
    with TemporaryDirectory() as folder:
        path = factory.write(Path(folder) / "model.gguf", data)
        shard_model(path, folder, ShardOptions(pages_per_shard=2))
        return {name: (Path(folder) / name).read_bytes() for name in ("core.gguf", "core.sgmap")}


def _patch_cases() -> list[tuple[str, str, Case]]:
    """Fault, name and case."""
    tables = [("patch that lies of itself", lying_patches.ALL),
              ("patch that lies of models", unbound_patches.ALL)]  # fmt: skip
    return [(fault, f"{of}: {name}", case) for fault, table in tables
            for of, cases in table.items() for name, case in cases.items()]  # fmt: skip


def file_probes(scene: Scene, examiner: Examiner) -> Iterator[Probe]:
    """A probe for each malformed file."""

    def probe(fault: str, artefact: str, name: str, check: Callable[[], Outcome]) -> Probe:
        return Probe("hostile", fault, artefact, name, check)

    for kind in _sample(scene, hostile_gguf.kinds(), lambda kind: kind.fault):
        check = partial(_try_gguf, scene, examiner, kind)
        yield probe(kind.fault, "model.gguf", kind.name, check)
    for llama_kind in _sample(scene, hostile_llama.kinds(), lambda kind: kind.fault):
        yield probe(llama_kind.fault, "run", llama_kind.name,
                    partial(_try_llama, scene, examiner, llama_kind))  # fmt: skip
    for map_kind in _sample(scene, hostile_maps.kinds(), lambda kind: kind.fault):
        yield probe(map_kind.fault, "core.sgmap", map_kind.name,
                    partial(_try_map, scene, examiner, map_kind))  # fmt: skip
    for fault, name, case in _sample(scene, _patch_cases(), lambda case: case[0]):
        yield probe(fault, "patch", name, partial(_try_patch, scene, examiner, case))


def _sample(scene: Scene, kinds: Sequence[K], fault: Callable[[K], str]) -> list[K]:
    """In a quick run some of each fault, spread evenly."""
    if scene.effort.flips == 0:  # a full run
        return list(kinds)
    by_fault: dict[str, list[K]] = {}
    for kind in kinds:
        by_fault.setdefault(fault(kind), []).append(kind)
    chosen = []
    for name, some in by_fault.items():
        n_most = 1 if name in _SLOW_FAULTS else _QUICK_OF_A_FAULT
        chosen += some[:: -(-len(some) // n_most)]
    return chosen


def probes(scene: Scene) -> Iterator[Probe]:
    """Malformed files, then fuzzing."""
    with Examiner() as examiner:
        yield from file_probes(scene, examiner)
    yield from fuzz_probes(scene)
