"""The validation suite: does this machine, with this installation, lose nothing and let nobody in?

    python experiments/comprehensive_validation_suite.py [--quick|--full] [--only SECTION,...]
                                                         [--json FILE] [--seed N]
                                                         [--seconds N] [--minutes N]

    integrity    right input: every path gives the right bytes, at once and side by side
    chaos        damage, failing system calls, kills, no memory, no room: old or new, never a third
    hostile      malformed files of every kind, and fuzzing: refused in one line, in bounded time
    throughput   how fast, beside what the machine itself does
    soak         with `--minutes`: run, damage, repair, update, again and again

It ends with a table of what was injected and what came of it, and with exit code 1 if anything was
missed. See `experiments.validation.probe` for what the words mean.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script from the project's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.validation.probe import Probe
from experiments.validation.scene import Scene

Probes = Callable[[Scene], Iterator[Probe]]
