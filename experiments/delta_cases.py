"""Pairs of models to make patches between, and the fewest bytes that a patch can have.

A base is a llama-like GGUF file with a vocabulary and square BF16 matrices of gaussian weights
(deviation 0.02). Its targets differ from it so that what a patch must say is known:

| pair | the target | what cannot be said in less |
| --- | --- | --- |
| `identical` | the same bytes | |
| `pages` | k = n/100 of the n pages of 4096 bytes are random | log2(n choose k) + 8 * 4096 k bits |
| `edits` | k of the n bytes of the tensor data are others | log2(n choose k) + k log2(255) bits |
| `metadata` | the name is 100 letters longer: everything behind it moves | 100 log2(26) bits |
| `noise` | gaussian noise of deviation 1e-4 on every weight, rounded | `noise_entropy` |

These are entropies: no coder needs fewer bits on average over all targets made so. A pair named
after a file is a fine-tuned model from the folder of real ones; nothing is known about it.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from experiments.make_model import MIN_VOCAB, Preset, TensorPlan, write_header

PAGE = 4096
WEIGHT_STD, NOISE_STD = 0.02, 1e-4
_METADATA_BYTES = 100
_NAMES = ("attn_q", "attn_k", "attn_v", "attn_output")
_ALIGNMENT = 32  # GGUF's default
_BASE_SEED, _TARGET_SEED = 0, 1
_MODELS = Path(__file__).resolve().parent.parent.parent / "shared" / "models"
FINE_TUNED = {"tales7M-ft-last2-f16": "tales7M-f16"}


@dataclass(frozen=True)
class DeltaCases:
    """Parameters of `experiments.exp_delta`.

    Attributes
    ----------
    n_tensors, side
        Matrices of the generated models, and their rows and columns.
    edits
        Bytes that differ in the pair `edits`.
    peers
        Names of peers that take part.
    repeats
        Measurements of each variant, after one to warm up.
    """

    n_tensors: int
    side: int
    edits: int
    peers: tuple[str, ...]
    repeats: int


_QUICK = ("zstd -1", "xdelta3")
_ALL = ("zstd -19", *_QUICK, "bsdiff")

# 4 MiB, 64 MiB and 1 GiB of weights, with as many edits a byte. bsdiff needs 17 times the base in
# memory, and like zstd -19 half a second a megabyte.
DELTA = {
    "S": DeltaCases(32, 256, 125, _ALL, 3),
    "M": DeltaCases(32, 1024, 2000, _ALL, 5),
    "L": DeltaCases(32, 4096, 32000, _QUICK, 3),
}


@dataclass(frozen=True)
class Pair:
    """A base and a target; `least_bytes` is what a patch must have on average, None if unknown."""

    name: str
    base: Path
    target: Path
    least_bytes: float | None = None


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of float32 values rounded to BF16, ties to even; uint16 of the same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: np.ndarray = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def float32(bits: np.ndarray) -> np.ndarray:
    """Values of BF16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_base(path: Path, cases: DeltaCases, seed: int) -> None:
    """Write the base of all generated pairs."""
    _write_header(path, cases, "random BF16")
    with open(path, "ab") as file:
        for i in range(cases.n_tensors):
            rng = _generator(seed, _BASE_SEED, i)
            weights = rng.standard_normal(cases.side**2, np.float32)
            file.write(bfloat16(weights * np.float32(WEIGHT_STD)).data)


def write_target(name: str, base: Path, target: Path, cases: DeltaCases, seed: int) -> Pair:
    """Write the target of the generated pair `name`, a key of `GENERATED`."""
    rng = _generator(seed, _TARGET_SEED, zlib.crc32(name.encode()))
    return Pair(name, base, target, GENERATED[name](base, target, cases, rng))


def write_large_pair(folder: Path, n_bytes: int, seed: int) -> Pair:
    """A pair of about `n_bytes` each: 1 % of the pages random, noise on one tensor in sixteen."""
    cases = large_cases(n_bytes)
    base, target = folder / "base.gguf", folder / "target.gguf"
    write_base(base, cases, seed)
    shutil.copyfile(base, target)
    rng = _generator(seed, _TARGET_SEED, 0)
    for i, tensor in enumerate(_tensors(target, cases)):
        if i % 16 == 0:
            _add_noise(tensor, rng)
    _replace_pages(target, cases, rng)
    return Pair("large", base, target)


