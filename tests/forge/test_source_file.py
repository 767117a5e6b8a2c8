"""A source file is read in one state, or not at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forge.errors import GGUFShardError
from forge.gguf_file import read_gguf
from forge.source_file import SourceFile


@pytest.mark.parametrize("n_bytes", [0, 1, 4096])
def test_reads_what_is_asked_for(model: Path, n_bytes: int) -> None:
    content = model.read_bytes()
    with SourceFile(read_gguf(model)) as source:
        assert source.header.file_bytes == len(content)
        assert source.read(5, n_bytes).tobytes() == content[5 : 5 + n_bytes]
        buffer = np.full(n_bytes + 2, 0xEE, np.uint8)
        source.read_into(7, buffer[1:-1])
        assert buffer.tobytes() == b"\xee" + content[7 : 7 + n_bytes] + b"\xee"
        assert os.fstat(source.fileno()).st_size == len(content)
        source.check_unchanged()
    with pytest.raises(ValueError, match="closed"):
        source.fileno()


def test_the_end_of_the_file_is_named(model: Path) -> None:
    size = model.stat().st_size
    with (
        SourceFile(read_gguf(model)) as source,
        pytest.raises(GGUFShardError, match=rf"model\.gguf: offset {size}: the file ends, 1 bytes"),
    ):
        source.read(size - 3, 4)


def test_changes_are_found(model: Path) -> None:
    header = read_gguf(model)
    changed = r"model\.gguf: changed while it was read"
    with pytest.raises(GGUFShardError, match=changed):
        SourceFile(replace(header, file_bytes=header.file_bytes - 1))
    with SourceFile(header) as source:
        os.utime(model, ns=(1, 1))
        with pytest.raises(GGUFShardError, match=changed):
            source.check_unchanged()
    with pytest.raises(GGUFShardError, match=changed):
        SourceFile(header)  # which was read before that
    with SourceFile(read_gguf(model)) as source:
        os.truncate(model, 10)
        with pytest.raises(GGUFShardError, match=changed):
            source.check_unchanged()


def test_another_file_in_the_same_place_is_found(model: Path) -> None:
    header = read_gguf(model)
    other = model.with_name("other")
    shutil.copy2(model, other)  # with the same size and time
    os.replace(other, model)
    with pytest.raises(GGUFShardError, match=r"model\.gguf: changed while it was read"):
        SourceFile(header)
