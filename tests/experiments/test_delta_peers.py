"""Turns of tools that make patches: what counts, what does not, and real tools where installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from experiments import delta_peers
from experiments.delta_cases import DeltaCases, Pair, write_base, write_target
from experiments.delta_peers import (
    PEERS,
    Tool,
    file_sha256,
    installed_peers,
    our_command,
    our_library,
    take_turn,
)
from forge.errors import GGUFShardError

TINY = DeltaCases(n_tensors=4, side=64, edits=3, peers=(), repeats=1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    write_base(folder / "base.gguf", TINY, 0)
    return write_target("edits", folder / "base.gguf", folder / "target.gguf", TINY, 0)


def copying() -> Tool:
    """The patch is the target."""
    return Tool(
        "copy",
        lambda base, target, patch: ("cp", target, patch),
        lambda base, patch, output: ("cp", patch, output),
    )


def test_a_right_turn(pair: Pair, tmp_path: Path) -> None:
    turn = take_turn(copying(), pair, tmp_path, file_sha256(pair.target))
    assert turn.patch_bytes == pair.target.stat().st_size
    assert turn.create.seconds > 0 and turn.apply.peak_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_output_does_not_count(pair: Pair, tmp_path: Path) -> None:
    lazy = Tool("lazy", copying().create, lambda base, patch, output: ("cp", base, output))
    with pytest.raises(GGUFShardError, match="lazy, edits: the output is not the target"):
        take_turn(lazy, pair, tmp_path, file_sha256(pair.target))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    failing = Tool("failing", copying().create, lambda base, patch, output: ("cp", output, output))
    with pytest.raises(GGUFShardError, match=r"cp: .*No such file"):
        take_turn(failing, pair, tmp_path, file_sha256(pair.target))
    assert list(tmp_path.iterdir()) == []


def test_a_clock_of_its_own_counts(pair: Pair, tmp_path: Path) -> None:
    code = "import shutil, sys; shutil.copy(*sys.argv[1:]); print('{\"seconds\": 1234.5}')"
    copy = (sys.executable, "-I", "-c", code)
    clock = Tool(
        "clock",
        lambda base, target, patch: (*copy, target, patch),
        lambda base, patch, output: (*copy, patch, output),
        has_clock=True,
    )
    turn = take_turn(clock, pair, tmp_path, file_sha256(pair.target))
    assert turn.create.seconds == turn.apply.seconds == 1234.5


def test_peers_that_are_not_installed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_peers.shutil, "which", lambda name: None)
    assert installed_peers(["xdelta3", "zstd -1"]) == ([], ["zstd -1", "xdelta3"])
    only = {"zstd", "bsdiff"}  # without bspatch, bsdiff is half a tool
    monkeypatch.setattr(delta_peers.shutil, "which", lambda name: name if name in only else None)
    here, missing = installed_peers([tool.name for tool in PEERS])
    assert [tool.name for tool in here] == ["zstd -19", "zstd -1"]
    assert missing == ["xdelta3", "bsdiff"]


@pytest.mark.parametrize("tool", PEERS, ids=lambda tool: tool.name)
def test_peers(tool: Tool, pair: Pair, tmp_path: Path) -> None:
    path = Path()
    for command in (tool.create, tool.apply):
        program = str(command(path, path, path)[0])
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    turn = take_turn(tool, pair, tmp_path, file_sha256(pair.target))
    assert 20 < turn.patch_bytes < 2000


def test_ours(pair: Pair, tmp_path: Path) -> None:
    sha256 = file_sha256(pair.target)
    turns = [take_turn(tool, pair, tmp_path, sha256) for tool in (our_library(), our_command())]
    assert turns[0].patch_bytes == turns[1].patch_bytes < 2000


def test_levels_are_passed_on() -> None:
    path = Path()
    assert "--level" not in our_library().create(path, path, path)
    assert our_library(22).create(path, path, path)[-2:] == ("--level", "22")
    assert (our_library().name, our_library(22).name) == ("gguf-shard", "gguf-shard level 22")
