"""The mode of a page: where it is evident, and that the sum of the choices is near the best."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from delta import mode_choice
from delta.byte_planes import ElementKind, element_kind
from delta.compression import compress_streams
from delta.mode_choice import ORDERED, RAW, SPARSE, XOR, choose_modes
from delta.page_coding import encode
from forge.crc32 import CONTENT_BYTES

T = GGMLQuantizationType
N_PAGES = 24


def lengths_of(kind: ElementKind) -> np.ndarray:
    return np.full(N_PAGES, CONTENT_BYTES // kind.block_bytes * kind.block_bytes)


def noise(kind: ElementKind, seed: int = 0) -> np.ndarray:
    n_bytes = int(lengths_of(kind).sum())
    return np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)


def numbers(kind: ElementKind, values: np.ndarray) -> np.ndarray:
    """Real numbers as elements of a plain type: uint8."""
    if kind.ggml_type == T.BF16:
        bits = values.astype("<f4").view("<u4") + np.uint32(0x8000)
        return (bits >> 16).astype("<u2").view(np.uint8)
    return values.astype({T.F16: "<f2", T.F32: "<f4", T.F64: "<f8"}[T(kind.ggml_type)]).view(
        np.uint8
    )


def weights(kind: ElementKind, seed: int = 0) -> np.ndarray:
    n = int(lengths_of(kind).sum()) // kind.block_bytes
    return np.random.default_rng(seed).normal(0, 0.02, n)


def chosen(kind: ElementKind, target: np.ndarray, base: np.ndarray) -> set[int]:
    return set(choose_modes(kind, target, base, lengths_of(kind)).tolist())


every_float = pytest.mark.parametrize(
    "ggml_type", [T.F16, T.BF16, T.F32, T.F64], ids=lambda t: t.name
)
some_kinds = pytest.mark.parametrize(
    "ggml_type", [None, T.I8, T.I32, T.F16, T.F32, T.F64, T.Q4_0, T.Q8_0, T.Q4_K, T.Q6_K, T.MXFP4],
    ids=lambda t: "bytes" if t is None else t.name,
)  # fmt: skip


@some_kinds
def test_unrelated_noise_is_raw(ggml_type: T | None) -> None:
    kind = element_kind(ggml_type)
    assert chosen(kind, noise(kind, 1), noise(kind, 2)) == {RAW}


@some_kinds
def test_constant_pages_are_raw_whatever_was_there(ggml_type: T | None) -> None:
    kind = element_kind(ggml_type)
    assert chosen(kind, np.zeros_like(noise(kind)), noise(kind)) == {RAW}


@some_kinds
@pytest.mark.parametrize("n_changes", [0, 1, 40])
def test_few_changes_are_sparse(ggml_type: T | None, n_changes: int) -> None:
    kind = element_kind(ggml_type)
    base = noise(kind)
    target = base.copy().reshape(N_PAGES, -1)
    target[:, :: target.shape[1] // max(n_changes, 1)][:, :n_changes] ^= 0xA5
    assert chosen(kind, target.reshape(-1), base) == {SPARSE}


@some_kinds
def test_flipped_bits_everywhere_are_xor(ggml_type: T | None) -> None:
    """Subtracting would carry."""
    kind = element_kind(ggml_type)
    base = noise(kind)
    bits = np.random.default_rng(1).choice(np.array([0x81, 0x18, 0x99], np.uint8), base.size)
    assert chosen(kind, base ^ bits, base) == {XOR}


def test_xor_of_a_nibble_is_smaller_than_its_steps() -> None:
    """Four bits, where the steps from -15 to 15 make 4.7."""
    kind = element_kind(T.I8)
    base = noise(kind)
    nibbles = np.random.default_rng(1).integers(0, 16, base.size, dtype=np.uint8)
    assert chosen(kind, base ^ nibbles, base) == {XOR}


@every_float
def test_small_updates_of_weights_are_ordered(ggml_type: T) -> None:
    kind = element_kind(ggml_type)
    base = weights(kind)
    target = base + np.random.default_rng(1).normal(0, 1e-3, base.size)
    assert chosen(kind, numbers(kind, target), numbers(kind, base)) == {ORDERED}


@every_float
def test_turned_signs_are_xor(ggml_type: T) -> None:
    kind = element_kind(ggml_type)
    base = weights(kind)
    is_turned = np.random.default_rng(1).random(base.size) < 0.9
    target = np.where(is_turned, -base, base)
    assert chosen(kind, numbers(kind, target), numbers(kind, base)) == {XOR}


@every_float
def test_other_weights_are_raw(ggml_type: T) -> None:
    kind = element_kind(ggml_type)
    target, base = (numbers(kind, weights(kind, seed)) for seed in (1, 2))
    assert chosen(kind, target, base) == {RAW}


@pytest.mark.parametrize("ggml_type", [T.I16, T.I32, T.I64], ids=lambda t: t.name)
def test_counted_up_integers_are_ordered(ggml_type: T) -> None:
    kind = element_kind(ggml_type)
    base = noise(kind)
    steps = np.random.default_rng(1).integers(-3, 4, base.size // kind.block_bytes)
    target = kind.words(base) + steps.astype(kind.words(base).dtype)
    assert chosen(kind, target.view(np.uint8), base) == {ORDERED}


def test_each_page_for_itself() -> None:
    kind = element_kind(T.F16)
    base = numbers(kind, weights(kind)).reshape(N_PAGES, -1)
    target = base.copy()
    target[0::4] = noise(kind).reshape(N_PAGES, -1)[0::4]
    target[1::4, 100] ^= 1
    update = weights(kind).reshape(N_PAGES, -1) * 1.01
    target[2::4] = numbers(kind, update.reshape(-1)).reshape(N_PAGES, -1)[2::4]
    target[3::4, 1::2] ^= 0x80
    modes = choose_modes(kind, target.reshape(-1), base.reshape(-1), lengths_of(kind))
    assert modes.tolist() == [RAW, SPARSE, ORDERED, XOR] * (N_PAGES // 4)
    assert modes.dtype == np.uint8


@pytest.mark.parametrize("half", [slice(None, 2044), slice(2044, None)], ids=["first", "second"])
@pytest.mark.parametrize("ggml_type", [None, T.F16, T.F32], ids=str)
def test_a_half_of_the_page_does_not_hide_the_other(ggml_type: T | None, half: slice) -> None:
    """New noise there, elsewhere flipped bits: RAW would cost twice as much."""
    kind = element_kind(ggml_type)
    base = noise(kind, 1).reshape(N_PAGES, -1)
    target = base ^ np.uint8(0x81)
    target[:, half] = noise(kind, 2).reshape(N_PAGES, -1)[:, half]
    assert chosen(kind, target.reshape(-1), base.reshape(-1)) == {XOR}


def test_short_pages_and_none() -> None:
    kind = element_kind(T.F32)
    lengths = np.array([4, 0, 4088, 8, 4])
    target, base = (noise(kind, seed)[: lengths.sum()] for seed in (1, 2))
    modes = choose_modes(kind, target, base, lengths)
    assert modes.shape == (5,) and modes[2] == RAW
    nothing = np.zeros(0, np.uint8)
    assert choose_modes(kind, nothing, nothing, np.zeros(0, np.int64)).shape == (0,)


def test_pages_are_only_read_wherever_they_lie() -> None:
    kind = element_kind(T.F32)
    arrays = [np.frombuffer(b"?" + noise(kind, s).tobytes(), np.uint8)[1:] for s in (1, 2)]
    assert set(choose_modes(kind, *arrays, lengths_of(kind)).tolist()) == {RAW}
    with pytest.raises(ValueError, match="pages are uint8"):
        choose_modes(kind, arrays[0], arrays[1][4:], lengths_of(kind))


# ---- when only some pages are asked ----


def pages_of_two_minds(n_others: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target and base, 1024 pages of BF16: small steps, but for pages of other content."""
    kind = element_kind(T.BF16)
    rng = np.random.default_rng(seed)
    base = numbers(kind, rng.normal(0, 0.02, 1024 * 2044))
    target = base.view("<u2") + rng.integers(1, 9, 1024 * 2044).astype("<u2")
    others = np.sort(rng.choice(1024, n_others, replace=False))
    target.reshape(1024, -1)[others] = rng.integers(0, 1 << 16, (n_others, 2044))
    return target.view(np.uint8), base, others


