"""Pairs to make patches between: how they differ, and what that takes at least."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from experiments import delta_cases
from experiments.delta_cases import (
    GENERATED,
    PAGE,
    DeltaCases,
    Pair,
    bfloat16,
    fine_tuned_pairs,
    float32,
    large_cases,
    noise_entropy,
    subset_bits,
    write_base,
    write_large_pair,
    write_target,
)

TINY = DeltaCases(n_tensors=7, side=128, edits=4000, peers=(), repeats=1)
TINY_BYTES = 7 * 128 * 128 * 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    write_base(path, TINY, seed=3)
    return path


def target(name: str, base: Path, folder: Path) -> Pair:
    return write_target(name, base, folder / "target.gguf", TINY, seed=3)


def halves(path: Path) -> tuple[bytes, np.ndarray]:
    """Header, and tensor data as uint8."""
    whole = path.read_bytes()
    return whole[:-TINY_BYTES], np.frombuffer(whole[-TINY_BYTES:], np.uint8)


def nearest_bfloat16(value: float) -> int:
    """Round by comparing with both neighbours, in exact arithmetic."""
    below = int(np.array(value, np.float32).view(np.uint32)) >> 16
    low, high = (float(float32(np.array([bits], np.uint16))[0]) for bits in (below, below + 1))
    if abs(value - low) == abs(value - high):
        return below + (below & 1)
    return below if abs(value - low) < abs(value - high) else below + 1


def test_rounding_to_bfloat16() -> None:
    rng = np.random.default_rng(0)
    ties = (np.arange(0x3F00, 0x3F10, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([rng.standard_normal(500).astype(np.float32) * 0.02, ties, -ties])
    values = np.concatenate([values, np.nextafter(ties, 0), np.nextafter(ties, 1)])
    assert bfloat16(values).tolist() == [nearest_bfloat16(float(v)) for v in values]


def test_bfloat16_values_are_kept() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[np.isfinite(float32(bits))]
    assert np.array_equal(bfloat16(float32(bits)), bits)


def test_base(base: Path, tmp_path: Path) -> None:
    reader = GGUFReader(base)
    assert [t.name for t in reader.tensors[3:5]] == [
        "blk.0.attn_output.weight", "blk.1.attn_q.weight",
    ]  # fmt: skip
    assert len({t.name for t in reader.tensors}) == TINY.n_tensors
    for tensor in reader.tensors:
        assert tensor.tensor_type == GGMLQuantizationType.BF16
        assert tensor.shape.tolist() == [128, 128]
        weights = float32(tensor.data.view(np.uint16).ravel())
        assert weights.std() == pytest.approx(0.02, rel=0.03)
    assert reader.tensors[-1].data_offset + 2 * 128 * 128 == base.stat().st_size
    assert not np.array_equal(reader.tensors[0].data, reader.tensors[1].data)

    again, other = tmp_path / "again.gguf", tmp_path / "other.gguf"
    write_base(again, TINY, seed=3)
    write_base(other, TINY, seed=4)
    assert again.read_bytes() == base.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("name", GENERATED)
def test_targets_are_repeatable(name: str, base: Path, tmp_path: Path) -> None:
    before = base.read_bytes()
    pair = target(name, base, tmp_path)
    assert (pair.name, pair.base, pair.target) == (name, base, tmp_path / "target.gguf")
    first = pair.target.read_bytes()
    assert target(name, base, tmp_path).target.read_bytes() == first
    assert base.read_bytes() == before
    GGUFReader(pair.target)


def test_identical(base: Path, tmp_path: Path) -> None:
    pair = target("identical", base, tmp_path)
    assert pair.target.read_bytes() == base.read_bytes()
    assert pair.least_bytes is None


def test_metadata(base: Path, tmp_path: Path) -> None:
    pair = target("metadata", base, tmp_path)
    names = []
    for path in (base, pair.target):
        names.append(GGUFReader(path).fields["general.name"].contents())
    assert names[1].startswith(names[0]) and len(names[1]) == len(names[0]) + 100
    (old, old_data), (new, new_data) = halves(base), halves(pair.target)
    assert len(new) - len(old) in (96, 128)
    assert np.array_equal(old_data, new_data)
    assert pair.least_bytes == pytest.approx(100 * math.log2(26) / 8)


def test_edits(base: Path, tmp_path: Path) -> None:
    pair = target("edits", base, tmp_path)
    (old, old_data), (new, new_data) = halves(base), halves(pair.target)
    assert old == new
    assert (old_data != new_data).sum() == TINY.edits
    bits = math.log2(math.comb(TINY_BYTES, 4000)) + 4000 * math.log2(255)
    assert pair.least_bytes == pytest.approx(bits / 8)


def test_pages(base: Path, tmp_path: Path) -> None:
    pair = target("pages", base, tmp_path)
    (old, old_data), (new, new_data) = halves(base), halves(pair.target)
    assert old == new
    changed = (old_data != new_data).reshape(-1, PAGE).sum(1)
    assert (changed > 0).sum() == 1  # of 56
    assert changed.max() > 0.98 * PAGE  # random bytes: one in 256 is as before
    assert pair.least_bytes == pytest.approx(PAGE + math.log2(56) / 8)
    wide = replace(TINY, side=1024)  # 3,584 pages
    big = tmp_path / "big.gguf"
    write_base(big, wide, 0)
    pair = write_target("pages", big, tmp_path / "wide.gguf", wide, 0)
    differs = np.fromfile(big, np.uint8) != np.fromfile(pair.target, np.uint8)
    assert differs[-wide.n_tensors * 2 << 20 :].reshape(-1, PAGE).any(1).sum() == 36


def test_noise(base: Path, tmp_path: Path) -> None:
    pair = target("noise", base, tmp_path)
    (old, old_data), (new, new_data) = halves(base), halves(pair.target)
    assert old == new
    before, after = (data.view(np.uint16) for data in (old_data, new_data))
    small = np.abs(float32(before)) < 0.004  # where rounding hides little
    change = (float32(after) - float32(before))[small]
    assert change.std() == pytest.approx(1e-4, rel=0.05)
    assert abs(change.mean()) < 1e-5
    assert pair.least_bytes == pytest.approx(noise_entropy(before) / 8)


def test_subsets() -> None:
    for n, k in ((1, 0), (1, 1), (10, 3), (1000, 999), (10**6, 50)):
        assert subset_bits(n, k) == pytest.approx(math.log2(math.comb(n, k)), abs=1e-6)


def entropy_by_all_values(b: float, std: float) -> float:
    """Over every finite value of BF16, the probability that b + noise is rounded to it."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        values = np.unique(float32(bits)[np.isfinite(float32(bits))].astype(np.float64))
    near = values[np.abs(values - b) < 10 * std]
    ends = [-math.inf, *((near[1:] + near[:-1]) / 2).tolist(), math.inf]
    below = [0.5 * math.erfc((b - end) / (std * math.sqrt(2))) for end in ends]
    return -sum(p * math.log2(p) for p in np.diff(below).tolist() if p > 0)


