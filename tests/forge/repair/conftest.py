"""A small sharded model, a copy of it, and another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from experiments.validation import gguf_factory as factory
from forge.sgmap import core_path
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from tests.repair_factory import N_PAGES


@pytest.fixture
def sharded(model: Path, tmp_path: Path) -> Path:
    """Two pages a shard, in a folder of its own."""
    path = shard_model(model, tmp_path / "out", ShardOptions(pages_per_shard=2))
    assert load_map(path).n_pages == N_PAGES
    return path


@pytest.fixture
def pages(sharded: Path) -> Path:
    return core_path(sharded)


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """An intact copy of the sharded model; its map."""
    shutil.copytree(sharded.parent, tmp_path / "copy")
    return tmp_path / "copy" / "core.sgmap"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model of the same shape."""
    return factory.write(tmp_path / "other.gguf", factory.small_model(seed=100))
