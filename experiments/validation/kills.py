"""Operations that are killed, interrupted, done twice at once, or disturbed by what others do.

    kill -9 and SIGINT      at random moments, and at each system call, half-way through a write
    two processes           do the same: one after the other, or one is refused
    readers of a model      while it is updated in place: the old one, the new one, or a refusal
    a file that is read     is overwritten, replaced, cut or extended by somebody else

Kills of a process show no loss of what the system had not yet written: see `failing_calls`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from experiments.validation.children import Child
from experiments.validation.failing_calls import sampled
from experiments.validation.operations import (
    Operation,
    checked_line,
    operations,
    prepared,
    told,
)
from experiments.validation.probe import Outcome, Probe, require
from experiments.validation.scene import Scene, sha256
from experiments.validation.system_calls import Counted, Disturbed, Signalled, intercepted
from forge.restore import restore_model
from forge.sgmap_reader import load_map
from forge.shard import shard_model


def probes(scene: Scene) -> Iterator[Probe]:
    """Those of all kinds, for each operation."""
    table = operations(scene)
    variants = Counter(operation.name for operation in table)
    for operation in table:
        kills = -(-scene.effort.kills // variants[operation.name])
        yield from _killed(scene, operation, kills)
        yield from _twice(scene, operation, -(-kills // 3))
        if operation.undo is not None:
            yield Probe(
                "chaos", "read while it is updated", operation.name, str(operation),
                partial(_read_while_updated, scene, operation),
            )  # fmt: skip
        else:
            yield from _disturbed(scene, operation)


# ---- killed and interrupted ----


def _killed(scene: Scene, operation: Operation, kills: int) -> Iterator[Probe]:
    seconds, n_calls = _measured(scene, operation)
    moments = random.Random(f"{scene.seed} {operation}")
    for _ in range(kills):
        moment = moments.uniform(0, 1.2 * seconds)
        yield Probe(
            "chaos", "kill -9 at a random moment", operation.name,
            f"{operation}: {1e3 * moment:.1f} ms",
            partial(_kill_after, scene, operation, moment),
        )  # fmt: skip
    # In its full form at every call; in the quick one at some.
    for k in sampled(n_calls, scene.effort.every**2):
        for number, row in (
            (signal.SIGKILL, "kill -9 at the k-th call"),
            (signal.SIGINT, "SIGINT at the k-th call"),
        ):
            yield Probe(
                "chaos", row, operation.name, f"{operation}: {k}",
                partial(_signal_at, scene, operation, k, number),
            )  # fmt: skip


def _measured(scene: Scene, operation: Operation) -> tuple[float, int]:
    """How long an operation takes in a child, and how many system calls."""
    hook = Counted()
    with prepared(scene, operation) as folder, intercepted(folder, hook):
        operation.work(folder)
    with prepared(scene, operation) as folder:
        started = time.perf_counter()
        Child(lambda: operation.work(folder)).wait()
        return time.perf_counter() - started, hook.calls.total()


def _kill_after(scene: Scene, operation: Operation, seconds: float) -> Outcome:
    with prepared(scene, operation) as folder:
        child = Child(lambda: operation.work(folder))
        time.sleep(seconds)
        child.kill()
        ended = child.wait()
        require(ended.status in (0, -signal.SIGKILL), f"fails by itself: {ended.said}")
        operation.judge(folder, "killed" if ended.status else None)
    return Outcome.HARMLESS


def _signal_at(scene: Scene, operation: Operation, k: int, number: signal.Signals) -> Outcome:
    """A signal at a call; if it kills, what mends it is killed, too, half as far."""
    with prepared(scene, operation) as folder:
        line = _signalled(operation, folder, k, number)
        if number == signal.SIGKILL and operation.state(folder) != "new":
            _signalled(operation, folder, k // 2, number)
        operation.judge(folder, line)
    return Outcome.HARMLESS


def _signalled(operation: Operation, folder: Path, k: int, number: signal.Signals) -> str | None:
    """The line with which an operation ends that gets a signal at a call; None: it succeeds."""

    def work() -> None:
        with intercepted(folder, Signalled(k, number)):
            operation.work(folder)

    ended = Child(work).wait()
    if ended.status == -signal.SIGKILL:
        return "killed"
    line = checked_line(ended.status, ended.said)
    require(line in (None, "interrupted"), f"fails by itself: {line}")
    return line


# ---- two processes ----


def _twice(scene: Scene, operation: Operation, times: int) -> Iterator[Probe]:
    delays = random.Random(f"{scene.seed} {operation} twice")
    for number in range(times):
        delay = 0.0 if number == 0 else delays.uniform(0, 0.02)
        yield Probe(
            "chaos", "two processes at once", operation.name,
            f"{operation}: {1e3 * delay:.1f} ms apart",
            partial(_do_twice, scene, operation, delay),
        )  # fmt: skip


def _do_twice(scene: Scene, operation: Operation, delay: float) -> Outcome:
    with prepared(scene, operation) as folder:
        children = []
        for pause in (0.0, delay):
            time.sleep(pause)
            children.append(Child(lambda: operation.work(folder)))
        ends = [child.wait() for child in children]
        lines = [checked_line(ended.status, ended.said) for ended in ends]
        require(None in lines, f"neither succeeds: {lines}")
        operation.judge(folder, None)
    return Outcome.HARMLESS if lines == [None, None] else Outcome.DETECTED


# ---- readers of what is updated in place ----


def _read_while_updated(scene: Scene, operation: Operation) -> Outcome:
    """One process updates a model and takes it back, again and again; this one reads it."""
    assert operation.undo is not None
    undo = operation.undo
    outcome = Outcome.HARMLESS
    with prepared(scene, operation) as folder, scene.copies() as scratch:
        expected = _sources(scene, operation, folder)

        def update() -> None:
            for _ in range(scene.effort.kills):
                # A reader that mends what it meets holds the lock for a moment.
                while told(lambda: operation.work(folder)) is not None:
                    time.sleep(1e-3)
                while told(lambda: undo(folder)) is not None:
                    time.sleep(1e-3)

        child = Child(update)
        try:
            while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                line = told(lambda: _read(operation, folder, scratch))
                if line is not None:
                    outcome = Outcome.DETECTED
                else:
                    found = sha256(scratch / "read.gguf")
                    require(found in expected, "a reader got a mixture of two versions")
        finally:
            ended = child.wait()
        require(ended.status == 0 and not ended.said, f"the writer fails: {ended.said}")
        operation.judge(folder, "taken back")
    return outcome


def _sources(scene: Scene, operation: Operation, folder: Path) -> set[str]:
    """SHA-256 of what the old and the new model are restored to."""
    owner = folder / operation.owner
    if owner.suffix != ".sgmap":
        return {sha256(owner), *operation.new.values()}
    with prepared(scene, operation) as other:
        operation.work(other)
        maps = (owner, other / operation.owner)
        return {load_map(path).source[0].sha256 for path in maps}


def _read(operation: Operation, folder: Path, scratch: Path) -> None:
    """Read a model, whole, into read.gguf."""
    map_path = folder / operation.owner
    if map_path.suffix != ".sgmap":
        map_path = shard_model(map_path, scratch / "read", force=True)
    restore_model(map_path, scratch / "read.gguf", force=True)


# ---- files that others change ----


def _disturbed(scene: Scene, operation: Operation) -> Iterator[Probe]:
    hook = Counted()
    with prepared(scene, operation) as folder, intercepted(folder, hook):
        operation.work(folder)
    for name in operation.inputs:
        for kind, every in (("open", 1), ("read", 3 * scene.effort.every - 2)):
            n_calls = hook.on_files[kind, Path(name).name]
            if n_calls == 0 or not name.endswith(".gguf"):
                continue
            for row, change in _CHANGES.items():
                for k in sampled(n_calls, every):
                    yield Probe(
                        "chaos", f"{row} while it is read", operation.name,
                        f"{operation}: {name}, {kind} {k}",
                        partial(_disturb, scene, operation, name, kind, k, change),
                    )  # fmt: skip


def _overwrite(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "r+b", buffering=0) as file:
        for place in (size // 3, size // 2, size - 2):
            os.pwrite(file.fileno(), b"\x5a\xa5", place)


def _replace(path: Path) -> None:
    """Another file of the same size takes the name: another header, other contents."""
    data = path.read_bytes().replace(b"attn_q", b"attn_k")
    other = path.with_name("other")
    other.write_bytes(data)
    _overwrite(other)
    os.replace(other, path)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _extend(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


_CHANGES: dict[str, Callable[[Path], None]] = {
    "overwritten": _overwrite,
    "replaced": _replace,
    "cut short": _cut,
    "extended": _extend,
}


def _disturb(
    scene: Scene, operation: Operation, name: str, kind: str, k: int, change: Callable[[Path], None]
) -> Outcome:
    """What is made of a file that changes is made of it as it was, or as it is; or nothing is."""
    with prepared(scene, operation) as folder, prepared(scene, operation) as other:
        path = folder / name
        hook = Disturbed(kind, path, k, lambda: change(path))
        with intercepted(folder, hook):
            line = told(lambda: operation.work(folder))
        made = _outputs(operation, folder)
        if line is not None:
            old = {output: operation.digests.get(output) for output in operation.new}
            require(made == old, f"refused, and the output is not what it was: {line}")
            return Outcome.DETECTED
        if made != operation.new:
            change(other / name)
            refusal = told(lambda: operation.work(other))
            require(refusal is None, f"made of what is refused: {refusal}")
            require(made == _outputs(operation, other), "made of two states of its input")
    return Outcome.HARMLESS


def _outputs(operation: Operation, folder: Path) -> dict[str, str | None]:
    return {name: sha256(folder / name) if (folder / name).exists() else None
            for name in operation.new}  # fmt: skip
