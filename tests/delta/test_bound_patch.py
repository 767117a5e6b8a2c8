"""A patch and its models: what does not fit is refused before anything is written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from delta.apply import apply_patch
from delta.apply_in_place import update_in_place
from delta.bound_patch import BoundPatch
from delta.diff import create_patch
from delta.patch_file import PatchReader
from delta.source_model import open_source
from experiments.validation import gguf_factory as factory
from experiments.validation import hostile_patches as hostile
from experiments.validation.hostile_patches import (
    Case,
    Patch,
    having,
    header_bytes,
    material,
    target_file,
    two_way,
)  # fmt: skip
from experiments.validation.unbound_patches import ALL
from forge.errors import GGUFShardError
from forge.gguf_file import parse_header
from forge.shard import ShardOptions, shard_model
from forge.verify import verify_model
from tests.delta.refusals import refused_every_way, snapshot

# ---- what is right ----


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("of", [material, two_way])
def test_right_patches_are_taken(tmp_path: Path, of: type[Patch], reverse: bool) -> None:
    """Or the refusals below would say nothing."""
    right = of()
    if reverse and len(right.ways) == 1:
        (said,) = refused_every_way(tmp_path, right.target, right.data(), True)
        assert "reversible" in said
        return
    before, after = (right.target, right.base) if reverse else (right.base, right.target)
    patch = factory.write(tmp_path / "p", right.data())
    model = factory.write(tmp_path / "model.gguf", before)
    shard_map = shard_model(model, tmp_path, ShardOptions(pages_per_shard=2))
    apply_patch(model, patch, tmp_path / "new.gguf", reverse=reverse)
    assert (tmp_path / "new.gguf").read_bytes() == after
    update_in_place(model, patch, reverse=reverse)
    assert model.read_bytes() == after
    update_in_place(shard_map, patch, reverse=reverse)
    assert verify_model(shard_map, tmp_path / "new.gguf").ok


def test_a_header_that_stays_is_the_targets_all_the_same(tmp_path: Path) -> None:
    """The base's is taken as it was parsed, but errors name what it is of now."""
    right = material()
    data = bytearray(right.base)
    data[-1] ^= 1
    model = factory.write(tmp_path / "model.gguf", right.base)
    target = factory.write(tmp_path / "target.gguf", bytes(data))
    patch = tmp_path / "p"
    create_patch(model, target, patch)
    expected = parse_header(bytes(data), f"{patch}: target.gguf")
    with PatchReader(patch) as reader, open_source(model) as base:
        (header,) = BoundPatch(reader, base).headers
        assert base.headers[0].identity is not None
    assert header.identity is None
    assert (header.name, header.file_bytes) == (expected.name, expected.file_bytes)
    assert (header.tensors, header.header_bytes) == (expected.tensors, expected.header_bytes)
    assert header.metadata.keys() == expected.metadata.keys()


@pytest.fixture
def few_files() -> Iterator[None]:
    """No more than 64 files can be open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_parts_than_can_be_open(tmp_path: Path, few_files: None) -> None:
    """A target of a hundred parts: nothing stays of those that were begun."""
    pairs = [{"split.no": i, "split.count": 100} for i in range(100)]
    headers = [factory.header([factory.pair(key, factory.U16, n) for key, n in of.items()], [])
               for of in pairs]  # fmt: skip
    base, files = material().base, tuple(map(hostile.record, headers))
    way = hostile.Way(tuple(hostile.edit(new, header_bytes(base)) for new in headers), ())
    data = having(target_files=files, ways=(way,), groups=())(material()).data()
    model, patch = factory.write(tmp_path / "m.gguf", base), factory.write(tmp_path / "p", data)
    before = snapshot(tmp_path)
    with pytest.raises(GGUFShardError, match="Too many open files"):
        apply_patch(model, patch, tmp_path / "new.gguf")
    assert snapshot(tmp_path) == before


def test_a_name_too_long_for_what_comes_behind_it(tmp_path: Path) -> None:
    """A sharded model is built anew from a file of the name that the patch says."""
    model = factory.write(tmp_path / "m.gguf", material().base)
    shard_map = shard_model(model, tmp_path)
    patch = factory.write(tmp_path / "p", target_file(name=b"x" * 255)(material()).data())
    before = snapshot(tmp_path)
    with pytest.raises(GGUFShardError, match="name too long"):
        update_in_place(shard_map, patch)
    assert snapshot(tmp_path) == before
    apply_patch(shard_map, patch, tmp_path / "new.gguf")
    assert (tmp_path / "new.gguf").read_bytes() == material().target


# ---- what is not ----


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{of}: {name}") for of, cases in ALL.items()
             for name, case in cases.items()]
)  # fmt: skip
def test_lies_are_refused(tmp_path: Path, case: Case) -> None:
    patch = case.change(case.of())
    base = patch.target if case.reverse else patch.base
    for said in refused_every_way(tmp_path, base, patch.data(), case.reverse):
        assert case.says in said, said
