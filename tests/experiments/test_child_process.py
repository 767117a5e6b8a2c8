"""Commands in processes of their own: output, time, memory, failure."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from experiments.child_process import run_measured
from forge.errors import GGUFShardError


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.mark.parametrize("text", ["", "one", "one\n", "one\ntwo"])
def test_output_is_kept(text: str) -> None:
    usage = run_measured(python(f"print({text!r}, end='')"))
    assert usage.output.strip("\n") == text.strip("\n")


def test_time_is_that_of_the_command() -> None:
    assert run_measured(python("import time; time.sleep(0.2)")).seconds >= 0.2


def test_memory_is_that_of_the_command_alone() -> None:
    held = np.ones(200 << 20, np.uint8)  # ours, and not the command's
    small, large = (run_measured(python(f"bytearray({n} << 20)")) for n in (0, 100))
    assert small.peak_bytes < 60 << 20 < held.nbytes
    assert 95 << 20 < large.peak_bytes - small.peak_bytes < 105 << 20


def test_a_failure_is_told_by_its_last_line() -> None:
    code = "import sys; print('out'); print('first\\nlast', file=sys.stderr); sys.exit(3)"
    with pytest.raises(GGUFShardError, match=r"^[^\n]*: last: exit code 3$"):
        run_measured(python(code))
    with pytest.raises(GGUFShardError, match=r"python[^:]*: exit code 1$"):
        run_measured(python("import os; os._exit(1)"))
    with pytest.raises(GGUFShardError, match=r"python[^:]*: ended by signal 9$"):
        run_measured(python("import os; os.kill(os.getpid(), 9)"))


def test_a_missing_program_is_told() -> None:
    with pytest.raises(
        GGUFShardError, match=r"^no-such-program: cannot be started: No such file[^:]*$"
    ):
        run_measured(["no-such-program"])
