"""Tables and plots from fixture rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from experiments import report
from experiments.report import (
    BEGIN,
    END,
    goal_lines,
    insert_table,
    markdown_table,
    of_peer,
)
from forge.errors import GGUFShardError
from tests.experiments.delta_rows import tool_rows


def row(**changes: Any) -> dict[str, Any]:
    return {
        "case": "decode",
        "variant": "gguf-shard",
        "params": {"model": "random 1b Q8_0", "threads": 2},
        "median": 9.0,
        "p20": 8.5,
        "p80": 9.25,
        "n": 7,
        "unit": "tokens/s",
        "better": "higher",
        "limit": 12.0,
        "limit_by": "memory",
        "fraction_of_limit": 0.75,
        "validated": True,
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2026-01-02",
        "seed": 0,
        "host": {"cpu": "Some CPU", "cores": 2},
        "gpu": None,
        "driver": None,
        "versions": {"python": "3.11.7", "numpy": "2.4.0", "numba": "0.68.1", "llvmlite": "0.48"},
    } | changes


PEER = row(variant="llama.cpp", median=10.0, fraction_of_limit=10 / 12)
WRONG = row(case="crc32", params={}, validated=False, median=None, p20=None, p80=None, n=0,
            fraction_of_limit=None)  # fmt: skip


def test_markdown_table() -> None:
    lines = markdown_table([row(), PEER, WRONG]).splitlines()
    assert lines[0] == "| case | variant | median | p20 to p80 | limit | of limit | of peer |"
    assert lines[2] == (
        "| decode: random 1b Q8_0, 2 threads | gguf-shard | 9 tokens/s | 8.5 to 9.25 "
        "| 12 tokens/s (memory) | 75 % | 0.90 |"
    )
    assert "| llama.cpp | 10 tokens/s |" in lines[3] and lines[3].endswith("| 83 % |  |")
    assert lines[4] == "| crc32 | gguf-shard | wrong result |  |  |  |  |"
    assert lines[-1] == (
        "Some CPU, 2 cores; Python 3.11.7, NumPy 2.4.0, Numba 0.68.1; commit 0123456; 2026-01-02."
    )


def test_text_table_is_aligned() -> None:
    lines = report.text_table([row(), PEER]).splitlines()
    assert len({line.index(name) for line, name in zip(
        lines, ("variant", "gguf-shard", "llama.cpp"), strict=True)}) == 1  # fmt: skip


def test_peers_are_compared_within_case_and_params() -> None:
    other = row(variant="llama.cpp", params={"model": "another"}, median=1.0)
    assert of_peer(row(), [row(), other]) is None
    assert of_peer(row(), [row(), other, PEER]) == pytest.approx(0.9)
    assert of_peer(PEER, [row(), PEER]) is None
    slow = row(better="lower", median=2.0)
    assert of_peer(slow, [slow, row(variant="cp", better="lower", median=1.0)]) == 0.5
    assert of_peer(row(), [row(), PEER | {"validated": False}]) is None


def test_goals_are_said_to_be_reached_or_missed() -> None:
    rows = [
        row(), PEER, row(case="gpu-crc32"), row(case="gpu-crc32", variant="zlib, one thread"),
        row(case="shard"), row(case="shard", variant="cp + sha256sum", median=100.0),
        row(case="verify", unit="GB/s", median=2.5),
        row(case="budget-rss-overhead", variant="pin", unit="MB", median=400.0, better="lower"),
        row(case="swap"),
    ]  # fmt: skip
    verdicts = goal_lines(rows)
    assert [line.rsplit(": ", 1)[1] for line in verdicts] == [
        "reached", "missed", "reached", "missed", "reached",  # the last: GPU's CRC32, not zlib's
    ]  # fmt: skip
    assert "0.90 of the peer, goal 0.8" in verdicts[0]
    assert "400 MB, goal at most 350" in verdicts[3]


def test_dirty_sources_and_several_dates_are_told() -> None:
    line = report.provenance([row(), row(dirty=True, date="2026-01-05", commit=None)])
    assert "commit 0123456, unknown with changes; 2026-01-02 to 2026-01-05" in line


def test_insert_keeps_what_is_around() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = insert_table(text, "| new |", "README.md")
    assert once == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
    assert insert_table(once, "| new |", "README.md") == once


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_insert_wants_its_markers(text: str) -> None:
    with pytest.raises(GGUFShardError, match=r"README\.md: want one line"):
        insert_table(text, "", "README.md")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "box"
    folder.mkdir()
    (folder / "decode.json").write_text(json.dumps([row(), PEER]))
    readme, image = tmp_path / "README.md", tmp_path / "plot.png"
    readme.write_text(f"# Title\n{BEGIN}\n{END}\n")
    command = ["--machine", "box", "--results", str(tmp_path)]
    assert report.main(command) == 0
    assert "| 9 tokens/s |" in capsys.readouterr().out
    assert report.main([*command, "--write", str(readme), "--plot", str(image)]) == 0
    assert "| 9 tokens/s |" in readme.read_text()
    assert imread(image).std() > 0.05

    assert report.main(["--machine", "none", "--results", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err
    (folder / "decode.json").write_text("[")
    assert report.main(command) == 1
    assert "decode.json: no JSON rows" in capsys.readouterr().err


def test_patches_have_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, readme = tmp_path / "box", tmp_path / "README.md"
    folder.mkdir()
    (folder / "decode.json").write_text(json.dumps([row(), PEER]))
    command = ["--machine", "box", "--results", str(tmp_path), "--write", str(readme)]
    readme.write_text(f"{BEGIN}\n{END}\nand\n<!-- results:delta -->\n{END}\n")
    assert report.main([*command, "--table", "delta"]) == 1
    assert "no rows for the table delta" in capsys.readouterr().err

    patches = tool_rows("noise", "gguf-shard", (20e6, 0.5, 0.2, 300, 200))
    (folder / "delta-patch.json").write_text(json.dumps(patches))
    image = tmp_path / "plot.png"
    assert report.main([*command, "--table", "delta", "--plot", str(image)]) == 0
    assert "create 200 MB/s, goal at least 300: missed" in capsys.readouterr().err
    assert imread(image).std() > 0.02
    assert report.main(command) == 0
    cpu, _, delta = readme.read_text().partition("\nand\n")
    assert "| 9 tokens/s |" in cpu and "noise" not in cpu
    assert "| noise, 100.00 MB | gguf-shard | 20,000,000 |" in delta and "tokens" not in delta


def test_a_plot_needs_a_limit(tmp_path: Path) -> None:
    with pytest.raises(GGUFShardError, match="no timed row has a limit"):
        report.plot_fractions([WRONG], tmp_path / "p.png")