def large_cases(n_bytes: int) -> DeltaCases:
    """A model of about so many bytes in a hundred to four hundred tensors, or one."""
    side = 1 << max(0, math.floor(math.log2(n_bytes / 200) / 2))
    return DeltaCases(max(1, n_bytes // (2 * side**2)), side, 0, (), 1)


def fine_tuned_pairs() -> list[Pair]:
    """Real pairs: files of `$GGUF_SHARD_MODELS`, or of `shared/models` beside the project; those
    that are there."""
    folder = Path(os.environ.get("GGUF_SHARD_MODELS") or _MODELS)
    pairs = [
        Pair(target, folder / f"{base}.gguf", folder / f"{target}.gguf")
        for target, base in FINE_TUNED.items()
    ]
    return [pair for pair in pairs if pair.base.is_file() and pair.target.is_file()]


def subset_bits(n: int, k: int) -> float:
    """log2 of the number of ways to choose k things out of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def noise_entropy(bits: np.ndarray, noise_std: float = NOISE_STD) -> float:
    """Entropy of round(b + noise), given b: bits in all, over the elements b of a base.

    The probability of a value of BF16 is that of its rounding interval, whose ends are the middles
    between neighbours. Values below 2**-32 count as 0: with the usual deviation, a probability of
    1e-6.

    Parameters
    ----------
    bits
        BF16 elements of the base, uint16 [n].
    noise_std
        Deviation of the gaussian noise.
    """
    counts = np.bincount(bits & 0x7FFF)  # the sign does not matter
    present = np.flatnonzero(counts)
    values = float32(present.astype(np.uint16)).tolist()
    return sum(
        n * _rounded_entropy(b, noise_std)
        for n, b in zip(counts[present].tolist(), values, strict=True)
    )


@cache
def _rounded_entropy(b: float, noise_std: float) -> float:
    """Entropy of round(b + noise) in bits."""
    middles = _middles()
    first, last = np.searchsorted(middles, (b - 9 * noise_std, b + 9 * noise_std))
    scaled = (middles[first:last] - b) / (noise_std * math.sqrt(2))
    below = np.array([0.0, *((1 + math.erf(x)) / 2 for x in scaled.tolist()), 1.0])
    p = np.diff(below)
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


@cache
def _middles() -> np.ndarray:
    """Between neighbours of BF16 from 2**-32 to 2**16, of either sign, and 0; float64."""
    bits = np.arange((127 - 32) << 7, (127 + 16) << 7, dtype=np.uint16)
    values = float32(bits).astype(np.float64)
    values = np.concatenate([-values[::-1], [0.0], values])
    middles: np.ndarray = (values[1:] + values[:-1]) / 2
    return middles


def _write_header(path: Path, cases: DeltaCases, name: str) -> None:
    side, n_names = cases.side, len(_NAMES)
    n_layer = -(-cases.n_tensors // n_names)
    shape = Preset(side, n_layer, side, 1, 1, max(4 * side, MIN_VOCAB), 512)
    plans = []
    for i in range(cases.n_tensors):
        tensor = f"blk.{i // n_names}.{_NAMES[i % n_names]}.weight"
        plans.append(TensorPlan(tensor, (side, side), GGMLQuantizationType.BF16, None))
    write_header(path, name, shape, LlamaFileType.MOSTLY_BF16, plans)
    with open(path, "ab") as file:
        file.write(bytes(-file.tell() % _ALIGNMENT))


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seeds))


def _data(path: Path, cases: DeltaCases, mode: Literal["r", "r+"] = "r+") -> np.ndarray:
    """The tensor data of a file, mapped; uint8 [n]. Tensors lie one behind the other."""
    n_bytes = 2 * cases.n_tensors * cases.side**2
    return np.memmap(path, np.uint8, mode, path.stat().st_size - n_bytes, (n_bytes,))


def _tensors(path: Path, cases: DeltaCases) -> Iterator[np.ndarray]:
    """Elements of one tensor after the other, uint16 [n], mapped."""
    yield from _data(path, cases).view(np.uint16).reshape(cases.n_tensors, -1)


def _identical(base: Path, target: Path, cases: DeltaCases, rng: np.random.Generator) -> None:
    shutil.copyfile(base, target)


def _pages(base: Path, target: Path, cases: DeltaCases, rng: np.random.Generator) -> float:
    shutil.copyfile(base, target)
    return _replace_pages(target, cases, rng)


def _replace_pages(target: Path, cases: DeltaCases, rng: np.random.Generator) -> float:
    """Make 1 % of the pages random; the fewest bytes that say so."""
    data = _data(target, cases)
    n_pages = data.size // PAGE
    pages = data[: n_pages * PAGE].reshape(n_pages, PAGE)
    chosen = rng.choice(n_pages, max(1, round(n_pages / 100)), replace=False)
    for page in chosen:
        pages[page] = rng.integers(0, 256, PAGE, np.uint8)
    return subset_bits(n_pages, chosen.size) / 8 + chosen.size * PAGE


def _edits(base: Path, target: Path, cases: DeltaCases, rng: np.random.Generator) -> float:
    shutil.copyfile(base, target)
    data = _data(target, cases)
    places = rng.choice(data.size, cases.edits, replace=False)
    data[places] ^= rng.integers(1, 256, cases.edits, np.uint8)
    return (subset_bits(data.size, cases.edits) + cases.edits * math.log2(255)) / 8


def _metadata(base: Path, target: Path, cases: DeltaCases, rng: np.random.Generator) -> float:
    letters = rng.integers(ord("a"), ord("z") + 1, _METADATA_BYTES, np.uint8).tobytes().decode()
    _write_header(target, cases, f"random BF16{letters}")
    with open(target, "ab") as file:
        file.write(_data(base, cases, "r").data)
    return _METADATA_BYTES * math.log2(26) / 8


def _noise(base: Path, target: Path, cases: DeltaCases, rng: np.random.Generator) -> float:
    shutil.copyfile(base, target)
    n_bits = 0.0
    for tensor in _tensors(target, cases):
        n_bits += noise_entropy(tensor)
        _add_noise(tensor, rng)
    return n_bits / 8


def _add_noise(tensor: np.ndarray, rng: np.random.Generator) -> None:
    noise = rng.standard_normal(tensor.size, np.float32) * np.float32(NOISE_STD)
    tensor[:] = bfloat16(float32(tensor) + noise)


GENERATED: dict[str, Callable[[Path, Path, DeltaCases, np.random.Generator], float | None]] = {
    "identical": _identical,
    "metadata": _metadata,
    "edits": _edits,
    "pages": _pages,
    "noise": _noise,
}
