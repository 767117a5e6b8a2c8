"""Processes that are forked to be killed, interrupted, or kept short of something.

A child does what a command does: one line on stderr and exit code 1 if it fails. It is forked, not
started: compiled code is there already. Nothing of it runs on Numba's own threads, which a fork
does not survive; the threads of a pool are the child's own.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from experiments.validation.probe import Missed, Outcome, Unavailable
from forge.command import run_command

_TIMEOUT = 60  # seconds: a child that hangs, not a slow machine
_TRACEBACK, _MISSED, _UNAVAILABLE = 70, 71, 72


@dataclass(frozen=True)
class Ended:
    """How a child came to its end.

    Attributes
    ----------
    status
        Its exit code, or less than 0: the signal that killed it.
    said
        What it wrote to stderr.
    """

    status: int
    said: str


class Child:
    """A forked process that does some work; it MUST be waited for.

    Parameters
    ----------
    work
        What to do.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        # A pipe: what may not write files can still say so.
        self._said, write_end = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, write_end)
        os.close(write_end)

    def _run(self, work: Callable[[], object], write_end: int) -> None:
        """Do the work and end this process."""

        is_working = False

        def run(_: argparse.Namespace) -> int:
            nonlocal is_working
            is_working = True
            work()
            is_working = False
            return 0

        code = _TRACEBACK
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(write_end, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            code = run_command(argparse.Namespace(run=run))
        except KeyboardInterrupt:
            if is_working:  # not before or behind all that a command does
                traceback.print_exc()
            elif code == _TRACEBACK:
                print("interrupted", file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Its end.

        Raises
        ------
        Missed
            If it does not come to one.
        """
        deadline = time.monotonic() + _TIMEOUT
        with os.fdopen(self._said, "rb") as pipe:
            while True:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    break
                if time.monotonic() > deadline:
                    self.kill()
                    os.waitpid(self.pid, 0)
                    raise Missed(f"hangs: no end within {_TIMEOUT} s")
                time.sleep(5e-4)
            said = pipe.read().decode(errors="replace")
        return Ended(os.waitstatus_to_exitcode(status), said)


def check_in_child(check: Callable[[], Outcome]) -> Outcome:
    """A probe's check in a process of its own, for what cannot be taken back in this one."""

    def work() -> None:
        try:
            print(check().name, file=sys.stderr)
        except Missed as error:
            print(error, file=sys.stderr)
            os._exit(_MISSED)
        except Unavailable as error:
            print(error, file=sys.stderr)
            os._exit(_UNAVAILABLE)

    ended = Child(work).wait()
    said = ended.said.strip()
    if ended.status == _UNAVAILABLE:
        raise Unavailable(said)
    if ended.status != 0:
        raise Missed(said or f"the process ended with {ended.status}")
    return Outcome[said.splitlines()[-1]]
