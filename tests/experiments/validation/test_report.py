"""The table, the JSON and the matrix say what was found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.validation import report
from experiments.validation.probe import Matrix, Outcome, Probe, Result

ROWS = [
    ("integrity", "none: every type", "model.gguf", {Outcome.HARMLESS: 3}),
    ("chaos", "bit flip", "core.sgmap", {Outcome.DETECTED: 1500}),
    ("chaos", "bit flip", "core.gguf", {Outcome.DETECTED: 7, Outcome.HARMLESS: 2}),
    ("chaos", "disk full", "shard", {Outcome.UNAVAILABLE: 1}),
    ("chaos", "kill -9", "apply | diff", {Outcome.DETECTED: 4, Outcome.MISSED: 1}),
]


@pytest.fixture
def matrix() -> Matrix:
    found = Matrix()
    for section, fault, artefact, counts in ROWS:
        probe = Probe(section, fault, artefact, "place 5", lambda: Outcome.DETECTED)
        for outcome, n in counts.items():
            for _ in range(n):
                found.add(Result(probe, outcome, "the reason"))
    return found


def test_text(matrix: Matrix) -> None:
    text = report.text(matrix)
    assert "MISSED: kill -9, apply | diff, place 5: the reason" in text
    assert "not possible here: disk full, shard: the reason" in text
    assert text.endswith(
        "1517 faults injected, 1511 detected, 5 harmless, 1 MISSED; 1 not possible here"
    )
    line = next(line for line in text.splitlines() if "core.gguf" in line)
    assert line.split() == ["chaos", "bit", "flip", "core.gguf", "9", "7", "2"]


def test_not_all_misses_are_listed(matrix: Matrix) -> None:
    matrix.misses *= 50
    text = report.text(matrix)
    assert text.count("MISSED: kill") == 40 and "MISSED: and 10 more" in text


def test_json_and_matrix(
    matrix: Matrix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report.as_json(matrix, [], "full", 3)
    assert (found["injected"], found["detected"], found["MISSED"]) == (1517, 1511, 1)
    assert found["misses"] == [
        {"section": "chaos", "fault": "kill -9", "artefact": "apply | diff", "place": "place 5",
         "reason": "the reason"}
    ]  # fmt: skip
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found))
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "| chaos | core.gguf | core.sgmap |\n| --- | --- | --- |\n" in text
    assert "| bit flip | 7 + 2 | 1,500 |" in text
    assert "| none: every type | 0 + 3 |" in text
    assert "| disk full | n/a |  |" in text
    assert "| kill -9 |  | 4 **1 missed** |" in text
    assert "1,517 faults injected: 1,511 detected, 5 harmless, 1 missed (`--full`, seed 3)." in text
    document = tmp_path / "README.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n<!-- /results -->\nafter\n")
    assert report.main([str(path), "--write", str(document)]) == 0
    written = document.read_text()
    assert written == f"before\n{report.BEGIN}\n{text.rstrip()}\n<!-- /results -->\nafter\n"


def test_what_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    for text in ("", "[]", "{}", '{"rows": 3}'):
        path.write_text(text)
        assert report.main([str(path)]) == 1
        assert capsys.readouterr().err.startswith(f"{path}: not what the suite writes: ")
    assert report.main([str(tmp_path / "missing.json")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_what_was_run_again_counts(matrix: Matrix) -> None:
    first = report.as_json(matrix, [], "full", 0)
    again = Matrix()
    probe = Probe("chaos", "bit flip", "core.gguf", "place 5", lambda: Outcome.DETECTED)
    again.add(Result(probe, Outcome.DETECTED))
    found = report.merged([first, report.as_json(again, [], "full", 0)])
    assert [(row["section"], row["fault"]) for row in found["rows"]] == [
        ("integrity", "none: every type"),
        ("chaos", "bit flip"),
    ]
    assert (found["injected"], found["detected"], found["harmless"], found["MISSED"]) == (
        4,
        1,
        3,
        0,
    )
    assert "4 faults injected" in report.markdown(found)
