"""Pages and the layout of blocks in them: every type, both layouts, ragged counts."""

from __future__ import annotations

import re
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from numba.core import config

from forge import block_layouts
from forge.block_layouts import _STRUCTS, MEMORY_LAYOUTS, BlockLayout, block_layout
from forge.pages import (
    CONTENT_BYTES,
    MAGIC,
    PAGE_BYTES,
    _move_blocks,
    pack_blocks,
    pack_raw,
    page_fault,
    tag_pages,
    unpack_blocks,
    unpack_raw,
)

TYPES = list(GGML_QUANT_SIZES)
POISON = 0xA5
FORMAT_PAGE = Path(block_layouts.__file__).with_name("FORMAT.md")
every_type = pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
both_layouts = pytest.mark.parametrize("memory_layout", MEMORY_LAYOUTS)


def ragged_counts(layout: BlockLayout) -> list[int]:
    """Numbers of blocks around the edges of pages."""
    return [0, 1, layout.per_page - 1, layout.per_page, layout.per_page + 1, 2 * layout.per_page]


def random_blocks(layout: BlockLayout, n_blocks: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, n_blocks * layout.bytes, dtype=np.uint8)


def poisoned_pages(n: int) -> np.ndarray:
    return np.full((n, PAGE_BYTES), POISON, np.uint8)


