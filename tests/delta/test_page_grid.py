"""The pages of a model: all its bytes, in pieces that are the pages of the sharded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from delta.apply import apply_patch
from delta.apply_in_place import update_in_place
from delta.diff import create_patch
from delta.page_grid import PADDING, TENSOR, Run, model_runs, n_paired
from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import Tensor, tensor
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader, parse_header
from forge.pages import unpack_blocks
from forge.shard import ShardOptions, shard_model
from forge.sharded_model import ShardedModel
from forge.split_model import read_model
from forge.verify import verify_model
from tests.delta.model_pairs import CASES, PAIRS, edited, tensors

_TYPES = [T.F64, T.I8, T.I16, T.I32, T.I64, T.F32, T.BF16, T.F16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1,
          T.Q8_0, T.Q2_K, T.Q3_K, T.Q5_K, T.Q6_K, T.Q8_K, T.IQ2_XXS, T.IQ1_M, T.IQ4_XS, T.TQ1_0,
          T.TQ2_0, T.MXFP4]  # fmt: skip


def parsed(data: bytes) -> GGUFHeader:
    return parse_header(data, "model.gguf")


def _all_types() -> list[Tensor]:
    return [tensor(f"t{i}", ggml_type, (512, 9), i) for i, ggml_type in enumerate(_TYPES)]


# ---- the runs of a model ----


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_header_and_runs_are_the_file(name: str) -> None:
    for data in CASES[name]:
        header = parsed(data)
        runs = model_runs([header])
        end = header.header_bytes
        for run in runs:
            assert run.offset == end and run.bytes > 0 and run.part == 0
            end = run.end
        assert end == len(data)
        assert len({run.key for run in runs}) == len(runs)
        for run in runs:
            spans = [run.span(page, 1) for page in range(run.n_pages)]
            assert spans[0][0] == run.offset and sum(n for _, n in spans) == run.bytes
            assert all(a + n == b for (a, n), (b, _) in pairwise(spans))
            assert [n for _, n in spans] == run.page_lengths(np.arange(run.n_pages)).tolist()
            assert {n for _, n in spans[:-1]} <= {run.page_bytes} and spans[-1][1] <= run.page_bytes


@pytest.mark.parametrize("layout", ["column_major", "row_major"])
def test_pages_are_those_of_the_sharded_model(tmp_path: Path, layout: str) -> None:
    """Page i of a run is page i of the slice, whatever its type and the layout."""
    model = [*_all_types(), tensor("x_exps.weight", T.Q8_0, (64, 70, 3), 99)]
    data = factory.gguf(model, PAIRS)
    source = factory.write(tmp_path / "model.gguf", data)
    runs = {run.key: run for run in model_runs([parsed(data)]) if run.kind == TENSOR}
    with ShardedModel(shard_model(source, tmp_path, ShardOptions(layout))) as sharded:
        assert sum(len(t.slices) for t in sharded.map.tensors) == len(runs) == len(_TYPES) + 3
        for entry in sharded.map.tensors:
            for i, piece in enumerate(entry.slices):
                run = runs[TENSOR, entry.name, i]
                assert run.n_pages == piece.pages
                for page in range(run.n_pages):
                    offset, n_bytes = run.span(page, 1)
                    found = np.empty(n_bytes, np.uint8)
                    pages = sharded.read_checked(piece.first_page + page, 1)
                    unpack_blocks(pages, entry.layout(layout), found)
                    assert found.tobytes() == data[offset : offset + n_bytes]


def test_slices_and_pieces() -> None:
    model = [
        tensor("x_exps.weight", T.F16, (64, 40, 3)),
        tensor("x_exps.bias", T.F32, (8, 3)),  # two dimensions: one slice
        Tensor("y_exps.weight", factory.UNKNOWN_TYPE, (4, 4, 2), b"y" * 9000),
    ]
    header = parsed(factory.gguf(model, alignment=256, tail=b"t" * 5))
    runs = model_runs([header])
    assert [(r.kind, r.name, r.index, r.ggml_type, r.bytes, r.page_bytes, r.n_pages)
            for r in runs if r.offset >= header.data_offset] == [
        (TENSOR, "x_exps.weight", 0, T.F16, 5120, 4088, 2),
        (TENSOR, "x_exps.weight", 1, T.F16, 5120, 4088, 2),
        (TENSOR, "x_exps.weight", 2, T.F16, 5120, 4088, 2),
        (TENSOR, "x_exps.bias", 0, T.F32, 96, 4088, 1),
        (PADDING, "0.1", 0, None, 160, 4088, 1),
        (TENSOR, "y_exps.weight", 0, None, 9005, 4088, 3),  # an unknown type reaches to the end
    ]  # fmt: skip
    assert [r.label for r in runs[1:6]] == [
        "x_exps.weight", "x_exps.weight[1]", "x_exps.weight[2]", "x_exps.bias", "padding 0.1",
    ]  # fmt: skip


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_padding_comes_in_pieces(more: int) -> None:
    header, piece = factory.header(PAIRS, []), 4 << 20
    size = len(header) + 2 * piece + more
    runs = model_runs([parse_header(header, "model.gguf", size)])
    assert [run.index for run in runs] == list(range(2 + (more > 0)))
    assert {(run.kind, run.name, run.ggml_type) for run in runs} == {(PADDING, "0.0", None)}
    assert [run.bytes for run in runs] == [piece, piece + min(more, 0), more][: len(runs)]
    assert runs[1].offset == runs[0].end and runs[-1].end == size


def test_parts_follow_each_other(tmp_path: Path) -> None:
    """Sorted by part, then by place; the infos of a header come in any order."""
    first = factory.split_model(tmp_path, [[tensors()[0], tensors()[1]], [tensors()[2]]])
    headers = read_model(first)
    runs = model_runs([replace(header, tensors=header.tensors[::-1]) for header in headers])
    assert runs == model_runs(headers)
    assert [(run.part, run.name) for run in runs if run.kind == TENSOR] == [
        (0, tensors()[0].name), (0, tensors()[1].name), (1, tensors()[2].name),
    ]  # fmt: skip
    assert {run.name.split(".")[0] for run in runs if run.kind == PADDING and run.part == 1} <= {
        "1"
    }


def test_too_many_slices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    header = parsed(factory.gguf([tensor("x_exps.weight", T.F16, (64, 2, 9))]))
    n_runs = len(model_runs([header]))
    monkeypatch.setattr("delta.page_grid.MAX_RUNS", n_runs)
    assert len(model_runs([header])) == n_runs
    monkeypatch.setattr("delta.page_grid.MAX_RUNS", n_runs - 1)
    with pytest.raises(GGUFShardError, match=r"^model\.gguf: more than 9 slices of tensors$"):
        model_runs([header])


# ---- pairs ----


@pytest.mark.parametrize(
    ("a", "b", "paired"),
    [
        (1, 1, 1), (1, 2, 0), (4088, 4088, 1), (4088, 4089, 1), (4087, 4088, 0), (4089, 4088, 1),
        (4089, 4089, 2), (4089, 4090, 1), (8176, 4088, 1), (8176, 8176, 2), (8177, 12264, 2),
        (12264, 8177, 2),
    ],
)  # fmt: skip
def test_counterparts(a: int, b: int, paired: int) -> None:
    """All pages of runs of one size; of others as many as both have full ones."""
    runs = [Run(TENSOR, "x", 0, T.F16, 0, 100 * i, n, 4088) for i, n in enumerate((a, b))]
    assert n_paired(*runs) == n_paired(*runs[::-1]) == paired
    pages = np.arange(paired)
    assert (runs[0].page_lengths(pages) == runs[1].page_lengths(pages)).all()
    assert n_paired(runs[0], replace(runs[1], ggml_type=T.BF16)) == 0
    assert n_paired(runs[0], replace(runs[1], ggml_type=None)) == 0
    assert n_paired(runs[0], None) == 0


# ---- models that are odd, and valid ----


def _flipped(of: Tensor, *places: int) -> Tensor:
    def flip(data: np.ndarray) -> None:
        data[[place % len(data) for place in places]] ^= 0x55

    return edited(of, flip)


_A = tensor("a.weight", T.F16, (64, 100), 1)
_U = Tensor("u.weight", factory.UNKNOWN_TYPE, (7,), factory.random_bytes(5000, 2))
_B = tensor("b.weight", T.F32, (64, 70), 3)
_C = tensor("c.weight", T.Q8_0, (64, 100), 4)
_TINY = [
    Tensor(name, int(T.I8), (n,), b"1234567"[:n]) for name, n in (("x", 7), ("y", 5), ("z", 1))
]


def _named(name: str | bytes) -> tuple[list[Tensor], list[Tensor]]:
    of = replace(_A, name=name)
    return [of], [_flipped(of, 7)]


#: Tensors of base and target, of each part, and how the files are written.
ODD: dict[str, tuple[Sequence[Sequence[Tensor]], Sequence[Sequence[Tensor]], dict[str, int]]] = {
    "version 2": ([[_A]], [[_flipped(_A, 3, 9000)]], {"version": 2}),
    "all types": ([_all_types()], [[_flipped(t, 5, 100, 4000) for t in _all_types()]], {}),
    "no gaps": ([_TINY], [[_TINY[0], *(_flipped(t, 0) for t in _TINY[1:])]], {"alignment": 1}),
    "a byte": ([_TINY[2:]], [[_flipped(_TINY[2], 0)]], {}),
    "names of 63 bytes": (*([of] for of in _named("n" * 63)), {}),
    "names of 31 letters": (*([of] for of in _named("é" * 31)), {}),
    "names with control characters": (*([of] for of in _named("a\n\x1b[3m")), {}),
    "names that are not UTF-8": (*([of] for of in _named(b"\xff\xfe")), {}),
    "unknown between others": ([[_A, _U, _B]], [[_A, _flipped(_U, 4999), _flipped(_B, 1)]], {}),
    "unknown grows": ([[_A, _U, _B]], [[_A, replace(_U, data=_U.data + b"more" * 900), _B]], {}),
    "unknown becomes known": (
        [[_A, replace(_U, data=_U.data[:4096])]],
        [[_A, Tensor("u.weight", int(T.F16), (64, 32), _U.data[:4096])]], {}),
    "another shape": ([[_A]], [[replace(_A, shape=(100, 64))]], {}),
    "an expert less": ([[tensor("x_exps.w", T.F16, (64, 40, 3))]],
                       [[tensor("x_exps.w", T.F16, (64, 40, 2))]], {}),
    "names change places": ([[_A, replace(_flipped(_A, 5), name="b")]],
                            [[_flipped(_A, 5), replace(_A, name="b")]], {}),
    "split": ([[_A, _C], [_B], [_U]], [[_A, _flipped(_C, 5)], [_flipped(_B, 9)], [_U]], {}),
    "split elsewhere": ([[_A, _C], [_B], [_U]], [[_A], [_flipped(_C, 5)], [_B, _U]], {}),
    "split in fewer": ([[_A, _C], [_B], [_U]], [[_A, _C], [_flipped(_B, 3), _U]], {}),
    "split in more": ([[_A, _C], [_B, _U]], [[_A], [_flipped(_C, 5)], [_B], [_U]], {}),
    "split in one": ([[_A, _C], [_B, _U]], [[_A, _C, _B, _flipped(_U, 3)]], {}),
}  # fmt: skip


def _write(folder: Path, parts: Sequence[Sequence[Tensor]], options: dict[str, int]) -> Path:
    folder.mkdir()
    if len(parts) > 1:
        return factory.split_model(folder, parts)
    return factory.write(folder / "model.gguf", factory.gguf(parts[0], PAIRS, **options))


def _files(first: Path) -> list[bytes]:
    return [Path(header.name).read_bytes() for header in read_model(first)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ODD, ids=lambda name: name.replace(" ", "-"))
def test_odd_models_become_each_other(tmp_path: Path, name: str, reverse: bool) -> None:
    *sides, options = ODD[name]
    base, target = (_write(tmp_path / f"{i}", side, options) for i, side in enumerate(sides))
    create_patch(base, target, tmp_path / "p", reversible=True)
    before, after = (target, base) if reverse else (base, target)
    made = apply_patch(before, tmp_path / "p", tmp_path / before.name, reverse=reverse)
    assert [path.read_bytes() for path in made] == _files(after)

    sharded = shard_model(before, tmp_path / "sharded", ShardOptions(pages_per_shard=2))
    fresh = shard_model(after, tmp_path / "fresh", ShardOptions(pages_per_shard=2))
    update_in_place(sharded, tmp_path / "p", reverse=reverse)
    assert verify_model(sharded, after).ok
    assert sharded.read_bytes() == fresh.read_bytes()
    assert sharded.with_suffix(".gguf").read_bytes() == fresh.with_suffix(".gguf").read_bytes()

    if len(_files(before)) != len(_files(after)):
        with pytest.raises(GGUFShardError, match="cannot be done in place"):
            update_in_place(before, tmp_path / "p", reverse=reverse)
        return
    expected = _files(after)
    update_in_place(before, tmp_path / "p", reverse=reverse)
    assert _files(before) == expected
