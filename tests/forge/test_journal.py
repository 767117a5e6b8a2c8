"""A change in place: what it will be, what it is, who may make it, and which files it is for."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.validation import gguf_factory as factory
from forge import journal, journal_file
from forge.errors import GGUFShardError
from forge.journal import JournalWriter, finish_journal, journal_path
from forge.pending_file import PendingFile, pending_path
from tests.journal_factory import CHANGE, NAMES, NEW, OLD, Change, contents, names, set_contents


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    """Two files that stand for a sharded model; what is in them is all the same to a journal."""
    path = tmp_path / "core.sgmap"
    set_contents(path, OLD)
    return path


def test_a_change_happens_when_it_is_finished(owner: Path) -> None:
    assert finish_journal(owner) is False
    with CHANGE.open(owner) as writer:
        for record in CHANGE.records:
            writer.record(*record)
        assert contents(owner) == OLD
        assert names(owner) == [*NAMES, "core.sgmap.sgjournal.sgnew", "core.sgmap.sgnew"]
        writer.commit()
        assert contents(owner) == OLD
        assert names(owner) == [*NAMES, "core.sgmap.sgjournal"]
        assert finish_journal(str(owner)) is True
    assert contents(owner) == NEW and names(owner) == [*NAMES]
    assert finish_journal(owner) is False


def test_progress_is_told(owner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CHANGE.write(owner)
    size = journal_path(owner).stat().st_size
    told: list[int] = []

    @contextmanager
    def bar(n_bytes: int, label: str, show: bool) -> Iterator[Callable[[int], None]]:
        assert (n_bytes, show) == (3 * size, True)
        yield told.append

    monkeypatch.setattr(journal, "progress_bar", bar)
    finish_journal(owner, progress=True)
    recorded = sum(len(data) for _, _, data in CHANGE.records)
    assert sum(told) == size - 16 + 2 * recorded


def test_without_commit_nothing_happens(owner: Path) -> None:
    with pytest.raises(ZeroDivisionError), CHANGE.open(owner) as writer:
        writer.record(*CHANGE.records[0])
        raise ZeroDivisionError
    assert finish_journal(owner) is False
    assert contents(owner) == OLD and names(owner) == [*NAMES]


def test_a_change_of_sizes_alone(owner: Path) -> None:
    for sizes in [(20_001, 699), (20_000, 0), (0, 1)]:
        before = contents(owner)
        Change(sizes, []).write(owner)
        assert finish_journal(owner)
        assert contents(owner) == Change(sizes, []).apply(before)


# ---- any change, against a plain bytearray ----

OFFSETS = st.integers(0, 130)
RECORDS = st.lists(st.tuples(st.integers(0, 1), OFFSETS, st.binary(max_size=40)), max_size=12)


@pytest.mark.no_cover
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    old=st.lists(st.binary(max_size=130), min_size=2, max_size=2),
    sizes=st.tuples(OFFSETS, OFFSETS),
    records=RECORDS,
    limits=st.sampled_from([(1, 3, 1), (16, 20, 4), (1 << 20, 4 << 20, 4096)]),
)
def test_any_change(
    tmp_path: Path, old: list[bytes], sizes: tuple[int, int],
    records: list[tuple[int, int, bytes]], limits: tuple[int, int, int],
) -> None:  # fmt: skip
    owner = tmp_path / "core.sgmap"
    set_contents(owner, old)
    recorded: list[tuple[int, int, bytes]] = []
    taken: list[set[int]] = [set(), set()]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "_BUFFER_BYTES", limits[0])
        patched.setattr(journal_file, "_PIECE_BYTES", limits[1])
        patched.setattr(journal_file, "_TABLE_ROWS", limits[2])
        with Change(sizes, []).open(owner) as writer:
            for file, offset, data in records:
                covered = set(range(offset, offset + len(data)))
                if offset + len(data) > sizes[file] or covered & taken[file]:
                    with pytest.raises(ValueError, match=r"do not lie in|overlap a range"):
                        writer.record(file, offset, data)
                else:
                    writer.record(file, offset, np.frombuffer(data, np.uint8))
                    taken[file] |= covered
                    recorded.append((file, offset, data))
                assert_overlay(writer, Change(sizes, recorded), old)
            writer.commit()
        assert contents(owner) == old
        assert finish_journal(owner)
    assert contents(owner) == Change(sizes, recorded).apply(old)


def assert_overlay(writer: JournalWriter, change: Change, old: list[bytes]) -> None:
    for file, future in enumerate(change.apply(old)):
        base = Change(change.sizes, []).apply(old)[file]
        for begin, end in [(0, len(base)), (7, 8), (20, 61), (60, 60)]:
            buffer = np.frombuffer(base[begin:end], np.uint8).copy()
            writer.overlay(file, begin, buffer)
            assert buffer.tobytes() == future[begin:end]


@pytest.mark.parametrize("order", [1, -1, 7], ids=["in order", "backwards", "mixed"])
def test_pages_here_and_there(order: int, owner: Path) -> None:
    n = 40
    old = [factory.random_bytes(2 * n * 4096, 8), b""]
    set_contents(owner, old)
    records = [(0, 8192 * (i * order % n), factory.random_bytes(4096, i)) for i in range(n)]
    change = Change((len(old[0]), 0), records)
    change.write(owner)
    assert finish_journal(owner)
    assert contents(owner) == change.apply(old)


def test_overlays_of_many_threads(owner: Path) -> None:
    """While one thread records, what is recorded already can be seen by others."""
    size = 1 << 20
    with Change((size, 700), []).open(owner) as writer:
        base = Change((size, 700), []).apply(OLD)[0]
        recorded = 0
        failures: list[int] = []

        def watch(seed: int) -> None:
            rng = np.random.default_rng(seed)
            while recorded < size // 512:
                known = recorded
                page = int(rng.integers(0, max(known, 1)))
                buffer = np.frombuffer(base[512 * page :][:512], np.uint8).copy()
                writer.overlay(0, 512 * page, buffer)
                if page < known and buffer.tobytes() != bytes([page % 251]) * 512:
                    failures.append(page)

        watchers = [threading.Thread(target=watch, args=(seed,)) for seed in range(3)]
        for watcher in watchers:
            watcher.start()
        for page in range(size // 512):
            writer.record(0, 512 * page, bytes([page % 251]) * 512)
            recorded = page + 1
        for watcher in watchers:
            watcher.join()
    assert failures == []


def test_the_same_place_is_not_written_twice(owner: Path) -> None:
    with CHANGE.open(owner) as writer:
        writer.record(0, 100, b"x" * 10)
        writer.record(1, 100, b"x" * 10)
        for offset, n_bytes in [(100, 10), (109, 1), (100, 1), (91, 10), (0, 200), (105, 2)]:
            with pytest.raises(ValueError, match=f"bytes {offset} to {offset + n_bytes - 1} over"):
                writer.record(0, offset, b"y" * n_bytes)
        writer.record(0, 110, b"x")
        writer.record(0, 99, b"x")
        writer.commit()
    finish_journal(owner)
    assert contents(owner)[0][99:111] == b"x" * 12


def test_what_is_asked_for_is_checked(owner: Path) -> None:
    with CHANGE.open(owner) as writer:
        for offset, n_bytes in [(-1, 1), (23_000, 1), (22_999, 2), (0, 23_001)]:
            with pytest.raises(ValueError, match=r"core\.gguf: .* do not lie in 23000 bytes"):
                writer.record(0, offset, bytes(n_bytes))
        writer.record(0, 23_000, b"")
        writer.record(0, 0, np.empty(0, np.uint8))
    files: list[tuple[str, int]]
    for files in ([], [("core.gguf", 1), ("core.gguf", 1)], [("core.gguf", -1)]):
        with pytest.raises(ValueError, match="not files, each with a size"):
            JournalWriter(owner, files, 0)
    assert names(owner) == [*NAMES]


# ---- which files ----


@pytest.mark.parametrize("name", ["../core.gguf", "/etc/passwd", "other.gguf", "", ".", "a/b"])
def test_other_files_are_not_touched(name: str, owner: Path) -> None:
    owner.with_name("other.gguf").write_bytes(b"mine")
    with pytest.raises(GGUFShardError, match=r"sgjournal: .* is no file of core\.sgmap"):
        JournalWriter(owner, [(name, 4)], 4)
    assert names(owner) == [*NAMES, "other.gguf"]


def test_only_a_map_has_pages_beside_it(tmp_path: Path) -> None:
    for name in ("model.bin", "model.gguf"):
        (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(GGUFShardError, match=r"'model\.gguf' is no file of model\.bin"):
        JournalWriter(tmp_path / "model.bin", [("model.gguf", 4)], 4)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "nothing"])
def test_only_regular_files_are_changed(kind: str, owner: Path, tmp_path: Path) -> None:
    CHANGE.write(owner)
    committed = journal_path(owner).read_bytes()
    journal_path(owner).unlink()
    pages = owner.with_name("core.gguf")
    kept = pages.rename(tmp_path / "kept")
    if kind == "link":
        pages.symlink_to(kept)
    elif kind == "folder":
        pages.mkdir()
    elif kind == "pipe":
        os.mkfifo(pages)
    reason = {
        "link": "Too many levels of symbolic links", "folder": "Is a directory",
        "pipe": "is not a regular file", "nothing": "No such file",
    }[kind]  # fmt: skip
    with pytest.raises(GGUFShardError, match=rf"core\.gguf: {reason}"):
        CHANGE.open(owner)
    journal_path(owner).write_bytes(committed)
    with pytest.raises(GGUFShardError, match=rf"core\.gguf: {reason}") as error:
        finish_journal(owner)
    assert "\n" not in str(error.value)
    assert ("delete it and replace the model" in str(error.value)) == (kind == "nothing")
    assert kept.read_bytes() == OLD[0] and owner.read_bytes() == OLD[1]


def test_parts_of_a_split_model_are_files_of_it(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in [*parts, tmp_path / "n-00002-of-00003.gguf", tmp_path / "m-00002-of-00004.gguf"]:
        path.write_bytes(b"old")
    with JournalWriter(parts[0], [(parts[2].name, 3), (parts[0].name, 3)], 6) as writer:
        writer.record(0, 0, b"3rd")
        writer.record(1, 0, b"1st")
        writer.commit()
    assert finish_journal(parts[0])
    assert [path.read_bytes() for path in parts] == [b"1st", b"old", b"3rd"]
    for wrong in ("n-00002-of-00003.gguf", "m-00002-of-00004.gguf", "m-00004-of-00003.gguf"):
        with pytest.raises(GGUFShardError, match="is no file of m-00001-of-00003"):
            JournalWriter(parts[0], [(wrong, 3)], 3)
    with pytest.raises(GGUFShardError, match="is no file of m-00002-of-00003"):
        JournalWriter(parts[1], [(parts[0].name, 3)], 3)


@pytest.mark.parametrize("place", [0, 4095, 4096, 9000, 19_999])
def test_a_journal_is_not_written_into_other_files(place: int, owner: Path) -> None:
    """Somebody put another file of the same size there; the change leaves all but 9 bytes."""
    change = Change((20_000, 700), [(0, 4100, b"0123456"), (1, 0, b"xy")])
    change.write(owner)
    other = bytearray(OLD[0])
    other[place] ^= 1
    set_contents(owner, [bytes(other), OLD[1]])
    with pytest.raises(GGUFShardError, match=r"core\.gguf: offset \d+: not the file it is for"):
        finish_journal(owner)
    assert contents(owner) == [bytes(other), OLD[1]]
    set_contents(owner, OLD)
    assert finish_journal(owner) and contents(owner) == change.apply(OLD)


def test_nothing_is_written_before_all_is_checked(owner: Path) -> None:
    change = Change((20_000, 700), [(0, 0, b"new"), (1, 0, b"new")])
    change.write(owner)
    other = [OLD[0], OLD[1][:-1] + b"?"]
    set_contents(owner, other)
    with pytest.raises(GGUFShardError, match=r"core\.sgmap: offset 3: not the file it is for"):
        finish_journal(owner)
    assert contents(owner) == other


def test_large_files_are_known_by_samples(owner: Path) -> None:
    size = 4 << 20
    set_contents(owner, [bytes(size), b""])
    with Change((size, 0), []).open(owner) as writer:
        for offset in range(0, size, 8192):
            writer.record(0, offset, b"\1" * 4096)
        places = list(journal._sample_places(writer._ranges[0].gaps(size), size))
    assert len(places) == 64
    assert all(offset % 8192 == 4096 and n_bytes == 4096 for offset, n_bytes in places)
    assert np.diff([offset for offset, _ in places]).max() <= size // 64 + 8192


# ---- two at once ----


def test_one_writer_at_a_time(owner: Path) -> None:
    busy = r"core\.sgmap\.sgnew: another process is writing it"
    with CHANGE.open(owner) as writer:
        with pytest.raises(GGUFShardError, match=busy):
            CHANGE.open(owner)
        with pytest.raises(GGUFShardError, match=busy):
            PendingFile(owner, 0, force=True)
        writer.commit()
        with pytest.raises(GGUFShardError, match=r"sgjournal: an update in place was interrupted"):
            CHANGE.open(owner)
    assert names(owner) == [*NAMES, "core.sgmap.sgjournal"]
    with PendingFile(owner, 0, force=True):
        with pytest.raises(GGUFShardError, match=busy):
            CHANGE.open(owner)
        assert finish_journal(owner)


def test_remains_of_dead_writers_are_taken_over(owner: Path) -> None:
    pending_path(owner).write_bytes(b"remains")
    pending_path(journal_path(owner)).write_bytes(factory.random_bytes(100_000, 1))
    CHANGE.write(owner)
    assert finish_journal(owner)
    assert contents(owner) == NEW and names(owner) == [*NAMES]


def test_a_living_finisher_is_waited_for(owner: Path) -> None:
    CHANGE.write(owner)
    results: list[bool] = []
    with open(journal_path(owner), "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: results.append(finish_journal(owner)))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive() and contents(owner) == OLD
        journal_path(owner).unlink()  # as the other does at its end
    waiting.join(10)
    assert results == [True] and contents(owner) == OLD
