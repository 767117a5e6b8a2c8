"""A repair beside others, killed at any point, or refused: the old file or the new one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from forge import repair
from forge.errors import GGUFShardError
from forge.journal import JournalWriter
from forge.pending_file import PendingFile, journal_path
from forge.repair import RepairResult, repair_model
from forge.shard import ShardOptions, shard_model
from forge.verify import verify_model
from tests.killing import killed_at
from tests.repair_factory import (
    N_PAGES,
    TABLE,
    assert_refused,
    assert_repairs,
    at,
    edit,
    flipped,
    page,
)


def test_somebody_else_writes(sharded: Path, pages: Path, model: Path) -> None:
    good = edit(pages, flipped(pages, at(3)))
    with JournalWriter(sharded, [(pages.name, len(good))], 0):
        assert_refused(sharded, model, "another process is writing it")
    with PendingFile(sharded, 0, force=True):
        assert_refused(sharded, model, "another process is writing it")
        pages.unlink()
        assert_refused(sharded, model, "another process is writing it")


def test_a_model_replaced_meanwhile(
    sharded: Path, pages: Path, model: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_source = repair.open_repair_source

    def meanwhile(*arguments: Any) -> Any:
        shard_model(other, sharded.parent, ShardOptions(pages_per_shard=2), force=True)
        return open_source(*arguments)

    monkeypatch.setattr(repair, "open_repair_source", meanwhile)
    for damage in (lambda: edit(pages, flipped(pages, at(3))), pages.unlink):
        shard_model(model, sharded.parent, ShardOptions(pages_per_shard=2), force=True)
        damage()
        with pytest.raises(GGUFShardError, match="changed while it was read"):
            repair_model(sharded, model)
        assert verify_model(sharded, against=other).ok


def test_what_others_left_is_finished_first(
    sharded: Path, pages: Path, model: Path, tmp_path: Path
) -> None:
    """Pages that have not got their name yet; a journal, without which there is not even a map."""
    good, text = pages.read_bytes(), sharded.read_bytes()
    pages.rename(pages.with_name("core.gguf.sgnew"))
    assert repair_model(sharded, tmp_path / "none") == RepairResult(N_PAGES)
    assert pages.read_bytes() == good
    edit(pages, flipped(pages, at(6)))
    with JournalWriter(sharded, [(pages.name, len(good)), (sharded.name, len(text))], 0) as journal:
        journal.record(0, at(3), page(3, good))
        journal.record(1, 0, text[:100])
        journal.commit()
    edit(sharded, (0, b"{half"))
    edit(pages, flipped(pages, at(3)))
    (fault,) = assert_repairs(sharded, model, good).repaired
    assert fault.page == 6
    with JournalWriter(sharded, [(pages.name, len(good))], 0) as journal:
        journal.record(0, at(3), page(3, good))
        journal.commit()
    edit(journal_path(sharded), (0, b"X"))
    pages.unlink()
    assert_refused(sharded, model, "cannot be finished; delete it and replace the model")


@pytest.mark.parametrize("damage", ["pages", "missing"])
def test_killed_at_any_point(damage: str, sharded: Path, pages: Path, model: Path) -> None:
    """The old file or the new one, at the latest when the model is opened; then it is repaired."""
    good = pages.read_bytes()
    k = 0
    n_finished = 0
    while True:
        if damage == "missing":
            pages.unlink()
        else:
            edit(pages, flipped(pages, at(3)), flipped(pages, at(11)), flipped(pages, TABLE + 60))
        n_bad = len(verify_model(sharded).bad)
        if not killed_at(k, lambda: repair_model(sharded, model)):
            break
        bad = verify_model(sharded).bad  # which finishes what was begun
        assert len(bad) in (0, n_bad)
        n_finished += not bad
        if bad:
            assert repair_model(sharded, model).ok
        assert pages.read_bytes() == good
        k += 1
    assert pages.read_bytes() == good
    assert k > 10 and 0 < n_finished < k
    assert sorted(p.name for p in sharded.parent.iterdir()) == ["core.gguf", "core.sgmap"]


@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace", "ftruncate"])
@pytest.mark.parametrize("damage", ["pages", "missing"])
def test_a_disk_that_refuses(
    damage: str, name: str, sharded: Path, pages: Path, model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    good = edit(pages, flipped(pages, at(3)))
    if damage == "missing":
        pages.unlink()

    def failing(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, name, failing)
        with pytest.raises((GGUFShardError, OSError), match="No space left on device"):
            repair_model(sharded, model)
    assert sorted(p.name for p in sharded.parent.iterdir() if p != pages) == ["core.sgmap"]
    assert_repairs(sharded, model, good)


def test_pages_that_come_out_wrong_are_not_put_in_place(
    sharded: Path, pages: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.unlink()
    pwrite = os.pwrite

    def rotten(descriptor: int, data: Any, offset: int) -> int:
        return pwrite(descriptor, bytes(len(data)) if offset == at(4) else data, offset)

    monkeypatch.setattr(os, "pwrite", rotten)
    assert_refused(sharded, model, "page 4: wrong after writing")


def test_a_new_file_is_durable_before_it_can_be_taken_for_one(
    sharded: Path, pages: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kill shows this, only a power cut: all pages reach the disk before the table is written,
    and the table does before the file has its name."""
    pages.unlink()
    log: list[Any] = []

    def logged(name: str) -> None:
        call = getattr(os, name)

        def logging(what: Any, *rest: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            if path.endswith("core.gguf.sgnew"):
                log.append((name, rest[-1] if name == "pwrite" else None))
            return call(what, *rest)

        monkeypatch.setattr(os, name, logging)

    for name in ("pwrite", "fsync", "replace"):
        logged(name)
    repair_model(sharded, model)
    assert [offset for _, offset in log[:8]] == [at(n) for n in range(0, N_PAGES, 2)]
    fsync, replace = ("fsync", None), ("replace", None)
    assert log[8:] == [fsync, ("pwrite", 0), ("pwrite", TABLE), fsync, replace]
