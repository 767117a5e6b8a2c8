"""A small sharded model, and its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.validation import gguf_factory as factory
from forge.shard import shard_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GGUF file of about a dozen pages: every zone, experts, an unknown type, a tail."""
    return factory.write(tmp_path / "model.gguf", factory.small_model())


@pytest.fixture
def sharded(model: Path) -> Path:
    """The map of that model, sharded beside it."""
    return shard_model(model, model.parent)
