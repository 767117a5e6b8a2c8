"""Fixtures shared by all tests: targets, real models, and how Hypothesis searches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from atlas.target import CpuTarget, CudaTarget, Target, cuda_is_usable

# Compiled code makes first calls slow, and a red test must be red for everyone: no deadline, and
# the same examples on every machine.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

_PROJECT_ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` unless a real device is there; the simulator is none."""
    is_device = cuda_is_usable() and CudaTarget.name == "cuda"
    if item.get_closest_marker("gpu") is not None and not is_device:
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["cpu", "cuda"])
def target(request: pytest.FixtureRequest) -> Target:
    """Every target in turn: loops on the CPU, kernels on a GPU or in the simulator."""
    if request.param == "cpu":
        return CpuTarget()
    if not cuda_is_usable():
        pytest.skip("needs a CUDA device or NUMBA_ENABLE_CUDASIM=1 NUMBA_DISABLE_JIT=1")
    return CudaTarget()


def models_dir() -> Path:
    """Where real GGUF files are looked for: `$GGUF_SHARD_MODELS`, or beside the project."""
    named = os.environ.get("GGUF_SHARD_MODELS")
    return Path(named) if named else _PROJECT_ROOT.parent / "shared" / "models"


def reference_dir() -> Path:
    """Where recorded outputs of those models are looked for: beside the models."""
    return models_dir().parent / "reference"


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of real GGUF files."""
    return _existing(models_dir())


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of recorded tokens and logits."""
    return _existing(reference_dir())


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} (GGUF_SHARD_MODELS names the one with the models)")
    return folder
