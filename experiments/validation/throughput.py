"""Throughput: how fast shard, verify, restore, diff and apply are, and the machine itself.

Each takes its turn with the machine's own ways to go over as many bytes: `cp`, `cp` and `sync` (who
writes files forces them to disk, too), `sha256sum`, and a copy in memory. All figures are MB/s of
the model, not of what is read and written in all. Every result is checked before it is timed.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from delta.apply import apply_patch
from delta.diff import create_patch
from experiments.bench import Case, Variant, describe_environment, measure
from experiments.cases import OURS
from experiments.delta_cases import write_large_pair
from experiments.report import Row, text_table
from experiments.validation.scene import Scene
from forge.restore import restore_model
from forge.shard import shard_model
from forge.verify import verify_model

OPERATIONS = ("shard", "verify", "restore", "diff", "apply")
CP, CP_SYNC, SHA256SUM, MEMORY = PEERS = ("cp", "cp + sync", "sha256sum", "memory copy")


@dataclass(frozen=True)
class _Work:
    """What is timed: `do`, once `prepare` has made room for it; `is_right` looks at what it left,
    given what it returned."""

    do: Callable[[], Any]
    is_right: Callable[[Any], bool]
    prepare: Callable[[], object] = lambda: None


def measure_throughput(scene: Scene) -> list[dict[str, Any]]:
    """Measure every operation.

    Parameters
    ----------
    scene
        Where to work; `effort.throughput_bytes` and `effort.repeats` say how much and how often.

    Returns
    -------
    list of dict
        Rows as `experiments.bench` gives them: cases `validation_shard` and so on, in MB/s.

    Raises
    ------
    GGUFShardError
        In the CUDA simulator, whose timings mean nothing.
    """
    with _folder(scene) as folder:
        pair = write_large_pair(folder, scene.effort.throughput_bytes, scene.seed)
        n_bytes = pair.base.stat().st_size
        operations = _operations(folder, pair.base, pair.target)
        peers = _peers(folder, pair.base)
        environment = describe_environment()
        rows: list[dict[str, Any]] = []
        for name in OPERATIONS:
            work = {OURS: operations[name], **peers}
            variants = [_variant(variant, work[variant], n_bytes) for variant in work]
            case = Case(f"validation_{name}", "MB/s", {"MB": round(n_bytes / 1e6)})
            rows += measure(  # what is validated has run once, and needs no warming up
                case, variants, repeats=scene.effort.repeats, warmup=0, seed=scene.seed,
                environment=environment,
            )  # fmt: skip
    return rows


def text(rows: Sequence[Row]) -> str:
    """The rows as a table: a line for each operation."""
    return text_table(rows, _cells)


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    peers = [name for name in PEERS if any(row["variant"] == name for row in rows)]
    cells: list[tuple[str, ...]] = [("MB/s", OURS, "p20 to p80", *peers)]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["variant"]: row for row in rows if row["case"] == case}
        ours = found[OURS]
        spread = f"{ours['p20']:.0f} to {ours['p80']:.0f}" if ours["validated"] else ""
        others = [_figure(found[name]) for name in peers]
        cells.append((case.removeprefix("validation_"), _figure(ours), spread, *others))
    return cells


def _figure(row: Row) -> str:
    return f"{row['median']:.0f}" if row["validated"] else "wrong result"


@contextmanager
def _folder(scene: Scene) -> Iterator[Path]:
    folder = scene.folder / "throughput"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _variant(name: str, work: _Work, n_bytes: int) -> Variant:
    def is_right() -> bool:
        work.prepare()
        return work.is_right(work.do())

    def measured() -> float:
        work.prepare()
        started = time.perf_counter()
        work.do()
        return n_bytes / (time.perf_counter() - started) / 1e6

    return Variant(name, measured, is_right)


def _operations(folder: Path, base: Path, target: Path) -> dict[str, _Work]:
    map_path = shard_model(base, folder / "sharded")
    patch = folder / "patch"
    create_patch(base, target, patch)
    pages, restored, made, again = (folder / n for n in ("pages", "restored", "made", "again"))

    def is_patch_right(_: object) -> bool:
        return _same(apply_patch(base, again, made, force=True)[0], target)

    def remove(path: Path) -> Callable[[], object]:
        return functools.partial(path.unlink, missing_ok=True)

    return {
        "shard": _Work(
            lambda: shard_model(base, pages),
            lambda found: verify_model(found, base).ok,
            lambda: shutil.rmtree(pages, ignore_errors=True),
        ),
        "verify": _Work(lambda: verify_model(map_path), lambda result: bool(result.ok)),
        "restore": _Work(
            lambda: restore_model(map_path, restored),
            lambda found: _same(found[0], base),
            remove(restored),
        ),
        "diff": _Work(lambda: create_patch(base, target, again), is_patch_right, remove(again)),
        "apply": _Work(
            lambda: apply_patch(base, patch, made),
            lambda found: _same(found[0], target),
            remove(made),
        ),
    }


def _peers(folder: Path, model: Path) -> dict[str, _Work]:
    """What there is of the machine's own ways."""
    copy = folder / "copy"
    source = np.fromfile(model, np.uint8)
    destination = np.zeros_like(source)

    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
        return done.stdout

    def copy_and_sync() -> None:
        run("cp", model, copy)
        run("sync", copy)

    def is_copied(_: object) -> bool:
        return _same(copy, model)

    remove = functools.partial(copy.unlink, missing_ok=True)
    ways = {
        CP: (("cp",), _Work(lambda: run("cp", model, copy), is_copied, remove)),
        CP_SYNC: (("cp", "sync"), _Work(copy_and_sync, is_copied, remove)),
        SHA256SUM: (
            ("sha256sum",),
            _Work(lambda: run("sha256sum", model), lambda said: said.split()[0] == _sha256(model)),
        ),
        MEMORY: (
            (),
            _Work(
                lambda: np.copyto(destination, source),
                lambda _: np.array_equal(destination, source),
            ),
        ),
    }
    return {name: work for name, (tools, work) in ways.items() if all(map(shutil.which, tools))}


def _same(path: Path, other: Path) -> bool:
    return _sha256(path) == _sha256(other)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest()
