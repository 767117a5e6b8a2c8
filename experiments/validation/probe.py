"""Probes: one fault put into one artefact, and what came of it.

    DETECTED   whoever read the artefact refused it in one line, and nothing was lost
    HARMLESS   every result was right all the same, bit for bit
    MISSED     a wrong result, a traceback, a loss, or a limit broken: the tool has failed

A probe's `check` does all of it: makes the fault, uses the tool, and looks at what it left. It
returns DETECTED or HARMLESS, raises `Missed` with the reason, or `Unavailable` where the machine
cannot do what the probe needs. Any other exception is a miss, too: foreseeable trouble is told as
`GGUFShardError`, and who expects one says so with `refused`.
"""

from __future__ import annotations

import enum
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from forge.errors import GGUFShardError


class Outcome(enum.Enum):
    """What came of a fault."""

    DETECTED = "detected"
    HARMLESS = "harmless"
    MISSED = "MISSED"
    UNAVAILABLE = "not possible here"


class Missed(Exception):
    """The tool let a fault through; the text says how."""


class Unavailable(Exception):
    """This machine cannot put the probe's question; the text says why."""


@dataclass(frozen=True)
class Probe:
    """A fault in an artefact.

    Attributes
    ----------
    section
        Part of the suite: "integrity", "chaos" or "hostile".
    fault
        What is done, as the table's row; the same for probes of one kind.
    artefact
        To what, as the table's column.
    place
        Which one of its kind: an offset, a page, a moment.
    check
        Does it, and says what came of it.
    """

    section: str
    fault: str
    artefact: str
    place: str
    check: Callable[[], Outcome]


def refused(work: Callable[[], object]) -> str | None:
    """The line in which `work` refuses, or None if it goes through.

    Raises
    ------
    Missed
        If what it says is not one line.
    """
    try:
        work()
    except (GGUFShardError, OSError) as error:  # what commands print as one line
        text = str(error)
        if not text or "\n" in text:
            raise Missed(f"not one line: {text!r}") from None
        return text
    return None


def require(holds: object, reason: str) -> None:
    """Raise `Missed` with a reason unless something holds."""
    if not holds:
        raise Missed(reason)


@dataclass(frozen=True)
class Result:
    """What came of one probe, and why if there is something to say."""

    probe: Probe
    outcome: Outcome
    reason: str = ""


def run_probe(probe: Probe) -> Result:
    """Put a probe's question."""
    try:
        return Result(probe, probe.check())
    except Missed as error:
        return Result(probe, Outcome.MISSED, str(error))
    except Unavailable as error:
        return Result(probe, Outcome.UNAVAILABLE, str(error))
    except Exception as error:  # a traceback for a user
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}:{frame.lineno}"
        return Result(probe, Outcome.MISSED, f"{type(error).__name__}: {error} ({where})")


def _or_failure(section: str, probes: Iterator[Probe]) -> Iterator[Probe]:
    """The probes; if they cannot be made, one more, which fails as they did."""
    try:
        yield from probes
    except Exception as error:
        failure = error

        def fail() -> Outcome:
            raise failure

        yield Probe(section, "none: making the faults", "suite", "", fail)


@dataclass
class Matrix:
    """Outcomes of all probes, by section, fault and artefact."""

    counts: dict[tuple[str, str, str], Counter[Outcome]] = field(default_factory=dict)
    misses: list[Result] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, section: str, probes: Iterable[Probe]) -> None:
        """Run the probes of a section and count what comes of them.

        Whoever makes them does what the tool should do first; if that fails, it is a miss.
        """
        started = time.perf_counter()
        for probe in _or_failure(section, iter(probes)):
            self.add(run_probe(probe))
            now = time.perf_counter()
            self.seconds[probe.section] = self.seconds.get(probe.section, 0.0) + now - started
            started = now

    def add(self, result: Result) -> None:
        """Count a result."""
        probe = result.probe
        key = (probe.section, probe.fault, probe.artefact)
        self.counts.setdefault(key, Counter())[result.outcome] += 1
        if result.outcome is Outcome.MISSED:
            self.misses.append(result)
        elif result.outcome is Outcome.UNAVAILABLE:
            self.unavailable[f"{probe.fault}, {probe.artefact}"] = result.reason

    def total(self, outcome: Outcome) -> int:
        """How many probes came out so."""
        return sum(counter[outcome] for counter in self.counts.values())

    def rows(self) -> list[dict[str, Any]]:
        """One flat dictionary for each fault and artefact, in the order they came."""
        return [
            {"section": section, "fault": fault, "artefact": artefact,
             "injected": counter.total() - counter[Outcome.UNAVAILABLE],
             **{outcome.value: counter[outcome] for outcome in Outcome}}
            for (section, fault, artefact), counter in self.counts.items()
        ]  # fmt: skip
