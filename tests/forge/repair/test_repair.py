"""What is damaged is made right, byte for byte; what cannot be is refused, and nothing changes."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from experiments.validation import gguf_factory as factory
from forge import model_sharding_tool as tool
from forge import repair
from forge.block_layouts import MEMORY_LAYOUTS, block_layout
from forge.pages import PAGE_BYTES
from forge.pending_file import journal_path
from forge.repair import RepairResult, repair_model
from forge.sgmap import core_path
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.verify import verify_model
from tests.repair_factory import (
    N_PAGES,
    POLYNOMIAL,
    TABLE,
    added,
    assert_refused,
    assert_repairs,
    at,
    edit,
    flipped,
    page,
)

# ---- damage ----


@pytest.mark.no_cover
def test_a_flipped_bit_is_named_and_mended(sharded: Path, pages: Path, model: Path) -> None:
    """Anywhere: header, content, tag, table, padding."""
    good = pages.read_bytes()
    rng = random.Random(1)
    places = [0, 4, 300, 4095, TABLE, TABLE + 59, TABLE + 60, len(good) - 1]
    places += [at(n, k) for n in range(N_PAGES) for k in (rng.randrange(4088), 4088, 4095)]
    for offset in places:
        edit(pages, flipped(pages, offset, rng.randrange(8)))
        (found,) = verify_model(sharded).bad
        (fault,) = assert_repairs(sharded, model, good).repaired
        if found.page is not None or "table is not" not in found.reason:
            assert fault == found
        else:
            entry = (offset - TABLE) // 4
            assert str(fault).startswith(f"page {entry} (shard {entry // 2}, ")
            assert "its entry in the table is " in fault.reason


@pytest.mark.parametrize("source", ["model", "core.gguf", "core.sgmap"])
def test_damage_of_whole_pages(
    source: str, sharded: Path, pages: Path, model: Path, copy: Path, other: Path, tmp_path: Path
) -> None:
    good = pages.read_bytes()
    options = ShardOptions(pages_per_shard=2)
    stale = core_path(shard_model(other, tmp_path / "other", options)).read_bytes()
    origin = model if source == "model" else copy.with_name(source)
    foreign = [(TABLE + 8, stale[TABLE + 8 : TABLE + 12]), (at(2), page(2, stale))]
    for bad, changes in [
        ([3], [(at(3), bytes(PAGE_BYTES))]),
        ([2, 5], [(at(2), page(5, good)), (at(5), page(2, good))]),
        ([6], [(at(6), page(7, good))]),
        ([4], [(at(4), page(4, stale))]),
        ([13], [(at(13), page(12, stale))]),
        ([2, 2], foreign),  # content, tag and entry of the table agree with each other
        ([*range(N_PAGES)], [(at(n, 4092), b"none") for n in range(N_PAGES)]),
        ([9], [added(pages, at(9), POLYNOMIAL)]),
        ([8, 9], [added(pages, at(9), POLYNOMIAL), flipped(pages, at(8))]),
    ]:
        edit(pages, *changes)
        result = assert_repairs(sharded, origin, good)
        assert [fault.page for fault in result.repaired] == bad
        assert result.source_differs == []


def test_a_lost_table_is_made_of_pages(sharded: Path, pages: Path, model: Path) -> None:
    good = pages.read_bytes()
    for changes in [
        [(TABLE, bytes(4 * N_PAGES))],
        [(TABLE, factory.random_bytes(PAGE_BYTES)), flipped(pages, at(3)), flipped(pages, 7)],
        [flipped(pages, TABLE + 9), (at(1), page(4, good)), flipped(pages, at(8))],
        [flipped(pages, TABLE), added(pages, at(9), POLYNOMIAL), (at(6), page(2, good))],
        [(0, factory.random_bytes(len(good)))],
    ]:
        edit(pages, *changes)
        assert_repairs(sharded, model, good)


@pytest.mark.parametrize("source", ["model", "copy"])
def test_a_file_of_another_size_is_written_anew(
    source: str, sharded: Path, pages: Path, model: Path, copy: Path
) -> None:
    good = pages.read_bytes()
    origin = model if source == "model" else copy
    for size in (0, 1, PAGE_BYTES, TABLE, len(good) - 1, len(good) + 1, 2 * len(good)):
        pages.write_bytes(good[:size].ljust(size, b"\0"))
        pages.chmod(0o640)
        (fault,) = assert_repairs(sharded, origin, good).repaired
        assert fault.reason == f"{pages}: has {size} bytes, not {len(good)}"
        assert stat.S_IMODE(pages.stat().st_mode) == 0o640
    pages.unlink()
    (fault,) = assert_repairs(sharded, origin, good).repaired
    assert fault.reason == f"{pages}: No such file or directory"


def test_a_file_that_cannot_be_read_is_written_anew(
    sharded: Path, pages: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, inode, preadv = pages.read_bytes(), pages.stat().st_ino, os.preadv

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        if os.fstat(descriptor).st_ino == inode and offset == at(0):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    (fault,) = assert_repairs(sharded, model, good).repaired
    assert fault.reason == f"{pages}: offset 4096: Input/output error"


@pytest.mark.parametrize("memory_layout", MEMORY_LAYOUTS)
def test_pages_of_every_type(memory_layout: str, tmp_path: Path) -> None:
    """Cut as `shard` cuts them, from all files of a split model; the last page is not full."""
    tensors = [
        factory.blocks(t.name, t, block_layout(t).per_page * 2 + 1, seed=i)
        for i, t in enumerate(GGML_QUANT_SIZES)
    ]
    first = factory.split_model(tmp_path, [tensors[::2], tensors[1::2]])
    map_path = shard_model(first, tmp_path / "out", ShardOptions(memory_layout))
    path = core_path(map_path)
    n_pages = load_map(map_path).n_pages
    good = edit(path, *[flipped(path, at(n, n % 4088)) for n in range(n_pages)])
    result = repair_model(map_path, first)
    assert result.ok and path.read_bytes() == good
    assert [fault.page for fault in result.repaired] == [*range(n_pages)]


def test_nothing_else_is_written(
    sharded: Path, pages: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(pages, flipped(pages, at(3)), flipped(pages, at(7, 4090)))
    pages.chmod(0o600)
    before = pages.stat()
    written = []
    pwrite = os.pwrite

    def logging(descriptor: int, data: Any, offset: int) -> int:
        if os.fstat(descriptor).st_ino == before.st_ino:
            written.append((offset, len(data)))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", logging)
    assert repair_model(sharded, model).ok
    assert written == [(at(3), PAGE_BYTES), (at(7), PAGE_BYTES)]
    assert (pages.stat().st_ino, pages.stat().st_mode) == (before.st_ino, before.st_mode)


def test_nothing_to_do(sharded: Path, pages: Path, tmp_path: Path) -> None:
    """The source is not even looked for."""
    before = [path.stat() for path in (sharded, pages, sharded.parent)]
    assert repair_model(sharded, tmp_path / "none") == RepairResult(N_PAGES)
    assert [path.stat().st_mtime_ns for path in (sharded, pages, sharded.parent)] == [
        s.st_mtime_ns for s in before
    ]


# ---- sources ----


def test_a_source_is_needed_only_in_part(
    sharded: Path, pages: Path, model: Path, copy: Path
) -> None:
    good = edit(pages, flipped(pages, at(0)), flipped(pages, 9))
    edit(model, flipped(model, 0), flipped(model, model.stat().st_size - 1))
    (difference,) = assert_repairs(sharded, model, good).source_differs
    assert difference.startswith(f"{model}: has SHA-256 ")
    edit(core_path(copy), (0, bytes(PAGE_BYTES)), (at(1), bytes(PAGE_BYTES)), (TABLE, b"none"))
    copy.unlink()
    edit(pages, flipped(pages, at(0)), flipped(pages, TABLE))
    assert assert_repairs(sharded, copy, good).source_differs == []


def test_a_wrong_source_is_refused(
    sharded: Path, pages: Path, other: Path, copy: Path, tmp_path: Path
) -> None:
    """The first page that does not fit is named."""
    options = ShardOptions(pages_per_shard=2)
    others = core_path(shard_model(other, tmp_path / "other", options))
    edit(pages, flipped(pages, at(2)), flipped(pages, at(6)))
    where = "page 2 (shard 1, blk.0.attn_q.weight): page is valid but not the one that belongs"
    for source in (other, others):
        assert_refused(sharded, source, f"{source}: {where}")
    damaged = core_path(copy)
    edit(damaged, flipped(damaged, at(6)))
    refusal = assert_refused(sharded, copy, f"{damaged}: page 6 (shard 3, token_embd.weight): ")
    assert "content has CRC32 " in refusal
    edit(pages, (TABLE, b"lost"))
    assert_refused(
        sharded, other, f"{other}: page 2 (shard 1, blk.0.attn_q.weight): shard has xxh3"
    )
    pages.unlink()
    assert_refused(sharded, other, f"{other}: page 0 (shard 0, blk.0.attn_norm.weight): shard has")


def test_a_source_with_a_forged_checksum_is_refused(sharded: Path, pages: Path, copy: Path) -> None:
    edit(core_path(copy), added(core_path(copy), at(3), POLYNOMIAL))
    edit(pages, flipped(pages, at(3)))
    assert_refused(sharded, copy, "shard has xxh3-64 ")


def test_a_source_that_is_none_is_refused(
    sharded: Path, pages: Path, model: Path, copy: Path, tmp_path: Path
) -> None:
    edit(pages, flipped(pages, at(3)))
    size = model.stat().st_size
    link = tmp_path / "link.gguf"
    link.symlink_to(pages)
    for source, reason in [
        (tmp_path / "none.gguf", "none.gguf: No such file or directory"),
        (tmp_path / "none.sgmap", "none.gguf: No such file or directory"),
        (tmp_path, f"{tmp_path}: Is a directory"),
        (pages, f"{pages}: is what is to be repaired"),
        (sharded, f"{pages}: is what is to be repaired"),
        (link, f"{link}: is what is to be repaired"),
        (factory.write(tmp_path / "long.gguf", model.read_bytes() + b"1"), f"has {size + 1} bytes"),
        (factory.write(tmp_path / "empty.gguf", b""), "empty.gguf: has 0 bytes"),
    ]:
        assert_refused(sharded, source, reason)
    os.truncate(core_path(copy), TABLE)
    assert_refused(sharded, copy, f"has {TABLE} bytes")
    assert_refused(sharded, core_path(copy), f"has {TABLE} bytes, model.gguf had {size}")
    journal_path(model).touch()
    assert_refused(sharded, model, f"{model}: an update in place was interrupted")


def test_parts_of_a_split_model(tmp_path: Path) -> None:
    parts = [[factory.tensor(f"t{i}", Type.F32, (8,), seed=i)] for i in range(3)]
    first = factory.split_model(tmp_path, parts)
    map_path = shard_model(first, tmp_path / "out")
    good = edit(core_path(map_path), (at(1), bytes(PAGE_BYTES)))
    second = first.with_name("model-00002-of-00003.gguf")
    assert_refused(map_path, second, f"{second}: is not the first part of a split model")
    content = edit(second, flipped(second, second.stat().st_size - 1))
    assert_refused(map_path, first, f"{first}: page 1 (shard 1, t1): page is valid but not")
    second.write_bytes(content[:-1])
    assert_refused(map_path, first, f"{second}: has {len(content) - 1} bytes")
    second.unlink()
    assert_refused(map_path, first, f"{second}: No such file or directory")
    second.write_bytes(content)
    assert repair_model(map_path, first).ok
    assert core_path(map_path).read_bytes() == good


# ---- the map ----


def test_a_damaged_map_is_refused(
    sharded: Path, pages: Path, model: Path, copy: Path, other: Path
) -> None:
    edit(pages, flipped(pages, at(3)))
    good = sharded.read_bytes()
    hint = "`gguf-shard shard` of the GGUF file makes it anew"
    for damaged in (good[:-1], good.replace(b"Q8_0", b"Q8_1"), b"", good.replace(b"lru", b"mru")):
        sharded.write_bytes(damaged)
        for source in (model, copy):
            assert hint in assert_refused(sharded, source, f"{sharded}: ")
    sharded.unlink()
    assert hint in assert_refused(sharded, copy, f"{sharded}: No such file or directory")


def test_a_damaged_digest_in_the_map_is_refused(
    sharded: Path, pages: Path, model: Path, copy: Path
) -> None:
    good = sharded.read_bytes()
    m = load_map(sharded)
    for digest in (m.page_crc32_xxh3_128, m.shard_xxh3_64[3]):
        place = good.index(digest.encode())
        wrong = b"0" if good[place : place + 1] != b"0" else b"1"
        sharded.write_bytes(good[:place] + wrong + good[place + 1 :])
        for source in (model, copy):
            assert_refused(sharded, source, "digests.")


# ---- the command ----


def main(*arguments: str | Path) -> int:
    return tool.main([str(argument) for argument in arguments])


def test_the_command(
    sharded: Path, pages: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("repair", sharded, "--from", model)
    assert main(*command) == 0
    assert capsys.readouterr().out == f"{sharded}: nothing to repair, {N_PAGES} pages hold\n"
    good = edit(pages, flipped(pages, at(3)))
    edit(model, flipped(model, 30))
    assert main(*command) == 0
    out, err = capsys.readouterr()
    fault, difference, summary = out.splitlines()
    assert err == ""
    assert fault.startswith(f"{sharded}: repaired: page 3 (shard 1, ")
    assert difference.startswith(f"{model}: has SHA-256 ")
    assert difference.endswith(": what was taken from it is right")
    assert summary == f"{sharded}: 1 repaired, {N_PAGES} pages hold"
    assert pages.read_bytes() == good
    edit(pages, flipped(pages, at(3)))
    assert main(*command, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    edit(pages, flipped(pages, at(3)), flipped(pages, 0))
    assert main(*command, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.keys() == {"ok", "pages", "repaired", "bad", "source_differs"}
    assert (facts["ok"], facts["pages"], facts["bad"]) == (True, N_PAGES, [])
    assert [fault["page"] for fault in facts["repaired"]] == [None, 3]
    assert main(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out)["repaired"] == []


def test_the_command_refuses_in_one_line(
    sharded: Path, pages: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(pages, flipped(pages, at(3)))
    assert main("repair", sharded, "--from", other) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{other}: page 3 (shard 1, " in err
    with pytest.raises(SystemExit) as caught:
        main("repair", sharded)
    assert caught.value.code == 2


def test_what_is_still_bad_is_said(
    sharded: Path, pages: Path, model: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A disk that damages what it is given: the journal's own check of it is taken away."""
    edit(pages, flipped(pages, at(3)))
    monkeypatch.setattr(
        repair, "finish_journal", lambda *_, **__: journal_path(sharded).unlink(missing_ok=True)
    )
    assert main("repair", sharded, "--from", model) == 1
    assert capsys.readouterr().err.startswith(f"{sharded}: page 3 (shard 1, ")
