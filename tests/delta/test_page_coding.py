"""The coding of stored pages: both ways, against slow twins, and fed with what makes no sense."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from delta.byte_planes import MAX_PAGE_BYTES, ElementKind, element_kind
from delta.page_coding import (
    MODE_NAMES,
    ORDERED,
    RAW,
    SPARSE,
    XOR,
    count_items,
    decode,
    decode_reverse,
    encode,
    stream_sizes,
)
from forge.crc32 import CONTENT_BYTES
from forge.errors import GGUFShardError
from tests import naive

T = GGMLQuantizationType
TYPES: list[T | None] = [None, *sorted(T)]
FLOATS = {T.F16: (2, 5), T.BF16: (2, 8), T.F32: (4, 8), T.F64: (8, 11)}
INTEGERS = {T.I8: 1, T.I16: 2, T.I32: 4, T.I64: 8}
every_type = pytest.mark.parametrize(
    "ggml_type", TYPES, ids=lambda t: "bytes" if t is None else t.name
)
every_mode = pytest.mark.parametrize("mode", range(4), ids=MODE_NAMES)
every_coding = pytest.mark.parametrize(
    ("ggml_type", "mode"),
    [
        pytest.param(t, mode, id=f"{'bytes' if t is None else t.name}-{MODE_NAMES[mode]}")
        for t in TYPES
        for mode in range(4)
        if mode != ORDERED or t in FLOATS or t in INTEGERS
    ],
)


def page_bytes(kind: ElementKind) -> int:
    return CONTENT_BYTES // kind.block_bytes * kind.block_bytes


def awkward_lengths(kind: ElementKind) -> list[np.ndarray]:
    """No page, one block, one less than a page, one, and several with short ones."""
    block, full = kind.block_bytes, page_bytes(kind)
    groups = [
        [],
        [0],
        [block],
        [full - block],
        [full],
        [full, block],
        [block, full, full, 2 * block],
    ]
    return [np.array(lengths, np.int64) for lengths in groups]


def pages(lengths: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Target and base: any bytes, every third of them changed."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, int(lengths.sum()), dtype=np.uint8)
    changes = rng.integers(0, 256, base.size, dtype=np.uint8)
    return base ^ np.where(rng.random(base.size) < 1 / 3, changes, 0).astype(np.uint8), base


# ---- both ways ----


@every_coding
def test_pages_come_back(ggml_type: T | None, mode: int) -> None:
    kind = element_kind(ggml_type)
    for lengths in awkward_lengths(kind):
        target, base = pages(lengths)
        for symmetric in (False, True):
            known = None if mode == RAW else base.copy()
            streams = encode(kind, mode, target, known, lengths, symmetric=symmetric)
            n_items = count_items(kind, mode, streams)
            sizes = stream_sizes(kind, mode, target.size, lengths.size, n_items)
            assert [stream.size for stream in streams] == sizes
            assert all(stream.dtype == np.uint8 for stream in streams)
            back = decode(kind, mode, streams, known, lengths, symmetric=symmetric)
            np.testing.assert_array_equal(back, target)
            assert known is None or np.array_equal(known, base)  # it is only read
        if mode != RAW:
            back = decode_reverse(kind, mode, streams, target, lengths)
            np.testing.assert_array_equal(back, base)


@every_mode
def test_arrays_may_be_read_only_and_anywhere(mode: int) -> None:
    """As they come from files: an odd address, no leave to write, and lengths of 32 bits."""
    kind = element_kind(T.F32)
    lengths = np.array([4088, 8], np.int32)
    target, base = (np.frombuffer(b"?" + x.tobytes(), np.uint8)[1:] for x in pages(lengths))
    streams = encode(kind, mode, target, base, lengths)
    streams = [np.frombuffer(stream.tobytes(), np.uint8) for stream in streams]
    np.testing.assert_array_equal(decode(kind, mode, streams, base, lengths), target)


@given(data=st.data())
def test_any_pages_come_back(data: st.DataObject) -> None:
    kind = element_kind(data.draw(st.sampled_from(TYPES)))
    mode = data.draw(st.sampled_from([m for m in range(4) if m != ORDERED or kind.has_order]))
    counts = data.draw(st.lists(st.integers(0, 40), max_size=4))
    lengths = np.array(counts, np.int64) * kind.block_bytes
    patterns = [data.draw(st.binary(min_size=1, max_size=40)) for _ in range(2)]
    target, base = (np.resize(np.frombuffer(p, np.uint8), lengths.sum()) for p in patterns)
    streams = encode(kind, mode, target, base, lengths, symmetric=True)
    back = decode(kind, mode, streams, base, lengths, symmetric=True)
    np.testing.assert_array_equal(back, target)
    if mode != RAW:
        np.testing.assert_array_equal(decode_reverse(kind, mode, streams, target, lengths), base)
    if mode == ORDERED:
        streams = encode(kind, mode, target, base, lengths)
        np.testing.assert_array_equal(decode(kind, mode, streams, base, lengths), target)


# ---- what the streams hold ----


@every_type
def test_raw_and_xor_are_planes(ggml_type: T | None) -> None:
    kind = element_kind(ggml_type)
    for lengths in awkward_lengths(kind):
        target, base = pages(lengths)
        for mode, content in ((RAW, target), (XOR, target ^ base)):
            expected = naive.split_planes(content.tobytes(), kind.block_bytes, kind.planes)
            streams = encode(kind, mode, target, base, lengths)
            assert [stream.tobytes() for stream in streams] == expected


def ordered_slowly(
    target: np.ndarray, base: np.ndarray, size: int, exponent_bits: int, is_sorted: bool
) -> list[bytes]:
    """The streams of ORDERED by the twins."""
    steps = naive.ordered_difference(target.tobytes(), base.tobytes(), size, exponent_bits > 0)
    pairs: list[int] = []
    if is_sorted and exponent_bits:
        steps = [steps[i] for i in naive.by_exponent(base.tobytes(), size, exponent_bits)]
        steps, pairs = naive.small_steps(steps)
    content = b"".join(step.to_bytes(size, "little") for step in steps)
    planes = naive.split_planes(content, size, [(byte, 1) for byte in range(size)])
    return [*planes, bytes(pairs)] if pairs else planes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ggml_type", [*FLOATS, *INTEGERS], ids=lambda t: t.name)
def test_ordered_against_its_twin(ggml_type: T, symmetric: bool) -> None:
    size, exponent_bits = FLOATS.get(ggml_type, (INTEGERS.get(ggml_type), 0))
    assert size is not None
    kind = element_kind(ggml_type)
    for lengths in [*awkward_lengths(kind), np.array([4088] * 5)]:
        target, base = pages(lengths)
        streams = encode(kind, ORDERED, target, base, lengths, symmetric=symmetric)
        expected = ordered_slowly(target, base, size, exponent_bits, not symmetric)
        assert [stream.tobytes() for stream in streams] == expected


@pytest.mark.parametrize("n", [0, 1, 2, 3, 511, 512, 513, 40_000, 70_000, 140_001])
@pytest.mark.parametrize("ggml_type", FLOATS, ids=lambda t: t.name)
def test_small_steps_against_their_twin(ggml_type: T, n: int) -> None:
    """Smaller ones where the exponent is larger, and a few that are not: half a byte each."""
    size, exponent_bits = FLOATS[ggml_type]
    kind = element_kind(ggml_type)
    rng = np.random.default_rng(n)
    word = np.dtype(f"<u{size}").type
    highs = [0, 8, 16, 0x60] if n > 65536 else [16, 0x60]
    high = rng.choice(highs, n).astype(word)  # the first byte, with most of the exponent
    base = (high << word(8 * size - 8)) + rng.integers(0, 99, n).astype(word)
    steps = np.where(high < 16, rng.integers(-500, 500, n), rng.integers(-8, 8, n))
    steps[500::1024] = 600
    target = base + steps.astype(word)
    lengths = np.full(-(-n * size // 4080), 4080)
    lengths[-1:] -= int(lengths.sum()) - n * size
    pages = target.view(np.uint8), base.view(np.uint8), lengths
    streams = [stream.copy() for stream in encode(kind, ORDERED, *pages)]
    expected = ordered_slowly(*pages[:2], size, exponent_bits, True)
    assert [stream.tobytes() for stream in streams] == expected
    n_pairs = {70_000: 0, 140_001: 32768}.get(n, n // 2)  # half of many are large
    assert count_items(kind, ORDERED, streams) == n_pairs
    np.testing.assert_array_equal(decode(kind, ORDERED, streams, *pages[1:]), pages[0])


@pytest.mark.parametrize("n_edits", [0, 1, 2, 4088])
def test_sparse_against_its_twin(n_edits: int) -> None:
    kind = element_kind(None)
    lengths = np.array([4088, 0, 1, 4088, 7])
    rng = np.random.default_rng(n_edits)
    base = rng.integers(0, 256, int(lengths.sum()), dtype=np.uint8)
    target = base.copy()
    target[rng.choice(base.size, n_edits, replace=False)] ^= 0x80
    target[[0, 4087, 4088, -1]] ^= 1  # ends of pages
    streams = encode(kind, SPARSE, target, base, lengths)
    counts, gaps, values = naive.changed_bytes(target.tobytes(), base.tobytes(), lengths.tolist())
    expected = [[x & 255 for x in counts], [x >> 8 for x in counts],
                [x & 255 for x in gaps], [x >> 8 for x in gaps], values]  # fmt: skip
    assert [stream.tolist() for stream in streams] == expected
    np.testing.assert_array_equal(decode(kind, SPARSE, streams, base, lengths), target)


def test_the_longest_page_and_gap() -> None:
    kind = element_kind(None)
    lengths = np.array([MAX_PAGE_BYTES, MAX_PAGE_BYTES])
    base = np.zeros(2 * MAX_PAGE_BYTES, np.uint8)
    target = base.copy()
    target[MAX_PAGE_BYTES - 1] = 1  # the last byte of one page, and all of the other
    target[MAX_PAGE_BYTES:] = 2
    streams = encode(kind, SPARSE, target, base, lengths)
    assert (int(streams[2][0]), int(streams[3][0])) == (0xFE, 0xFF)
    assert (int(streams[0][1]), int(streams[1][1])) == (0xFF, 0xFF)
    np.testing.assert_array_equal(decode(kind, SPARSE, streams, base, lengths), target)


# ---- what makes no sense ----


def sparse_streams(counts: list[int], gaps: list[int], values: list[int]) -> list[np.ndarray]:
    u16 = [np.array(x, np.uint16) for x in (counts, gaps)]
    halves = [half.astype(np.uint8) for x in u16 for half in (x & 255, x >> 8)]
    return [*halves, np.array(values, np.uint8)]


@pytest.mark.parametrize(
    ("streams", "reason"),
    [
        pytest.param(sparse_streams([1, 0], [8], [1]), "page 0 .* past its end", id="behind"),
        pytest.param(sparse_streams([0, 1], [8], [1]), "page 1 .* past its end", id="behind-all"),
        pytest.param(sparse_streams([0, 1], [65535], [1]), "past its end", id="far"),
        pytest.param(sparse_streams([0, 2], [7, 0], [1, 1]), "past its end", id="second"),
        pytest.param(sparse_streams([1, 0], [0], [0]), "page 0 .* or of nothing", id="no-change"),
        pytest.param(sparse_streams([1, 0], [], []), "count 1 changed bytes, not 0", id="more"),
        pytest.param(sparse_streams([0, 0], [1], [1]), "count 0 changed bytes, not 1", id="fewer"),
        pytest.param(sparse_streams([65535] * 2, [1], [1]), "count 131070", id="many"),
        pytest.param(sparse_streams([1], [0], [1]), r"\[1, 1, 1, 1, 1\] bytes", id="one-page"),
        pytest.param(sparse_streams([1, 0], [0], [1])[:-1], "bytes, not", id="four"),
        pytest.param(sparse_streams([1, 0], [0, 0], [1]), "bytes, not", id="gaps"),
        pytest.param([], "bytes, not", id="none"),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_sparse_nonsense(streams: list[np.ndarray], reason: str, reverse: bool) -> None:
    kind, lengths = element_kind(None), np.array([8, 8])
    known = np.zeros(16, np.uint8)
    with pytest.raises(GGUFShardError, match=reason):
        if reverse:
            decode_reverse(kind, SPARSE, streams, known, lengths)
        else:
            decode(kind, SPARSE, streams, known, lengths)
    assert not known.any()


@given(data=st.data())
def test_sparse_never_writes_outside(data: st.DataObject) -> None:
    """Whatever the streams hold, only the pages themselves change, and only into other bytes."""
    counts = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    small = st.integers(0, 20) | st.integers(0, 65535)
    gaps = data.draw(st.lists(small, min_size=sum(counts), max_size=sum(counts)))
    values = data.draw(st.binary(min_size=len(gaps), max_size=len(gaps)))
    lengths = np.array(
        data.draw(st.lists(st.integers(0, 60), min_size=len(counts), max_size=len(counts)))
    )
    base = np.full(int(lengths.sum()), 0x55, np.uint8)
    streams = sparse_streams(counts, gaps, list(values))
    try:
        target = decode(element_kind(None), SPARSE, streams, base, lengths)
    except GGUFShardError:
        return
    again = encode(element_kind(None), SPARSE, target, base, lengths)
    assert [s.tolist() for s in again] == [s.tolist() for s in streams]


@given(content=st.binary(max_size=200), n_pages=st.integers(0, 8), n_edits=st.integers(0, 40))
def test_sparse_takes_noise(content: bytes, n_pages: int, n_edits: int) -> None:
    noise = np.resize(np.frombuffer(content + b"\1", np.uint8), 2 * n_pages + 3 * n_edits)
    ends = np.cumsum([n_pages, n_pages, n_edits, n_edits])
    lengths = np.full(n_pages, 16)
    base = np.zeros(16 * n_pages, np.uint8)
    try:
        target = decode(element_kind(None), SPARSE, np.split(noise, ends), base, lengths)
    except GGUFShardError:
        return
    assert np.count_nonzero(target) == n_edits


@every_coding
def test_streams_of_wrong_sizes(ggml_type: T | None, mode: int) -> None:
    kind = element_kind(ggml_type)
    lengths = np.array([page_bytes(kind), kind.block_bytes])
    target, base = pages(lengths)
    good = encode(kind, mode, target, base, lengths)
    for i in range(len(good)):
        longer = np.append(good[i], np.uint8(1))
        for stream in (good[i][:-1], longer, good[i][:0]):
            bad = [*good[:i], stream, *good[i + 1 :]]
            with pytest.raises(GGUFShardError, match=r"streams have \[.*\] bytes, not \["):
                decode(kind, mode, bad, base, lengths)
    for bad in (good[:-1], [*good, good[0]], []):
        with pytest.raises(GGUFShardError, match=r"bytes, not|pairs of"):
            decode(kind, mode, bad, base, lengths)


def test_modes_that_cannot_be() -> None:
    lengths, content = np.array([18]), np.zeros(18, np.uint8)
    kind = element_kind(T.Q4_0)
    for mode, reason in ((ORDERED, "mode ordered is not for Q4_0"), (4, "mode 4 is unknown")):
        with pytest.raises(GGUFShardError, match=reason):
            encode(kind, mode, content, content, lengths)
        with pytest.raises(GGUFShardError, match=reason):
            decode(kind, mode, [], content, lengths)
        with pytest.raises(GGUFShardError, match=reason):
            decode_reverse(kind, mode, [], content, lengths)
        with pytest.raises(GGUFShardError, match=reason):
            stream_sizes(kind, mode, 18, 1)
    with pytest.raises(GGUFShardError, match="mode ordered is not for raw bytes"):
        stream_sizes(element_kind(None), ORDERED, 18, 1)
    with pytest.raises(GGUFShardError, match="mode raw does not lead back"):
        decode_reverse(kind, RAW, encode(kind, RAW, content, None, lengths), content, lengths)


def test_sizes_of_sparse_streams() -> None:
    kind = element_kind(T.F16)
    assert stream_sizes(kind, SPARSE, 10, 3, 10) == [3, 3, 10, 10, 10]
    for n_edits in (-1, 11):
        with pytest.raises(GGUFShardError, match=f"{n_edits} changed bytes in 10"):
            stream_sizes(kind, SPARSE, 10, 3, n_edits)


def test_sizes_of_ordered_streams() -> None:
    kind = element_kind(T.F16)
    assert stream_sizes(kind, ORDERED, 10, 3, 0) == [5, 5]
    assert stream_sizes(kind, ORDERED, 10, 3, 2) == [5, 5, 2]
    for n_pairs in (-1, 3, 1 << 62):
        with pytest.raises(GGUFShardError, match=f"{n_pairs} pairs of 5 steps"):
            stream_sizes(kind, ORDERED, 10, 3, n_pairs)
    for other, mode in ((T.I16, ORDERED), (T.F16, RAW), (T.F16, XOR)):
        with pytest.raises(GGUFShardError, match="1 pairs of 0 steps"):
            stream_sizes(element_kind(other), mode, 10, 3, 1)


def test_pairs_that_cannot_be() -> None:
    """More than there are steps, and where nothing is sorted."""
    base, lengths = np.zeros(10, np.uint8), np.array([10])
    streams = [np.zeros(n, np.uint8) for n in (5, 5, 3)]
    with pytest.raises(GGUFShardError, match="3 pairs of 5 steps"):
        decode(element_kind(T.F16), ORDERED, streams, base, lengths)
    for ggml_type, symmetric in ((T.F16, True), (T.I16, False)):
        with pytest.raises(GGUFShardError, match=r"\[5, 5, 2\] bytes, not \[5, 5\]"):
            kind = element_kind(ggml_type)
            pairs = [*streams[:2], streams[2][:2]]
            decode(kind, ORDERED, pairs, base, lengths, symmetric=symmetric)


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        (np.array([18, 17]), "not whole blocks of 18 bytes"),
        (np.array([-18, 54]), "pages have -18 to 54 bytes"),
        (np.array([18 * 3641]), "pages have 65538 to 65538 bytes"),
        (np.array([18, 36]), r"pages are uint8 \(36,\), not uint8 \(54,\)"),
        (np.array([18, 18], np.uint64), "lengths of pages are uint64"),
    ],
)
def test_arrays_that_do_not_go_together(lengths: np.ndarray, reason: str) -> None:
    kind, content = element_kind(T.Q4_0), np.zeros(36, np.uint8)
    for mode in (RAW, XOR, SPARSE):
        with pytest.raises(ValueError, match=reason):
            encode(kind, mode, content, content, lengths)
        if mode != RAW or "pages are uint8" not in reason:
            with pytest.raises(ValueError, match=reason):
                decode(kind, mode, [], content, lengths)


def test_pages_must_be_bytes_in_a_row() -> None:
    kind, lengths, content = element_kind(None), np.array([8]), np.zeros(8, np.uint8)
    for bad in (np.zeros(16, np.uint8)[::2], content.view(np.int8), content.reshape(2, 4)):
        with pytest.raises(ValueError, match="pages are"):
            encode(kind, XOR, content, bad, lengths)
    with pytest.raises(ValueError, match="pages of the base are needed"):
        decode(kind, XOR, [content], None, lengths)
