"""What update in place refuses, and that it leaves alone what others have put there meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from delta import apply_in_place
from delta.apply_in_place import update_in_place
from delta.diff import create_patch
from delta.patch_file import PatchReader
from experiments.validation.gguf_factory import split_model, tensor
from forge.errors import GGUFShardError
from forge.journal import JournalWriter
from forge.pending_file import journal_path
from forge.shard import ShardOptions, shard_model
from tests.delta.model_pairs import CASES

#: Ways in which files change: some pages of them; all behind a longer header; other pages.
_WAYS = ("nudged weights", "metadata longer", "tensor added")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=_WAYS, ids=lambda name: name.replace(" ", "-"))
def files(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a patch for it."""
    base, target, patch = tmp_path / "base.gguf", tmp_path / "target.gguf", tmp_path / "p"
    for path, data in zip((base, target), CASES[request.param], strict=True):
        path.write_bytes(data)
    create_patch(base, target, patch)
    return base, patch


def when_bound(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Let something happen once the base has been read, and nothing of it is locked yet."""
    check = apply_in_place.check_patch

    def check_and_then(*arguments: Any) -> Any:
        bound = check(*arguments)
        then()
        return bound

    monkeypatch.setattr(apply_in_place, "check_patch", check_and_then)


@pytest.mark.parametrize("files", ["nudged weights"], indirect=True)
def test_only_what_changes_is_recorded(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, patch = files
    recorded = list[int]()
    record = JournalWriter.record

    def counted(self: JournalWriter, file: int, offset: int, data: bytes | np.ndarray) -> None:
        recorded.append(len(data))
        record(self, file, offset, data)

    monkeypatch.setattr(JournalWriter, "record", counted)
    with PatchReader(patch) as reader:
        changed = {int(page) for group in reader.groups for page in group.group.pages}
    update_in_place(base, patch)
    assert 0 < sum(recorded) <= 4096 * len(changed)


def test_a_file_that_was_replaced(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, patch = files
    other = tmp_path / "other.gguf"
    other.write_bytes(CASES["everything"][1])
    when_bound(monkeypatch, lambda: os.replace(other, base))
    with pytest.raises(GGUFShardError, match="was replaced"):
        update_in_place(base, patch)
    assert base.read_bytes() == CASES["everything"][1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf", "p", "target.gguf"]


def test_a_sharded_model_that_was_replaced(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, patch = files
    other = tmp_path / "other.gguf"
    other.write_bytes(CASES["everything"][1])
    options = ShardOptions(pages_per_shard=4)
    shard_map = shard_model(base, tmp_path / "sharded", options)
    theirs = contents(shard_model(other, tmp_path / "theirs", options).parent)
    when_bound(
        monkeypatch, lambda: shard_model(other, shard_map.parent, options, force=True) and None
    )
    with pytest.raises(GGUFShardError, match="was replaced"):
        update_in_place(shard_map, patch)
    assert contents(shard_map.parent) == theirs


def test_a_dry_run_finishes_nothing(files: tuple[Path, Path]) -> None:
    base, patch = files
    journal_path(base).write_bytes(b"whatever")
    before = contents(base.parent)
    with pytest.raises(GGUFShardError, match="interrupted"):
        update_in_place(base, patch, dry_run=True)
    assert contents(base.parent) == before


def test_another_number_of_files(tmp_path: Path) -> None:
    parts = [[tensor("a.weight", T.F16, (64, 40), 1)], [tensor("b.weight", T.F16, (64, 40), 2)]]
    (tmp_path / "two").mkdir()
    first = split_model(tmp_path / "two", parts)
    base, patch = tmp_path / "base.gguf", tmp_path / "p"
    base.write_bytes(CASES["nothing"][0])
    create_patch(base, first, patch)
    with pytest.raises(GGUFShardError, match="cannot be done in place"):
        update_in_place(base, patch)
    assert base.read_bytes() == CASES["nothing"][0]


def test_modes_of_files_are_left_alone_where_only_pages_change(tmp_path: Path) -> None:
    base, target, patch = tmp_path / "base.gguf", tmp_path / "target.gguf", tmp_path / "p"
    for path, data in zip((base, target), CASES["nudged weights"], strict=True):
        path.write_bytes(data)
    create_patch(base, target, patch)
    base.chmod(0o640)
    inode = base.stat().st_ino
    update_in_place(base, patch)
    assert base.stat().st_ino == inode and base.stat().st_mode & 0o777 == 0o640
    assert not journal_path(base).exists()
