"""The plan of a patch: what is rendered comes back, and headers follow from those of the base."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import zstandard
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from delta.page_grid import PADDING, TENSOR
from delta.patch_plan import (
    MAX_HEADER_BYTES,
    Direction,
    FileRecord,
    HeaderEdit,
    LostRun,
    PageCopy,
    PatchPlan,
    TouchedRun,
    decode_header,
    encode_header,
    parse_plan,
    render_plan,
)
from experiments.validation import gguf_factory as factory
from experiments.validation import hostile_patches as hostile
from experiments.validation.hostile_patches import Way, copy, edit, record, run
from forge.errors import GGUFShardError
from tests.delta.model_pairs import PAIRS, tensors

# ---- there and back ----

_TYPES = [None, *(int(t) for t in GGMLQuantizationType)]
_sizes = st.one_of(st.integers(0, 300), st.integers(0, (1 << 63) - 1))
_tensor_names = st.binary(min_size=1, max_size=63).map(
    lambda b: b.decode("utf-8", "surrogateescape")
)
_file_names = st.text(
    st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1, max_size=60
).filter(lambda name: name not in (".", ".."))  # fmt: skip


@st.composite
def _files(draw: st.DrawFn) -> tuple[FileRecord, ...]:
    records = st.builds(
        FileRecord, _file_names, _sizes, st.binary(min_size=32, max_size=32).map(bytes.hex)
    )
    return tuple(draw(st.lists(records, min_size=1, max_size=3)))


@st.composite
def _runs(draw: st.DrawFn) -> tuple[TouchedRun, ...]:
    keys = st.tuples(
        st.sampled_from([TENSOR, PADDING]), _tensor_names,
        st.one_of(st.integers(0, 9), st.integers(0, 1 << 40)),
    )  # fmt: skip
    runs = []
    for key in draw(st.lists(keys, max_size=5, unique=True)):
        n_pages = draw(st.one_of(st.integers(1, 9), st.integers(1, 1 << 40)))
        n_paired = draw(st.integers(0, n_pages))
        runs.append(TouchedRun(*key, draw(st.sampled_from(_TYPES)), n_pages, n_paired))
    return tuple(runs)


@st.composite
def _copies(draw: st.DrawFn, n_pages: int) -> tuple[PageCopy, ...]:
    copies = []
    end = 0
    for _ in range(draw(st.integers(0, 6))):
        if end >= n_pages:
            break
        first = draw(st.integers(end, min(end + 300, n_pages - 1)))
        count = draw(st.integers(1, min(300, n_pages - first)))
        from_target = first >= count and draw(st.booleans())
        most = first - count if from_target else 1 << 40
        copies.append(PageCopy(first, count, from_target, draw(st.integers(0, most))))
        end = first + count
    return tuple(copies)


@st.composite
def _directions(draw: st.DrawFn, n_files: int) -> Direction:
    edits = st.one_of(
        st.just(HeaderEdit()),
        st.builds(HeaderEdit, st.integers(1, MAX_HEADER_BYTES), st.binary(max_size=50)),
    )
    runs = draw(_runs())
    lost = st.builds(LostRun, _tensor_names, st.integers(0, 1 << 20), st.integers(1, 1 << 40))
    return Direction(
        tuple(draw(edits) for _ in range(n_files)),
        runs,
        tuple(draw(st.lists(lost, max_size=4))),
        draw(_copies(sum(run.n_pages for run in runs))),
    )


@st.composite
def plans(draw: st.DrawFn) -> PatchPlan:
    base, target = draw(_files()), draw(_files())
    reverse = draw(_directions(len(base))) if draw(st.booleans()) else None
    return PatchPlan(base, target, draw(_directions(len(target))), reverse)


def parsed(data: bytes, is_reversible: bool = False) -> PatchPlan:
    return parse_plan(data, "some.patch", 20, is_reversible)


@given(plans())
def test_plans_come_back(plan: PatchPlan) -> None:
    data = render_plan(plan)
    assert parsed(data, plan.reverse is not None) == plan
    assert parsed(data, plan.reverse is not None).forward.n_pages == sum(
        run.n_pages for run in plan.forward.runs
    )


@pytest.mark.no_cover
@given(plans(), st.data())
def test_part_of_a_plan_is_none(plan: PatchPlan, data: st.DataObject) -> None:
    rendered = render_plan(plan)
    length = data.draw(st.integers(0, len(rendered) - 1))
    for wrong in (rendered[:length], rendered + b"\0"):
        with pytest.raises(GGUFShardError, match=r"^some\.patch: offset ") as caught:
            parsed(wrong, plan.reverse is not None)
        assert "\n" not in str(caught.value)


@pytest.mark.no_cover
@given(plans(), st.data())
def test_any_other_byte_makes_a_plan_or_none(plan: PatchPlan, data: st.DataObject) -> None:
    rendered = bytearray(render_plan(plan))
    place = data.draw(st.integers(0, len(rendered) - 1))
    rendered[place] ^= data.draw(st.integers(1, 255))
    try:
        other = parsed(bytes(rendered), plan.reverse is not None)
    except GGUFShardError:
        return
    assert parsed(render_plan(other), other.reverse is not None) == other


def test_bytes_are_as_the_format_says() -> None:
    """The renderer against the one of the tests, which knows the format alone."""
    base, target = b"b" * 300, b"t" * 70_000
    copies = (copy(2, 1, 0, 6), copy(1, 2, 1, -5), copy(0, 1, 0, 70))
    way = Way((b"\0",), (run("a", 4), run("0.1", 3, 2, kind=PADDING, index=9, type_number=0)),
              (hostile.text("x") + b"\2\3",), copies)  # fmt: skip
    expected = hostile.Patch(
        b"", b"", (record(base, b"old"),), (record(target, "n\xe9w".encode()),), (way,), ()
    )
    digests = [hashlib.sha256(data).hexdigest() for data in (base, target)]
    plan = PatchPlan(
        (FileRecord("old", 300, digests[0]),),
        (FileRecord("néw", 70_000, digests[1]),),
        Direction(
            (HeaderEdit(),),
            (TouchedRun(TENSOR, "a", 0, 1, 4, 4), TouchedRun(PADDING, "0.1", 9, None, 3, 1)),
            (LostRun("x", 2, 3),),
            (PageCopy(2, 1, False, 6), PageCopy(4, 2, True, 2), PageCopy(6, 1, False, 74)),
        ),
        None,
    )
    assert parsed(expected.plan()) == plan
    assert render_plan(plan) == expected.plan()


def test_tables_are_compressed_and_empty_ones_take_nothing() -> None:
    file = (FileRecord("model.gguf", 1, "00" * 32),)
    runs = tuple(TouchedRun(TENSOR, f"blk.{i}.weight", 0, 1, 100, 100) for i in range(1000))
    nothing = Direction((HeaderEdit(),), (), (), ())
    assert render_plan(PatchPlan(file, file, nothing, None))[-3:] == bytes(3)  # header, two sizes
    plan = PatchPlan(file, file, Direction((HeaderEdit(),), runs, (), ()), None)
    assert len(render_plan(plan)) < 6000 and parsed(render_plan(plan)) == plan


# ---- headers ----


def decoded(header: HeaderEdit, base: bytes) -> bytes:
    return decode_header(header, base, "some.patch")


@given(st.binary(min_size=1, max_size=3000), st.binary(min_size=1, max_size=3000))
def test_any_header_follows_from_any(new: bytes, base: bytes) -> None:
    found = encode_header(new, base)
    assert decoded(found, base) == new
    assert (found == HeaderEdit()) == (new == base)


def test_the_same_header_takes_nothing() -> None:
    assert encode_header(b"header", b"header") == HeaderEdit(0, b"")
    assert decoded(HeaderEdit(), b"header") == b"header"


@pytest.mark.parametrize("n_bytes", [1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_large_header_takes_what_is_new(n_bytes: int) -> None:
    """A vocabulary moved by a longer text before it, below and above where levels change."""
    words = np.random.default_rng(1).integers(97, 123, n_bytes, np.uint8).tobytes()
    base = b"short" + words
    new = b"rather long" + words[: n_bytes // 2] + b"new" + words[n_bytes // 2 :]
    found = encode_header(new, base)
    assert found.n_bytes == len(new) and len(found.data) < 600
    assert decoded(found, base) == new


def test_a_header_of_a_model_takes_little() -> None:
    base = factory.gguf(tensors(), PAIRS)
    new = factory.gguf(tensors(), [*PAIRS, factory.pair("general.note", factory.STRING, "new")])
    headers = [hostile.header_bytes(data) for data in (new, base)]
    assert len(encode_header(*headers).data) < 80 < len(headers[0]) // 4


def test_a_frame_is_as_the_format_says() -> None:
    """Without content size, checksum and dictionary id; and another's frame is read."""
    base, new = b"abcdefgh" * 40, b"abcdefgh" * 30 + b"x"
    found = encode_header(new, base)
    parameters = zstandard.get_frame_parameters(found.data)
    assert parameters.content_size == zstandard.CONTENTSIZE_UNKNOWN
    assert (parameters.has_checksum, parameters.dict_id) == (False, 0)
    way, file = Way((edit(new, base),), ()), (record(b"x", b"x"),)
    plan = parsed(hostile.Patch(b"", b"", file, file, (way,), ()).plan())
    assert decoded(plan.forward.headers[0], base) == new


def test_a_header_too_large_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delta.patch_plan.MAX_HEADER_BYTES", 100)
    assert encode_header(b"x" * 100, b"y").n_bytes == 100
    with pytest.raises(GGUFShardError, match=r"^header of 101 bytes"):
        encode_header(b"x" * 101, b"y")


def test_another_base_does_not_make_the_header() -> None:
    words = np.random.default_rng(2).bytes(5000)
    found = encode_header(words[100:], words)
    with pytest.raises(GGUFShardError, match=r"^some\.patch: header"):
        decoded(found, words[:4000])
    try:
        assert decoded(found, words[::-1]) != words[100:]
    except GGUFShardError as error:
        assert str(error).startswith("some.patch: header")