def packed_slowly(blocks: np.ndarray, layout: BlockLayout) -> np.ndarray:
    """Pages byte by byte, as the format page says."""
    pages = np.zeros((layout.pages_for(blocks.size // layout.bytes), PAGE_BYTES), np.uint8)
    for number, block in enumerate(blocks.reshape(-1, layout.bytes)):
        page, slot = pages[number // layout.per_page], number % layout.per_page
        for field in layout.fields:
            start = field.page_offset + slot * field.page_stride
            content = block[field.struct_offset : field.struct_offset + field.bytes]
            page[start : start + field.bytes] = content
    for page in pages:
        page[4088:4092] = np.frombuffer(zlib.crc32(page[:4088]).to_bytes(4, "little"), np.uint8)
        page[4092:] = np.frombuffer(b"PGCR", np.uint8)
    return pages


@every_type
def test_structs_are_as_large_as_blocks(ggml_type: GGMLQuantizationType) -> None:
    struct = _STRUCTS.get(ggml_type.name)
    if struct is not None:
        assert sum(size for _, size in struct) == GGML_QUANT_SIZES[ggml_type][1]
    layout = block_layout(ggml_type)
    assert (layout.elements, layout.bytes) == GGML_QUANT_SIZES[ggml_type]
    assert layout.per_page * layout.bytes <= CONTENT_BYTES < (layout.per_page + 1) * layout.bytes


@every_type
@both_layouts
def test_fields_cover_each_block_once(ggml_type: GGMLQuantizationType, memory_layout: str) -> None:
    layout = block_layout(ggml_type, memory_layout)
    used = np.zeros(CONTENT_BYTES, np.int64)
    for field in layout.fields:
        for slot in range(layout.per_page):
            start = field.page_offset + slot * field.page_stride
            used[start : start + field.bytes] += 1
    assert used.max() == 1
    assert used.sum() == layout.per_page * layout.bytes
    in_struct = sorted((f.struct_offset, f.struct_offset + f.bytes) for f in layout.fields)
    assert in_struct[0][0] == 0 and in_struct[-1][1] == layout.bytes
    assert all(a[1] == b[0] for a, b in pairwise(in_struct))


@every_type
def test_column_major_starts_with_the_quants(ggml_type: GGMLQuantizationType) -> None:
    layout = block_layout(ggml_type, "column_major")
    quants = layout.field("qs")
    assert quants.page_offset % 16 == 0
    assert quants.page_offset == 0 and quants.page_stride == quants.bytes
    if len(layout.fields) > 1:
        last = max(layout.fields, key=lambda field: field.page_offset)
        assert last.name in ("d", "scales")  # IQ1_M alone keeps its scale inside the sub-scales


@pytest.mark.parametrize(
    ("name", "planes"),
    [
        ("Q4_0", {"qs": 0, "d": 227 * 16}),
        ("Q8_0", {"qs": 0, "d": 120 * 32}),
        ("Q4_K", {"qs": 0, "scales": 28 * 128, "dmin": 28 * 140, "d": 28 * 142}),
        ("Q6_K", {"qs": 0, "qh": 19 * 128, "scales": 19 * 192, "d": 19 * 208}),
    ],
)
def test_planes_of_common_types(name: str, planes: dict[str, int]) -> None:
    layout = block_layout(GGMLQuantizationType[name])
    assert {field.name: field.page_offset for field in layout.fields} == planes


def planes_in_format_page() -> dict[str, list[tuple[str, int]]]:
    """The planes of each type as the table in FORMAT.md has them."""
    rows = re.findall(r"^\| ([A-Z0-9_, /K]+) \| (qs .+) \|$", FORMAT_PAGE.read_text(), re.MULTILINE)
    planes = {}
    for types, fields in rows:
        groups = types.split(" / ")
        for names, listed in zip(groups, fields.split(" / "), strict=True):
            for name in names.split(", "):
                planes[name] = [(f, int(size)) for f, size in re.findall(r"(\w+) (\d+)", listed)]
    return planes


def test_format_page_lists_the_planes() -> None:
    listed = planes_in_format_page()
    assert listed.keys() == _STRUCTS.keys()
    for name, planes in listed.items():
        layout = block_layout(GGMLQuantizationType[name])
        in_page = sorted(layout.fields, key=lambda field: field.page_offset)
        assert [(field.name, field.bytes) for field in in_page] == planes


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="memory_layout 'diagonal' is none of column_major"):
        block_layout(GGMLQuantizationType.Q4_0, "diagonal")
    with pytest.raises(KeyError, match="Q4_0 has no field qh"):
        block_layout(GGMLQuantizationType.Q4_0).field("qh")


def test_a_struct_of_another_size_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `gguf` package whose block differs from the struct known here."""
    monkeypatch.setitem(_STRUCTS, "Q4_0", (("d", 2), ("qs", 15)))
    layout = block_layout.__wrapped__(GGMLQuantizationType.Q4_0)
    assert [(field.name, field.bytes) for field in layout.fields] == [("qs", 18)]


@every_type
@both_layouts
def test_pack_then_unpack(ggml_type: GGMLQuantizationType, memory_layout: str) -> None:
    layout = block_layout(ggml_type, memory_layout)
    for n_blocks in ragged_counts(layout):
        blocks = random_blocks(layout, n_blocks)
        pages = poisoned_pages(layout.pages_for(n_blocks))
        crcs = pack_blocks(blocks, layout, pages)
        np.testing.assert_array_equal(pages, packed_slowly(blocks, layout))
        assert crcs.tolist() == [zlib.crc32(page[:CONTENT_BYTES]) for page in pages]
        back = np.full_like(blocks, POISON)
        unpack_blocks(pages, layout, back)
        np.testing.assert_array_equal(back, blocks)


@every_type
@both_layouts
def test_twin_without_the_compiler(
    ggml_type: GGMLQuantizationType, memory_layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = block_layout(ggml_type, memory_layout)
    for n_blocks in ragged_counts(layout):
        blocks = random_blocks(layout, n_blocks)
        compiled, plain = (poisoned_pages(layout.pages_for(n_blocks)) for _ in range(2))
        crcs = pack_blocks(blocks, layout, compiled)
        back = np.full_like(blocks, POISON)
        with monkeypatch.context() as without:
            without.setattr(config, "DISABLE_JIT", True)
            np.testing.assert_array_equal(pack_blocks(blocks, layout, plain), crcs)
            unpack_blocks(plain, layout, back)
        np.testing.assert_array_equal(plain, compiled)
        np.testing.assert_array_equal(back, blocks)


@given(data=st.data())
def test_any_blocks_come_back(data: st.DataObject) -> None:
    layout = block_layout(
        data.draw(st.sampled_from(TYPES)), data.draw(st.sampled_from(MEMORY_LAYOUTS))
    )
    n_blocks = data.draw(st.integers(0, 2 * layout.per_page + 1))
    pattern = np.frombuffer(data.draw(st.binary(min_size=1, max_size=64)), np.uint8)
    blocks = np.resize(pattern, n_blocks * layout.bytes)
    pages = poisoned_pages(layout.pages_for(n_blocks))
    crcs = pack_blocks(blocks, layout, pages)
    assert all(page_fault(page, int(crc)) is None for page, crc in zip(pages, crcs, strict=True))
    by_hand = np.zeros_like(pages)
    _move_blocks(blocks, by_hand, layout, to_page=True)
    np.testing.assert_array_equal(pages[:, :CONTENT_BYTES], by_hand[:, :CONTENT_BYTES])
    back = np.full_like(blocks, POISON)
    unpack_blocks(pages, layout, back)
    np.testing.assert_array_equal(back, blocks)


@pytest.mark.parametrize("n_bytes", [0, 1, 4087, 4088, 4089, 8176, 10000])
def test_raw_bytes_come_back(n_bytes: int) -> None:
    content = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, dtype=np.uint8)
    pages = poisoned_pages(-(-n_bytes // CONTENT_BYTES))
    crcs = pack_raw(content, pages)
    np.testing.assert_array_equal(unpack_raw(pages, n_bytes), content)
    assert all(page_fault(page, int(crc)) is None for page, crc in zip(pages, crcs, strict=True))
    assert not pages[:, :CONTENT_BYTES].reshape(-1)[n_bytes:].any()


def tagged_page() -> tuple[np.ndarray, int]:
    pages = np.random.default_rng(1).integers(0, 256, (1, PAGE_BYTES), dtype=np.uint8)
    (crc,) = tag_pages(pages)
    return pages[0], int(crc)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        pytest.param(0, r"content has CRC32 [0-9a-f]{8}, its tag says [0-9a-f]{8}", id="first"),
        pytest.param(CONTENT_BYTES - 1, "content has CRC32", id="last"),
        pytest.param(CONTENT_BYTES, "its tag says", id="tag"),
        pytest.param(PAGE_BYTES - 1, r"magic is b'PGC.*', not b'PGCR'", id="magic"),
    ],
)
def test_fault_names_its_kind(place: int, reason: str) -> None:
    page, crc = tagged_page()
    assert page_fault(page, crc) is None
    page[place] ^= 0x20
    assert re.search(reason, str(page_fault(page, crc)))


def test_fault_of_a_valid_page_in_the_wrong_place() -> None:
    page, crc = tagged_page()
    assert page[4092:].tobytes() == MAGIC
    assert page_fault(page, crc ^ 1) == (
        f"page is valid but not the one that belongs here: {crc:08x}, not {crc ^ 1:08x}"
    )


def test_arrays_that_do_not_fit_are_refused() -> None:
    layout = block_layout(GGMLQuantizationType.Q4_0)
    blocks, pages = random_blocks(layout, 4), poisoned_pages(1)
    with pytest.raises(ValueError, match="71 bytes of Q4_0 do not fill pages"):
        pack_blocks(blocks[:-1], layout, pages)
    with pytest.raises(ValueError, match=r"do not fill pages \(2, 4096\)"):
        pack_blocks(blocks, layout, poisoned_pages(2))
    with pytest.raises(TypeError, match="must be contiguous uint8"):
        unpack_blocks(pages, layout, blocks.view(np.int8))
    with pytest.raises(TypeError, match="must be contiguous uint8"):
        pack_blocks(np.repeat(blocks, 2)[::2], layout, pages)
