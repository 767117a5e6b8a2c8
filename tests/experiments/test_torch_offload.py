"""The peer's loop against ours: the same weights give the same logits, whatever stays resident."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from atlas.errors import BudgetError
from atlas.infer.model import LlamaModel
from atlas.target import CpuTarget
from experiments.make_model import Preset
from experiments.synthetic_model import SyntheticModel
from experiments.torch_offload import TorchOffload
from forge.sizes import Size

torch = pytest.importorskip("torch")

SHAPE = Preset(64, 3, 96, 4, 2, 300, 64)
TOKENS = [1, 270, 280, 270, 299]
LAYER_BYTES = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)  # float32
FIXED_BYTES = 2 * 3 * 8 * 2 * 16 * 4 + 64 * 4  # keys and values of 8 positions, a norm


@pytest.fixture
def model() -> SyntheticModel:
    return SyntheticModel(SHAPE, "F16")


@pytest.fixture
def expected() -> Iterator[np.ndarray]:
    with LlamaModel(
        SyntheticModel(SHAPE, "F16"), CpuTarget(), Size(fraction=1.0), n_context=8
    ) as ours:
        yield np.stack([ours.target.get(ours.forward([token])) for token in TOKENS])


def peer_of(model: SyntheticModel, budget_bytes: int | None, dtype: str) -> TorchOffload:
    return TorchOffload(
        torch, "cpu", SHAPE, model, n_context=8, budget_bytes=budget_bytes, dtype=dtype
    )


@pytest.mark.parametrize("n_resident", [0, 1, 4])
def test_logits_are_ours_with_any_number_of_layers_resident(
    model: SyntheticModel, expected: np.ndarray, n_resident: int
) -> None:
    n_held = 4 if n_resident == 4 else n_resident + 2  # with two slots
    peer = peer_of(model, FIXED_BYTES + n_held * LAYER_BYTES, "float32")
    assert (peer.n_resident, peer.n_parts) == (n_resident, 4)
    assert (peer.moved_bytes == 0) == (n_resident == 4)
    found = np.stack([peer.forward(token).numpy() for token in TOKENS])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    peer.position = 0
    np.testing.assert_array_equal(peer.forward(TOKENS[0]).numpy(), found[0])
    peer.close()


def test_in_16_bits_it_is_near(model: SyntheticModel, expected: np.ndarray) -> None:
    peer = peer_of(model, None, "float16")
    found = np.stack([peer.forward(token).numpy() for token in TOKENS])
    assert 0 < np.abs(found - expected).max() < 0.05 * expected.std()


def test_what_moves_is_what_is_not_resident(model: SyntheticModel) -> None:
    peer = peer_of(model, FIXED_BYTES + 3 * LAYER_BYTES, "float32")
    assert peer.weight_bytes == 3 * LAYER_BYTES + 300 * 64 * 4
    assert peer.weight_bytes - peer.moved_bytes == LAYER_BYTES


def test_too_small_a_budget_says_what_is_needed(model: SyntheticModel) -> None:
    smallest = FIXED_BYTES + 2 * LAYER_BYTES
    with pytest.raises(BudgetError, match=f"{smallest} bytes are needed"):
        peer_of(model, smallest - 1, "float32")
