"""Fuzzing: changed files by the thousand, kept where they lead to lines not seen before.

    python -m experiments.validation.fuzz --seconds N --seed S [--target gguf|map|patch]
                                          [--corpus DIR] [--replay FILE ...]

Saved inputs (`experiments/validation/corpus`, a folder a target) are tried first, then changed ones
until the time is over. Whatever is not refused in one line must come out right; nothing may take
more than a second of CPU time or 200 MiB. What fails is saved in `fuzz-failures`, with the command
that tries it again, and the exit code is 1.

Lines of `forge` and `delta` are traced until all of a function have been seen, so the price falls
as coverage grows.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from experiments.validation.fuzz_targets import TARGETS, Target
from experiments.validation.probe import Missed, Outcome, Probe, refused, require
from experiments.validation.scene import Scene
from forge.command import run_command

MOST_CPU_SECONDS = 1.0
MOST_BYTES = 200 << 20
CORPUS = Path(__file__).resolve().parent / "corpus"
_ROOT = Path(__file__).resolve().parents[2]
_TRACED = tuple(str(_ROOT / package) for package in ("forge", "delta"))
_FAILURES = Path("fuzz-failures")
_PATIENCE_SECONDS = 10
_MOST_FAILURES = 5


class Coverage:
    """Which lines have been run."""

    def __init__(self) -> None:
        self.n_lines = 0
        self._left: dict[CodeType, set[int]] = {}

    def trace(self, work: Callable[[], object]) -> None:
        """Do something and count the lines that are new."""
        before = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            work()
        finally:
            sys.settrace(before)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        left = self._left.get(code)
        if left is None:
            is_ours = code.co_filename.startswith(_TRACED)
            left = {line for *_, line in code.co_lines() if line} if is_ours else set()
            self._left[code] = left
        return self._on_line if left else None

    def _on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        left = self._left[frame.f_code]
        if event == "line" and frame.f_lineno in left:
            left.discard(frame.f_lineno)
            self.n_lines += 1
        return self._on_line


def _give_up(*_: object) -> None:
    raise Missed(f"nothing after {_PATIENCE_SECONDS} s")


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def try_input(target: Target, data: bytes, coverage: Coverage) -> str | None:
    """Give an input to the tool.

    Returns
    -------
    str or None
        What is wrong with what came of it.
    """
    started, peak = time.process_time(), _peak_bytes()
    previous = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(_PATIENCE_SECONDS)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            coverage.trace(partial(refused, partial(target.try_one, folder, data)))
            left = [p.name for p in folder.rglob("*") if p.suffix in (".sgnew", ".sgjournal")]
            require(not left, f"left behind: {left}")
        seconds, grown = time.process_time() - started, _peak_bytes() - peak
        require(seconds < MOST_CPU_SECONDS, f"took {seconds:.2f} s")
        require(grown < MOST_BYTES, f"took {grown >> 20} MiB")
    except Exception as error:  # whatever it is: a user would see it
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return None


class Fuzzer:
    """Tries inputs of one target; keeps those that lead somewhere.

    Parameters
    ----------
    target
        The kind of file.
    seed
        Of the changes.
    saved
        Inputs to begin with, beside the target's own.

    Attributes
    ----------
    found
        Inputs that led to new lines, beside those it began with.
    failures
        Inputs of which something was wrong, and what.
    """

    def __init__(self, target: Target, seed: int, saved: Sequence[bytes] = ()) -> None:
        self.target = target
        self.coverage = Coverage()
        self.found: list[bytes] = []
        self.failures: list[tuple[bytes, str]] = []
        self.n_tried = 0
        self._random = random.Random(f"{target.name} {seed}")
        seeds = target.seeds()
        for data in seeds:  # once untimed: what is compiled is compiled here
            require(refused(partial(self._warm_up, data)) is None, "a right file is refused")
        self._pool = [*seeds, *saved]
        for data in self._pool:
            self._try(data)

    def _warm_up(self, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as name:
            self.target.try_one(Path(name), data)

    def step(self) -> None:
        """Try one more."""
        data, other = self._random.choices(self._pool, k=2)
        data = self.target.mutate(self._random, data, other)
        if self._try(data):
            self._pool.append(data)
            self.found.append(data)

    def run(self, seconds: float) -> None:
        """Try more until the time is over, or enough has failed."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and len(self.failures) < _MOST_FAILURES:
            self.step()

    def _try(self, data: bytes) -> bool:
        """Whether it leads to new lines."""
        before = self.coverage.n_lines
        self.n_tried += 1
        wrong = try_input(self.target, data, self.coverage)
        if wrong is not None:
            self.failures.append((data, wrong))
        return wrong is None and self.coverage.n_lines > before


def saved_inputs(target: Target) -> list[bytes]:
    """The corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / target.name).glob("*"))]


def _save(folder: Path, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path


def _report(fuzzer: Fuzzer, corpus: str | None) -> None:
    target = fuzzer.target
    for data, wrong in fuzzer.failures:
        path = _save(_FAILURES, data)
        line = " ".join(wrong.split())
        print(f"{line}: python -m experiments.validation.fuzz --target {target.name} "
              f"--seconds 0 --replay {path}")  # fmt: skip
    if corpus is not None:
        for data in fuzzer.found:
            _save(Path(corpus) / target.name, data)
    print(f"{target.name}: {fuzzer.n_tried} inputs, {fuzzer.coverage.n_lines} lines, "
          f"{len(fuzzer.found)} led to new ones, {len(fuzzer.failures)} failed")  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    replayed = [Path(name).read_bytes() for name in args.replay]
    n_failed = 0
    for target in TARGETS:
        if args.target in (None, target.name):
            fuzzer = Fuzzer(target, args.seed, replayed or saved_inputs(target))
            fuzzer.run(args.seconds)
            _report(fuzzer, args.corpus)
            n_failed += len(fuzzer.failures)
    return 1 if n_failed else 0


def _fuzz(seconds: float, seed: int, target: Target) -> Outcome:
    command = [sys.executable, "-m", "experiments.validation.fuzz", "--target", target.name,
               "--seconds", str(seconds), "--seed", str(seed)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=None, check=False)
    require(done.returncode == 0, (done.stdout or done.stderr).strip()[-1500:])
    return Outcome.HARMLESS


def fuzz_probes(scene: Scene) -> Iterator[Probe]:
    """A probe a target: saved inputs, then changed ones."""
    artefacts = {"gguf": "model.gguf", "map": "core.sgmap", "patch": "patch"}
    seconds = scene.effort.fuzz_seconds
    for target in TARGETS:
        yield Probe("hostile", "fuzz", artefacts[target.name], f"{seconds} s, seed {scene.seed}",
                    partial(_fuzz, seconds, scene.seed, target))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.validation.fuzz", description="Try changed files."
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=[target.name for target in TARGETS])
    parser.add_argument("--corpus", metavar="DIR", help="save inputs that led to new lines")
    parser.add_argument("--replay", metavar="FILE", nargs="*", default=[],
                        help="instead of the saved inputs")  # fmt: skip
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
