"""The bytes of random weights, in the block types of GGUF.

No float32 tensor is ever made or quantised. Every byte of a chunk of blocks is drawn from the
generator (SFC64, seeded per tensor by the seed and the tensor's name, so no two rows or pages are
alike), and then only the bytes that may not be arbitrary are put right:

- Q8_0: -128, which the quantiser never writes, becomes -127; the scale is looked up by a random
  byte in a table of 256 scales around the fitting one.
- Q4_0, Q6_K: as above, without the first step. Half the Q4_0 scales are negative, as in real
  files, since quants from -8 to 7 have a mean of -0.5, which would add up over a row.
- F16, F32: 16 random bits choose one of the 65,536 quantiles of the normal distribution.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

CHUNK_BYTES = 1 << 20
Q6_K, F16, F32 = GGMLQuantizationType.Q6_K, GGMLQuantizationType.F16, GGMLQuantizationType.F32
Q8_0, Q4_0 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0


def random_chunks(
    name: str, n_blocks: int, ggml_type: GGMLQuantizationType, std: float, seed: int
) -> Iterator[np.ndarray]:
    """Random weights of a tensor, in order.

    Parameters
    ----------
    name
        The tensor's name; with the seed, it decides the values.
    n_blocks
        Blocks of the tensor (elements, if F16 or F32).
    ggml_type
        Q8_0, Q4_0, Q6_K, F16 or F32.
    std
        Standard deviation of the values.
    seed
        Non-negative seed.

    Yields
    ------
    numpy.ndarray
        Whole blocks, at most `CHUNK_BYTES` of them.
    """
    bits = np.random.SFC64([seed, zlib.crc32(name.encode())])
    for n in _chunk_sizes(n_blocks, ggml_type):
        if ggml_type in (F16, F32):
            draws = _random_bytes(bits, 2 * n).view(np.uint16)
            yield _normal_quantiles(ggml_type, std)[draws]
        else:
            yield _random_blocks(bits, n, ggml_type, std)


def chunks_of_ones(n_elements: int) -> Iterator[np.ndarray]:
    """A float32 tensor of ones, in arrays of at most `CHUNK_BYTES`."""
    for n in _chunk_sizes(n_elements, F32):
        yield np.ones(n, np.float32)


def _chunk_sizes(n_blocks: int, ggml_type: GGMLQuantizationType) -> Iterator[int]:
    per_chunk = CHUNK_BYTES // GGML_QUANT_SIZES[ggml_type][1]
    for first in range(0, n_blocks, per_chunk):
        yield min(per_chunk, n_blocks - first)


def _random_bytes(bits: np.random.BitGenerator, count: int) -> np.ndarray:
    """Uniform bytes, uint8 [count]."""
    return bits.random_raw(-(-count // 8)).view(np.uint8)[:count]


def _random_blocks(
    bits: np.random.BitGenerator, n_blocks: int, ggml_type: GGMLQuantizationType, std: float
) -> np.ndarray:
    """Quantised blocks, uint8 [n_blocks, block bytes], whose values have the deviation `std`."""
    block_bytes = GGML_QUANT_SIZES[ggml_type][1]
    blocks = _random_bytes(bits, n_blocks * block_bytes).reshape(n_blocks, block_bytes)
    if ggml_type == Q8_0:
        quants = blocks.view(np.int8)  # the scales too: one contiguous pass, they are set below
        np.maximum(quants, -127, out=quants)
    # A block ends (Q6_K) or begins with its float16 scale; the sizes are even.
    field = -1 if ggml_type == Q6_K else 0
    blocks.view(np.uint16)[:, field] = _scales(ggml_type, std)[blocks[:, field]]
    return blocks


@lru_cache
def _scales(ggml_type: GGMLQuantizationType, std: float) -> np.ndarray:
    """Bits of 256 float16 scales, 0.75 to 1.25 of the one that gives deviation `std`."""
    spread = np.linspace(0.75, 1.25, 256)
    if ggml_type == Q4_0:
        spread[::2] *= -1
    scales = spread * std / (_rms(spread) * _unit_scale_rms(ggml_type))
    return scales.astype(np.float16).view(np.uint16)


def _unit_scale_rms(ggml_type: GGMLQuantizationType) -> float:
    """Root mean square of the values in a block of random bytes whose scale is 1."""
    int8 = np.arange(-128, 128)
    if ggml_type == Q8_0:
        return _rms(np.maximum(int8, -127))
    if ggml_type == Q4_0:
        return _rms(np.arange(-8, 8))
    return _rms(np.arange(-32, 32)) * _rms(int8)  # Q6_K: 6-bit quants, 8-bit scales of 16 of them


def _rms(values: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(values, dtype=np.float64)))


@lru_cache
def _unit_normal_quantiles() -> np.ndarray:
    """Normal distribution at the middles of 65,536 equal shares of probability, float64."""
    distribution = NormalDist()
    return np.array([distribution.inv_cdf((k + 0.5) / 65536) for k in range(65536)])


@lru_cache(maxsize=8)
def _normal_quantiles(ggml_type: GGMLQuantizationType, std: float) -> np.ndarray:
    dtype = np.float16 if ggml_type == F16 else np.float32
    return (_unit_normal_quantiles() * std).astype(dtype)
