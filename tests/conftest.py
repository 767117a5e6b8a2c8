"""Fixtures shared by all tests: targets, real models, and how Hypothesis searches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from numba import config

from atlas.target import CpuTarget, CudaTarget, Target, cuda_is_usable

if config.ENABLE_CUDASIM:  # before test modules import kernels
    from tests.warp_simulator import install

    install()
    from tests import quick_crc

# Compiled code makes first calls slow, and a red test must be red for everyone: no deadline, and
# the same examples on every machine.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

_PROJECT_ROOT = Path(__file__).resolve().parent.parent


_NEEDS_CUDA = "needs a CUDA device, or the simulator (python -m tests.warp_simulator -m pytest ...)"


def _has_device() -> bool:
    return cuda_is_usable() and CudaTarget.name == "cuda"


#: Not traced where coverage is measured, which would take longer than the tests: they use what
#: others test. (Single tests that do one thing a thousand times are marked where they stand.)
_NOT_TRACED = (
    "tests/experiments", "tests/test_reference.py", "tests/delta/test_kills.py",
)  # fmt: skip


#: Tests of the kernel that computes the CRC32 of pages that come, and of what measures it.
_CHECKS_PAGES = (
    "test_gather.py", "test_swap.py", "test_integrity.py", "test_gpu_swap.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a device, what runs kernels is among what `-m gpu` selects."""
    for item in items:
        if _has_device() and item.get_closest_marker("cuda") is not None:
            item.add_marker("gpu")
        if any(item.path.is_relative_to(_PROJECT_ROOT / path) for path in _NOT_TRACED):
            item.add_marker("no_cover")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `cuda` or `gpu` where they cannot run; the simulator is no `gpu`."""
    if item.get_closest_marker("gpu") is not None and not _has_device():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("cuda") is not None and not cuda_is_usable():
        pytest.skip(_NEEDS_CUDA)


@pytest.fixture(autouse=True)
def _quick_crc(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are checked by zlib in the simulator, but where their checks are what is tested."""
    if config.ENABLE_CUDASIM and request.path.name not in _CHECKS_PAGES:
        quick_crc.install(monkeypatch)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def target(request: pytest.FixtureRequest) -> Target:
    """Every target in turn: loops on the CPU, kernels on a GPU or in the simulator."""
    return CpuTarget() if request.param == "cpu" else CudaTarget()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.cuda)])
def cuda_target(request: pytest.FixtureRequest) -> CudaTarget:
    """A GPU, or the simulator."""
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
