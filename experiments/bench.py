"""The measuring harness: check, warm up, alternate, and one full row per measurement.

A row is a flat dictionary:

| key | |
| --- | --- |
| `case`, `variant`, `params` | what was measured, in whose hands, with what |
| `median`, `p20`, `p80`, `n`, `unit`, `better` | the result of `n` repeats; "higher" or "lower" |
| `limit`, `limit_by`, `fraction_of_limit` | what physics allows, what sets it, how near (0..1) |
| `validated` | whether the variant's result was checked first; if red, there is no result |
| `commit`, `dirty`, `date`, `seed` | which sources, when |
| `host`, `gpu`, `driver`, `versions` | on what |

Variants of a case take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np

from forge.errors import GGUFShardError

RESULTS = Path(__file__).resolve().parent / "results"
_PROJECT = Path(__file__).resolve().parent.parent
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Variant:
    """One way to do what a case measures.

    Attributes
    ----------
    name
        "gguf-shard", or the peer's name.
    measure
        Does it once; returns the figure in the case's unit.
    validate
        Whether its result is right; asked once, before any measurement.
    limit
        The best figure that physics allows, or how to measure it, or None if not known. A limit
        that is measured is so beside every measurement, and the best one counts: measured once,
        while the machine was busy, it would be too low.
    limit_by
        What sets the limit.
    """

    name: str
    measure: Callable[[], float]
    validate: Callable[[], bool]
    limit: float | Callable[[], float] | None = None
    limit_by: str = ""


@dataclass(frozen=True)
class Case:
    """What is measured; `better` is "higher" or "lower"."""

    name: str
    unit: str
    params: Mapping[str, Any]
    better: str = "higher"


def measure(
    case: Case,
    variants: Sequence[Variant],
    *,
    repeats: int,
    warmup: int = 1,
    seed: int = 0,
    environment: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure variants in turn.

    Parameters
    ----------
    case
        What is measured.
    variants
        Who takes part; each is validated first.
    repeats
        Measurements of each that count, at least 1.
    warmup
        Measurements of each that do not.
    seed
        Seed of the case's data, for the record.
    environment
        What `describe_environment` says, where it has been asked already.

    Returns
    -------
    list of dict
        A row per variant, in order. The row of a variant whose validation failed has no times.

    Raises
    ------
    GGUFShardError
        In the CUDA simulator, whose timings mean nothing, or if there is nothing to repeat.
    """
    refuse_in_simulator()
    if repeats < 1:
        raise GGUFShardError(f"{case.name}: repeats {repeats}: at least 1 is needed")
    valid = [variant.validate() for variant in variants]
    racing = [variant for variant, ok in zip(variants, valid, strict=True) if ok]
    figures: dict[str, list[float]] = {variant.name: [] for variant in racing}
    limits: dict[str, list[float]] = {variant.name: [] for variant in racing}
    for turn in range(warmup + repeats):
        for variant in racing:
            figure = variant.measure()
            if turn >= warmup:
                figures[variant.name].append(figure)
            if callable(variant.limit):
                limits[variant.name].append(variant.limit())
            elif variant.limit is not None:
                limits[variant.name] = [variant.limit]
    best = max if case.better == "higher" else min
    facts = {**(describe_environment() if environment is None else environment), "seed": seed}
    return [
        _row(
            case, variant, figures.get(variant.name, []),
            best(limits.get(variant.name, []), default=None), facts,
        )
        for variant in variants
    ]  # fmt: skip


def record(case: Case, variant: Variant, *, seed: int = 0) -> dict[str, Any]:
    """The row of a quantity that is counted, not timed: one measurement, no warm-up."""
    return measure(case, [variant], repeats=1, warmup=0, seed=seed)[0]


def _row(
    case: Case,
    variant: Variant,
    figures: Sequence[float],
    limit: float | None,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    p20, median, p80 = np.percentile(figures, (20, 50, 80)).tolist() if figures else (None,) * 3
    fraction = None
    if median and limit:
        fraction = median / limit if case.better == "higher" else limit / median
    return {
        "case": case.name,
        "variant": variant.name,
        "params": dict(case.params),
        "median": median,
        "p20": p20,
        "p80": p80,
        "n": len(figures),
        "unit": case.unit,
        "better": case.better,
        "limit": limit,
        "limit_by": variant.limit_by,
        "fraction_of_limit": fraction,
        "validated": bool(figures),
        **environment,
    }


def refuse_in_simulator() -> None:
    """GGUFShardError where kernels are only simulated."""
    if numba.config.ENABLE_CUDASIM:
        raise GGUFShardError(
            "bench: the CUDA simulator is on; its timings say nothing and are not recorded"
        )


def write_rows(
    rows: Sequence[Mapping[str, Any]], machine: str, results: Path = RESULTS
) -> list[Path]:
    """Write rows to `results/<machine>/<case>.json`, in place of those of the same variant and
    params; returns the files.

    Raises
    ------
    GGUFShardError
        In the CUDA simulator, or if the machine's name is not one of a folder.
    """
    refuse_in_simulator()
    if not machine or slug(machine) != machine:
        raise GGUFShardError(f"machine {machine!r}: want small letters, digits and dashes only")
    folder = results / machine
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in dict.fromkeys(row["case"] for row in rows):
        path = folder / f"{name}.json"
        new = [dict(row) for row in rows if row["case"] == name]
        taken = [(row["variant"], row["params"]) for row in new]
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        kept = [row for row in old if (row["variant"], row["params"]) not in taken]
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(kept + new, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        paths.append(path)
    return paths


def describe_environment() -> dict[str, Any]:
    """Sources, host and versions, without names of hosts or folders."""
    gpu, driver = _gpu()
    # What has just been recorded is no change of the sources.
    changes = _git("status", "--porcelain", "--", ".", ":!experiments/results")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "host": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "gpu": gpu,
        "driver": driver,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
            "llvmlite": llvmlite.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def machine_name() -> str:
    """A name for this machine: its processor and number of cores."""
    return slug(f"{cpu_name()}-{os.cpu_count()}-cores")


def slug(text: str) -> str:
    """Small letters and digits, with single dashes between."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_name() -> str:
    """The processor's model name; where that says no model, as in some virtual machines, with
    Linux' numbers of its family and model."""
    said: dict[str, str] = {}
    try:
        with open(_CPU_INFO, encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                said.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = said.get("model name") or platform.processor() or platform.machine()
    if not re.search("[0-9]", name) and {"cpu family", "model"} <= said.keys():
        name += f" (family {said['cpu family']}, model {said['model']})"
    return name


def _git(*arguments: str) -> str | None:
    """Output of a git command in the project; None outside a repository."""
    return _output(["git", "-C", str(_PROJECT), *arguments])


def _gpu() -> tuple[str | None, str | None]:
    """Name and driver of the first GPU, as its driver's own tool says."""
    line = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if not line:
        return None, None
    name, _, driver = line.splitlines()[0].rpartition(", ")
    return name, driver


def _output(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
