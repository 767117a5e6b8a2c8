"""The plot of patches is drawn, with a limit and without."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from experiments.delta_plot import _range, plot_patches
from forge.errors import GGUFShardError
from tests.experiments.delta_rows import tool_rows


def test_plot(tmp_path: Path) -> None:
    rows = [
        row
        for i, tool in enumerate(("gguf-shard", "gguf-shard command", "zstd -1", "bsdiff"))
        for row in tool_rows("noise", tool, (1e6 * (i + 1), 0.1, 1, 1, 1), limits={"patch": 9e5})
    ]
    rows += tool_rows("pages", "gguf-shard", (1e6, 1, 1, 1, 1))
    rows += tool_rows("pages", "bsdiff", (0, 0, 0, 0, 0), validated=False)
    plot_patches(rows, tmp_path / "plot.png", "title")
    image = imread(tmp_path / "plot.png")
    assert image.std() > 0.05
    assert image.shape[1] > 2 * image.shape[0]  # one line of panels


def test_nothing_to_draw(tmp_path: Path) -> None:
    wrong = tool_rows("pages", "bsdiff", (0, 0, 0, 0, 0), validated=False)
    with pytest.raises(GGUFShardError, match="no patch to be drawn"):
        plot_patches(wrong, tmp_path / "plot.png", "title")


@pytest.mark.parametrize("values", [[3.0], [1.0, 1.01], [0.001, 50.0]])
def test_axes_hold_their_values(values: list[float]) -> None:
    low, high = _range(values)
    assert low < min(values) and max(values) < high
    assert high / low >= 9.99