@pytest.mark.parametrize(("n_others", "ask_all"), [(0, False), (0, True), (3, False), (400, False)])
def test_pages_of_one_mind_are_not_all_asked(
    monkeypatch: pytest.MonkeyPatch, n_others: int, ask_all: bool
) -> None:
    """Others are found all the same, be they few or many."""
    asked: list[int] = []
    loop = mode_choice._choose_loop
    monkeypatch.setattr(
        mode_choice, "_choose_loop", lambda *args: [asked.extend(args[3].tolist()), loop(*args)]
    )
    kind, lengths = element_kind(T.BF16), np.full(1024, 4088)
    target, base, others = pages_of_two_minds(n_others)
    modes = choose_modes(kind, target, base, lengths, ask_all)
    assert {m: np.flatnonzero(modes == m).tolist() for m in (ORDERED, RAW)} == {
        ORDERED: sorted({*range(1024)} - {*others.tolist()}), RAW: others.tolist(),
    }  # fmt: skip
    assert len(asked) == len(set(asked))
    assert len(asked) == 1024 if ask_all or n_others > 3 else 128 <= len(asked) < 200


@pytest.mark.parametrize("first", [0, 4])
def test_a_pattern_of_pages_is_seen(first: int) -> None:
    """Every eighth page is another: those that are asked at first, or none of them."""
    kind, lengths = element_kind(T.BF16), np.full(1024, 4088)
    target, base, _ = pages_of_two_minds(0)
    pages = target.reshape(1024, -1)
    pages[first::8] = np.random.default_rng(9).integers(0, 256, pages[first::8].shape)
    modes = choose_modes(kind, target, base, lengths, ask_all=False)
    assert np.flatnonzero(modes == RAW).tolist() == list(range(first, 1024, 8))
    assert set(modes.tolist()) == {RAW, ORDERED}


