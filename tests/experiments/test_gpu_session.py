"""The GPU session without a GPU: its rehearsal in the simulator, its frame, its table."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from atlas.ops.dequant import dequantise
from atlas.target import CpuTarget
from experiments import gpu_session
from experiments.bench import RESULTS, Case, Variant
from experiments.cases import GPU, GPU_REHEARSAL, OURS
from experiments.gpu_bench import GpuBench, close_to
from experiments.gpu_kernels import make_weights
from experiments.report import goal_lines, text_table
from experiments.torch_peer import TorchPeer
from forge.errors import GGUFShardError

#: What a dry run does here: "13b" is what "1b" is, with another model.
MEASURED = [name for name in gpu_session.SECTIONS if name not in ("tests", "13b")]
CASE = Case("speed", "GB/s", {"MiB": 3})


def make_bench(*, is_rehearsal: bool, **options: Any) -> GpuBench:
    """A session whose cases are of our making: on the processor."""
    return GpuBench(CpuTarget(), GPU_REHEARSAL, is_rehearsal, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(importlib.util.find_spec("greenlet") is None, reason="needs greenlet")
def test_a_dry_run_checks_every_section_and_writes_nothing(tmp_path: Path) -> None:
    before = contents(RESULTS)
    environment = {**os.environ, "OUT": str(tmp_path)}
    command = [sys.executable, "-m", "experiments.gpu_session", "--dry-run"]
    done = subprocess.run(
        [*command, "--only", ",".join(MEASURED)], cwd=RESULTS.parent.parent, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("right, 0 wrong\n")
    for case in (
        "gpu-bandwidth", "gpu-launch", "gpu-crc32", "gpu-matvec", "gpu-matmul", "gpu-swap",
        "gpu-gather", "gpu-select-publish", "gpu-decode", "gpu-prefill", "gpu-streamed",
    ):  # fmt: skip
        assert f"right: {case}: " in done.stdout
    for type_name in GPU.types:
        assert f"right: gpu-matmul: type {type_name}, " in done.stdout
    assert not any(unit in done.stdout for unit in ("GB/s", "TFLOP/s", " us"))
    assert list(tmp_path.iterdir()) == []
    assert contents(RESULTS) == before


def test_a_rehearsal_does_everything_once_and_keeps_no_figure() -> None:
    bench = make_bench(is_rehearsal=True)
    done: list[str] = []

    def step(name: str, result: Any) -> Any:
        return lambda: (done.append(name), result)[1]

    variants = [
        Variant("good", step("measured", 7.0), step("validated", True), step("limit", 9.0)),
        Variant("bad", step("never", 7.0), step("validated", False), step("never", 9.0)),
    ]
    assert bench.measure(CASE, variants) == []
    assert done == ["validated", "measured", "limit", "validated"]
    assert bench.right == ["speed: MiB 3, good"]
    assert bench.wrong == ["speed: MiB 3, bad"]


def test_a_measurement_has_rows_that_say_where_they_come_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numba.config, "ENABLE_CUDASIM", False)
    facts = {"commit": None, "versions": {"numpy": "2"}, "gpu": "GPU", "date": "2000-01-01"}
    monkeypatch.setattr("experiments.gpu_bench.describe_environment", lambda: facts)
    kept: list[list[dict[str, Any]]] = []
    bench = make_bench(is_rehearsal=False, commit="abc", seed=4, keep=kept.append)
    good, bad = bench.measure(
        CASE,
        [
            Variant("good", lambda: 6.0, lambda: True, lambda: 12.0, "memory"),
            Variant("bad", lambda: 6.0, lambda: False),
        ],
    )
    assert (good["median"], good["fraction_of_limit"], good["validated"]) == (6.0, 0.5, True)
    assert (good["commit"], good["seed"], good["gpu"]) == ("abc", 4, "GPU")
    assert {"numpy", "torch", "numba-cuda", "nvidia-nvvm"} <= set(good["versions"])
    assert (bad["median"], bad["validated"]) == (None, False)
    assert kept == [[good, bad]]
    assert (len(bench.right), len(bench.wrong)) == (1, 1)


def test_one_section_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: GpuBench) -> list[dict[str, Any]]:
        raise ZeroDivisionError("on the day")

    monkeypatch.setattr(
        gpu_session, "SECTIONS", {"broken": broken, "good": lambda bench: [{"case": "good"}]}
    )
    bench = make_bench(is_rehearsal=False)
    assert gpu_session.run_sections(bench, ["broken", "good"]) == [{"case": "good"}]
    assert bench.wrong == ["broken: ZeroDivisionError: on the day"]
    assert "Traceback" in capsys.readouterr().err


def test_no_section_is_begun_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "SECTIONS", {"late": lambda bench: [{"case": "late"}]})
    monkeypatch.setattr(gpu_session, "SECONDS", -1)
    bench = make_bench(is_rehearsal=False)
    assert gpu_session.run_sections(bench, ["late"]) == []
    assert bench.wrong == ["late: not begun after 0 s"]


@pytest.mark.parametrize(("code", "is_right"), [(0, True), (5, False), (1, False)])
def test_gpu_tests_count(code: int, is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=code, stdout="...\n3 passed in 1 s\n", stderr="")

    monkeypatch.setattr(gpu_session.subprocess, "run", run)
    bench = make_bench(is_rehearsal=False)
    assert gpu_session.gpu_tests(bench) == []
    assert "gpu" in commands[0]
    assert (bench.right if is_right else bench.wrong) == ["tests: 3 passed in 1 s"]


def test_without_a_gpu_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none_here(name: str) -> None:
        raise GGUFShardError(f"target {name}: none here")

    monkeypatch.setattr(numba.config, "ENABLE_CUDASIM", False)
    monkeypatch.setattr(gpu_session, "select_target", none_here)
    assert gpu_session.main(["-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "target cuda: none here\n"
    assert list(tmp_path.iterdir()) == []


def test_in_the_simulator_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numba.config, "ENABLE_CUDASIM", True)
    assert gpu_session.main([]) == 1
    assert "simulator" in capsys.readouterr().err


def test_unknown_sections_are_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_session.main(["--only", "crc32,nothing"])
    assert stop.value.code == 2


def fake_row(case: str, variant: str, median: float, limit: float, **params: Any) -> dict[str, Any]:
    return {
        "case": case, "variant": variant, "params": params, "median": median, "p20": median,
        "p80": median, "n": 5, "unit": "GB/s", "better": "higher", "limit": limit,
        "limit_by": "device copy", "fraction_of_limit": median / limit, "validated": True,
    }  # fmt: skip


def test_table_and_goals() -> None:
    rows = [
        fake_row("gpu-matvec", OURS, 3000, 4000, type="F16", matrix="8 x 8"),
        fake_row("gpu-matvec", "PyTorch", 2000, 4000, type="F16", matrix="8 x 8"),
        fake_row("gpu-matvec", OURS, 2800, 4000, type="Q4_0", matrix="8 x 8"),
        fake_row("gpu-matvec", OURS, 2900, 4000, type="Q8_0", matrix="8 x 8"),
        fake_row("gpu-matmul", OURS, 100, 800, type="F16", tokens=512),
        fake_row("gpu-matmul", "PyTorch", 400, 800, type="F16", tokens=512),
    ]
    line = text_table(rows).splitlines()[1]
    assert line.split("  ")[0] == "gpu-matvec: F16, 8 x 8" and "75 %" in line and "1.50" in line
    verdicts = [goal.rpartition(": ")[::2] for goal in goal_lines(rows) if OURS in goal]
    assert [verdict for _, verdict in verdicts] == ["reached", "missed", "reached", "missed"]
    assert "75 % of the limit, goal 75 %" in verdicts[0][0]
    assert "goal 60 %" in verdicts[2][0] and "Q4_0" in verdicts[2][0]
    assert "0.25 of the peer, goal 0.35" in verdicts[3][0]


@pytest.mark.parametrize("type_name", GPU.types)
def test_weights_in_pages_are_those_on_the_host(type_name: str) -> None:
    bench = make_bench(is_rehearsal=False)
    weights = make_weights(bench, type_name, 160, 96)
    assert weights.params == {"type": type_name, "matrix": "160 x 96"}
    out = np.full((160, 96), np.nan, np.float32)
    dequantise(bench.target, out, weights.cache, weights.matrix, 0, 160)
    np.testing.assert_array_equal(out, weights.rows(0, 160))
    expected = quants.dequantize(weights.blocks, GGMLQuantizationType[type_name])
    np.testing.assert_array_equal(out, expected)
    assert 0.8 < out.std() * 96**0.5 < 1.2
    table = weights.cache.table
    assert len(table) >= 3 and (table != np.arange(len(table))).any()


def test_closeness_is_relative_to_all() -> None:
    expected = np.array([3.0, -4.0, 0.0, 5.0])  # root mean square 3.54
    assert close_to(expected + 0.03, expected, 1e-2)
    assert not close_to(expected + np.array([0, 0, 0.04, 0]), expected, 1e-2)
    assert not close_to(np.array([3.0, np.nan, 0.0, 5.0]), expected, 1e-2)


def test_pytorch_as_the_peer() -> None:
    pytest.importorskip("torch")
    peer = TorchPeer.find("cpu")
    assert peer is not None
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 16)), rng.standard_normal((5, 16))
    found = peer.get(peer.product(peer.array(x, "BF16"), peer.array(w, "BF16")))
    assert close_to(found, x @ w.T, 8e-2)
    assert peer.seconds(lambda: None) >= 0
    assert peer.dense_flops(4) > 0
