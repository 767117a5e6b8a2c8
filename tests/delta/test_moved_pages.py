"""Pages that stand elsewhere already: found wherever they are, and never by their hash alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from delta import compare as compare_module
from delta import moved_pages
from delta.apply import apply_patch
from delta.compare import compare
from delta.diff import create_patch
from delta.moved_pages import PageSources, find_sources
from delta.page_grid import PADDING, Run, model_runs
from delta.page_hash import hash_pages, sample_pages
from delta.source_model import ShardedSource, SourceModel, open_source
from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import Tensor
from forge.shard import ShardOptions, shard_model
from tests.delta.model_pairs import CASES, PAIRS, edited, tensors

PAGE = 4088  # bytes of a page of F16


def page(seed: int, n_bytes: int = PAGE) -> bytes:
    return factory.random_bytes(n_bytes, seed)


def _tensor(ggml_type: T, name: str, *pages: bytes) -> Tensor:
    elements, block_bytes = GGML_QUANT_SIZES[ggml_type]
    data = b"".join(pages)
    return Tensor(name, int(ggml_type), (len(data) // block_bytes * elements,), data)


f16, f32, q8 = (partial(_tensor, ggml_type) for ggml_type in (T.F16, T.F32, T.Q8_0))


class Found:
    """Two models and where the pages of the target were found."""

    def __init__(
        self,
        base: SourceModel,
        target: SourceModel,
        before: Callable[[SourceModel, SourceModel], None] = lambda base, target: None,
    ) -> None:
        self.models = base, target
        comparison = compare(base, target, lambda n: None)
        changes = [change for change in comparison.forward if change.changed.any()]
        self.base_runs = model_runs(base.headers)
        self.touched = [change.run for change in changes]
        before(base, target)
        self.sources = find_sources(base, target, comparison.backward, changes)

    @property
    def places(self) -> dict[tuple[str, int], tuple[str, str, int] | None]:
        """For each changed page by (tensor, number) where it is: model, tensor, number."""
        base, target = (
            [(run.label, i) for run in runs for i in range(run.n_pages)]
            for runs in (self.base_runs, self.touched)
        )
        return {
            target[page]: None if source < 0
            else ("target", *target[source]) if from_target else ("base", *base[source])
            for page, source, from_target in _rows(self.sources)
        }  # fmt: skip

    def check(self) -> None:
        """What is said to be equal is, and is there when it is copied."""
        sources = self.sources
        contents = [_pages(model, runs) for model, runs in
                    zip(self.models, (self.base_runs, self.touched), strict=True)]  # fmt: skip
        stored = set(sources.stored.tolist())
        assert (np.diff(sources.pages) > 0).all()
        for number, source, from_target in _rows(sources):
            if source < 0:
                assert number in stored and not from_target
                continue
            assert number not in stored
            assert contents[from_target][source] == contents[1][number]
            assert not from_target or (source < number and source in stored)


def _rows(sources: PageSources) -> Iterator[tuple[int, int, bool]]:
    columns = (sources.pages, sources.source, sources.from_target)
    return zip(*(column.tolist() for column in columns), strict=True)


def _pages(model: SourceModel, runs: Sequence[Run]) -> list[tuple[int, bytes]]:
    """Bytes of a whole page, and the page."""
    return [
        (run.page_bytes, model.read(run.part, *run.span(i, 1)).tobytes())
        for run in runs
        for i in range(run.n_pages)
    ]


def found(folder: Path, base: Sequence[Tensor] | bytes, target: Sequence[Tensor] | bytes,
          options: ShardOptions | None = None, **hook: Any) -> Found:  # fmt: skip
    """The search in two models, sharded if there are options."""
    with ExitStack() as stack:
        models = []
        for name, content in (("base", base), ("target", target)):
            data = content if isinstance(content, bytes) else factory.gguf(content, PAIRS)
            path = factory.write(folder / f"{name}.gguf", data)
            if options is not None:
                path = shard_model(path, folder / name, options)
            models.append(stack.enter_context(open_source(path)))
        search = Found(*models, **hook)
        search.check()
        return search


BASE = [f16("a", page(1), page(2), page(3), page(4, 100)), f32("b", page(5), page(6))]
ANY = [None, ShardOptions(pages_per_shard=2), ShardOptions("row_major", pages_per_shard=1)]


# ---- where they are ----


@pytest.mark.parametrize("options", ANY, ids=["plain", "sharded", "rows"])
def test_pages_are_found_wherever_they_are(tmp_path: Path, options: ShardOptions | None) -> None:
    target = [
        f16("a", page(2), page(2), page(7), page(4, 100)),  # 0 was 1; 2 is new, 3 is the same
        f32("b", page(7), page(1)),  # 0 is new, too; 1 is of another tensor and type
        f16("c", page(8), page(8), page(3), page(4, 100)),  # a tensor that was added
    ]
    search = found(tmp_path, BASE, target, options)
    assert search.places == {
        ("a", 0): ("base", "a", 1), ("a", 2): None,
        ("b", 0): ("target", "a", 2), ("b", 1): ("base", "a", 0),
        ("c", 0): None, ("c", 1): ("target", "c", 0),
        ("c", 2): ("base", "a", 2), ("c", 3): ("base", "a", 3),
    }  # fmt: skip


def test_the_first_of_equal_pages_counts(tmp_path: Path) -> None:
    base = [f16("a", page(1), page(2), page(1), page(1))]
    target = [f16("a", page(2), *[page(1)] * 2, page(9)), f16("b", page(9))]
    assert found(tmp_path, base, target).places == {
        ("a", 0): ("base", "a", 1), ("a", 1): ("base", "a", 0),
        ("a", 3): None, ("b", 0): ("target", "a", 3),
    }  # fmt: skip


def test_an_expert_of_another_number(tmp_path: Path) -> None:
    base = factory.tensor("x_exps.weight", T.F16, (64, 40, 3), 1)
    size = len(base.data) // 3
    target = edited(base, lambda data: data.__setitem__(slice(None), np.roll(data, size)))
    places = found(tmp_path, [base], [target]).places
    names = ["x_exps.weight", "x_exps.weight[1]", "x_exps.weight[2]"]
    assert places == {(names[i], n): ("base", names[i - 1], n) for i in range(3) for n in range(2)}


# ---- what does not count ----


def test_the_same_bytes_in_pages_of_other_types(tmp_path: Path) -> None:
    """A page of Q8_0 is 4080 bytes, one of F16 4088: only short ones could be of one length."""
    short = page(1, 680)
    base = [q8("q", page(2, 4080), short), f16("h", page(3), short)]
    target = [q8("q", page(2, 4080), short), f16("h", page(3), short), q8("r", short)]
    assert found(tmp_path, base, target).places == {("r", 0): ("base", "q", 1)}
    target = [q8("q", page(2, 4080), page(4, 680)), f16("h", page(3), page(4, 680))]
    assert found(tmp_path, base, target).places == {("q", 1): None, ("h", 1): None}


@pytest.mark.parametrize("n_bytes", [2, 62, 64, 66])
def test_what_is_smaller_than_its_name(tmp_path: Path, n_bytes: int) -> None:
    a, b = f16("a", page(1, n_bytes)), f16("b", page(1, n_bytes))
    sides = (factory.gguf(side, PAIRS, alignment=2) for side in ([a], [a, b]))
    expected = ("base", "a", 0) if n_bytes >= 64 else None
    assert found(tmp_path, *sides).places == {("b", 0): expected}


@pytest.mark.parametrize("options", [None, ShardOptions(pages_per_shard=2)])
def test_a_page_that_is_another_one_and_zeros(tmp_path: Path, options: ShardOptions | None) -> None:
    """Their pages in `core.gguf` are the same, padded as those are."""
    base = [f16("a", page(1), page(2, 100) + bytes(PAGE - 100), page(2, 100))]
    target = [
        f16("a", page(1), page(9), page(2, 100)),
        f16("b", page(1), page(2, 100) + bytes(PAGE - 100)),
        f16("c", page(2, 100)),
    ]
    places = found(tmp_path, base, target, options).places
    assert places[("b", 0)] == ("base", "a", 0) and places[("b", 1)] == ("base", "a", 1)
    assert places[("c", 0)] in (("base", "a", 2), None)


@pytest.mark.parametrize("n_bytes", [62, 64])
def test_what_has_no_hash_is_not_read_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: int
) -> None:
    """Last pages that are too short to be copied; those that are not were sampled before."""
    base = [f16(name, page(i), page(i + 50, n_bytes)) for i, name in enumerate("abcdef")]
    target = [f16(name, page(i + 100), page(i + 150, n_bytes)) for i, name in enumerate("abcdef")]
    reads: list[int] = []
    read = moved_pages.read_pages

    def counted(model: SourceModel, run: Run, first: int, count: int) -> np.ndarray:
        reads.append(count)
        return read(model, run, first, count)

    monkeypatch.setattr(moved_pages, "read_pages", counted)
    assert set(found(tmp_path, base, target).places.values()) == {None}
    assert not reads


def test_padding_is_not_moved(tmp_path: Path) -> None:
    base = factory.gguf([f16("a", page(1))], PAIRS, tail=page(2) * 2)
    target = factory.gguf([f16("a", page(1)), f16("b", page(2))], PAIRS, tail=page(1) + page(1))
    search = found(tmp_path, base, target)
    assert [run.kind for run in search.touched].count(PADDING) == 1
    assert set(search.places.values()) == {None}


# ---- hashes that collide ----


@pytest.mark.parametrize("case", [*CASES, "moved"], ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("n_hashes", [1, 2, 5])
def test_a_hash_that_collides_makes_no_wrong_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, n_hashes: int
) -> None:
    def few(data: np.ndarray, page_bytes: int) -> np.ndarray:
        keys = hash_pages(data, page_bytes)
        return np.where(keys == 0, keys, 1 + keys % np.uint64(n_hashes))

    monkeypatch.setattr(moved_pages, "hash_pages", few)
    moved = [f16("c", page(3), page(8), page(1), page(8), page(2))]
    pair = CASES[case] if case in CASES else (BASE, BASE + moved)
    found(tmp_path, *pair)


@pytest.mark.parametrize("case", [*CASES, "moved"], ids=lambda name: name.replace(" ", "-"))
def test_samples_that_all_agree_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    moved = [f16("c", page(3), page(8), page(1), page(8), page(2))]
    pair = CASES[case] if case in CASES else (BASE, BASE + moved)
    (tmp_path / "usual").mkdir()
    (tmp_path / "agreeing").mkdir()
    usual = found(tmp_path / "usual", *pair).places

    def same(data: np.ndarray, page_bytes: int) -> np.ndarray:
        return np.minimum(sample_pages(data, page_bytes), np.uint64(1))

    for module in (moved_pages, compare_module):
        monkeypatch.setattr(module, "sample_pages", same)
    assert found(tmp_path / "agreeing", *pair).places == usual


@pytest.mark.parametrize("hash_of", [hash_pages, sample_pages])
def test_a_hash_is_of_its_page_alone(hash_of: Callable[[np.ndarray, int], np.ndarray]) -> None:
    data = np.frombuffer(page(1) + page(2) + page(1) + page(3, 80), np.uint8)
    keys = hash_of(data, PAGE).tolist()
    assert keys == [hash_of(data[i * PAGE : (i + 1) * PAGE], PAGE)[0] for i in range(4)]
    assert keys[0] == keys[2] and len(set(keys)) == 3 and 0 not in keys
    assert hash_of(data[: PAGE + 63], PAGE)[1] == 0 != hash_of(data[: PAGE + 64], PAGE)[1]


def test_a_sample_sees_every_128th_byte() -> None:
    data = np.frombuffer(page(1), np.uint8).copy()
    before = [int(hash_of(data, PAGE)[0]) for hash_of in (hash_pages, sample_pages)]
    for place in range(PAGE):
        data[place] ^= 1
        after = [int(hash_of(data, PAGE)[0]) for hash_of in (hash_pages, sample_pages)]
        assert [a != b for a, b in zip(after, before, strict=True)] == [True, place % 128 < 2]
        data[place] ^= 1


def test_the_last_byte_of_an_odd_page_counts(tmp_path: Path) -> None:
    a, b = (Tensor(name, int(T.I8), (101,), page(1, 100) + name.encode()) for name in "ab")
    assert found(tmp_path, [a], [a, b]).places == {("b", 0): None}


def _same_crc(data: bytes, place: int) -> bytes:
    """Other bytes with the same CRC32: the generator polynomial leaves no remainder."""
    mask = int(f"{0x104C11DB7:033b}"[::-1], 2).to_bytes(5, "little")  # the first bit is the lowest
    other = bytearray(data)
    for i, byte in enumerate(mask):
        other[place + i] ^= byte
    assert zlib.crc32(other) == zlib.crc32(data) and other != data
    return bytes(other)


def test_pages_of_one_crc_are_told_apart(tmp_path: Path) -> None:
    twin = _same_crc(page(1), 77)
    target = [*BASE, f16("c", twin, page(1), page(3), twin)]
    for options in ANY:
        folder = tmp_path / str(options)
        folder.mkdir()
        assert found(folder, BASE, target, options).places == {
            ("c", 0): None,
            ("c", 1): ("base", "a", 0),
            ("c", 2): ("base", "a", 2),
            ("c", 3): ("target", "c", 0),
        }


def test_pages_of_one_crc_before_one_of_another_length(tmp_path: Path) -> None:
    """The last page here is full, and there short: the table does not tell, and what comes before
    it is compared all the same."""
    base = [f16("a", page(1), page(2), page(3, 100))]
    twins = [_same_crc(page(1), 5), page(2), page(3, 100) + bytes(PAGE - 100)]
    for options in ANY:
        folder = tmp_path / str(options)
        folder.mkdir()
        places = found(folder, base, [*base, f16("c", *twins)], options).places
        assert places == {("c", 0): None, ("c", 1): ("base", "a", 1), ("c", 2): None}


def test_a_crc_that_stays_hides_no_change(tmp_path: Path) -> None:
    """Counterparts of one CRC32 differ all the same."""
    changed = [f16("a", page(1), _same_crc(page(2), 1000), page(3), page(4, 100)), BASE[1]]
    for options in ANY[1:]:
        folder = tmp_path / str(options)
        folder.mkdir()
        search = found(folder, BASE, changed, options)
        assert search.places == {("a", 1): None}


# ---- what is read ----


def _search_and_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch, target: Sequence[Tensor],
    options: ShardOptions | None,
) -> tuple[Found, list[int]]:  # fmt: skip
    """The search, and how many bytes of base and target it reads."""
    reads: list[list[int]] = []

    def count(*models: SourceModel) -> None:
        for model in models:

            def counting(
                *place: int, n_bytes: list[int], read: Callable[..., np.ndarray]
            ) -> np.ndarray:
                n_bytes.append(place[-1])
                return read(*place)

            reads.append([])
            monkeypatch.setattr(
                model, "read", partial(counting, n_bytes=reads[-1], read=model.read)
            )

    search = found(folder, BASE, target, options, before=count)
    # What `check` reads comes after, page by page.
    n_check = [sum(run.n_pages for run in runs) for runs in (search.base_runs, search.touched)]
    return search, [sum(of[: len(of) - n]) for of, n in zip(reads, n_check, strict=True)]


def test_only_what_seems_to_be_the_same_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages whose samples agree, to hash and to compare; before that, what is in no pair."""
    target = [f16("a", page(1), page(9), page(3), page(4, 100)), BASE[1], f16("c", page(6))]
    search, (of_base, of_target) = _search_and_count(tmp_path, monkeypatch, target, None)
    assert search.places == {("a", 1): None, ("c", 0): ("base", "b", 1)}
    assert (of_base, of_target) == (2 * PAGE, 3 * PAGE)


