"""The checksum of a page, folded by each width and sliced, against zlib."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba.core import config

from forge import crc32
from forge.crc32 import CONTENT_BYTES, crc32_pages, possible_ways
from tests import naive

POISON = 0xDEADBEEF


def twins() -> list[object]:
    here = possible_ways()
    compiled = pytest.mark.skipif(bool(config.DISABLE_JIT), reason="the compiler is off")
    return [
        pytest.param(
            way,
            marks=[compiled, pytest.mark.skipif(way not in here, reason=f"needs {sorted(needed)}")],
            id=way.__name__,
        )
        for way, needed in crc32._WAYS
    ]


def crc_by(twin: object, content: np.ndarray) -> int:
    assert content.ctypes.data % 8 == 0
    return int(twin(np.uint64(content.ctypes.data)))  # type: ignore[operator]


@pytest.mark.parametrize("twin", twins())
def test_each_twin_equals_zlib(twin: object) -> None:
    rng = np.random.default_rng(0)
    contents = [
        np.zeros(CONTENT_BYTES, np.uint8),
        np.full(CONTENT_BYTES, 255, np.uint8),
        *rng.integers(0, 256, (50, CONTENT_BYTES), dtype=np.uint8),
    ]
    for content in contents:
        content = np.ascontiguousarray(content)
        assert crc_by(twin, content) == zlib.crc32(content)


@pytest.mark.parametrize("twin", twins())
def test_each_twin_sees_every_byte(twin: object) -> None:
    content = np.zeros(CONTENT_BYTES, np.uint8)
    for place in range(CONTENT_BYTES):
        content[place] = 1 << place % 8
        assert crc_by(twin, content) == zlib.crc32(content), place
        content[place] = 0


@pytest.mark.parametrize("twin", twins())
@given(pattern=st.binary(min_size=1, max_size=200), shift=st.integers(0, 300))
def test_each_twin_equals_zlib_on_any_content(twin: object, pattern: bytes, shift: int) -> None:
    content = np.resize(np.frombuffer(pattern, np.uint8), CONTENT_BYTES)
    content[:shift] = 0
    assert crc_by(twin, content) == zlib.crc32(content)


@pytest.mark.parametrize(
    "features, expected",
    [
        ([], ["_crc32_sliced"]),
        (["avx2", "avx512f"], ["_crc32_sliced"]),
        (["pclmul", "avx2"], ["_crc32_by_128", "_crc32_sliced"]),
        (["pclmul", "vpclmulqdq"], ["_crc32_by_128", "_crc32_sliced"]),
        (["pclmul", "avx512f", "avx2"], ["_crc32_by_128", "_crc32_sliced"]),
        (["pclmul", "vpclmulqdq", "avx2"], ["_crc32_by_256", "_crc32_by_128", "_crc32_sliced"]),
        (
            ["pclmul", "vpclmulqdq", "avx2", "avx512f"],
            ["_crc32_by_512", "_crc32_by_256", "_crc32_by_128", "_crc32_sliced"],
        ),
    ],
)
def test_a_way_needs_its_features(features: list[str], expected: list[str]) -> None:
    assert [way.__name__ for way in possible_ways(features)] == expected


def test_the_fastest_way_is_taken() -> None:
    assert crc32.crc32_content is possible_ways()[0]


@given(pages=hnp.arrays(np.uint8, (2, 4096), fill=st.integers(0, 255)))
def test_pages_equal_zlib(pages: np.ndarray) -> None:
    np.testing.assert_array_equal(crc32_pages(pages), naive.crc32_pages(pages))


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_out_is_filled_and_returned(n: int) -> None:
    pages = np.random.default_rng(n).integers(0, 256, (n, 4096), dtype=np.uint8)
    out = np.full(n, POISON, np.uint32)
    assert crc32_pages(pages, out) is out
    np.testing.assert_array_equal(out, naive.crc32_pages(pages))


def test_tag_does_not_count() -> None:
    pages = np.zeros((2, 4096), np.uint8)
    pages[1, CONTENT_BYTES:] = 7
    first, second = crc32_pages(pages)
    assert first == second


@pytest.mark.parametrize(
    "pages",
    [np.zeros((1, 4096), np.int8), np.zeros(4096, np.uint8), np.zeros((4, 4096), np.uint8)[::2]],
    ids=["dtype", "dimensions", "strides"],
)
def test_other_arrays_are_refused(pages: np.ndarray) -> None:
    with pytest.raises(TypeError, match="contiguous uint8"):
        crc32_pages(pages)


def test_without_the_compiler() -> None:
    """zlib does the work, and nothing is compiled on import."""
    program = (
        "import zlib, numpy as np\n"
        "from forge.crc32 import crc32_pages\n"
        "pages = np.arange(3 * 4096, dtype=np.uint32).astype(np.uint8).reshape(3, 4096)\n"
        "assert crc32_pages(pages).tolist() == [zlib.crc32(p[:4088]) for p in pages]\n"
        "print('same')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "same\n"), run.stderr


@pytest.mark.parametrize("variable", ["NUMBA_CPU_NAME=generic", "NUMBA_ENABLE_AVX=0"])
def test_only_what_the_compiler_may_use(variable: str, tmp_path: Path) -> None:
    """An instruction that it may not use would end the process."""
    program = (
        "import zlib, numpy as np\n"
        "from forge.crc32 import crc32_content, crc32_pages\n"
        "pages = np.arange(3 * 4096, dtype=np.uint32).astype(np.uint8).reshape(3, 4096)\n"
        "assert crc32_pages(pages).tolist() == [zlib.crc32(p[:4088]) for p in pages]\n"
        "print(crc32_content.__name__)\n"
    )
    name, _, value = variable.partition("=")
    environment = {**os.environ, name: value, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment.pop("NUMBA_DISABLE_JIT", None)
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in {"_crc32_by_128", "_crc32_sliced"}
