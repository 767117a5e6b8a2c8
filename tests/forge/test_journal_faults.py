"""A change in place: all of it or nothing, wherever it is killed and whatever is refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge import journal, journal_file
from forge.errors import GGUFShardError
from forge.journal import finish_journal, journal_path
from forge.sharded_model import ShardedModel
from tests.journal_factory import CHANGE, NAMES, NEW, OLD, contents, names, set_contents
from tests.killing import killed_at


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    """Two files that stand for a sharded model; what is in them is all the same to a journal."""
    path = tmp_path / "core.sgmap"
    set_contents(path, OLD)
    return path


# ---- killed ----


@pytest.mark.parametrize("half", [False, True], ids=["before a write", "half-way through it"])
def test_killed_at_any_point(owner: Path, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_BUFFER_BYTES", 1500)
    monkeypatch.setattr(journal_file, "_PIECE_BYTES", 1000)

    def work() -> None:
        CHANGE.write(owner)
        finish_journal(owner)

    seen = set()
    k = 0
    while killed_at(k, work, half):
        if not journal_path(owner).exists():
            state = "old" if contents(owner) == OLD else "new"
            assert contents(owner) == (OLD if state == "old" else NEW)
            assert finish_journal(owner) is False
        else:
            state = "committed" if contents(owner) == OLD else "half written"
            assert finish_journal(owner) is True
            assert contents(owner) == NEW and names(owner) == [*NAMES]
        seen.add(state)
        set_contents(owner, OLD)  # what lies about of the dead writer stays
        k += 1
    assert contents(owner) == NEW
    assert seen == {"old", "new", "committed", "half written"} and k > 25


def test_killed_again_and_again_while_finishing(owner: Path) -> None:
    CHANGE.write(owner)
    k = 0
    while journal_path(owner).exists():
        killed_at(k, lambda: finish_journal(owner), half=bool(k % 2))
        k += 1
    assert k > 10
    assert contents(owner) == NEW
    assert names(owner) == [*NAMES]


def test_what_must_be_durable_is_so_in_time(owner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kill shows this, only a power cut: in which order things reach the disk."""
    log: list[tuple[str, str]] = []

    def logged(name: str) -> None:
        call = getattr(os, name)

        def logging(what: Any, *rest: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            entry = (name, "." if Path(path) == owner.parent else Path(path).name)
            if entry not in log[-1:]:
                log.append(entry)
            return call(what, *rest)

        monkeypatch.setattr(os, name, logging)

    for name in ("pwrite", "fsync", "replace", "unlink", "ftruncate"):
        logged(name)
    with CHANGE.open(owner) as writer:
        for record in CHANGE.records:
            writer.record(*record)
        log.clear()
        writer.commit()
    new, done = "core.sgmap.sgjournal.sgnew", "core.sgmap.sgjournal"
    assert log[:-1] == [("pwrite", new), ("fsync", new), ("replace", new), ("fsync", ".")]
    assert log.pop() == ("unlink", "core.sgmap.sgnew")
    log.clear()
    finish_journal(owner)
    assert log == [
        ("fsync", done), ("fsync", "."),
        ("pwrite", "core.gguf"), ("ftruncate", "core.gguf"), ("fsync", "core.gguf"),
        ("pwrite", "core.sgmap"), ("ftruncate", "core.sgmap"), ("fsync", "core.sgmap"),
        ("unlink", done), ("fsync", "."),
    ]  # fmt: skip


# ---- refused ----


def refuse(code: int) -> Callable[..., Any]:
    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return failing


def assert_one_line(error: pytest.ExceptionInfo[GGUFShardError]) -> None:
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "unlink"])
def test_what_the_disk_refuses_can_be_finished_later(
    call: str, owner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CHANGE.write(owner)
    real, left, calls = getattr(os, call), 0, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    while True:
        calls = 0
        with monkeypatch.context() as patched:
            patched.setattr(os, call, counted)
            try:
                finish_journal(owner)
                break
            except GGUFShardError as error:
                assert "core." in str(error) and "No space left on device" in str(error)
        # The last call makes it durable that the journal is gone.
        assert journal_path(owner).exists() or (call == "fsync" and contents(owner) == NEW)
        left += 1
    assert left > 0 and contents(owner) == NEW and names(owner) == [*NAMES]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_what_the_disk_refuses_before_the_commit_changes_nothing(
    call: str, owner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(GGUFShardError, match=r"core\.sgmap\.sgjournal.*: No space left") as error,
        CHANGE.open(owner) as writer,
    ):
        for record in CHANGE.records:
            writer.record(*record)
        monkeypatch.setattr(os, call, refuse(errno.ENOSPC))
        writer.commit()
    assert_one_line(error)
    assert contents(owner) == OLD and names(owner) == [*NAMES]


def test_a_name_that_could_not_be_made_durable_is_a_commit(
    owner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("forge.pending_file.sync_folder", refuse(errno.EIO))
        with pytest.raises(GGUFShardError, match=r"sgjournal: Input/output error"):
            CHANGE.write(owner)
    assert names(owner) == [*NAMES, "core.sgmap.sgjournal"]
    assert finish_journal(owner) and contents(owner) == NEW


def test_a_read_that_differs_from_what_was_written(
    owner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CHANGE.write(owner)
    pwrite = os.pwrite

    def lying(descriptor: int, data: Any, offset: int) -> int:
        return pwrite(descriptor, bytes(len(data)) if offset == 8192 else data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lying)
        with pytest.raises(GGUFShardError, match=r"core\.gguf: offset 8192: wrong after writing"):
            finish_journal(owner)
    assert finish_journal(owner) and contents(owner) == NEW


def test_the_disk_must_have_room(owner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_bytes = sum(len(data) for _, _, data in CHANGE.records)
    room = n_bytes + 3000  # a file grows by that
    free = SimpleNamespace(free=room - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    message = rf"core\.sgmap\.sgjournal: needs {room} bytes, the disk has {room - 1} left"
    with pytest.raises(GGUFShardError, match=message):
        CHANGE.open(owner)
    assert names(owner) == [*NAMES]
    free.free = room
    with (
        pytest.raises(GGUFShardError, match=r"needs 3000 bytes, the disk has 2999 left"),
        CHANGE.open(owner) as writer,
    ):
        free.free = 2999  # the journal took more than was thought
        writer.commit()
    assert contents(owner) == OLD and names(owner) == [*NAMES]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_who_may_not_write_is_told_so(
    code: int, owner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CHANGE.write(owner)
    os_open = os.open

    def read_only(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(code, os.strerror(code))
        return os_open(path, flags, *rest)

    expected = "an update in place was interrupted and must be finished by someone with write acc"
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        with pytest.raises(GGUFShardError, match=rf"core\.gguf: .*: {expected}") as error:
            finish_journal(owner)
    assert_one_line(error)
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(GGUFShardError, match=rf"sgjournal: Permission denied: {expected}"):
            ShardedModel(owner)
    assert contents(owner) == OLD and journal_path(owner).exists()
