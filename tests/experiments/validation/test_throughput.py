"""The throughput part: full rows, checked results."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numba import config

from experiments.validation import throughput
from experiments.validation.effort import Effort
from experiments.validation.scene import Scene
from forge.errors import GGUFShardError

TINY = Effort("tiny", flips=1, random_flips=1, every=1, kills=1, fuzz_seconds=0,
              throughput_bytes=1 << 19, repeats=1)  # fmt: skip


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, TINY, seed=3)


@pytest.mark.skipif(not config.ENABLE_CUDASIM, reason="needs the simulator")
def test_nothing_is_timed_in_the_simulator(scene: Scene) -> None:
    with pytest.raises(GGUFShardError, match="simulator"):
        throughput.measure_throughput(scene)


@pytest.mark.skipif(bool(config.ENABLE_CUDASIM), reason="nothing is timed in the simulator")
class TestMeasured:
    def test_every_operation_and_every_peer_has_a_row(self, scene: Scene) -> None:
        rows = throughput.measure_throughput(scene)
        found = [(row["case"], row["variant"]) for row in rows]
        variants = ["gguf-shard", "cp", "cp + sync", "sha256sum", "memory copy"]
        cases = [f"validation_{name}" for name in ("shard", "verify", "restore", "diff", "apply")]
        assert found == [(case, variant) for case in cases for variant in variants]
        for row in rows:
            assert row["validated"] and row["n"] == 1 and row["median"] > 0
            assert (row["unit"], row["better"], row["seed"]) == ("MB/s", "higher", 3)
        assert list(scene.folder.iterdir()) == []

    def test_what_the_machine_lacks_takes_no_part(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(throughput, "OPERATIONS", ("verify",))
        which, absent = shutil.which, ("sync", "sha256sum")
        monkeypatch.setattr(shutil, "which", lambda tool: None if tool in absent else which(tool))
        rows = throughput.measure_throughput(scene)
        assert [row["variant"] for row in rows] == ["gguf-shard", "cp", "memory copy"]
        assert "sha256sum" not in throughput.text(rows)

    @pytest.mark.parametrize(
        ("operation", "function"),
        [
            ("shard", "shard_model"),
            ("verify", "verify_model"),
            ("restore", "restore_model"),
            ("diff", "create_patch"),
            ("apply", "apply_patch"),
        ],
    )
    def test_a_wrong_result_is_not_timed(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch, operation: str, function: str
    ) -> None:
        monkeypatch.setattr(throughput, "OPERATIONS", (operation,))
        spoil(monkeypatch, function)
        ours, *peers = throughput.measure_throughput(scene)
        assert not ours["validated"] and ours["median"] is None
        assert all(row["validated"] for row in peers)
        assert f"{operation}  " in throughput.text([ours, *peers])
        assert "wrong result" in throughput.text([ours, *peers])

    def test_a_wrong_copy_is_not_timed(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(throughput, "OPERATIONS", ("verify",))
        monkeypatch.setattr(throughput.np, "copyto", lambda *_: None)
        *_, memory = throughput.measure_throughput(scene)
        assert not memory["validated"]


def spoil(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Let a function of the tool leave a wrong result."""
    right = getattr(throughput, function)

    def wrong(*arguments: object, **options: object) -> object:
        result = right(*arguments, **options)
        if function == "verify_model":
            result.bad.append("something")
            return result
        if function == "create_patch":  # of a model with itself
            base, _, output = arguments
            Path(str(output)).unlink()
            return right(base, base, output)
        path = result.with_suffix(".gguf") if function == "shard_model" else result[0]
        data = np.fromfile(path, np.uint8)
        data[10_000] ^= 1
        data.tofile(path)
        return result

    monkeypatch.setattr(throughput, function, wrong)


def row(variant: str, median: float | None, case: str = "validation_diff") -> dict[str, object]:
    valid = median is not None
    spread = {"p20": median and median - 1.2, "p80": median and median + 1.2}
    return {"case": case, "variant": variant, "median": median, "validated": valid, **spread}


def test_the_table_has_a_line_for_each_operation() -> None:
    rows = [
        row("gguf-shard", 75.4), row("cp", 656.0), row("sha256sum", None),
        row("gguf-shard", None, "validation_apply"), row("cp", 600.0, "validation_apply"),
        row("sha256sum", 83.0, "validation_apply"),
    ]  # fmt: skip
    assert throughput.text(rows).splitlines() == [
        "MB/s   gguf-shard    p20 to p80  cp   sha256sum",
        "diff   75            74 to 77    656  wrong result",
        "apply  wrong result              600  83",
    ]
