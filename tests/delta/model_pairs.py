"""Pairs of small models, base and target, that differ in one way each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from gguf import GGMLQuantizationType as T

from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import STRING, Tensor, pair, tensor
from experiments.validation.hostile_patches import PAIRS, half_floats

#: Pages of the large matrices: several, the last one short.
_ROWS = 120


def tensors(seed: int = 0) -> list[Tensor]:
    """Tensors of several types; some 60 pages."""
    return [
        tensor("token_embd.weight", T.Q8_0, (64, 130), seed),
        tensor("blk.0.attn_norm.weight", T.F32, (64,), seed + 1),
        Tensor("blk.0.attn_q.weight", int(T.F16), (64, _ROWS), half_floats((64, _ROWS), seed + 2)),
        tensor("blk.0.attn_k.weight", T.BF16, (64, _ROWS), seed + 3),
        tensor("blk.0.ffn_up.weight", T.Q4_K, (256, 40), seed + 4),
        tensor("blk.0.ffn_gate_exps.weight", T.F16, (64, 40, 3), seed + 5),
        Tensor("unknown.weight", factory.UNKNOWN_TYPE, (7,), factory.random_bytes(9000, seed + 6)),
        tensor("output.weight", T.F32, (64, 40), seed + 7),
    ]


def edited(of: Tensor, change: Callable[[np.ndarray], None]) -> Tensor:
    """A tensor whose bytes `change` has changed."""
    data = np.frombuffer(of.data, np.uint8).copy()
    change(data)
    return replace(of, data=data.tobytes())


def _with(index: int, change: Callable[[np.ndarray], None]) -> list[Tensor]:
    changed = tensors()
    changed[index] = edited(changed[index], change)
    return changed


def _nudge(data: np.ndarray) -> None:
    words = data.view("<f2")
    words += np.random.default_rng(9).normal(0, 1e-4, len(words)).astype("<f2")


def _flip(data: np.ndarray) -> None:
    data[[5, 4087, 4088, len(data) - 1]] ^= 0x41


def _randomise(data: np.ndarray) -> None:
    data[:] = np.frombuffer(factory.random_bytes(len(data), 77), np.uint8)


def _swap_pages(data: np.ndarray) -> None:
    data[:8176] = np.concatenate([data[4088:8176], data[:4088]])


def _fill_with_one_page(data: np.ndarray) -> None:
    page = np.frombuffer(factory.random_bytes(4088, 5), np.uint8)
    data[:] = np.resize(page, len(data))


def _base() -> bytes:
    return factory.gguf(tensors(), PAIRS)


#: What has changed: (base, target).
CASES: dict[str, tuple[bytes, bytes]] = {
    "nothing": (_base(), _base()),
    "nudged weights": (_base(), factory.gguf(_with(2, _nudge), PAIRS)),
    "single bytes": (_base(), factory.gguf(_with(2, _flip), PAIRS)),
    "a quantised tensor": (_base(), factory.gguf(_with(0, _flip), PAIRS)),
    "an expert": (_base(), factory.gguf(_with(5, lambda d: _flip(d[5120:10240])), PAIRS)),
    "an unknown type": (_base(), factory.gguf(_with(6, _flip), PAIRS)),
    "all of a tensor": (_base(), factory.gguf(_with(3, _randomise), PAIRS)),
    "pages swapped": (_base(), factory.gguf(_with(3, _swap_pages), PAIRS)),
    "pages repeated": (_base(), factory.gguf(_with(3, _fill_with_one_page), PAIRS)),
    "everything": (_base(), factory.gguf(tensors(50), PAIRS)),
    "metadata longer": (
        _base(),
        factory.gguf(tensors(), [*PAIRS, pair("general.note", STRING, "x" * 100)]),
    ),
    "metadata much longer": (
        _base(),
        factory.gguf(tensors(), [*PAIRS, pair("general.note", STRING, "x" * 9000)]),
    ),
    "metadata shorter": (_base(), factory.gguf(tensors(), PAIRS[:1])),
    "tensor added": (
        _base(),
        factory.gguf([*tensors(), tensor("blk.1.extra.weight", T.F16, (64, 90), 88)], PAIRS),
    ),
    "tensor removed": (_base(), factory.gguf(tensors()[:-1], PAIRS)),
    "tensor renamed": (
        _base(),
        factory.gguf([replace(tensors()[0], name="tok.weight"), *tensors()[1:]], PAIRS),
    ),
    "tensors reordered": (_base(), factory.gguf(tensors()[::-1], PAIRS)),
    "tensor grown": (
        _base(),
        factory.gguf(
            [tensors()[0], *tensors()[1:3], tensor("blk.0.attn_k.weight", T.BF16, (64, 200), 3),
             *tensors()[4:]],
            PAIRS,
        ),
    ),
    "type changed": (
        _base(),
        factory.gguf([tensor("token_embd.weight", T.F16, (64, 130), 4), *tensors()[1:]], PAIRS),
    ),
    "alignment changed": (
        _base(),
        factory.gguf(tensors(), PAIRS, alignment=256),
    ),
    "junk behind": (_base(), factory.gguf(tensors(), PAIRS, tail=b"junk" * 3000)),
    "other junk behind": (
        factory.gguf(tensors(), PAIRS, tail=b"junk" * 3000),
        factory.gguf(tensors(), PAIRS, tail=b"junk" * 1500 + b"more" * 2500),
    ),
    "junk between": (_base(), factory.gguf(tensors(), PAIRS, padding=0x55)),
    "junk taken away": (factory.gguf(tensors(), PAIRS, padding=0x55), _base()),
    "no tensors": (_base(), factory.gguf([], PAIRS)),
    "from no tensors": (factory.gguf([], PAIRS), _base()),
}  # fmt: skip
