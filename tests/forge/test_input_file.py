"""What is opened is a file, or nothing is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from delta.patch_file import PatchReader
from forge.errors import GGUFShardError
from forge.gguf_file import read_gguf
from forge.input_file import open_input
from forge.sgmap_reader import load_map


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("f")
    for name in ("f", "link"):
        with open_input(tmp_path / name) as file:
            assert file.read() == b"abc"


@pytest.mark.parametrize("reader", [open_input, read_gguf, load_map, PatchReader])
def test_pipes_and_devices_are_refused(tmp_path: Path, reader: type) -> None:
    """At once: to open a pipe for reading waits for who writes it."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(GGUFShardError, match=f"^{path}: is not a regular file$"):
            reader(path)


def test_folders_and_missing_files_are_errors_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        open_input(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_input(tmp_path / "missing")
