"""Base and patch make the target, bit for bit, whatever has changed and however models lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from delta import rehearsal
from delta.apply import apply_patch
from delta.apply_in_place import update_in_place
from delta.diff import create_patch
from forge.errors import GGUFShardError
from forge.restore import restore_model
from forge.shard import ShardOptions, shard_model
from forge.verify import verify_model
from tests.delta.model_pairs import CASES

_NAMES = ("base.gguf", "target.gguf", "new.gguf")


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Sequence[Path]:
    """Paths of base and target, and one for what is made."""
    paths = [tmp_path / name for name in _NAMES]
    for path, data in zip(paths, CASES[request.param], strict=False):
        path.write_bytes(data)
    return paths


def _leftovers(folder: Path) -> list[str]:
    return [
        path.name for path in folder.rglob("*") if ".sgnew" in path.name or "sgjournal" in path.name
    ]


@pytest.mark.parametrize("level", [1, 3, 19])
def test_new_file(pair: Sequence[Path], tmp_path: Path, level: int) -> None:
    base, target, new = pair
    create_patch(base, target, tmp_path / "p", level=level)
    assert apply_patch(base, tmp_path / "p", new) == [new]
    assert new.read_bytes() == target.read_bytes()
    assert not _leftovers(tmp_path)


def test_in_place(pair: Sequence[Path], tmp_path: Path) -> None:
    base, target, _ = pair
    create_patch(base, target, tmp_path / "p")
    result = update_in_place(base, tmp_path / "p")
    assert result.changed and not result.resumed
    assert base.read_bytes() == target.read_bytes()
    assert not _leftovers(tmp_path)


def test_what_would_take_too_much_memory(
    pair: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is made as it is written."""
    base, target, new = pair
    create_patch(base, target, tmp_path / "p", reversible=True)
    monkeypatch.setattr(rehearsal, "_MOST_STORED_BYTES", -1)
    monkeypatch.setattr(rehearsal.Rehearsal, "run", None)
    apply_patch(base, tmp_path / "p", new)
    assert new.read_bytes() == target.read_bytes()
    update_in_place(new, tmp_path / "p", reverse=True)
    assert new.read_bytes() == base.read_bytes()
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.write_bytes(data)
    with pytest.raises(GGUFShardError, match="not the patch's base"):
        apply_patch(base, tmp_path / "p", tmp_path / "other.gguf")


def test_reverse(pair: Sequence[Path], tmp_path: Path) -> None:
    base, target, new = pair
    create_patch(base, target, tmp_path / "p", reversible=True)
    apply_patch(target, tmp_path / "p", new, reverse=True)
    assert new.read_bytes() == base.read_bytes()
    apply_patch(base, tmp_path / "p", new, force=True)
    assert new.read_bytes() == target.read_bytes()
    update_in_place(new, tmp_path / "p", reverse=True)
    assert new.read_bytes() == base.read_bytes()


@pytest.mark.parametrize("layout", ["column_major", "row_major"])
def test_sharded(pair: Sequence[Path], tmp_path: Path, layout: str) -> None:
    base, target, new = pair
    options = ShardOptions(layout, pages_per_shard=4, cache_policy="pin")
    old_map = shard_model(base, tmp_path / "old", options)
    fresh = shard_model(target, tmp_path / "fresh", options)
    create_patch(base, target, tmp_path / "p")
    apply_patch(old_map, tmp_path / "p", new)
    assert new.read_bytes() == target.read_bytes()
    update_in_place(old_map, tmp_path / "p")
    assert (tmp_path / "old/core.gguf").read_bytes() == fresh.with_suffix(".gguf").read_bytes()
    assert old_map.read_bytes() == fresh.read_bytes()
    assert verify_model(old_map, target).ok
    assert not _leftovers(tmp_path)


def test_patch_between_sharded_models(pair: Sequence[Path], tmp_path: Path) -> None:
    base, target, new = pair
    options = ShardOptions(pages_per_shard=2)
    old_map = shard_model(base, tmp_path / "old", options)
    fresh = shard_model(target, tmp_path / "fresh", options)
    for number, sides in enumerate([(old_map, fresh), (base, fresh), (old_map, target)]):
        patch = tmp_path / f"p{number}"
        create_patch(*sides, patch)
        apply_patch(base, patch, new, force=True)
        assert new.read_bytes() == target.read_bytes()


def test_sharded_reverse(pair: Sequence[Path], tmp_path: Path) -> None:
    base, target, new = pair
    sharded = shard_model(target, tmp_path / "sharded")
    create_patch(base, target, tmp_path / "p", reversible=True)
    update_in_place(sharded, tmp_path / "p", reverse=True)
    assert verify_model(sharded, base).ok
    restore_model(sharded, new)
    assert new.read_bytes() == base.read_bytes()
