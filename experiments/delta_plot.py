"""The size of a patch against the time to make it, a marker a tool, a panel a pair of models."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.cases import OURS
from experiments.delta_report import Row, by_pair
from forge.errors import GGUFShardError
from forge.sizes import format_bytes

# The colour-blind safe colours of M. Okabe and K. Ito, "Color Universal Design" (2008): ours blue.
_OURS_STYLES = (("o", "#0072B2"), ("s", "#56B4E9"), ("P", "#0072B2"))
_PEER_STYLES = (("^", "#D55E00"), ("v", "#E69F00"), ("D", "#009E73"), ("X", "#CC79A7"))
_COLUMNS = 3


def plot_patches(rows: Sequence[Row], path: str | os.PathLike[str], title: str) -> None:
    """Draw patch sizes in % of the target against seconds to create; down and left is better.

    Parameters
    ----------
    rows
        Rows of `experiments.exp_delta`; those that were not validated are left out.
    path
        The image to write; its suffix decides the format.
    title
        Above the panels.

    Raises
    ------
    GGUFShardError
        If no row can be drawn.
    """
    pairs = by_pair([row for row in rows if row["validated"]])
    if not pairs:
        raise GGUFShardError(f"{path}: no patch to be drawn")
    styles = _styles([tool for tools in pairs.values() for tool in tools])
    n_rows = math.ceil(len(pairs) / _COLUMNS)
    figure = Figure(figsize=(12.5, 1.4 + 3.6 * n_rows), layout="constrained")
    figure.suptitle(textwrap.fill(title, 120), fontsize=9)
    panels = figure.subplots(n_rows, _COLUMNS, squeeze=False).ravel()
    handles: dict[str, Artist] = {}
    for axes, ((pair, n_bytes), tools) in zip(panels, pairs.items(), strict=False):
        handles |= _panel(axes, tools, n_bytes, styles)
        axes.set_title(f"{pair}, {format_bytes(n_bytes)}", fontsize=10)
        axes.set_xlabel("seconds to create", fontsize=9)
        axes.set_ylabel("patch, % of the target", fontsize=9)
    for axes in panels[len(pairs) :]:
        axes.set_axis_off()
    order = [*styles, "limit"]
    names = sorted(handles, key=order.index)
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center",
        ncols=min(len(names), 8), fontsize=9,
    )  # fmt: skip
    figure.savefig(path, dpi=110)


def _styles(tools: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Marker and colour of each tool, ours first."""
    names = dict.fromkeys(tools)
    ours = [name for name in names if name.startswith(OURS)]
    peers = [name for name in names if name not in ours]
    styles = dict(zip(ours, cycle(_OURS_STYLES), strict=False))
    return styles | dict(zip(peers, cycle(_PEER_STYLES), strict=False))


def _panel(
    axes: Axes,
    tools: Mapping[str, Mapping[str, Row]],
    n_bytes: int,
    styles: Mapping[str, tuple[str, str]],
) -> dict[str, Artist]:
    """Draw a pair; returns what stands for whom."""
    handles: dict[str, Artist] = {}
    sizes, seconds, limit = [], [], None
    for tool, quantities in tools.items():
        marker, colour = styles[tool]
        sizes.append(100 * quantities["patch"]["median"] / n_bytes)
        seconds.append(quantities["create"]["median"])
        limit = quantities["patch"]["limit"]
        (handles[tool],) = axes.plot(
            seconds[-1:], sizes[-1:], linestyle="none", marker=marker, markersize=9,
            color=colour, markeredgecolor="black", markeredgewidth=0.6,
        )  # fmt: skip
    if limit is not None:
        least = 100 * limit / n_bytes
        sizes.append(least)
        handles["limit"] = axes.axhline(least, color="#444444", linestyle=":", linewidth=1.6)
    axes.set(xscale="log", yscale="log", xlim=_range(seconds), ylim=_range(sizes))
    for axis, values in ((axes.xaxis, seconds), (axes.yaxis, sizes)):
        is_wide = max(values) > 100 * min(values)
        axis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    return handles


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis, a decade apart at least: what is nearly level looks so."""
    low, high = min(values) / 1.5, max(values) * 1.5
    wider = max(1.0, math.sqrt(10 * low / high))
    return low / wider, high * wider
