"""Which pages differ: against a slow twin, and without reading what digests tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta import compare as module
from delta.compare import Comparison, chunks, compare, different_pages, read_pages, slice_pages
from delta.page_grid import PADDING, TENSOR, Run, model_runs
from delta.source_model import PlainModel, ShardedSource, SourceModel, open_source
from experiments.validation import gguf_factory as factory
from forge.shard import ShardOptions, shard_model
from tests.delta.model_pairs import CASES
from tests.delta.test_page_grid import ODD

# ---- bytes ----


def slow_different_pages(a: bytes, b: bytes, page_bytes: int) -> list[bool]:
    return [a[i : i + page_bytes] != b[i : i + page_bytes] for i in range(0, len(a), page_bytes)]


@given(
    st.sampled_from([1, 2, 3, 7, 8, 16, 18, 4070, 4080, 4088]),
    st.integers(0, 4),
    st.sampled_from([0, 1, 2, 7, 8, 9]),
    st.data(),
)
def test_different_pages(page_bytes: int, n_full: int, n_more: int, data: st.DataObject) -> None:
    """Whole pages and a rest; bytes that differ at any place, the last of all among them."""
    n_bytes = n_full * page_bytes + min(n_more, page_bytes - 1)
    a = np.frombuffer(factory.random_bytes(n_bytes, 1), np.uint8)
    b = a.copy()
    if n_bytes:
        places = st.one_of(st.integers(0, n_bytes - 1), st.sampled_from([0, n_bytes - 1]))
        for place in data.draw(st.lists(places, max_size=3, unique=True)):
            b[place] ^= data.draw(st.sampled_from([1, 0x80, 0xFF]))
    found = different_pages(a, b, page_bytes)
    assert found.dtype == np.bool_
    assert found.tolist() == slow_different_pages(a.tobytes(), b.tobytes(), page_bytes)


@pytest.mark.parametrize("byte", range(17))
def test_every_byte_of_a_page_counts(byte: int) -> None:
    for page_bytes in (16, 17):
        a, b = np.zeros(3 * page_bytes, np.uint8), np.zeros(3 * page_bytes, np.uint8)
        b[page_bytes + byte % page_bytes] = 1
        assert different_pages(a, b, page_bytes).tolist() == [False, True, False]


@pytest.mark.parametrize(("first", "end"), [(0, 0), (0, 1), (3, 1025), (0, 1026), (5, 2057)])
def test_chunks(first: int, end: int) -> None:
    run = Run(TENSOR, "x", 0, None, 0, 0, 1 << 30, 4088)
    found = list(chunks(run, first, end))
    assert [page for begin, n in found for page in range(begin, begin + n)] == [*range(first, end)]
    assert all(0 < n * 4088 <= 4 << 20 for _, n in found)
    assert [n for _, n in chunks(replace(run, page_bytes=5 << 20), 0, 3)] == [1, 1, 1]


# ---- models ----


def slow_changes(
    model: bytes, other: bytes, runs: list[Run], others: list[Run]
) -> Iterator[object]:
    """(key, key of the namesake, pages with a counterpart, which pages differ)."""

    def pages(data: bytes, run: Run) -> list[bytes]:
        content = data[run.offset : run.end]
        return [content[i : i + run.page_bytes] for i in range(0, run.bytes, run.page_bytes)]

    for run in runs:
        namesake = next((o for o in others if o.key == run.key), None)
        mine = pages(model, run)
        theirs = [] if namesake is None else pages(other, namesake)
        if namesake is not None and namesake.ggml_type != run.ggml_type:
            theirs = []
        if namesake is not None and namesake.bytes != run.bytes:  # only full ones
            theirs = [page for page in theirs if len(page) == run.page_bytes]
            theirs = theirs[: sum(len(page) == run.page_bytes for page in mine)]
        rest = mine[len(theirs) :]
        changed = [a != b for a, b in zip(mine, theirs, strict=False)]
        changed += [run.kind != PADDING or any(page) for page in rest]
        yield run.key, None if namesake is None else namesake.key, len(theirs), changed


def said(changes: Sequence[module.RunChange]) -> list[object]:
    return [
        (c.run.key, None if c.other is None else c.other.key, c.n_paired, c.changed.tolist())
        for c in changes
    ]


def _compared(base: SourceModel, target: SourceModel) -> Comparison:
    done: list[int] = []
    found = compare(base, target, done.append)
    assert sum(done) == target.n_bytes - sum(header.header_bytes for header in target.headers)
    assert [c.run for c in found.forward] == model_runs(target.headers)
    assert [c.run for c in found.backward] == model_runs(base.headers)
    return found


#: Those of which every way to lie and to be read is tried.
_SOME = ["nothing", "single bytes", "an expert", "tensor grown", "tensor added", "junk behind",
         "metadata longer", "everything", "unknown between others", "unknown grows"]  # fmt: skip


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Paths of base and target of one part."""
    paths = tmp_path / "base.gguf", tmp_path / "target.gguf"
    if request.param in CASES:
        contents = CASES[request.param]
    else:
        base, target, options = ODD[request.param]
        # Split models take part as their first files.
        contents = factory.gguf(base[0], **options), factory.gguf(target[0], **options)
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    return paths


