"""Steps sorted by the exponents of the base's elements, whichever quarter they stand in."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from delta.byte_planes import element_kind
from delta.exponent_sort import add_sorted_difference, sorted_difference
from tests import naive

T = GGMLQuantizationType
FLOATS = {T.F16: (2, 5), T.BF16: (2, 8), T.F32: (4, 8), T.F64: (8, 11)}


@pytest.mark.parametrize("n", [*range(10), 4095, 4096, 4097, 9001])
@pytest.mark.parametrize("ggml_type", FLOATS, ids=lambda t: t.name)
def test_sorting_is_stable_and_can_be_undone(ggml_type: T, n: int) -> None:
    size, exponent_bits = FLOATS[ggml_type]
    kind = element_kind(ggml_type)
    rng = np.random.default_rng(n)
    base = rng.integers(0, 256, n * size, dtype=np.uint8)
    base[n // 8 * size : n // 3 * size] = 0x3C  # many of one exponent
    target = rng.integers(0, 256, n * size, dtype=np.uint8)
    steps = naive.ordered_difference(target.tobytes(), base.tobytes(), size, True)
    expected = [steps[i] for i in naive.by_exponent(base.tobytes(), size, exponent_bits)]
    result = sorted_difference(kind, target, base, np.empty_like(base))
    assert result.view(f"<u{size}").tolist() == expected
    np.testing.assert_array_equal(
        add_sorted_difference(kind, base, result, np.empty_like(base)), target
    )
