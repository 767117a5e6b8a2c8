"""Shard, then restore: the same bytes, whatever the model is made of."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import Tensor
from forge.block_layouts import MEMORY_LAYOUTS, block_layout
from forge.errors import GGUFShardError
from forge.restore import restore_model
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.verify import verify_model

both_layouts = pytest.mark.parametrize("memory_layout", MEMORY_LAYOUTS)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_comes_back(model: Path, folder: Path, options: ShardOptions | None = None) -> Path:
    """Shard, verify, restore and compare; returns the map."""
    map_path = shard_model(model, folder, options)
    result = verify_model(map_path, against=model)
    assert result.ok, result.bad
    assert result.pages == load_map(map_path).n_pages
    (restored,) = restore_model(map_path, folder / "restored.gguf")
    assert restored.read_bytes() == model.read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["core.gguf", "core.sgmap", "restored.gguf"]
    return map_path


@both_layouts
def test_real_models_come_back(memory_layout: str, models: Path, tmp_path: Path) -> None:
    paths = sorted(models.rglob("*.gguf"))
    assert paths
    for path in paths:
        options = ShardOptions(memory_layout)
        map_path = shard_model(path, tmp_path, options, force=True)
        restore_model(map_path, tmp_path / "restored.gguf", force=True)
        assert sha256(tmp_path / "restored.gguf") == sha256(path), path.name


@both_layouts
def test_every_type_comes_back(memory_layout: str, tmp_path: Path) -> None:
    tensors = []
    for ggml_type in GGML_QUANT_SIZES:
        per_page = block_layout(ggml_type).per_page
        for n_blocks in (1, per_page, per_page + 1):
            name = f"{ggml_type.name}.{n_blocks}"
            tensors.append(factory.blocks(name, ggml_type, n_blocks, seed=len(tensors)))
    model = factory.write(tmp_path / "model.gguf", factory.gguf(tensors))
    options = ShardOptions(memory_layout, pages_per_shard=8)
    map_path = assert_comes_back(model, tmp_path / "out", options)
    assert len(load_map(map_path).tensors) == len(tensors)


PLAIN = factory.tensor("a.weight", Type.Q4_0, (32, 40))
VARIANTS = {
    "no tensors": factory.gguf(),
    "no tensors, trailing zeros": factory.gguf(tail=bytes(5)),
    "metadata of many pages": factory.gguf(
        [PLAIN], [factory.array("k", factory.STRING, ["word"] * 5000)]
    ),
    "non-zero padding": factory.gguf([PLAIN, Tensor("b", 0, (3,), b"x" * 12)], padding=7),
    "trailing bytes": factory.gguf([PLAIN], tail=b"trailing" * 2000),
    "much zero padding": factory.gguf([PLAIN], tail=bytes(9 << 20) + b"!"),
    "unknown type": factory.gguf([Tensor("u", factory.UNKNOWN_TYPE, (3,), b"?" * 9000), PLAIN]),
    "version 2": factory.gguf([PLAIN], version=2),
    "experts": factory.gguf([factory.tensor("blk.0.ffn_up_exps.weight", Type.Q6_K, (256, 30, 5))]),
    "experts of one row": factory.gguf(
        [factory.tensor("blk.0.ffn_up_exps.weight", Type.F32, (32, 1, 1))]
    ),
    "tensors out of order": factory.gguf(
        [Tensor("behind", 0, (8,), b"", offset=32), Tensor("front", 0, (8,), b"ab" * 32, offset=0)]
    ),
    "names that are not UTF-8": factory.gguf([Tensor(b"\xff\n\x1b", 0, (1,), b"1234")]),
    **{
        f"alignment {n}": factory.gguf([PLAIN, factory.tensor("b", Type.F32, (5,))], alignment=n)
        for n in (1, 2, 8, 64, 4096)
    },
    "everything": factory.small_model(),
}


@both_layouts
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_come_back(variant: str, memory_layout: str, tmp_path: Path) -> None:
    model = factory.write(tmp_path / "model.gguf", VARIANTS[variant])
    assert_comes_back(model, tmp_path / "out", ShardOptions(memory_layout))


def test_zero_padding_takes_no_pages(tmp_path: Path) -> None:
    model = factory.write(tmp_path / "model.gguf", VARIANTS["much zero padding"])
    m = load_map(shard_model(model, tmp_path))
    assert [segment.bytes for segment in m.raw][1:] == [(9 << 20) + 1 - 2 * (4 << 20)]
    assert m.n_pages < 300


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_model_comes_back(tmp_path: Path, data: st.DataObject) -> None:
    kinds = st.sampled_from([*Type, None])
    tensors = []
    for number, kind in enumerate(data.draw(st.lists(kinds, max_size=6))):
        n = data.draw(st.integers(1, 700))
        if kind is None:
            payload = factory.random_bytes(n, number)
            tensors.append(Tensor(f"t{number}", factory.UNKNOWN_TYPE, (n,), payload))
        else:
            tensors.append(factory.blocks(f"t{number}", kind, n, number))
    model = factory.write(
        tmp_path / "model.gguf",
        factory.gguf(
            tensors,
            alignment=data.draw(st.sampled_from([1, 32, 256])),
            padding=data.draw(st.sampled_from([0, 1])),
            tail=data.draw(st.binary(max_size=20)),
        ),
    )
    options = ShardOptions(
        data.draw(st.sampled_from(MEMORY_LAYOUTS)),
        pages_per_shard=data.draw(st.sampled_from([None, 1, 4, 256])),
    )
    map_path = shard_model(model, tmp_path, options, force=True)
    restore_model(map_path, tmp_path / "restored.gguf", force=True)
    assert (tmp_path / "restored.gguf").read_bytes() == model.read_bytes()


def split_model(folder: Path) -> list[Path]:
    parts = [
        [factory.tensor(f"blk.{i}.attn_q.weight", Type.Q8_0, (32, 100 * i + 1), seed=i)]
        for i in range(3)
    ]
    first = factory.split_model(folder, parts)
    return sorted(folder.glob(first.name.replace("00001-of", "*-of")))


def test_split_models_come_back_as_their_parts(tmp_path: Path) -> None:
    sources = split_model(tmp_path)
    assert len(sources) == 3
    map_path = shard_model(sources[0], tmp_path / "out")
    assert [source.name for source in load_map(map_path).source] == [p.name for p in sources]
    assert verify_model(map_path, against=sources[0]).ok
    for output, stem in [
        ("copy-00001-of-00003.gguf", "copy"), ("any.gguf", "any"), ("bare", "bare"),
    ]:  # fmt: skip
        written = restore_model(map_path, tmp_path / output)
        assert [p.name for p in written] == [f"{stem}-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        assert list(map(sha256, written)) == list(map(sha256, sources))


def test_a_part_in_the_way_stops_all(tmp_path: Path) -> None:
    map_path = shard_model(split_model(tmp_path)[0], tmp_path)
    folder = tmp_path / "restored"
    folder.mkdir()
    (folder / "m-00002-of-00003.gguf").write_bytes(b"mine")
    with pytest.raises(GGUFShardError, match=r"m-00002-of-00003\.gguf: exists already"):
        restore_model(map_path, folder / "m.gguf")
    assert [p.name for p in folder.iterdir()] == ["m-00002-of-00003.gguf"]


def test_damage_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = factory.write(tmp_path / "model.gguf", factory.small_model())
    map_path = shard_model(model, tmp_path / "out")
    core = bytearray((tmp_path / "out/core.gguf").read_bytes())
    m = load_map(map_path)
    page = next(t for t in m.tensors if t.name == "output.weight").slices[0].first_page
    core[4096 * (1 + page) + 17] ^= 1
    (tmp_path / "out/core.gguf").write_bytes(core)
    target = factory.write(tmp_path / "restored.gguf", b"what was there")
    expected = rf"core\.gguf: page {page} \(shard {page}, output\.weight\): content has CRC32"
    with pytest.raises(GGUFShardError, match=expected):
        restore_model(map_path, target, force=True)
    assert target.read_bytes() == b"what was there"
    assert not target.with_name("restored.gguf.sgnew").exists()


def test_another_sha256_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page holds, yet the file is not the source: the last line of defence."""
    model = factory.write(tmp_path / "model.gguf", factory.small_model())
    map_path = shard_model(model, tmp_path)
    monkeypatch.setattr("forge.source_bytes.unpack_raw", lambda pages, n: pages.reshape(-1)[:n] ^ 1)
    with pytest.raises(GGUFShardError, match=r"restored model\.gguf has SHA-256 [0-9a-f]{64}, not"):
        restore_model(map_path, tmp_path / "restored.gguf")
    assert not list(tmp_path.glob("restored*"))


@pytest.mark.parametrize("name", ["core.gguf", "core.sgmap"])
def test_the_sharded_model_is_not_overwritten(name: str, tmp_path: Path) -> None:
    model = factory.write(tmp_path / "model.gguf", factory.small_model())
    map_path = shard_model(model, tmp_path)
    with pytest.raises(GGUFShardError, match="is the sharded model itself"):
        restore_model(map_path, tmp_path / name, force=True)
    assert verify_model(map_path).ok
