"""The best of several runs, by a clock that the runs themselves put forward."""

from __future__ import annotations

import pytest

from experiments import machine_limits
from experiments.machine_limits import Best, best_seconds


@pytest.mark.parametrize(
    "seconds, best",
    [
        pytest.param([9, 3, 1, 2], 1, id="three runs, if they are long"),
        pytest.param([0.01, 0.2, 0.125, 0.1, 0.05, 0.025], 0.025, id="half a second's worth"),
        pytest.param([0.01, 0.4, 0.04, 0.05, 0.06], 0.04, id="not only the last"),
    ],
)
def test_the_fastest_run_counts(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], best: float
) -> None:
    """And never the first, which warms up."""
    now, left = [0.0], [*seconds, 7.0]
    monkeypatch.setattr(machine_limits.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += left.pop(0)

    assert best_seconds(work) == pytest.approx(best)
    assert left == [7.0]


def test_the_best_of_all_calls_counts() -> None:
    figures = iter([3.0, 5.0, 4.0])
    best = Best(lambda: next(figures))
    assert [best(), best(), best()] == [3, 5, 5]