def test_a_page_is_not_held_against_its_counterpart_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their samples agree, as all between is the same; that they differ is known."""
    nearly = bytearray(page(2))
    nearly[5] ^= 1
    target = [f16("a", page(1), bytes(nearly), page(3), page(4, 100)), BASE[1]]
    search, counts = _search_and_count(tmp_path, monkeypatch, target, None)
    assert search.places == {("a", 1): None} and counts == [0, 0]


def test_nothing_is_read_where_nothing_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, counts = _search_and_count(tmp_path, monkeypatch, BASE, None)
    assert search.places == {} and counts == [0, 0]


def test_tables_spare_sharded_models_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what seems to be the same is read."""
    target = [f16("a", page(1), page(9), page(3), page(4, 100)), BASE[1], f16("c", page(6))]
    for layout in ("column_major", "row_major"):
        folder = tmp_path / layout
        folder.mkdir()
        search, counts = _search_and_count(folder, monkeypatch, target, ShardOptions(layout))
        assert search.places == {("a", 1): None, ("c", 0): ("base", "b", 1)}
        assert counts == [PAGE, PAGE]


def test_tables_of_other_layouts_say_nothing(tmp_path: Path) -> None:
    """The pages hold the same in another order then: contents are hashed."""
    target = [*tensors(), replace(tensors()[4], name="again")]
    maps = []
    for name, content, layout in (("b", tensors(), "row_major"), ("t", target, "column_major")):
        path = factory.write(tmp_path / f"{name}.gguf", factory.gguf(content, PAIRS))
        maps.append(shard_model(path, tmp_path / name, ShardOptions(layout, pages_per_shard=2)))
    with open_source(maps[0]) as base, open_source(maps[1]) as model:
        assert isinstance(base, ShardedSource)
        search = Found(base, model)
        search.check()
        assert len(search.sources.stored) == 0 and len(search.sources.pages) > 0