@pytest.mark.parametrize("exponent", [-3, -6, -10, -14])
def test_noise_entropy(exponent: int) -> None:
    first = exponent + 127 << 7
    binade = np.arange(first, first + 128, dtype=np.uint16)
    sample = binade[::5]
    expected = sum(entropy_by_all_values(float(b), 1e-4) for b in float32(sample))
    assert noise_entropy(sample) == pytest.approx(expected, rel=1e-4)
    assert noise_entropy(binade | 0x8000) == noise_entropy(binade)
    repeated = np.concatenate([sample, sample, sample[:1]])
    assert noise_entropy(repeated) == pytest.approx(
        2 * noise_entropy(sample) + noise_entropy(sample[:1])
    )


def test_noise_entropy_is_that_of_samples() -> None:
    rng = np.random.default_rng(0)
    n = 400_000
    base = np.full(n, bfloat16(np.array([0.01], np.float32))[0])
    noise = rng.standard_normal(n).astype(np.float32) * np.float32(1e-4)
    _, counts = np.unique(bfloat16(float32(base) + noise), return_counts=True)
    p = counts / n
    assert noise_entropy(base) / n == pytest.approx(-(p * np.log2(p)).sum(), rel=0.01)


@pytest.mark.parametrize("n_bytes", [1, 2, 199, 800, 1 << 20, 4 * 10**9])
def test_sizes_of_large_pairs(n_bytes: int) -> None:
    cases = large_cases(n_bytes)
    tensor = 2 * cases.side**2
    assert cases.n_tensors * tensor <= max(n_bytes, 2) < (cases.n_tensors + 1) * tensor
    assert cases.n_tensors <= 400


def test_large_pair(tmp_path: Path) -> None:
    pair = write_large_pair(tmp_path, 5 << 20, seed=0)
    cases = large_cases(5 << 20)
    n_bytes = 2 * cases.n_tensors * cases.side**2
    assert abs(n_bytes - (5 << 20)) < 2 * cases.side**2
    old, new = (np.fromfile(path, np.uint8)[-n_bytes:] for path in (pair.base, pair.target))
    changed = (old != new).reshape(cases.n_tensors, -1).mean(1)
    assert (changed[::16] > 0.3).all()  # noise
    others = np.delete(changed, np.s_[::16])
    assert 0.003 < others.mean() < 0.03 and (others == 0).any()  # pages
    assert pair.least_bytes is None


def test_fine_tuned_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_SHARD_MODELS", str(tmp_path))
    assert fine_tuned_pairs() == []
    (tmp_path / "tales7M-f16.gguf").touch()
    assert fine_tuned_pairs() == []
    (tmp_path / "tales7M-ft-last2-f16.gguf").touch()
    (pair,) = fine_tuned_pairs()
    assert pair.name == "tales7M-ft-last2-f16"
    assert (pair.base.name, pair.target.name) == (
        "tales7M-f16.gguf", "tales7M-ft-last2-f16.gguf",
    )  # fmt: skip
    monkeypatch.delenv("GGUF_SHARD_MODELS")
    monkeypatch.setattr(delta_cases, "_MODELS", tmp_path / "none")
    assert fine_tuned_pairs() == []
