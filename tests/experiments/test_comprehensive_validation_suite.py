"""The command: what it runs, what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import comprehensive_validation_suite as suite
from experiments.validation.effort import FULL, QUICK
from experiments.validation.probe import Missed, Outcome, Probe
from experiments.validation.scene import Scene

_ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> list[Scene]:
    """The scenes of parts that find one fault each."""
    seen: list[Scene] = []

    def probes(scene: Scene) -> Iterator[Probe]:
        seen.append(scene)
        yield Probe("chaos", "bit flip", "core.gguf", "byte 0", lambda: Outcome.DETECTED)

    monkeypatch.setattr(suite, "PARTS", dict.fromkeys(suite.PARTS, (probes,)))
    monkeypatch.setattr(suite, "measure_throughput", lambda scene: [])
    return seen


def test_all_sections_and_json(
    scenes: list[Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    assert suite.main(["--json", str(path), "--seed", "4", "--seconds", "7"]) == 0
    output = capsys.readouterr()
    assert output.out.rstrip().endswith("3 faults injected, 3 detected, 0 harmless, 0 MISSED")
    assert [line.split(":")[0] for line in output.err.splitlines()] == [*suite.PARTS]
    found = json.loads(path.read_text())
    assert (found["effort"], found["seed"], found["detected"]) == ("quick", 4, 3)
    assert {scene.seed for scene in scenes} == {4}
    assert {scene.effort.fuzz_seconds for scene in scenes} == {7}
    assert not scenes[0].folder.exists()


def test_sections_and_effort(scenes: list[Scene]) -> None:
    assert suite.main(["--full", "--only", "hostile"]) == 0
    assert suite.main(["--quick", "--only", "integrity,chaos"]) == 0
    assert [scene.effort for scene in scenes] == [FULL, QUICK, QUICK]


def test_a_miss_is_exit_code_1(
    scenes: list[Scene], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def miss() -> Outcome:
        raise Missed("wrong bytes")

    def probes(scene: Scene) -> Iterator[Probe]:
        yield Probe("chaos", "bit flip", "core.gguf", "byte 0", miss)

    monkeypatch.setattr(suite, "PARTS", {"chaos": (probes,)})
    assert suite.main(["--only", "chaos"]) == 1
    assert "MISSED: bit flip, core.gguf, byte 0: wrong bytes" in capsys.readouterr().out


def test_a_wrong_result_is_exit_code_1(
    scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "measure_throughput", lambda scene: [{"validated": False}])
    monkeypatch.setattr(suite, "throughput_text", str)
    assert suite.main(["--only", "throughput"]) == 1


@pytest.mark.parametrize(
    "arguments", [["--only", "chaos,typo"], ["--minutes", "0"], ["--minutes", "x"],
                  ["--quick", "--full"]],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        suite.main(arguments)
    assert end.value.code == 2 and "error:" in capsys.readouterr().err


def test_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, "experiments/comprehensive_validation_suite.py", "--help"],
        cwd=_ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--quick" in done.stdout and "soak" in done.stdout
