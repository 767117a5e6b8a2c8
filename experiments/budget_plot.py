"""Speed, traffic and hits against the budget, with theory drawn in as lines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.budget_runs import BudgetRun, Theory

# Two of the colour-blind safe colours of M. Okabe and K. Ito, "Color Universal Design" (2008).
_COLOURS = {"lru": "#D55E00", "pin": "#0072B2"}
_MARKERS = {"lru": "o", "pin": "s"}


def plot_budgets(
    runs: Sequence[BudgetRun],
    theories: Mapping[str, Theory],
    path: str | os.PathLike[str],
    title: str,
) -> None:
    """Draw runs as points and the closed forms as lines, one panel a quantity.

    Parameters
    ----------
    runs
        Runs of the policies in `theories`.
    theories
        The closed forms, by policy.
    path
        The image to write; its suffix decides the format.
    title
        Above the panels.
    """
    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    figure.suptitle(title)
    speed, traffic, hits = figure.subplots(1, 3)
    _panel(speed, runs, theories, "tokens_per_second", "limit", 1.0, "limit")
    speed.set(title="Speed", ylabel="tokens/s", yscale="log")
    _panel(traffic, runs, theories, "bytes_per_token", "bytes_per_token", 1e-6, "closed form")
    traffic.set(title="Traffic", ylabel="MB moved per token", ylim=(-0.05 * _top(traffic), None))
    _panel(hits, runs, theories, "reuse", "reuse", 100.0, "closed form")
    theory = next(iter(theories.values()))
    hits.plot(
        100 * theory.budget, 100 * theory.belady, color="#444444", linestyle=":", linewidth=1.6,
        label="Belady's MIN, C/N",
    )  # fmt: skip
    hits.set(title="Reuse hits", ylabel="% of accesses", ylim=(-5, 105))
    for axes in (speed, traffic, hits):
        axes.set(xlabel="budget, % of the model's pages", xlim=(0, 105))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8.5)
    figure.savefig(path, dpi=110)


def _panel(
    axes: Axes,
    runs: Sequence[BudgetRun],
    theories: Mapping[str, Theory],
    measured: str,
    expected: str,
    scale: float,
    expected_label: str,
) -> None:
    for policy, theory in theories.items():
        colour = _COLOURS[policy]
        axes.plot(
            100 * theory.budget, scale * getattr(theory, expected), color=colour,
            linestyle="--", linewidth=1.2, label=f"{policy}, {expected_label}",
        )  # fmt: skip
        fill = colour if policy == "lru" else "none"  # one may lie on the other
        mine = [run for run in runs if run.policy == policy]
        axes.plot(
            [100 * run.budget for run in mine], [scale * getattr(run, measured) for run in mine],
            linestyle="none", marker=_MARKERS[policy], markersize=7, color=colour,
            markerfacecolor=fill, label=f"{policy}, measured",
        )  # fmt: skip


def _top(axes: Axes) -> float:
    return float(axes.get_ylim()[1])