def test_each_model_is_asked_once_where_its_slices_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each of thousands of tensors."""
    asked: list[SourceModel] = []
    slice_pages = moved_pages.slice_pages

    def counting(model: ShardedSource) -> dict[tuple[int, str, int], tuple[int, int]]:
        asked.append(model)
        return slice_pages(model)

    monkeypatch.setattr(moved_pages, "slice_pages", counting)
    target = [*BASE, *(f16(f"c{i}", page(50 + i)) for i in range(9))]
    found(tmp_path, BASE, target, ShardOptions(pages_per_shard=2))
    assert len(asked) <= 2


# ---- in patches ----


def test_a_tensor_of_one_page_is_stored_once(tmp_path: Path) -> None:
    """Copies reach back beyond each other, and are made one after the other."""
    base = factory.write(tmp_path / "b", factory.gguf(BASE, PAIRS))
    same = [*BASE, f16("c", *[page(9)] * 40), f16("d", *[page(8), page(7)] * 20)]
    target = factory.write(tmp_path / "t", factory.gguf(same, PAIRS))
    made = create_patch(base, target, tmp_path / "p")
    assert sum(len(group.pages) for group, _ in made.groups) == 3
    assert sum(copy.count for copy in made.plan.forward.copies) == 39 + 38
    apply_patch(base, tmp_path / "p", tmp_path / "new.gguf")
    assert (tmp_path / "new.gguf").read_bytes() == target.read_bytes()


def test_more_copies_than_a_patch_holds_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = factory.write(tmp_path / "b", factory.gguf(BASE, PAIRS))
    pages = [page(i) for i in (1, 9, 3, 9, 1, 9, 3, 8)]
    target = factory.write(tmp_path / "t", factory.gguf([*BASE, f16("c", *pages)], PAIRS))
    for most, n_stored in ((6, 2), (5, 3), (2, 6), (0, 8)):
        monkeypatch.setattr("delta.diff.MAX_COPIES", most)
        monkeypatch.setattr("delta.patch_plan.MAX_COPIES", most)
        made = create_patch(base, target, tmp_path / "p", force=True)
        assert sum(len(group.pages) for group, _ in made.groups) == n_stored
        apply_patch(base, tmp_path / "p", tmp_path / "new.gguf", force=True)
        assert (tmp_path / "new.gguf").read_bytes() == target.read_bytes()
