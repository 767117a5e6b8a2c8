"""Where compiled code is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from numba.core import config

from forge import jit


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gguf-shard" / "numba"


def test_the_folder_is_named_by_the_sources(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = jit._prepare_cache_dir()
    assert folder == root / jit._sources_digest() and folder.is_dir()
    changed = root.parent / "changed"
    (changed / "forge").mkdir(parents=True)
    (changed / "forge" / "crc32.py").write_text("another line")
    monkeypatch.setattr(jit, "_PACKAGE_ROOT", changed)
    assert jit._prepare_cache_dir() not in (None, folder)


def test_numbas_own_setting_wins(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "chosen"))
    assert jit._prepare_cache_dir() == tmp_path / "chosen" / "gguf-shard" / jit._sources_digest()


def test_only_the_last_few_versions_are_kept(root: Path) -> None:
    for age in range(12):
        old = root / f"{age:016x}"
        old.mkdir(parents=True)
        os.utime(old, (1000 - age, 1000 - age))
    (root / "something else").mkdir()
    (root / "sixteen letters!").mkdir()
    folder = jit._prepare_cache_dir()
    assert folder is not None
    kept = sorted(path.name for path in root.iterdir())
    others = ["sixteen letters!", "something else"]
    assert kept == sorted([folder.name, *others, *(f"{age:016x}" for age in range(7))])


def test_a_place_that_cannot_be_written_is_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "file"))
    assert jit._prepare_cache_dir() is None
    monkeypatch.setattr(jit, "_CACHE_DIR", None)
    assert jit.cached_njit()(lambda x: x + 1)(1) == 2
    assert str(tmp_path / "file") == config.CACHE_DIR
