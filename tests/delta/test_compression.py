"""Streams in fewer bytes, and frames that do not hold what they should."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from delta.compression import compress_streams, decompress
from forge.errors import GGUFShardError

LEVELS = [1, 3, 6, 19, 22]
KIBI, MEBI = 1 << 10, 1 << 20


def noise(n_bytes: int, n_values: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n_values, n_bytes, dtype=np.uint8)


def skewed(n_bytes: int) -> np.ndarray:
    """Values without order, small ones more often: what differences look like."""
    steps = np.random.default_rng(0).geometric(0.2, n_bytes)
    return np.minimum(steps, 255).astype(np.uint8)


def frame(content: bytes, **parameters: object) -> bytes:
    chosen = zstandard.ZstdCompressionParameters(compression_level=3, **parameters)
    return zstandard.ZstdCompressor(compression_params=chosen).compress(content)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_bytes", [0, 1, 2, 99, 64 * KIBI - 1, 64 * KIBI, 64 * KIBI + 1, 200_000])
def test_streams_come_back(n_bytes: int, level: int) -> None:
    streams = [noise(n_bytes), skewed(n_bytes), np.zeros(n_bytes, np.uint8)]
    compressed = compress_streams(streams, level)
    for stream, packed in zip(streams, compressed, strict=True):
        assert len(packed) <= n_bytes
        np.testing.assert_array_equal(decompress(bytes(packed), n_bytes), stream)


@given(content=st.binary(max_size=300), level=st.sampled_from([1, 3, 19]))
def test_any_stream_comes_back(content: bytes, level: int) -> None:
    (packed,) = compress_streams([content], level)
    assert decompress(packed, len(content)).tobytes() == content


def test_streams_that_gain_nothing_are_kept() -> None:
    (packed,) = compress_streams([noise(MEBI)], 3)
    assert len(packed) == MEBI
    for share, is_kept in ((0.005, True), (0.02, False)):
        stream = noise(MEBI)
        stream[: int(share * MEBI)] = 0
        (packed,) = compress_streams([stream], 3)
        assert (bytes(packed) == stream.tobytes()) == is_kept


def test_frames_are_bare() -> None:
    (packed,) = compress_streams([skewed(4 * MEBI)], 3)
    parameters = zstandard.get_frame_parameters(bytes(packed))
    assert zstandard.frame_content_size(bytes(packed)) == -1
    assert (parameters.has_checksum, parameters.dict_id) == (False, 0)


def test_noise_is_not_searched_and_text_is() -> None:
    """Either way alone would do much worse on one of the two."""
    entropy_bits = 3.61  # of a geometric distribution with p = 0.2
    for level in (1, 3, 6):
        (packed,) = compress_streams([skewed(MEBI)], level)
        assert len(packed) < 1.03 * MEBI * entropy_bits / 8
    words = noise(200 * 24).reshape(200, 24)
    text = words[np.random.default_rng(1).integers(0, 200, 20_000)].reshape(-1)
    for level in (1, 3, 6):
        (packed,) = compress_streams([text], level)
        assert len(packed) < 0.2 * text.size


def test_parts_that_differ_are_tried_apart() -> None:
    """As in a sorted plane: from one end to the other the numbers get smaller."""
    rng = np.random.default_rng(0)
    planes = [np.minimum(rng.geometric(p, MEBI // 4), 255) for p in (0.05, 0.2, 0.5, 0.9)]
    (packed,) = compress_streams([np.concatenate(planes).astype(np.uint8)], 3)
    entropy_bits = np.mean([5.76, 3.61, 2.0, 0.52])
    assert len(packed) < 1.12 * MEBI * entropy_bits / 8


def test_slow_levels_are_never_larger_than_quick_ones() -> None:
    streams = [skewed(300_000), noise(300_000, 3), np.tile(noise(70_000), 4)]
    quick, slow = (compress_streams(streams, level) for level in (1, 12))
    assert all(len(s) <= len(q) for q, s in zip(quick, slow, strict=True))


def test_threads_do_not_meet() -> None:
    streams = [skewed(100_000 + i) for i in range(8)]
    expected = [bytes(packed) for packed in compress_streams(streams, 3)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda stream: bytes(compress_streams([stream], 3)[0]), streams))
        sizes = [stream.size for stream in streams]
        back = list(pool.map(decompress, found, sizes))
    assert found == expected
    assert all(np.array_equal(a, b) for a, b in zip(back, streams, strict=True))


# ---- what is no such stream ----


@pytest.mark.parametrize("has_size", [False, True])
def test_bombs_are_refused(has_size: bool) -> None:
    bomb = frame(bytes(64 * MEBI), write_content_size=has_size)
    assert len(bomb) < 8 * KIBI
    for expected in (len(bomb) + 1, 10_000, 64 * MEBI - 1, 64 * MEBI + 1):
        with pytest.raises(GGUFShardError, match=r"stream (expands to|does not expand)"):
            decompress(bomb, expected)
    with pytest.raises(GGUFShardError, match=f"stream has {len(bomb)} bytes for 100"):
        decompress(bomb, 100)
    assert decompress(bomb, 64 * MEBI).size == 64 * MEBI


def test_a_size_that_is_only_claimed_is_not_allocated() -> None:
    """A header that promises an exbibyte, of which zstandard would reserve all."""
    magic, single_segment_of_8 = b"\x28\xb5\x2f\xfd", b"\xe0"
    claim = magic + single_segment_of_8 + (1 << 60).to_bytes(8, "little") + b"\x01\0\0"
    with pytest.raises(GGUFShardError, match=f"expands to {1 << 60} bytes, not 100"):
        decompress(claim, 100)


def test_windows_are_bounded() -> None:
    content = noise(100, 2).tobytes()
    for window_log, is_fine in ((23, True), (24, False)):
        compressor = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=window_log)
        ).compressobj()
        wide = compressor.compress(content) + compressor.flush()
        assert zstandard.get_frame_parameters(wide).window_size == 1 << window_log
        if is_fine:
            assert decompress(wide, 100).tobytes() == content
        else:
            with pytest.raises(GGUFShardError, match="does not expand"):
                decompress(wide, 100)


@pytest.mark.parametrize("n_bytes", [1000, 300_000])
def test_cut_lengthened_and_changed_frames(n_bytes: int) -> None:
    content = skewed(n_bytes)
    (packed,) = compress_streams([content], 3)
    packed = bytes(packed)
    for end in {*range(0, 20), len(packed) // 2, len(packed) - 1}:
        with pytest.raises(GGUFShardError, match="does not expand"):
            decompress(packed[:end], n_bytes)
    for extra in (b"\0", packed, b"\x50\x2a\x4d\x18\0\0\0\0"):  # the last is a skippable frame
        if len(packed + extra) < n_bytes:
            with pytest.raises(GGUFShardError, match="does not expand"):
                decompress(packed + extra, n_bytes)
    for expected in (n_bytes - 1, n_bytes + 1):
        with pytest.raises(GGUFShardError, match="expand"):
            decompress(packed, expected)


@pytest.mark.parametrize(
    "stream", [b"", b"\0", b"text that is no frame", b"\x50\x2a\x4d\x18\4\0\0\0abcd"]
)
def test_no_frames(stream: bytes) -> None:
    with pytest.raises(GGUFShardError, match="expand"):
        decompress(stream, 100)


@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_damage_gives_the_right_size_or_an_error(flips: list[tuple[int, int]]) -> None:
    (packed,) = compress_streams([skewed(2000)], 3)
    damaged = bytearray(packed)
    for place, bits in flips:
        damaged[place % len(damaged)] ^= bits
    try:
        content = decompress(bytes(damaged), 2000)
    except GGUFShardError:
        return
    assert content.shape == (2000,)
