"""Models without files: what a sharded file would be, page by page, and run like one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from atlas.errors import CorruptPageError
from atlas.infer.generate import generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.target import CpuTarget, CudaTarget, Target
from experiments import synthetic_model
from experiments.make_model import PRESETS, Preset, write_model
from experiments.synthetic_model import SyntheticModel
from forge.errors import GGUFShardError
from forge.pages import unpack_blocks
from forge.sgmap import render_map
from forge.sgmap_reader import parse_map
from forge.shard import ShardOptions, shard_model
from forge.sharded_model import ShardedModel
from forge.sizes import Size

SMALL = Preset(32, 1, 64, 2, 1, 260, 64)


def continuation(target: Target, fraction: float, type_name: str = "F16") -> list[int]:
    model = SyntheticModel(SMALL, type_name, pages_per_shard=1)
    with LlamaModel(model, target, Size(fraction=fraction), n_context=8) as opened:
        result = generate(opened, [1, 259], 2, Sampler(temperature=0))
    assert np.isfinite(result.prompt_logits).all() and 0.2 < result.prompt_logits.std() < 5
    return result.tokens


@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "Q4_0"])
def test_tokens_do_not_depend_on_the_budget(type_name: str) -> None:
    tokens = continuation(CpuTarget(), 1.0, type_name)
    assert continuation(CpuTarget(), 0.5, type_name) == tokens


@pytest.mark.cuda
def test_kernels_give_the_same_tokens(cuda_target: CudaTarget) -> None:
    assert continuation(cuda_target, 0.5) == continuation(CpuTarget(), 1.0)


@pytest.mark.parametrize("type_name", ["F16", "Q4_0"])
def test_the_map_is_that_of_a_sharded_file(tmp_path: Path, type_name: str) -> None:
    shape = PRESETS["tiny"]
    file = write_model(tmp_path / "tiny.gguf", shape, type_name)
    with ShardedModel(shard_model(file, tmp_path, ShardOptions())) as sharded:
        made = SyntheticModel(shape, type_name)
        for name in ("tensors", "raw", "n_pages", "pages_per_shard"):
            assert getattr(made.map, name) == getattr(sharded.map, name), name
        assert made.map.atlas.priority_zones == sharded.map.atlas.priority_zones
        assert made.source_header().tensors == sharded.source_header().tensors
    assert parse_map(render_map(made.map), made.map_path) == made.map


def test_every_page_holds_and_may_be_read_in_any_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_model, "_TILE_PAGES", 7)  # so that matrices repeat it
    model = SyntheticModel(SMALL, "F16", pages_per_shard=4)
    n = model.map.n_pages
    pages = model.read_checked(0, n)
    assert n > 3 * 7 and 10 < len(np.unique(model.page_crc32)) < n
    for first, count in ((0, 1), (5, 9), (n - 3, 3)):
        np.testing.assert_array_equal(
            model.read_checked(first, count), pages[first : first + count]
        )
    with pytest.raises(GGUFShardError, match=f"there are {n}"):
        model.read_checked(n - 1, 2)


def test_blocks_are_those_in_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_model, "_TILE_PAGES", 3)
    model = SyntheticModel(SMALL, "F16")
    entry = next(t for t in model.map.tensors if t.name == "output.weight")
    (place,) = entry.slices
    blocks, found = np.empty(entry.slice_bytes, np.uint8), np.empty(entry.slice_bytes, np.uint8)
    unpack_blocks(
        model.read_checked(place.first_page, place.pages), entry.layout("column_major"), blocks
    )
    model.copy_blocks("output.weight", found)
    np.testing.assert_array_equal(found, blocks)
    values = quants.dequantize(found, GGMLQuantizationType.F16)
    assert 0.9 < values.std() * 32**0.5 < 1.1


def test_a_changed_page_is_found() -> None:
    model = SyntheticModel(SMALL, "F16", pages_per_shard=1)
    model.page_crc32[model.map.atlas.priority_zones[1][1]] ^= 1
    with pytest.raises(CorruptPageError), LlamaModel(
        model, CpuTarget(), Size(fraction=1.0), n_context=8
    ) as opened:  # fmt: skip
        generate(opened, [1], 1, Sampler(temperature=0))


def test_real_shapes_take_little_memory() -> None:
    model = SyntheticModel("13b", "F16")
    assert model.map.n_pages > 6_000_000 and model.map.pages_per_shard == 256
    pages = np.empty((300, 4096), np.uint8)
    model.core.read_pages(model.map.n_pages - 5_000, pages)
    assert model.source_header().metadata["llama.block_count"] == 40


@pytest.mark.parametrize(("preset", "type_name"), [("2b", "F16"), ("1b", "F64")])
def test_unknown_shapes_and_types_are_refused(preset: str, type_name: str) -> None:
    with pytest.raises(GGUFShardError, match="not one of"):
        SyntheticModel(preset, type_name)