@pytest.mark.parametrize("n_pages", [256, 511, 512, 1024])
def test_pages_with_few_changes_are_all_asked(n_pages: int) -> None:
    """Whoever has few changes does not decide for those who have many."""
    kind, lengths = element_kind(T.BF16), np.full(n_pages, 4088)
    base = np.random.default_rng(0).integers(0, 256, n_pages * 4088).astype(np.uint8)
    target = base.copy()
    target[::4088] ^= 1
    many = target.reshape(n_pages, -1)[7]
    many[:] = np.random.default_rng(1).integers(0, 256, 4088)
    modes = choose_modes(kind, target, base, lengths, ask_all=False)
    assert np.flatnonzero(modes != SPARSE).tolist() == [7]


# ---- near the best ----


def stored_bytes(kind: ElementKind, modes: np.ndarray, target: np.ndarray, base: np.ndarray) -> int:
    """What the pages take, a group for each mode."""
    total = 0
    for mode in np.unique(modes).tolist():
        pages = [x.reshape(N_PAGES, -1)[modes == mode].reshape(-1) for x in (target, base)]
        streams = encode(kind, mode, *pages, lengths_of(kind)[modes == mode])
        total += sum(len(packed) for packed in compress_streams(streams, 3))
    return total


@pytest.mark.parametrize("share", [0.03, 0.1, 0.2, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("ggml_type", [None, T.F16, T.BF16, T.F32, T.Q8_0, T.Q4_K], ids=str)
@pytest.mark.parametrize("change", ["last-place", "small", "any"])
def test_choices_are_near_the_best(ggml_type: T | None, share: float, change: str) -> None:
    """Changes of some elements: no mode for all pages is much better than the modes chosen."""
    kind = element_kind(ggml_type)
    is_float = kind.exponent_bits > 0
    base = numbers(kind, weights(kind)) if is_float else noise(kind)
    rng = np.random.default_rng(1)
    dtype = f"<u{kind.block_bytes}" if is_float else "<u1"
    elements = base.view(dtype)
    steps = {
        "last-place": rng.integers(0, 2, elements.size) * 2 - 1,
        "small": rng.normal(0, 20, elements.size),
        "any": rng.integers(0, 1 << 62, elements.size) >> 17,
    }[change]
    is_changed = rng.random(elements.size) < share
    target = elements + np.where(is_changed, steps, 0).astype(np.int64).astype(dtype)
    target = target.astype(dtype).view(np.uint8)
    modes = choose_modes(kind, target, base, lengths_of(kind))
    found = stored_bytes(kind, modes, target, base)
    possible = [RAW, XOR, SPARSE, *([ORDERED] if kind.has_order else [])]
    alone = [stored_bytes(kind, np.full(N_PAGES, mode), target, base) for mode in possible]
    assert found <= 1.08 * min(alone) + 300
