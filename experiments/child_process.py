"""A command in a process of its own: its time, its peak memory, what it printed.

The peak is `ru_maxrss` of `wait4`, which counts pages of mapped files as well as memory of its own.
A process started from a large one counts the large one's memory as its own peak, until it has more
itself: Linux carries `ru_maxrss` through exec. So a small process stands between, whose own ten
megabytes are the least that can be told.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from forge.errors import GGUFShardError

_LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
try:
    child = subprocess.Popen(sys.argv[1:])
except OSError as error:
    sys.exit(f"cannot be started: {error.strerror}")
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - started
peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
if status:
    code = os.waitstatus_to_exitcode(status)
    sys.exit(f"exit code {code}" if code > 0 else f"ended by signal {-code}")
print()
print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes}))
"""


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes
    ----------
    seconds
        From before its start until after its end.
    peak_bytes
        Its largest resident set.
    output
        What it wrote to stdout.
    """

    seconds: float
    peak_bytes: int
    output: str


def run_measured(command: Sequence[str]) -> Usage:
    """Run a command to its end.

    Raises
    ------
    GGUFShardError
        If it fails, with its exit code or signal and the last line that it wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        *said, end = done.stderr.strip().splitlines()
        raise GGUFShardError(f"{command[0]}: {': '.join([*said[-1:], end])}")
    output, _, facts = done.stdout.rstrip("\n").rpartition("\n")
    return Usage(**json.loads(facts), output=output)
