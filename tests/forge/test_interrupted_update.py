"""Who opens or replaces a model meets the journal of a change that was interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.validation import gguf_factory as factory
from forge.errors import GGUFShardError
from forge.gguf_file import read_gguf
from forge.journal import JournalWriter, finish_journal, journal_path
from forge.restore import restore_model
from forge.shard import shard_model
from forge.sharded_model import ShardedModel
from forge.split_model import read_model
from forge.verify import verify_model
from tests.journal_factory import NAMES, Change


def fail(*_: Any) -> Any:
    raise OSError("broken")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return factory.write(tmp_path / "other.gguf", factory.small_model(seed=77))


def interrupted(sharded: Path, source: Path) -> Path:
    """A sharded model that was being turned into that of `source`; returns the map."""
    work = sharded.parent / "work"
    shard_model(source, work)
    new = [(work / name).read_bytes() for name in NAMES]
    shutil.rmtree(work)
    records = [(0, 4096, new[0][4096:]), (1, 0, new[1])]
    Change((len(new[0]), len(new[1])), records).write(sharded)
    with open(sharded, "r+b") as half:
        half.write(b"{half of it")
    return sharded


def test_opening_a_map_finishes_its_journal(sharded: Path, other: Path) -> None:
    interrupted(sharded, other)
    with ShardedModel(sharded) as model:
        assert model.map.source[0].name == "other.gguf"
    assert not journal_path(sharded).exists()
    assert verify_model(sharded, against=other).ok


def test_a_journal_that_cannot_be_finished_stops_the_opening(sharded: Path, other: Path) -> None:
    interrupted(sharded, other)
    with open(journal_path(sharded), "r+b") as damaged:
        damaged.write(b"X")
    with pytest.raises(GGUFShardError, match="cannot be finished; delete it and replace the model"):
        ShardedModel(sharded)


def test_sharding_finishes_a_journal_before_it_replaces_its_files(
    sharded: Path, other: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(sharded, other)
    with monkeypatch.context() as patched:
        patched.setattr("forge.shard.scan_shards", fail)
        with pytest.raises(OSError, match="broken"):
            shard_model(model, sharded.parent, force=True)
    assert verify_model(sharded, against=other).ok
    interrupted(sharded, model)
    with open(journal_path(sharded), "r+b") as damaged:
        damaged.write(b"X")
    with pytest.raises(GGUFShardError, match="cannot be finished; delete it and replace the model"):
        shard_model(model, sharded.parent, force=True)
    journal_path(sharded).unlink()
    shard_model(model, sharded.parent, force=True)
    assert verify_model(sharded, against=model).ok


def test_no_journal_can_come_to_be_while_files_are_replaced(
    sharded: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*_: Any) -> Any:
        JournalWriter(sharded, [("core.gguf", 1)], 0)

    with monkeypatch.context() as patched:
        patched.setattr("forge.shard.scan_shards", meanwhile)
        with pytest.raises(GGUFShardError, match=r"core\.sgmap\.sgnew: another process is writin"):
            shard_model(model, sharded.parent, force=True)
    assert verify_model(sharded, against=model).ok


def test_restoring_finishes_the_journal_of_its_output(sharded: Path, model: Path) -> None:
    content = model.read_bytes()
    with JournalWriter(model, [(model.name, len(content))], 4) as writer:
        writer.record(0, 0, b"XXXX")
        writer.commit()
    restore_model(sharded, model, force=True)
    assert model.read_bytes() == content and not journal_path(model).exists()


def test_a_gguf_file_is_not_read_half_way(model: Path) -> None:
    content = model.read_bytes()
    with JournalWriter(model, [(model.name, len(content))], 4) as writer:
        writer.record(0, len(content) - 4, b"tail")
        assert read_gguf(model).file_bytes == len(content)
        writer.commit()
    for read in (read_gguf, read_model):
        with pytest.raises(GGUFShardError) as error:
            read(model)
        assert str(error.value) == (
            f"{model}: an update in place was interrupted; `gguf-shard apply --in-place` with any "
            f"patch, or `gguf-shard apply --resume {model}`, finishes it"
        )
    assert finish_journal(model)
    assert read_gguf(model).file_bytes == len(content)
    assert model.read_bytes() == content[:-4] + b"tail"


def test_a_split_model_has_its_journal_beside_the_first_part(tmp_path: Path) -> None:
    parts = [[factory.tensor(f"t{i}", factory.GGMLQuantizationType.F16, (30,))] for i in range(2)]
    first = factory.split_model(tmp_path, parts)
    second = first.with_name("model-00002-of-00002.gguf")
    with JournalWriter(first, [(second.name, second.stat().st_size)], 2) as writer:
        writer.record(0, second.stat().st_size - 2, b"xy")
        writer.commit()
    with pytest.raises(GGUFShardError, match=rf"{first.name}: an update in place was interrupted"):
        read_model(first)
    assert finish_journal(first)
    assert len(read_model(first)) == 2 and second.read_bytes().endswith(b"xy")


@pytest.mark.parametrize("path", ["", ".", "/", "no/such/file", "x" * 250])
def test_what_has_no_journal(path: str) -> None:
    assert finish_journal(path) is False
    with pytest.raises(OSError):
        read_gguf(path)
