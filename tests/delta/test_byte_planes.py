"""What goes to which plane, and the scale on which elements are subtracted."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from delta.byte_planes import (
    add_ordered_difference,
    element_kind,
    ordered_difference,
    split_planes,
)
from forge.block_layouts import block_layout
from tests import naive

T = GGMLQuantizationType
FLOATS = {T.F16: (2, 5), T.BF16: (2, 8), T.F32: (4, 8), T.F64: (8, 11)}


@pytest.mark.parametrize("ggml_type", [None, *T], ids=lambda t: "bytes" if t is None else t.name)
def test_planes_cover_each_byte_of_a_block_once(ggml_type: T | None) -> None:
    kind = element_kind(ggml_type)
    assert kind.ggml_type == ggml_type
    assert kind.block_bytes == (1 if ggml_type is None else GGML_QUANT_SIZES[ggml_type][1])
    used = np.zeros(kind.block_bytes, np.int64)
    for offset, size in kind.planes:
        used[offset : offset + size] += 1
    assert (used == 1).all()


def test_planes_of_common_types() -> None:
    assert element_kind(None).planes == ((0, 1),)
    assert element_kind(T.BF16).planes == ((0, 1), (1, 1))
    assert element_kind(T.Q4_0).planes == ((0, 1), (1, 1), (2, 16))
    assert element_kind(T.Q4_K).planes == ((0, 1), (1, 1), (2, 1), (3, 1), (4, 12), (16, 128))
    assert element_kind(T.Q6_K).planes == ((0, 128), (128, 64), (192, 16), (208, 1), (209, 1))
    assert element_kind(T.IQ4_XS).planes == ((0, 1), (1, 1), (2, 2), (4, 4), (8, 128))


@pytest.mark.parametrize("name", ["Q5_1", "Q3_K", "Q8_K", "IQ1_M", "MXFP4"])
def test_scales_are_a_plane_a_byte_and_other_fields_one(name: str) -> None:
    kind = element_kind(T[name])
    for field in block_layout(T[name]).fields:
        end = field.struct_offset + field.bytes
        sizes = [size for offset, size in kind.planes if field.struct_offset <= offset < end]
        is_scale = field.name in ("d", "m", "dmin")
        assert sizes == ([1] * field.bytes if is_scale else [field.bytes])


@pytest.mark.parametrize("n_blocks", [0, 1, 2, 33])
def test_planes_in_the_order_of_blocks(n_blocks: int) -> None:
    kind = element_kind(T.Q3_K)
    content = np.random.default_rng(n_blocks).integers(0, 256, n_blocks * 110, dtype=np.uint8)
    expected = naive.split_planes(content.tobytes(), 110, kind.planes)
    assert [
        plane.tobytes() for plane in split_planes(kind, content, np.empty_like(content))
    ] == expected


@pytest.mark.parametrize("ggml_type", [T.F16, T.BF16], ids=lambda t: t.name)
def test_differences_are_a_bijection_of_all_patterns(ggml_type: T) -> None:
    """From any pattern there is one step to each pattern, all steps are, and all lead back."""
    kind = element_kind(ggml_type)
    target = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    for start in (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x3C00, 0xFC01):
        base = np.full(1 << 16, start, "<u2").view(np.uint8)
        steps = ordered_difference(kind, target, base, np.empty_like(base))
        assert sorted(steps.view("<u2").tolist()) == list(range(1 << 16))
        np.testing.assert_array_equal(
            add_ordered_difference(kind, base, steps, np.empty_like(steps)), target
        )
        back = add_ordered_difference(kind, target, steps, steps, backwards=True)
        np.testing.assert_array_equal(back, base)


@pytest.mark.parametrize("ggml_type", [T.F16, T.BF16], ids=lambda t: t.name)
def test_from_one_number_to_the_next_is_one_step(ggml_type: T) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32)
    if ggml_type == T.F16:
        numbers = patterns.astype("<u2").view("<f2").astype(np.float64)
    else:
        with np.errstate(invalid="ignore"):  # of signalling NaNs
            numbers = (patterns << 16).view("<f4").astype(np.float64)
    order = sorted(patterns[~np.isnan(numbers)], key=lambda p: (numbers[p], -int(p)))  # -0, then 0
    base, target = (np.array(x, "<u2").view(np.uint8) for x in (order[:-1], order[1:]))
    steps = ordered_difference(element_kind(ggml_type), target, base, np.empty_like(base)).view(
        "<u2"
    )
    assert (steps == 2).all()
    steps = ordered_difference(element_kind(ggml_type), base, target, np.empty_like(base)).view(
        "<u2"
    )
    assert (steps == 1).all()


@pytest.mark.parametrize("ggml_type", [T.F32, T.F64], ids=lambda t: t.name)
def test_special_numbers(ggml_type: T) -> None:
    """From each to each: zeros, infinities, NaNs of several kinds, the smallest and the largest."""
    kind = element_kind(ggml_type)
    size = kind.block_bytes
    limits = np.finfo(f"<f{size}")
    numbers = [np.nan, 0.0, np.inf, 1.0, limits.smallest_subnormal, limits.tiny, limits.max]
    patterns = np.array(numbers, f"<f{size}").view(f"<u{size}")
    patterns = np.append(patterns, [patterns[0] ^ 0x1234, ~patterns[0]])
    sign = patterns.dtype.type(1 << (8 * size - 1))
    patterns = np.concatenate([patterns, patterns ^ sign])
    target, base = (np.ravel(x).view(np.uint8) for x in np.meshgrid(patterns, patterns))
    steps = ordered_difference(kind, target, base, np.empty_like(base))
    expected = naive.ordered_difference(target.tobytes(), base.tobytes(), size, True)
    assert steps.view(f"<u{size}").tolist() == expected
    np.testing.assert_array_equal(
        add_ordered_difference(kind, base, steps, np.empty_like(steps)), target
    )
