"""Every damage is found, and named."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.validation import gguf_factory as factory
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.restore import restore_model
from forge.sgmap import core_path
from forge.sgmap_reader import load_map, parse_map
from forge.shard import ShardOptions, shard_model
from forge.verify import Fault, VerifyResult, verify_model

shared_folder = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def pages(sharded: Path) -> Path:
    return core_path(sharded)


def write_at(path: Path, offset: int, data: bytes) -> bytes:
    """Change an existing file in place; returns what stood there."""
    with open(path, "r+b") as file:
        file.seek(offset)
        before = file.read(len(data))
        file.seek(offset)
        file.write(data)
    return before


def faults_with(path: Path, offset: int, bit: int, map_path: Path) -> list[Fault]:
    """What `verify` finds while one bit of a file is flipped."""
    with open(path, "rb") as file:
        file.seek(offset)
        byte = file.read(1)[0]
    write_at(path, offset, bytes([byte ^ 1 << bit]))
    try:
        result = verify_model(map_path)
    finally:
        write_at(path, offset, bytes([byte]))
    assert not result.ok
    assert result.as_dict()["bad"]
    return result.bad


def place_of(offset: int, n_pages: int) -> str:
    """Which part of `core.gguf` a byte belongs to."""
    page, within = divmod(offset - PAGE_BYTES, PAGE_BYTES)
    if page < 0:
        return "header"
    if page >= n_pages:
        return "table" if offset - PAGE_BYTES * (1 + n_pages) < 4 * n_pages else "padding"
    return "content" if within < 4088 else "tag"


def assert_fault_names(place: str, offset: int, faults: list[Fault]) -> None:
    (fault,) = faults
    if place in ("content", "tag"):
        assert fault.page == fault.shard == offset // PAGE_BYTES - 1
        assert fault.tensor
        assert str(fault).startswith(f"page {fault.page} (shard {fault.shard}, {fault.tensor}): ")
    elif place == "table":
        assert fault.page is None and "page_crc32" in fault.reason
    else:
        assert fault.page is None and f"{place}: byte {offset} is 0x" in fault.reason


@pytest.mark.no_cover
def test_a_flipped_bit_of_the_pages_file_is_found(sharded: Path, pages: Path) -> None:
    """Every byte of headers, tags and table, and every 61st of contents and padding."""
    assert verify_model(sharded).ok
    n_pages = load_map(sharded).n_pages
    rng = random.Random(1)
    used_header = len(pages.read_bytes()[:PAGE_BYTES].rstrip(b"\0"))
    for offset in range(pages.stat().st_size):
        place = place_of(offset, n_pages)
        often = place in ("tag", "table") or offset < used_header
        if often or offset % 61 == 0:
            faults = faults_with(pages, offset, rng.randrange(8), sharded)
            assert_fault_names(place, offset, faults)


@shared_folder
@given(data=st.data())
def test_any_flipped_bit_of_the_pages_file_is_found(
    data: st.DataObject, sharded: Path, pages: Path
) -> None:
    offset = data.draw(st.integers(0, pages.stat().st_size - 1))
    faults = faults_with(pages, offset, data.draw(st.integers(0, 7)), sharded)
    assert_fault_names(place_of(offset, load_map(sharded).n_pages), offset, faults)


@pytest.mark.no_cover
def test_every_flipped_bit_of_the_map_is_found(sharded: Path) -> None:
    """By its reader, or, in the digests of the pages, beside these."""
    data = bytearray(sharded.read_bytes())
    named = re.compile(rf"{sharded}: (field \S|byte \d|not JSON: )")
    in_digests = 0
    for offset in range(len(data)):
        for bit in range(8):
            data[offset] ^= 1 << bit
            try:
                parse_map(bytes(data), sharded)
            except GGUFShardError as error:
                assert named.match(str(error)) and "\n" not in str(error), error
            else:
                in_digests += 1
                (fault,) = faults_with(sharded, offset, bit, sharded)
                assert re.search(r"\(digests\.(page_crc32_xxh3_128|shard_xxh3_64\[)", fault.reason)
            data[offset] ^= 1 << bit
    assert 0 < in_digests < 8 * (32 + 16 * load_map(sharded).n_shards)


def test_swapped_pages_are_found(sharded: Path, pages: Path) -> None:
    first = write_at(pages, PAGE_BYTES * 3, pages.read_bytes()[PAGE_BYTES * 5 : PAGE_BYTES * 6])
    write_at(pages, PAGE_BYTES * 5, first)
    result = verify_model(sharded)
    assert [fault.page for fault in result.bad] == [2, 4]
    assert all("valid but not the one that belongs here" in fault.reason for fault in result.bad)


def test_a_stale_page_is_found(sharded: Path, pages: Path, tmp_path: Path) -> None:
    """A page of an earlier state of the same model: right in itself, right in its place."""
    older = factory.write(tmp_path / "older.gguf", factory.small_model(seed=100))
    stale = core_path(shard_model(older, tmp_path / "older")).read_bytes()
    write_at(pages, PAGE_BYTES * 2, stale[PAGE_BYTES * 2 : PAGE_BYTES * 3])
    (fault,) = verify_model(sharded).bad
    assert fault.page == 1 and "valid but not the one" in fault.reason


def test_a_forged_checksum_is_found(sharded: Path, pages: Path) -> None:
    """CRC32 is linear: adding a multiple of its polynomial leaves tag and table as they are."""
    content = pages.read_bytes()[PAGE_BYTES * 4 : PAGE_BYTES * 4 + 5]
    polynomial = int(f"{0x104C11DB7:033b}"[::-1], 2).to_bytes(5, "little")
    forged = bytes(a ^ b for a, b in zip(content, polynomial, strict=True))
    write_at(pages, PAGE_BYTES * 4, forged)
    (fault,) = verify_model(sharded).bad
    assert (fault.page, fault.shard) == (3, 3)
    assert "shard has xxh3-64" in fault.reason and "digests.shard_xxh3_64[3]" in fault.reason


def test_many_faults_are_all_reported(sharded: Path, pages: Path) -> None:
    n_pages = load_map(sharded).n_pages
    write_at(pages, 0, b"X")
    for page in range(n_pages):
        write_at(pages, PAGE_BYTES * (1 + page) + 4092, b"none")
    result = verify_model(sharded)
    assert [fault.page for fault in result.bad] == [None, *range(n_pages)]
    assert result.pages == n_pages


@pytest.mark.parametrize("change", [-PAGE_BYTES, -1, 1, PAGE_BYTES])
def test_another_size_is_found(change: int, sharded: Path, pages: Path) -> None:
    os.truncate(pages, pages.stat().st_size + change)
    (fault,) = verify_model(sharded).bad
    assert f"core.gguf: has {pages.stat().st_size} bytes" in fault.reason


@pytest.mark.parametrize("name", ["core.gguf", "core.sgmap"])
def test_a_missing_file_is_found(name: str, sharded: Path) -> None:
    sharded.with_name(name).unlink()
    (fault,) = verify_model(sharded).bad
    assert fault.reason == f"{sharded.with_name(name)}: No such file or directory"


@pytest.mark.parametrize("end", [0, 1, 100, -1])
def test_a_truncated_map_is_found(end: int, sharded: Path) -> None:
    sharded.write_bytes(sharded.read_bytes()[:end])
    (fault,) = verify_model(sharded).bad
    assert "not JSON" in fault.reason or "not as written" in fault.reason


def test_the_map_of_another_model_is_found(sharded: Path, tmp_path: Path) -> None:
    same_shape = factory.write(tmp_path / "other.gguf", factory.small_model(seed=100))
    other = shard_model(same_shape, tmp_path / "other")
    sharded.write_bytes(other.read_bytes())
    (fault,) = verify_model(sharded).bad
    assert "digests.page_crc32_xxh3_128" in fault.reason
    other_layout = shard_model(same_shape, tmp_path / "again", ShardOptions(pages_per_shard=16))
    sharded.write_bytes(other_layout.read_bytes())
    (fault,) = verify_model(sharded).bad
    assert "core.gguf: has" in fault.reason


def test_against_another_source(sharded: Path, model: Path, tmp_path: Path) -> None:
    assert verify_model(sharded, against=model).ok
    write_at(model, model.stat().st_size - 1, b"?")
    (fault,) = verify_model(sharded, against=model).bad
    assert f"{model}: has SHA-256 " in fault.reason
    (fault,) = verify_model(sharded, against=tmp_path / "none.gguf").bad
    assert fault.reason == f"{tmp_path / 'none.gguf'}: No such file or directory"


def test_against_all_parts_of_a_split_model(tmp_path: Path) -> None:
    parts = [[factory.tensor(f"t{i}", Type.F32, (8,), seed=i)] for i in range(3)]
    first = factory.split_model(tmp_path, parts)
    map_path = shard_model(first, tmp_path)
    assert verify_model(map_path, against=first).ok
    second = first.with_name("model-00002-of-00003.gguf")
    write_at(second, 0, b"?")
    (fault,) = verify_model(map_path, against=first).bad
    assert fault.reason.startswith(f"{second}: has SHA-256 ")


def test_results_are_plain_data() -> None:
    result = VerifyResult(2, [Fault(1, 0, "a", "why"), Fault(None, None, None, "what")])
    assert result.as_dict() == {
        "ok": False,
        "pages": 2,
        "bad": [
            {"page": 1, "shard": 0, "tensor": "a", "reason": "why"},
            {"page": None, "shard": None, "tensor": None, "reason": "what"},
        ],
    }
    assert str(result.bad[1]) == "what"


def test_against_reads_the_copy_it_is_given(tmp_path: Path) -> None:
    """Not the intact original that happens to lie beside it."""
    tensors = [[factory.tensor(f"t{i}", Type.F32, (8,), seed=i)] for i in range(2)]
    first = factory.split_model(tmp_path, tensors)
    map_path = shard_model(first, tmp_path / "out")
    copies = restore_model(map_path, tmp_path / "copy-00001-of-00002.gguf")
    assert verify_model(map_path, against=copies[0]).ok
    with open(copies[1], "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    (fault,) = verify_model(map_path, against=copies[0]).bad
    assert str(fault).startswith(f"{copies[1]}: has SHA-256")
    (fault,) = verify_model(map_path, against=copies[1]).bad
    assert "is not the first part of a split model" in str(fault)


def test_a_source_that_is_a_pipe_is_not_waited_for(sharded: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (fault,) = verify_model(sharded, tmp_path / "pipe.gguf").bad
    assert fault.reason == f"{tmp_path / 'pipe.gguf'}: is not a regular file"
