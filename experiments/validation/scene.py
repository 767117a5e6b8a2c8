"""The models that faults are put into: small ones made by hand, and the demonstration model.

    small.gguf       a dozen pages: every zone, several types, experts, an unknown type, a tail
    newer.gguf       another version of it: some bytes of some tensors, another text in the header
    small/ newer/    core.gguf and core.sgmap of each
    patch            makes newer of small; reversible
    demo/            the demonstration model, sharded

Originals are never touched: a probe takes copies.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from delta.diff import create_patch
from experiments.quickstart import MODEL as DEMO_MODEL
from experiments.validation import gguf_factory as factory
from experiments.validation.effort import Effort
from forge.shard import ShardOptions, shard_model


class Scene:
    """Originals in a folder, made when they are first asked for.

    Parameters
    ----------
    folder
        An empty folder that exists.
    effort
        How much is to be tried.
    seed
        Of everything random.
    """

    def __init__(self, folder: Path, effort: Effort, seed: int = 0) -> None:
        self.folder = folder
        self.effort = effort
        self.seed = seed
        self._numbers = itertools.count()

    @cached_property
    def small(self) -> Path:
        """A GGUF file of about a dozen pages."""
        return factory.write(self.folder / "small.gguf", factory.small_model(self.seed))

    @cached_property
    def newer(self) -> Path:
        """Another version of it, with the same tensors."""
        return factory.write(self.folder / "newer.gguf", factory.newer_small_model(self.seed))

    @cached_property
    def small_map(self) -> Path:
        """The map of the small model; beside it `core.gguf`. Two pages a shard."""
        return shard_model(self.small, self.folder / "small", ShardOptions(pages_per_shard=2))

    @cached_property
    def newer_map(self) -> Path:
        """The map of the other version."""
        return shard_model(self.newer, self.folder / "newer", ShardOptions(pages_per_shard=2))

    @cached_property
    def patch(self) -> Path:
        """A reversible patch from the small model to the other version."""
        path = self.folder / "patch"
        create_patch(self.small, self.newer, path, reversible=True)
        return path

    @property
    def demo_model(self) -> Path:
        """The demonstration model's GGUF file, 3.8 MB, which is part of the project."""
        return DEMO_MODEL

    @cached_property
    def demo_map(self) -> Path:
        """The map of the demonstration model, sharded."""
        return shard_model(DEMO_MODEL, self.folder / "demo")

    @contextmanager
    def copies(self, *originals: Path) -> Iterator[Path]:
        """A new folder with copies of files under their own names; gone afterwards.

        Of a map its `core.gguf` is copied, too.
        """
        folder = self.folder / f"probe-{next(self._numbers)}"
        folder.mkdir()
        try:
            for path in originals:
                shutil.copyfile(path, folder / path.name)
                if path.suffix == ".sgmap":
                    core = path.with_suffix(".gguf")
                    shutil.copyfile(core, folder / core.name)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Names of files in a folder that a writer has left half done."""
    return sorted(p.name for p in folder.rglob("*") if p.suffix in (".sgnew", ".sgjournal"))
