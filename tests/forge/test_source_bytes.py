"""Source bytes out of pages: any range, the same as in the file; no page more than it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.validation import gguf_factory as factory
from forge import source_bytes
from forge.block_layouts import MEMORY_LAYOUTS
from forge.errors import GGUFShardError
from forge.sgmap import ShardMap
from forge.shard import ShardOptions, shard_model
from forge.sharded_model import ShardedModel
from forge.source_bytes import SourceBytes

both_layouts = pytest.mark.parametrize("memory_layout", MEMORY_LAYOUTS)


class Recorder:
    """A model that is no `ShardedModel`, and notes which pages are read."""

    def __init__(self, model: ShardedModel) -> None:
        self.map: ShardMap = model.map
        self.model = model
        self.pages: list[tuple[int, int]] = []

    def read_checked(self, first: int, count: int) -> np.ndarray:
        self.pages.append((first, count))
        return self.model.read_checked(first, count)


def gappy_model() -> bytes:
    """Tensors of many types, an unknown one, experts, zeros between them and at the end."""
    tensors = [
        factory.tensor("blk.0.ffn_up_exps.weight", Type.Q6_K, (256, 30, 3)),
        factory.tensor("a", Type.Q8_0, (32, 301), seed=1),
        factory.Tensor("u", factory.UNKNOWN_TYPE, (3,), b"?" * 9000),
        factory.tensor("b", Type.F16, (5000,), seed=2),
        factory.tensor("c", Type.F32, (3,), seed=3),
    ]
    return factory.gguf(tensors, alignment=256, tail=bytes(9000) + b"!" + bytes(77))


@both_layouts
def test_a_part_comes_in_order_and_whole(memory_layout: str, tmp_path: Path) -> None:
    model = factory.write(tmp_path / "model.gguf", gappy_model())
    with ShardedModel(shard_model(model, tmp_path, ShardOptions(memory_layout))) as opened:
        chunks = list(SourceBytes(opened).chunks(0))
    offsets = np.cumsum([0, *(data.size for _, data in chunks)])
    assert [offset for offset, _ in chunks] == offsets[:-1].tolist()
    assert b"".join(data.tobytes() for _, data in chunks) == model.read_bytes()


@both_layouts
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range(memory_layout: str, tmp_path: Path, data: st.DataObject) -> None:
    content = gappy_model()
    folder = tmp_path / "out"
    if not folder.exists():
        factory.write(tmp_path / "model.gguf", content)
        shard_model(tmp_path / "model.gguf", folder, ShardOptions(memory_layout))
    with pytest.MonkeyPatch.context() as patched, ShardedModel(folder / "core.sgmap") as model:
        patched.setattr(source_bytes, "_CHUNK_PAGES", data.draw(st.sampled_from([1, 2, 1024])))
        patched.setattr(source_bytes, "_ZERO_CHUNK", data.draw(st.sampled_from([1000, 4 << 20])))
        edges = [0, len(content)]
        edges += [edge for run in SourceBytes(model)._runs[0] for edge in (run.offset, run.end)]
        near_an_edge = st.tuples(st.sampled_from(edges), st.integers(-9, 9)).map(sum)
        place = st.one_of(near_an_edge, st.integers(0, len(content)))
        begin, end = sorted(min(max(data.draw(place), 0), len(content)) for _ in range(2))
        source = SourceBytes(model)
        assert source.read(0, begin, end - begin).tobytes() == content[begin:end]
        chunks = [chunk.tobytes() for _, chunk in source.chunks(0)]
        assert b"".join(chunks) == content


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, 4080, (0, 1)), (0, 4081, (0, 2)), (4079, 4081, (0, 2)), (4080, 4081, (1, 1)),
        (5000, 5000, None), (4080, 10234, (1, 2)), (10233, 10234, (2, 1)),
    ],
)  # fmt: skip
def test_pages_that_are_not_needed_are_not_read(
    tmp_path: Path, begin: int, end: int, expected: tuple[int, int] | None
) -> None:
    """301 blocks of Q8_0 take three pages: 120 blocks (4080 bytes), 120, and 61 (2074 bytes)."""
    model = factory.write(
        tmp_path / "model.gguf", factory.gguf([factory.tensor("a", Type.Q8_0, (32, 301))])
    )
    with ShardedModel(shard_model(model, tmp_path)) as opened:
        (tensor,) = opened.map.tensors
        recorder = Recorder(opened)
        source = SourceBytes(recorder)
        data = source.read(0, tensor.offset + begin, end - begin)
    assert data.tobytes() == model.read_bytes()[tensor.offset + begin : tensor.offset + end]
    first = tensor.slices[0].first_page
    wanted = [] if expected is None else [(first + expected[0], expected[1])]
    assert recorder.pages == wanted


def test_zeros_take_no_pages(tmp_path: Path) -> None:
    content = factory.gguf([factory.tensor("c", Type.F32, (3,))], tail=bytes(5000))
    model = factory.write(tmp_path / "model.gguf", content)
    with ShardedModel(shard_model(model, tmp_path)) as opened:
        recorder = Recorder(opened)
        assert not SourceBytes(recorder).read(0, len(content) - 5000, 5000).any()
    assert recorder.pages == []


def test_parts_are_apart(tmp_path: Path) -> None:
    parts = [[factory.tensor(f"t{i}", Type.F16, (3000 + i,), seed=i)] for i in range(3)]
    first = factory.split_model(tmp_path, parts)
    with ShardedModel(shard_model(first, tmp_path / "out")) as opened:
        source = SourceBytes(opened)
        for number in range(3):
            content = first.with_name(f"model-{number + 1:05d}-of-00003.gguf").read_bytes()
            assert b"".join(d.tobytes() for _, d in source.chunks(number)) == content
            assert source.read(number, 33, 6000).tobytes() == content[33:6033]


def test_what_does_not_lie_in_the_file_is_refused(sharded: Path, model: Path) -> None:
    size = model.stat().st_size
    with ShardedModel(sharded) as opened:
        source = SourceBytes(opened)
        for offset, n_bytes in [(-1, 1), (0, size + 1), (size, 1), (size + 1, 0), (5, -1)]:
            with pytest.raises(
                GGUFShardError, match=rf"model\.gguf: offset {offset}: {n_bytes} bytes do not lie"
            ):
                source.read(0, offset, n_bytes)
        assert source.read(0, size, 0).size == 0


def test_a_damaged_page_is_found_where_it_is_needed(sharded: Path, model: Path) -> None:
    content = model.read_bytes()
    core = bytearray(sharded.with_name("core.gguf").read_bytes())
    with ShardedModel(sharded) as opened:
        tensor = next(t for t in opened.map.tensors if t.name == "output.weight")
    core[4096 * (1 + tensor.slices[0].first_page) + 17] ^= 1
    sharded.with_name("core.gguf").write_bytes(core)
    with ShardedModel(sharded) as opened:
        source = SourceBytes(opened)
        assert source.read(0, 0, 100).tobytes() == content[:100]
        for read in (lambda: source.read(0, tensor.offset + 1, 1), lambda: [*source.chunks(0)]):
            with pytest.raises(GGUFShardError, match=r"output\.weight\): content has CRC32"):
                read()
