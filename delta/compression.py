"""Streams in fewer bytes: Zstandard, with hardly a search.

Most streams are noise with uneven frequencies. Matches found in noise are chance, and dearer than
the literals they replace: the least search that Zstandard knows, with the smallest of hash tables,
beats nearly all levels on such streams, and is faster than each. Where pages do repeat themselves,
the levels are better. So each stream is tried both ways.

A compressed stream is one frame without size, checksum and dictionary. One that would save next
to nothing is kept as it is; it is known by having as many bytes as it shall expand to. The bytes
that a frame may expand to are known to whoever reads it, and it is held to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard

from forge.errors import GGUFShardError
from forge.thread_things import ThreadThings

#: Distances over which matches are looked for, at most: this bounds what decompressing takes.
_MAX_WINDOW_LOG = 23

#: From this level on searching takes so long that trying is nothing beside it.
SLOW_LEVEL = 6

#: Below, ways to compress a stream are tried on so many pieces of it, of so many bytes.
_TRIAL_PIECES, _TRIAL_BYTES = 2, 1 << 14

#: Of streams that compress to more than this share it is the streams that are kept.
_WORTHWHILE_SHARE = 0.99

_things = ThreadThings()  # Zstandard's objects serve one thread at a time


def _compressor(level: int | None) -> zstandard.ZstdCompressor:
    """This thread's compressor of a level; None is the one that hardly searches."""
    compressors = _things.mine().setdefault("compressors", {})
    if level not in compressors:
        if level is None:
            parameters = zstandard.ZstdCompressionParameters(
                compression_level=1,
                strategy=zstandard.STRATEGY_FAST,
                hash_log=6,
                min_match=7,
                write_content_size=False,
            )
        else:
            usual = zstandard.ZstdCompressionParameters.from_level(level)
            parameters = zstandard.ZstdCompressionParameters(
                compression_level=level,
                window_log=min(usual.window_log, _MAX_WINDOW_LOG),
                write_content_size=False,
            )
        compressors[level] = zstandard.ZstdCompressor(compression_params=parameters)
    return compressors[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's decompressor."""
    things = _things.mine()
    if "decompressor" not in things:
        things["decompressor"] = zstandard.ZstdDecompressor(max_window_size=1 << _MAX_WINDOW_LOG)
    decompressor: zstandard.ZstdDecompressor = things["decompressor"]
    return decompressor


def _on_trial(stream: np.ndarray, level: int) -> list[memoryview]:
    """What ways to compress a stream are tried on: its begin and its end, or all of it."""
    if level >= SLOW_LEVEL or stream.size <= _TRIAL_PIECES * _TRIAL_BYTES:
        return [stream.data]
    starts = np.linspace(0, stream.size - _TRIAL_BYTES, _TRIAL_PIECES).astype(np.int64)
    return [stream[start : start + _TRIAL_BYTES].data for start in starts]


def _compress(stream: np.ndarray, level: int) -> bytes:
    """The stream as one frame, the way that does better on trial."""
    pieces = _on_trial(stream, level)
    frames = [
        [c.compress(piece) for piece in pieces] for c in (_compressor(None), _compressor(level))
    ]
    sizes = [sum(map(len, tried)) for tried in frames]
    best = sizes.index(min(sizes))
    if len(pieces) == 1:
        return frames[best][0]
    return _compressor(level if best else None).compress(stream.data)


def compress_streams(streams: Sequence[np.ndarray | bytes], level: int) -> list[bytes | memoryview]:
    """Each stream in fewer bytes, or as it is: then it has as many as before.

    Parameters
    ----------
    streams
        uint8 arrays, contiguous, or bytes.
    level
        Zstandard's compression level.
    """
    compressed: list[bytes | memoryview] = []
    for stream in streams:
        data = np.frombuffer(stream, np.uint8)
        frame = _compress(data, level)
        is_worthwhile = len(frame) <= _WORTHWHILE_SHARE * data.size
        compressed.append(frame if is_worthwhile else data.data)
    return compressed


def decompress(stream: bytes | memoryview, expected_size: int) -> np.ndarray:
    """A stream as it was before `compress_streams`.

    Parameters
    ----------
    stream
        What lies in the patch.
    expected_size
        From `stream_sizes`. No more than that is allocated, and a window of 8 MiB.

    Returns
    -------
    numpy.ndarray
        uint8 [expected_size], its own memory. GGUFShardError if that is not what the stream holds.
    """
    if len(stream) == expected_size:
        return np.frombuffer(bytes(stream), np.uint8)
    if len(stream) > expected_size:
        raise GGUFShardError(f"stream has {len(stream)} bytes for {expected_size}")
    try:
        # A size that the frame claims would be allocated whatever the limit.
        claimed = zstandard.frame_content_size(stream)
        if claimed not in (-1, expected_size):
            raise GGUFShardError(f"stream expands to {claimed} bytes, not {expected_size}")
        content = _decompressor().decompress(
            stream, max_output_size=expected_size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise GGUFShardError(f"stream does not expand: {error}") from None
    if len(content) != expected_size:
        raise GGUFShardError(f"stream expands to {len(content)} bytes, not {expected_size}")
    return np.frombuffer(content, np.uint8)
