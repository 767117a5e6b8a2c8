"""What came of a fault is told as it is, and trouble of any kind is a miss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from experiments.validation.probe import (
    Matrix,
    Missed,
    Outcome,
    Probe,
    Unavailable,
    refused,
    require,
    run_probe,
)
from forge.errors import GGUFShardError


def probe(check: Callable[[], Outcome], fault: str = "bit flip") -> Probe:
    return Probe("chaos", fault, "core.gguf", "byte 7", check)


def raising(error: BaseException) -> Callable[[], Outcome]:
    def check() -> Outcome:
        raise error

    return check


@pytest.mark.parametrize(
    ("check", "outcome", "reason"),
    [
        (lambda: Outcome.DETECTED, Outcome.DETECTED, ""),
        (lambda: Outcome.HARMLESS, Outcome.HARMLESS, ""),
        (raising(Missed("wrong bytes")), Outcome.MISSED, "wrong bytes"),
        (raising(Unavailable("no GPU")), Outcome.UNAVAILABLE, "no GPU"),
        (raising(GGUFShardError("nobody expected it")), Outcome.MISSED, "nobody expected it"),
        (raising(IndexError("out of range")), Outcome.MISSED, "IndexError: out of range"),
        (raising(MemoryError()), Outcome.MISSED, "MemoryError"),
    ],
)
def test_outcomes(check: Callable[[], Outcome], outcome: Outcome, reason: str) -> None:
    result = run_probe(probe(check))
    assert result.outcome is outcome and reason in result.reason


def test_an_interrupt_is_no_outcome() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_probe(probe(raising(KeyboardInterrupt())))


def test_a_refusal_is_one_line() -> None:
    def refuse(error: Exception) -> Callable[[], object]:
        def work() -> object:
            raise error

        return work

    assert refused(lambda: None) is None
    assert refused(refuse(GGUFShardError("a: b"))) == "a: b"
    assert refused(refuse(PermissionError(13, "Permission denied"))) is not None
    for text in ("", "two\nlines"):
        with pytest.raises(Missed, match="not one line"):
            refused(refuse(GGUFShardError(text)))
    with pytest.raises(ZeroDivisionError):
        refused(lambda: 1 // 0)


def test_require() -> None:
    require([0], "is true")
    with pytest.raises(Missed, match="is empty"):
        require([], "is empty")


def test_matrix_counts() -> None:
    def probes() -> Iterator[Probe]:
        yield probe(lambda: Outcome.DETECTED)
        yield probe(lambda: Outcome.HARMLESS)
        yield probe(raising(Missed("wrong")))
        yield probe(raising(Unavailable("no disk")), "disk full")
        raise ValueError("the tool is broken")

    matrix = Matrix()
    matrix.run("chaos", probes())
    assert [matrix.total(outcome) for outcome in Outcome] == [1, 1, 2, 1]
    assert [result.reason.partition(" (")[0] for result in matrix.misses] == [
        "wrong",
        "ValueError: the tool is broken",
    ]
    assert matrix.unavailable == {"disk full, core.gguf": "no disk"}
    first, second, third = matrix.rows()
    assert (first["injected"], first["detected"], first["harmless"], first["MISSED"]) == (
        3,
        1,
        1,
        1,
    )
    assert (second["fault"], second["injected"]) == ("disk full", 0)
    assert third["artefact"] == "suite" and third["MISSED"] == 1
    assert matrix.seconds["chaos"] >= 0
