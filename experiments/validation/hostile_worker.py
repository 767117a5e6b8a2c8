"""A small server that runs commands in forked children and tells what each one took.

    python -m experiments.validation.hostile_worker

Modules are imported and loops compiled once, so that a child's seconds and bytes are those of the
command alone. A request is one line of JSON on stdin, `{"folder": F, "steps": [{"arguments": [...],
"needs": i}, ...]}`, and is answered by one line on stdout: a list of what came of each step, the
fields of `Outcome` of `experiments.validation.hostile`. A step runs only if the one it needs went
through.

A child cannot grow by more than 2 GiB, and a step ends after 10 seconds: a file that does its worst
must not hurt the machine. Its peak is the resident set that it reaches above the one that it starts
with; a process that is forked counts its parent's present memory, not its parent's peak.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from atlas.cli import main as command
from experiments.validation import gguf_factory as factory
from experiments.validation.hostile_llama import LlamaKind, llama
from experiments.validation.hostile_patches import material

_ROOM = 2 << 30
_PATIENCE_SECONDS = 10.0
_MOST_FILE_BYTES = 1 << 28
_SHOWN_BYTES = 1 << 16


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of the last change of everything below a folder, by name."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        state = (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
        entries[str(path.relative_to(folder))] = (status.st_mode, *state)
    return entries


def _status(field: str) -> int:
    """Bytes of memory that Linux counts for this process; 0 elsewhere."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(text.split(f"{field}:")[1].split()[0]) << 10


def _peak_bytes(*, restart: bool = False) -> int:
    """Largest resident set so far; with `restart`, Linux counts from here."""
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _call(arguments: list[str]) -> int:
    """The command's exit code; what would be a traceback is printed as one, with code 70."""
    try:
        return command(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70


def _captured(arguments: list[str], out: IO[bytes], err: IO[bytes]) -> dict[str, Any]:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    before_bytes, before_seconds = _peak_bytes(restart=True), _cpu_seconds()
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE_SECONDS)
    code = _call(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    signal.setitimer(signal.ITIMER_REAL, 0)
    facts: dict[str, Any] = {
        "code": code,
        "seconds": _cpu_seconds() - before_seconds,
        "grown_bytes": _peak_bytes() - before_bytes,
    }
    for name, file in (("out", out), ("err", err)):
        file.seek(0)
        facts[name] = file.read(_SHOWN_BYTES).decode("utf-8", "replace")
    return facts


def _run_step(folder: Path, arguments: list[str]) -> dict[str, Any]:
    before = snapshot(folder)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        facts = _captured(arguments, out, err)
    after = snapshot(folder)
    names = sorted(before.keys() | after.keys())
    facts["changed"] = [name for name in names if before.get(name) != after.get(name)]
    return facts


def _be_child(request: dict[str, Any], answers: int) -> None:
    """Do the steps; write a line of JSON about each."""
    if _status("VmSize"):
        room = _status("VmSize") + _ROOM
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_FILE_BYTES, _MOST_FILE_BYTES))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails instead
    folder = Path(request["folder"])
    os.chdir(folder)
    went_through: list[bool] = []
    for step in request["steps"]:
        needs = step["needs"]
        facts: dict[str, Any] | None = None
        if needs is None or went_through[needs]:
            facts = _run_step(folder, step["arguments"])
        went_through.append(facts is not None and facts["code"] == 0)
        os.write(answers, (json.dumps(facts) + "\n").encode())


def serve_one(request: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Run the steps of a request in a child; None for one that was not run.

    Where the child died, the last answer says so: {"died": signal}.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            _be_child(request, write_end)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answers = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    if status:
        answers.append({"died": -os.waitstatus_to_exitcode(status)})
    return answers


def _warm_up() -> None:
    """Import what commands import late, and compile or load their loops."""
    import atlas.run_command  # noqa: F401

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama_model = factory.write(folder / "llama.gguf", llama(LlamaKind("", "")))
        right = material()  # of all modes
        other = [str(factory.write(folder / "base.gguf", right.base)),
                 str(factory.write(folder / "modes", right.data()))]  # fmt: skip
        run = ["--prompt-ids", "1,2", "-n", "2", "--target", "cpu", "--json"]
        model = str(factory.write(folder / "small.gguf", factory.small_model()))
        newer = str(factory.write(folder / "newer.gguf", factory.newer_small_model()))
        shard_map, patch = str(folder / "core.sgmap"), str(folder / "patch")
        # Held against it every page of every type has changed, and not all at random.
        blank = [replace(tensor, data=bytes(len(tensor.data)))
                 for tensor in factory.small_tensors()]  # fmt: skip
        zeros = str(factory.write(folder / "zeros.gguf", factory.gguf(blank)))
        for arguments in (
            ["info", model],
            ["shard", model, "-o", name],
            ["verify", shard_map],
            ["restore", shard_map, "-o", f"{name}/back.gguf"],
            ["diff", model, newer, "-o", patch, "--reversible"],
            ["apply", model, patch, "-o", f"{name}/made.gguf"],
            ["apply", shard_map, patch, "--in-place"],
            ["diff", zeros, newer, "-o", f"{name}/of-zeros"],
            ["apply", *other, "-o", f"{name}/modes.gguf"],
            ["shard", str(llama_model), "-o", name, "--force"],
            ["run", shard_map, *run],
        ):
            quiet = [] if arguments[0] == "info" else ["-q"]
            if _call([*arguments, *quiet]):
                raise SystemExit(f"cannot {arguments[0]} a right model")


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what commands print
    _warm_up()
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
