"""How every command ends: one line for foreseeable trouble, exit code 1, nothing half done."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from typing import Any

from forge.errors import GGUFShardError


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    # ASCII: any terminal takes it, and names in a file may hold bytes that are not UTF-8.
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # A file's name may hold what a terminal would obey.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def run_command(args: argparse.Namespace) -> int:
    """Run `args.run(args)`; returns the exit code.

    Errors that a user can cause (bad input, a full disk, no memory, Ctrl-C) become one line on
    stderr and exit code 1; a reader that went away ends the program quietly.
    """
    if sys.stdout is None:  # closed by whoever started us: nobody reads, which is no error
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may hold what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return int(args.run(args))
    except BrokenPipeError:
        # Whoever read our output has left: keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except MemoryError:
        print("out of memory", file=sys.stderr)
        return 1
    except (GGUFShardError, OSError) as error:
        print(_one_line(error), file=sys.stderr)
        return 1