def _name(of: str) -> str:
    return of.replace(" ", "-")


@pytest.mark.parametrize("pair", [*CASES, *ODD], indirect=True, ids=_name)
def test_changes_are_those_of_the_bytes(pair: tuple[Path, Path]) -> None:
    contents = [path.read_bytes() for path in pair]
    with PlainModel(pair[0]) as base, PlainModel(pair[1]) as target:
        found = _compared(base, target)
        runs = [model_runs(model.headers) for model in (base, target)]
    assert said(found.forward) == list(slow_changes(*contents[::-1], *runs[::-1]))
    assert said(found.backward) == list(slow_changes(*contents, *runs))


@pytest.mark.parametrize("chunk_bytes", [1, 8176])
@pytest.mark.parametrize("pair", _SOME, indirect=True, ids=_name)
def test_chunks_do_not_matter(
    pair: tuple[Path, Path], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PlainModel(pair[0]) as base, PlainModel(pair[1]) as target:
        whole = _compared(base, target)
        monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
        assert said(_compared(base, target).forward) == said(whole.forward)


# ---- sharded models ----


@pytest.mark.parametrize("pair", _SOME, indirect=True, ids=_name)
@pytest.mark.parametrize(
    "options",
    [
        (ShardOptions(pages_per_shard=2), ShardOptions(pages_per_shard=2)),
        (ShardOptions(pages_per_shard=1), ShardOptions(pages_per_shard=1)),
        (
            ShardOptions("row_major", pages_per_shard=2),
            ShardOptions("row_major", pages_per_shard=2),
        ),
        (ShardOptions(pages_per_shard=2), ShardOptions(pages_per_shard=4)),
        (ShardOptions("row_major"), ShardOptions("column_major")),
        (None, ShardOptions(pages_per_shard=2)),
        (ShardOptions(pages_per_shard=2), None),
    ],
    ids=["alike", "small", "rows", "other-shards", "other-layout", "plain-base", "plain-target"],
)
def test_sharded_models_are_compared_alike(
    pair: tuple[Path, Path], tmp_path: Path, options: Sequence[ShardOptions | None]
) -> None:
    sides = [
        path if how is None else shard_model(path, tmp_path / path.stem, how)
        for path, how in zip(pair, options, strict=True)
    ]
    with ExitStack() as stack:
        plain = [stack.enter_context(PlainModel(path)) for path in pair]
        other = [stack.enter_context(open_source(path)) for path in sides]
        expected, found = _compared(*plain), _compared(*other)
    assert said(found.forward) == said(expected.forward)
    assert said(found.backward) == said(expected.backward)


def _sharded(
    tmp_path: Path, case: str, pages_per_shard: int
) -> tuple[ShardedSource, ShardedSource]:
    maps = [
        shard_model(factory.write(tmp_path / f"{i}.gguf", data), tmp_path / f"{i}",
                    ShardOptions(pages_per_shard=pages_per_shard))
        for i, data in enumerate(CASES[case])
    ]  # fmt: skip
    base, target = map(open_source, maps)
    assert isinstance(base, ShardedSource) and isinstance(target, ShardedSource)
    return base, target


def _count_pages(model: ShardedSource, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pages of a model that are read from now on."""
    pages: list[int] = []
    read = model.model.read_checked

    def counting(first: int, count: int) -> np.ndarray:
        pages.extend(range(first, first + count))
        return read(first, count)

    monkeypatch.setattr(model.model, "read_checked", counting)
    return pages


def _tensor_pages(model: ShardedSource) -> set[int]:
    return {page for first, n in slice_pages(model).values() for page in range(first, first + n)}


@pytest.mark.parametrize("pages_per_shard", [1, 2, 4])
@pytest.mark.parametrize("case", ["nothing", "single bytes", "an expert", "all of a tensor"])
def test_shards_that_are_alike_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, pages_per_shard: int
) -> None:
    base, target = _sharded(tmp_path, case, pages_per_shard)
    with base, target:
        differ = {
            page
            for shard, (a, b) in enumerate(
                zip(base.model.map.shard_xxh3_64, target.model.map.shard_xxh3_64, strict=True)
            )
            if a != b
            for page in range(shard * pages_per_shard, (shard + 1) * pages_per_shard)
        }
        tensors = _tensor_pages(base)
        read = [_count_pages(model, monkeypatch) for model in (base, target)]
        changed = [c for c in _compared(base, target).forward if c.changed.any()]
        for pages in read:
            of_tensors = [page for page in pages if page in tensors]
            # What is read lies in the same chunk as what differs: all of it in shards that do,
            # or in runs with a shard that does.
            touched = {page for c in changed for page in _pages_of(base, c.run)}
            assert set(of_tensors) <= touched | (differ & tensors)
            assert len(set(of_tensors)) == len(of_tensors)
        assert bool(changed) == (case != "nothing")
        assert all(set(_pages_of(base, c.run)) & differ for c in changed)


def _pages_of(model: ShardedSource, run: Run) -> range:
    first, n_pages = slice_pages(model)[run.key]
    return range(first, first + n_pages)


def test_only_chunks_that_differ_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page by page, that is no page but those of shards that differ."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    base, target = _sharded(tmp_path, "single bytes", 1)
    with base, target:
        tensors = _tensor_pages(base)
        read = [_count_pages(model, monkeypatch) for model in (base, target)]
        (change,) = (c for c in _compared(base, target).forward if c.changed.any())
        differ = np.array(_pages_of(base, change.run))[change.changed]
        assert 0 < len(differ) < change.run.n_pages
        for pages in read:
            assert [page for page in pages if page in tensors] == differ.tolist()


def test_a_digest_of_shards_that_collides_hides_nothing(tmp_path: Path) -> None:
    """The tables of CRCs have to agree as well."""
    base, target = _sharded(tmp_path, "single bytes", 2)
    with base, target:
        expected = said(_compared(base, target).forward)
        target.model.map = replace(target.model.map, shard_xxh3_64=base.model.map.shard_xxh3_64)
        assert said(_compared(base, target).forward) == expected


def test_pages_are_read_as_they_lie(tmp_path: Path) -> None:
    data = CASES["nothing"][0]
    with PlainModel(factory.write(tmp_path / "m.gguf", data)) as model:
        for run in model_runs(model.headers):
            for first in range(run.n_pages):
                count = run.n_pages - first
                begin = run.offset + first * run.page_bytes
                assert read_pages(model, run, first, count).tobytes() == data[begin : run.end]
