"""`diff`, `apply` and `info PATCH` as a user types them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from atlas.cli import main as gguf_shard
from delta.incremental_model_updater import main
from forge.shard import shard_model
from tests.delta.model_pairs import CASES

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.gguf"
    path.write_bytes(CASES["nudged weights"][0])
    return path


@pytest.fixture
def updated(tmp_path: Path) -> Path:
    path = tmp_path / "updated.gguf"
    path.write_bytes(CASES["nudged weights"][1])
    return path


@pytest.fixture
def patch(tmp_path: Path, base: Path, updated: Path) -> Path:
    path = tmp_path / "delta_patch"
    assert main(["--base", f"{base}", "--target", f"{updated}", "--output", f"{path}", "-q"]) == 0
    return path


def fails(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with 1."""
    capsys.readouterr()
    assert gguf_shard([str(a) for a in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def run(arguments: list[object]) -> int:
    return gguf_shard([str(a) for a in arguments])


def test_the_script_as_the_design_names_it(base: Path, updated: Path, tmp_path: Path) -> None:
    script = _ROOT / "delta" / "incremental_model_updater.py"
    patch, new = tmp_path / "p", tmp_path / "new.gguf"
    flags = ["--base", base, "--target", updated, "--output", patch]
    made = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "blk.0.attn_q.weight" in made.stdout and "4 modified" in made.stdout
    applied = subprocess.run(
        [sys.executable, script, "apply", base, patch, "-o", new], capture_output=True, text=True
    )
    assert applied.returncode == 0, applied.stderr
    assert new.read_bytes() == updated.read_bytes()


def test_diff_and_apply_are_commands_of_gguf_shard(
    base: Path, updated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch, new = tmp_path / "p", tmp_path / "new.gguf"
    assert run(["diff", base, updated, "-o", patch, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["written"] and made["bytes"] == patch.stat().st_size
    assert made["pages"] == {"added": 0, "modified": 4, "deleted": 0, "copied": 0}
    assert run(["apply", base, patch, "-o", new, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"files": [str(new)], "resumed": False, "changed": True}
    assert new.read_bytes() == updated.read_bytes()


def test_info(patch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", patch, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "patch" and not facts["reversible"]
    (tensor,) = facts["tensors"]
    assert tensor["name"] == "blk.0.attn_q.weight" and tensor["modified"] == 4
    assert 0 < tensor["bytes"] < facts["bytes"] == patch.stat().st_size
    assert run(["info", patch]) == 0
    text = capsys.readouterr().out
    assert "blk.0.attn_q.weight" in text and facts["target"][0]["sha256"] in text


def test_info_still_describes_models(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "gguf"
    assert run(["info", shard_model(base, base.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "sgmap"


def test_dry_runs_write_nothing(
    base: Path, updated: Path, patch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(["diff", base, updated, "-o", tmp_path / "other", "--dry-run", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert not made["written"] and made["bytes"] == patch.stat().st_size
    assert run(["apply", base, patch, "-o", tmp_path / "new.gguf", "--dry-run"]) == 0
    assert "nothing written" in capsys.readouterr().out
    assert run(["apply", base, patch, "--in-place", "--dry-run"]) == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "not the patch's base" in fails(
        ["apply", updated, patch, "-o", tmp_path / "new.gguf", "--dry-run"], capsys
    )


def test_in_place_and_again(
    base: Path, updated: Path, patch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["apply", base, patch, "--in-place"]) == 0
    assert "updated" in capsys.readouterr().out
    assert base.read_bytes() == updated.read_bytes()
    assert "not the patch's base" in fails(["apply", base, patch, "--in-place"], capsys)
    assert run(["apply", base, "--resume", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["resumed"]


def test_reverse(
    base: Path, updated: Path, patch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "both"
    assert run(["diff", base, updated, "-o", both, "--reversible", "-q"]) == 0
    assert run(["apply", updated, both, "-o", tmp_path / "old.gguf", "--reverse", "-q"]) == 0
    assert (tmp_path / "old.gguf").read_bytes() == base.read_bytes()
    error = fails(["apply", updated, patch, "-o", tmp_path / "x", "--reverse"], capsys)
    assert "no way back" in error


def test_level(base: Path, updated: Path, tmp_path: Path) -> None:
    sizes = []
    for level in (1, 22):
        path = tmp_path / f"p{level}"
        assert run(["diff", base, updated, "-o", path, "--level", level, "-q"]) == 0
        sizes.append(path.stat().st_size)
    assert sizes[1] <= sizes[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["diff", "a", "b"],
        ["diff", "a", "b", "-o", "p", "--level", "0"],
        ["diff", "a", "b", "-o", "p", "--level", "23"],
        ["diff", "a", "b", "-o", "p", "--level", "much"],
        ["apply", "a", "p"],
        ["apply", "a", "-o", "b"],
        ["apply", "a", "--in-place"],
        ["apply", "a", "p", "-o", "b", "--in-place"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gguf_shard(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_errors_are_one_line(
    base: Path, updated: Path, patch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, new = tmp_path / "missing", tmp_path / "new.gguf"
    assert "missing" in fails(["diff", missing, updated, "-o", new], capsys)
    assert "missing" in fails(["apply", base, missing, "-o", new], capsys)
    assert "missing" in fails(["info", missing], capsys)
    assert "magic" in fails(["apply", base, updated, "-o", new], capsys)
    assert "exists already" in fails(["diff", base, updated, "-o", patch], capsys)
    assert "exists already" in fails(["apply", base, patch, "-o", updated], capsys)
    assert "model itself" in fails(["diff", base, updated, "-o", base, "--force"], capsys)
    assert "model itself" in fails(["apply", base, patch, "-o", base, "--force"], capsys)
    assert "No such file" in fails(["diff", base, updated, "-o", missing / "p"], capsys)
    assert not new.exists()


def test_a_patch_is_not_replaced_by_what_fails(
    base: Path, patch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = patch.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(base.read_bytes()[:-100])
    fails(["diff", base, broken, "-o", patch, "--force"], capsys)
    assert patch.read_bytes() == before


def test_a_full_disk_changes_nothing(
    base: Path, updated: Path, patch: Path, tmp_path: Path
) -> None:
    """A limit on the size of files is what a process can give itself."""
    code = "import sys; from atlas.cli import main; sys.exit(main(sys.argv[1:]))"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments in (
        ["diff", base, updated, "-o", tmp_path / "p"],
        ["apply", base, patch, "-o", tmp_path / "new.gguf"],
        ["apply", base, patch, "--in-place"],
    ):
        ended = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=_ROOT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert ended.returncode == 1, ended.stderr
        assert ended.stderr.count("\n") == 1 and "File too large" in ended.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
