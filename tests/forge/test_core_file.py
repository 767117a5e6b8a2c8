"""The container, read by page."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from forge.core_file import CoreFile, core_bytes, core_header, crc_table_bytes, page_offset
from forge.errors import GGUFShardError
from forge.gguf_file import parse_header
from forge.sgmap import core_path
from forge.sgmap_reader import load_map
from forge.sharded_model import ShardedModel
from forge.verify import verify_model


@pytest.mark.parametrize("n_pages", [1, 2, 1023, 1024, 1025, 40_000_000])
def test_header_depends_on_the_number_of_pages_alone(n_pages: int) -> None:
    assert len(core_header(n_pages)) == 4096
    header = parse_header(core_header(n_pages), "core.gguf", core_bytes(n_pages))
    pages, table = header.tensors
    assert (pages.offset, pages.bytes) == (page_offset(0), 4096 * n_pages)
    assert (table.offset, table.bytes) == (page_offset(n_pages), 4 * n_pages)
    assert crc_table_bytes(n_pages) % 4096 == 0
    assert 0 <= crc_table_bytes(n_pages) - table.bytes < 4096


@pytest.mark.parametrize("change", [-4096, -1, 1, 4096])
def test_size_must_be_exact(change: int, sharded: Path) -> None:
    n_pages = load_map(sharded).n_pages
    pages = core_path(sharded)
    data = pages.read_bytes()
    pages.write_bytes((data + bytes(4096))[: len(data) + change])
    with pytest.raises(GGUFShardError, match=rf"has {len(data) + change} bytes, {n_pages} pages"):
        CoreFile(pages, n_pages)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GGUFShardError, match=r"none\.gguf: No such file or directory"):
        CoreFile(tmp_path / "none.gguf", 1)


def test_a_file_that_shrinks_is_noticed(sharded: Path) -> None:
    m = load_map(sharded)
    with CoreFile(core_path(sharded), m.n_pages) as core:
        pages = np.empty((2, 4096), np.uint8)
        core.read_pages(0, pages)
        with open(core.path, "r+b") as file:
            file.truncate(page_offset(1) + 10)
        with pytest.raises(GGUFShardError, match=r"offset 8202: the file ends, 4086 bytes short"):
            core.read_pages(0, pages)


def test_what_the_disk_cannot_read_is_named(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", refuse)
    (fault,) = verify_model(sharded).bad
    table = page_offset(load_map(sharded).n_pages)
    assert fault.reason == f"{core_path(sharded)}: offset {table}: Input/output error"


def test_read_checked_names_page_shard_and_tensor(sharded: Path) -> None:
    with ShardedModel(sharded) as model:
        last = model.map.n_pages - 1
        good = model.read_checked(0, model.map.n_pages)
        np.testing.assert_array_equal(model.read_checked(last, 1)[0], good[last])
        with open(model.core.path, "r+b") as file:
            file.seek(page_offset(last))
            file.write(b"\xff")
        with pytest.raises(
            GGUFShardError,
            match=rf"core\.gguf: page {last} \(shard {last}, raw bytes of model\.gguf\): content",
        ):
            model.read_checked(0, model.map.n_pages)
        assert model.read_checked(0, last).shape == (last, 4096)


def test_raw_segments_hold_the_source(sharded: Path, model: Path) -> None:
    source = model.read_bytes()
    with ShardedModel(sharded) as opened:
        assert len(opened.map.raw) == 3
        for segment in opened.map.raw:
            expected = source[segment.offset : segment.offset + segment.bytes]
            assert opened.read_raw(segment).tobytes() == expected


def test_a_map_without_the_header_is_no_model(sharded: Path) -> None:
    with (
        ShardedModel(sharded) as opened,
        pytest.raises(GGUFShardError, match="field raw: holds no header of part 1"),
    ):
        opened.source_header(1)
