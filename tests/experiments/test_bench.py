"""The measuring harness: statistics, turns, validation, and what it refuses to write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numba
import pytest

from experiments import bench
from experiments.bench import Case, Variant, measure, record, write_rows
from forge.errors import GGUFShardError

CASE = Case("speed", "GB/s", {"size": 3})
KEYS = {
    "case", "variant", "params", "median", "p20", "p80", "n", "unit", "better", "limit", "limit_by",
    "fraction_of_limit", "validated", "commit", "dirty", "date", "seed", "host", "gpu", "driver",
    "versions",
}  # fmt: skip


def series(*figures: float) -> Callable[[], float]:
    """A measurement that gives these figures, one a call."""
    left = list(figures)
    return lambda: left.pop(0)


def right() -> bool:
    return True


@pytest.fixture(autouse=True)
def no_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "ENABLE_CUDASIM", False)


def test_statistics_leave_the_warm_up_out() -> None:
    variant = Variant("ours", series(1000, 5, 1, 3, 2, 4), right, limit=12, limit_by="memory")
    (row,) = measure(CASE, [variant], repeats=5, seed=9)
    assert set(row) == KEYS
    assert (row["median"], row["n"], row["unit"]) == (3, 5, "GB/s")
    assert (row["p20"], row["p80"]) == pytest.approx((1.8, 4.2))
    assert row["fraction_of_limit"] == 0.25
    assert (row["validated"], row["seed"], row["params"]) == (True, 9, {"size": 3})


def test_less_is_better() -> None:
    case = Case("latency", "ms", {}, better="lower")
    (row,) = measure(case, [Variant("ours", series(9, 4), right, limit=1)], repeats=1)
    assert row["fraction_of_limit"] == 0.25


def test_the_best_of_measured_limits_counts() -> None:
    for better, expected in (("higher", 30), ("lower", 10)):
        variant = Variant("ours", series(1, 2, 3), right, series(20, 30, 10))
        (row,) = measure(Case("c", "s", {}, better), [variant], repeats=2)
        assert (row["limit"], row["n"]) == (expected, 2)


def test_without_a_limit_there_is_no_fraction() -> None:
    row = record(CASE, Variant("ours", series(7), right))
    assert (row["median"], row["limit"], row["fraction_of_limit"]) == (7, None, None)


def test_variants_take_turns() -> None:
    turns: list[str] = []

    def turn(name: str) -> Callable[[], float]:
        return lambda: float(len(turns) if turns.append(name) is None else 0)

    rows = measure(CASE, [Variant(n, turn(n), right) for n in "ab"], repeats=2, warmup=1)
    assert turns == ["a", "b"] * 3
    assert [row["variant"] for row in rows] == ["a", "b"]
    assert [row["median"] for row in rows] == [4, 5]


def test_a_wrong_result_has_no_time() -> None:
    def never() -> float:
        raise AssertionError("measured although wrong")

    rows = measure(
        CASE, [Variant("wrong", never, lambda: False, 10), Variant("good", series(1, 2), right)],
        repeats=1,
    )  # fmt: skip
    wrong, good = rows
    assert (wrong["validated"], wrong["n"], wrong["median"], wrong["p20"]) == (False, 0, None, None)
    assert wrong["fraction_of_limit"] is None
    assert (good["validated"], good["median"]) == (True, 2)


def test_nothing_to_repeat() -> None:
    with pytest.raises(GGUFShardError, match="speed: repeats 0"):
        measure(CASE, [], repeats=0)


def test_nothing_is_recorded_in_the_simulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = record(CASE, Variant("ours", series(7), right))
    monkeypatch.setattr(numba.config, "ENABLE_CUDASIM", True)
    with pytest.raises(GGUFShardError, match="simulator"):
        measure(CASE, [Variant("ours", series(1), right)], repeats=1)
    with pytest.raises(GGUFShardError, match="simulator"):
        write_rows([row], "m", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_replace_their_like(tmp_path: Path) -> None:
    def row(name: str, variant: str, size: int, figure: float) -> dict[str, object]:
        return record(Case(name, "s", {"size": size}), Variant(variant, series(figure), right))

    paths = write_rows(
        [row("a", "x", 1, 1), row("a", "y", 1, 2), row("a", "x", 2, 3), row("b", "x", 1, 4)],
        "my-machine", tmp_path,
    )  # fmt: skip
    assert paths == [tmp_path / "my-machine" / name for name in ("a.json", "b.json")]
    write_rows([row("a", "x", 1, 9)], "my-machine", tmp_path)
    rows = json.loads(paths[0].read_text())
    found = [(r["variant"], r["params"]["size"], r["median"]) for r in rows]
    assert sorted(found) == [("x", 1, 9), ("x", 2, 3), ("y", 1, 2)]
    assert [p.name for p in sorted(paths[0].parent.iterdir())] == ["a.json", "b.json"]


@pytest.mark.parametrize("name", ["", "..", "a/b", "Upper", "a b"])
def test_names_that_are_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(GGUFShardError, match="machine"):
        write_rows([], name, tmp_path)


def test_environment_names_hardware_and_versions_only() -> None:
    facts = bench.describe_environment()
    assert set(facts["host"]) == {"cpu", "cores"} and facts["host"]["cores"] >= 1
    assert set(facts["versions"]) == {"python", "numpy", "numba", "llvmlite"}
    assert set(facts) == {"commit", "dirty", "host", "gpu", "driver", "versions", "date"}
    assert bench.machine_name() == bench.slug(bench.machine_name()) != ""


@pytest.mark.parametrize(
    "name, expected", [("AMD EPYC", "AMD EPYC (family 26, model 2)"), ("Core i9-14900K",) * 2]
)
def test_a_processor_is_named_by_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    core = f"cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {name}\n\n"
    (tmp_path / "cpuinfo").write_text(core * 2)
    monkeypatch.setattr(bench, "_CPU_INFO", tmp_path / "cpuinfo")
    assert bench.cpu_name() == expected


def test_outside_a_repository_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    facts = bench.describe_environment()
    assert facts["commit"] is None and facts["dirty"] is None


def test_the_gpu_is_named_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_output", lambda command: "NVIDIA H200, 560.1\nNVIDIA H200, 560.1")
    assert bench._gpu() == ("NVIDIA H200", "560.1")
    monkeypatch.setattr(bench, "_output", lambda command: None)
    assert bench._gpu() == (None, None)
