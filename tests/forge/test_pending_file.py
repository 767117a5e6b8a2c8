"""A reader sees the old file or the new one, never a third state."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from forge import pending_file
from forge.errors import GGUFShardError
from forge.pending_file import PendingFile, finish_pending, is_at, pending_path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def test_appears_on_commit_only(path: Path) -> None:
    with PendingFile(path, 10) as file:
        file.write(b"world", 5)
        file.write(np.frombuffer(b"hello", np.uint8), 0)
        assert names(path) == ["file.sgnew"]
        file.commit()
        assert names(path) == ["file"]
    assert path.read_bytes() == b"helloworld"


def test_nothing_can_be_written_of_any_kind(path: Path) -> None:
    with PendingFile(path, 3) as file:
        for nothing in (b"", np.empty(0, np.uint8), np.empty((2, 0), np.float32)):
            file.write(nothing, 1)
        file.commit()
    assert path.read_bytes() == bytes(3)


def test_vanishes_without_commit(path: Path) -> None:
    with PendingFile(path, 10) as file:
        file.write(b"x", 0)
    assert names(path) == []


def test_an_error_leaves_the_old_file(path: Path) -> None:
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), PendingFile(path, 3, force=True) as file:
        file.write(b"new", 0)
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and names(path) == ["file"]


def test_existing_files_need_force(path: Path) -> None:
    path.write_bytes(b"old")
    with pytest.raises(GGUFShardError, match=r"file: exists already \(--force replaces it\)"):
        PendingFile(path, 3)
    with PendingFile(path, 3, force=True) as file:
        file.write(b"new", 0)
        file.commit()
    assert path.read_bytes() == b"new"


def test_what_a_dead_writer_left_is_taken_over(path: Path) -> None:
    pending_path(path).write_bytes(b"long remains of another write")
    with PendingFile(path, 2) as file:
        file.write(b"ok", 0)
        file.commit()
    assert path.read_bytes() == b"ok" and names(path) == ["file"]


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    with pytest.raises(GGUFShardError, match="is a folder"):
        PendingFile(tmp_path, 1, force=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GGUFShardError, match="pipe: is not a regular file"):
        PendingFile(tmp_path / "pipe", 1, force=True)
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    pending_path(tmp_path / "file").symlink_to(target)
    with pytest.raises(GGUFShardError, match=r"file\.sgnew: Too many levels of symbolic links"):
        PendingFile(tmp_path / "file", 1)
    assert target.read_bytes() == b"mine"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(GGUFShardError, match=r"none/file\.sgnew: No such file or directory"):
        PendingFile(tmp_path / "none" / "file", 1)


def test_a_full_disk_is_told_before_writing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    with pytest.raises(GGUFShardError, match="file: needs 100 bytes, the disk has 99 left"):
        PendingFile(path, 100)
    assert names(path) == []
    with PendingFile(path, 99) as file:
        file.commit()
    assert path.stat().st_size == 99


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("pwrite", r"file: offset 7: No space left"),
        ("fsync", r"file: fsync: No space left"),
        ("ftruncate", r"file\.sgnew: No space left"),
    ],
)
def test_what_the_disk_refuses_is_named(
    call: str, message: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, refuse)
    with (
        pytest.raises(GGUFShardError, match=message),
        PendingFile(path, 9, force=True) as file,
    ):
        file.write(b"12", 7)
        file.commit()
    assert path.read_bytes() == b"old" and names(path) == ["file"]


HOLDER = """
import sys
from forge.pending_file import PendingFile
with PendingFile(sys.argv[1], 3) as file:
    print("held", flush=True)
    sys.stdin.readline()
    file.write(b"his", 0)
    file.commit()
"""


def test_another_process_is_not_disturbed(path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(GGUFShardError, match=r"file\.sgnew: another process is writing it"):
            PendingFile(path, 3)
        assert names(path) == ["file.sgnew"]
        holder.stdin.write("go on\n")
        holder.stdin.close()
        assert holder.wait(20) == 0
    assert path.read_bytes() == b"his"


@pytest.mark.parametrize("fate", ["committed", "given up"])
def test_a_file_that_moved_before_the_lock_is_not_touched(
    fate: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our open and our lock the other writer ends: what we hold is not `NAME.sgnew` now."""
    other = PendingFile(path, 3)
    other.write(b"his", 0)
    flock = PendingFile.__init__.__globals__["fcntl"].flock

    def late(descriptor: int, how: int) -> None:
        if fate == "committed":
            other.commit()
        else:
            other.__exit__()
        flock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", late)
    with pytest.raises(GGUFShardError, match="another process is writing it"):
        PendingFile(path, 1, force=True)
    assert names(path) == (["file"] if fate == "committed" else [])
    if fate == "committed":
        assert path.read_bytes() == b"his"


def test_finishing_waits_for_a_living_writer(path: Path) -> None:
    writer = PendingFile(path, 3)
    writer.write(b"new", 0)
    with open(pending_path(path), "rb") as complete:
        reader = threading.Thread(target=finish_pending, args=(complete.fileno(), path))
        reader.start()
        reader.join(0.1)
        assert reader.is_alive() and names(path) == ["file.sgnew"]
        writer.commit()
        reader.join(10)
        assert not reader.is_alive()
        assert is_at(complete.fileno(), path)
    assert path.read_bytes() == b"new" and names(path) == ["file"]


def test_finishing_moves_what_a_dead_writer_left(path: Path) -> None:
    path.write_bytes(b"old")
    pending_path(path).write_bytes(b"new")
    with open(pending_path(path), "rb") as complete:
        finish_pending(complete.fileno(), path)
    assert path.read_bytes() == b"new" and names(path) == ["file"]


def test_what_is_settled_is_written_back_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hints: list[tuple[int, int]] = []

    def refuse(descriptor: int, offset: int, n_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        hints.append((offset, n_bytes))
        raise OSError(errno.EINVAL, "no such hint")

    monkeypatch.setattr(pending_file, "_WRITE_BACK_BYTES", 100)
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with PendingFile(tmp_path / "file", 400) as file:
        for end in (50, 99, 100, 199, 201, 400):
            file.write(b"x" * 50, end - 50)
            file.settle(end)
        file.commit()
    assert hints == [(0, 100), (100, 101), (201, 199)]
    assert (tmp_path / "file").read_bytes().count(b"x") == 202
