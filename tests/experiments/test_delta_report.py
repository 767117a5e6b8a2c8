"""The table of patches, and the goals."""

from __future__ import annotations

from typing import Any

from experiments.delta_report import by_pair, delta_cells, delta_verdicts, is_delta
from tests.experiments.delta_rows import tool_rows

OURS = tool_rows(
    "noise", "gguf-shard", (20e6, 0.5, 0.2, 300, 200),
    limits={"patch": 18e6, "create": 0.05, "apply": 0.1},
)  # fmt: skip
SMALL = tool_rows("noise", "bsdiff", (19e6, 30.0, 1.0, 1700, 200), limits={"patch": 18e6})
LARGE = tool_rows("noise", "zstd -1", (80e6, 1.0, 0.25, 180.4, 130))
WRONG = tool_rows("noise", "xdelta3", (0, 0, 0, 0, 0), validated=False)


def test_rows_of_other_experiments_are_left_out() -> None:
    other: dict[str, Any] = {**OURS[0], "case": "decode"}
    assert not is_delta(other) and all(map(is_delta, OURS))
    assert by_pair([other]) == {}
    assert list(by_pair([other, *OURS])) == [("noise", 10**8)]


def test_table() -> None:
    head, *lines = delta_cells([*OURS, *SMALL, *WRONG])
    assert head[:4] == ("pair", "tool", "patch, bytes", "% of target")
    assert {len(line) for line in lines} == {len(head)}
    assert lines[0] == (
        "noise, 100.00 MB", "gguf-shard", "20,000,000", "20", "0.5", "200", "0.2", "500",
        "300", "200",
    )  # fmt: skip
    assert lines[1][1:6] == ("bsdiff", "19,000,000", "19", "30", "3.33")
    assert lines[2][1:] == ("xdelta3", "no result", *[""] * 7)
    assert lines[3][1:] == (
        "limit", "18,000,000", "18", "0.05", "2000", "0.1", "1000", "", "",
    )  # fmt: skip
    assert len(lines) == 4


def test_sizes_and_pairs_are_kept_apart() -> None:
    rows = [
        *OURS, *tool_rows("noise", "gguf-shard", (1, 1, 1, 1, 1), n_bytes=4000),
        *tool_rows("pages", "gguf-shard", (1, 1, 1, 1, 1)),
    ]  # fmt: skip
    labels = [line[0] for line in delta_cells(rows)[1:]]
    assert labels == ["noise, 100.00 MB"] * 2 + ["noise, 4.00 kB", "pages, 100.00 MB"]


def test_verdicts_against_the_smallest_peer() -> None:
    lines = delta_verdicts([*LARGE, *OURS, *SMALL, *WRONG])
    assert lines == [
        "noise, 100.00 MB, gguf-shard: " + text
        for text in (
            "patch 20 % of the target, goal at most 32: reached",
            "create 200 MB/s, goal at least 300: missed",
            "apply 500 MB/s, goal at least 500: reached",
            "patch 1.05 times the smallest peer's (bsdiff, 20,000,000 to 19,000,000 bytes), "
            "goal at most 1.05: missed",
            "created 60 times as fast as by bsdiff, goal at least 3: reached",
        )
    ]


def test_verdicts_of_other_variants() -> None:
    command = tool_rows("noise", "gguf-shard command", (20e6, 15.0, 0.2, 300, 200))
    (speed,) = delta_verdicts([*command, *SMALL])  # the size is the library's
    assert speed.endswith("created 2 times as fast as by bsdiff, goal at least 3: missed")
    pair = "tales7M-ft-last2-f16"
    best = tool_rows(pair, "gguf-shard level 22", (15.4e6, 1, 1, 1, 1))
    (size,) = delta_verdicts(best)
    assert size.endswith("level 22: patch 15.4 % of the target, goal at most 15.3: missed")
    same = delta_verdicts(tool_rows("identical", "gguf-shard", (2000, 0.1, 0.1, 1, 1)))
    assert same[0].endswith("patch 2000 bytes, goal at most 2000: reached")


def test_verdict_on_memory() -> None:
    for peaks, word in (((399, 400), "reached"), ((401, 100), "missed"), ((1, 401), "missed")):
        (line,) = delta_verdicts(tool_rows("large", "gguf-shard command", (1, 1, 1, *peaks)))
        assert f"peak memory {max(peaks)} MB" in line and line.endswith(word)


def test_wrong_results_have_no_verdict() -> None:
    wrong = tool_rows("noise", "gguf-shard", (0, 0, 0, 0, 0), validated=False)
    assert delta_verdicts([*wrong, *SMALL]) == []
