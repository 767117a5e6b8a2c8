"""Budgets of a running model, from nothing to more than there is: the same tokens, or a refusal.

The refusal of one that is too small names the least that works: that works, and a byte less does
not.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

from atlas.cli import main
from experiments.validation.probe import Outcome, Probe, require
from experiments.validation.scene import Scene

_LEAST = re.compile(r"the smallest that works is (\d+) bytes")
_USAGE = 2  # exit code

_TOO_SMALL = ("1", "1B", "0.5kB", "4096")
_WORKING = ("50%", "100%", "64MiB", "1000TB")
_NONSENSE = (
    "0", "0%", "101%", "-1", "-5GB", "1e3", "nan", "inf", "GB", "", " ", "12 parsecs", "1GB2",
    "1" * 40, "\N{ARABIC-INDIC DIGIT FIVE}x",
)  # fmt: skip


def budget_probes(scene: Scene) -> Iterator[Probe]:
    """One for each budget; N is the least that works, as a refusal names it."""
    for text in _TOO_SMALL:
        yield _probe("budget too small", text, partial(_refused, scene, text))
    yield _probe("least budget that works", "N", lambda: _works(scene, str(_least(scene))))
    yield _probe("budget too small", "N - 1", lambda: _refused(scene, str(_least(scene) - 1)))
    for text in _WORKING:
        yield _probe("budget ample or a share", text, partial(_works, scene, text))
    for text in _NONSENSE:
        yield _probe("budget that is none", repr(text), partial(_no_size, scene, text))


def _probe(row: str, place: str, check: Callable[[], Outcome]) -> Probe:
    return Probe("chaos", row, "run", place, check)


def _run(scene: Scene, budget: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a short run."""
    arguments = [
        "run", str(scene.demo_map), "--prompt-ids", "1,403,7", "-n", "4", "--temp", "0",
        "--target", "cpu", "--json", "--ignore-eos", f"--budget={budget}",
    ]  # fmt: skip
    out, said = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as ended:  # a wrong usage
            code = int(ended.code or 0)
    return code, out.getvalue(), said.getvalue()


def _tokens(scene: Scene) -> list[int]:
    """What the model answers with all the memory it can use."""
    code, out, said = _run(scene, "100%")
    require(code == 0, f"does not run: {said}")
    return list(json.loads(out)["tokens"])


def _least(scene: Scene) -> int:
    code, _, said = _run(scene, "1")
    found = _LEAST.search(said)
    require(code == 1 and found, f"does not name the least budget: {said}")
    assert found is not None
    return int(found[1])


def _works(scene: Scene, budget: str) -> Outcome:
    code, out, said = _run(scene, budget)
    require(code == 0 and not said, f"exit code {code}: {said}")
    facts = json.loads(out)
    require(facts["tokens"] == _tokens(scene), "other tokens than with all memory")
    require(facts["device_bytes_peak"] <= facts["budget_bytes"], "more memory than the budget")
    return Outcome.HARMLESS


def _refused(scene: Scene, budget: str) -> Outcome:
    code, out, said = _run(scene, budget)
    require(code == 1 and not out and said.count("\n") == 1, f"exit code {code}: {said}")
    found = _LEAST.search(said)
    require(found and int(found[1]) == _least(scene), f"does not name the least: {said}")
    return Outcome.DETECTED


def _no_size(scene: Scene, budget: str) -> Outcome:
    """As any wrong usage: the last line says what is wrong."""
    code, out, said = _run(scene, budget)
    require(code == _USAGE and not out, f"exit code {code}: {said}")
    last = said.rstrip("\n").splitlines()[-1]
    require("--budget" in last and "size" in last, f"does not say what is wrong: {last}")
    require("Traceback" not in said, said)
    return Outcome.DETECTED
