"""What the sections of `experiments.gpu_session` share: the device, its clock and limits, and how a
case is measured there, or rehearsed in the simulator.

A rehearsal does all that a measurement does, once and on tiny data, and keeps no figure: it has no
rows, only the names of what was right and wrong.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from atlas.ops.stopwatch import Stopwatch
from atlas.target import CudaTarget
from experiments.bench import Case, Variant, describe_environment, measure
from experiments.cases import GpuCases
from experiments.gpu_capacity import Capacity
from experiments.machine_limits import Best
from experiments.torch_peer import TorchPeer

COPY = "device copy, read and written"
"""What sets the limit of all that the device's memory bounds: `GpuBench.copy_limit`."""

_PACKAGES = ("numba-cuda", "cuda-core", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink", "torch")


@dataclass
class GpuBench:
    """One session.

    Attributes
    ----------
    target
        The device.
    cases
        The parameters.
    is_rehearsal
        Whether it runs in the simulator.
    commit
        Commit of the sources, where there is no repository to ask.
    seed
        Of all data.
    keep
        Called with the rows of each case as soon as there are any.
    right, wrong
        What was validated, "case: variant".
    """

    target: CudaTarget
    cases: GpuCases
    is_rehearsal: bool
    commit: str | None = None
    seed: int = 0
    keep: Callable[[list[dict[str, Any]]], object] = lambda rows: None
    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @cached_property
    def stopwatch(self) -> Stopwatch:
        """Times what is queued on the device."""
        return Stopwatch(self.target)

    @cached_property
    def capacity(self) -> Capacity:
        """What the device's memory and link can do."""
        return Capacity(self.target, self.stopwatch, self.cases.memory_bytes, self.seed)

    @cached_property
    def copy_limit(self) -> Callable[[], float]:
        """GB/s, read and written, of a copy within the device: measured again at every call."""
        return Best(self.capacity.copy)

    @cached_property
    def torch(self) -> TorchPeer | None:
        """PyTorch on the same device (in a rehearsal, on the CPU), or None where it is missing."""
        peer = TorchPeer.find("cpu" if self.is_rehearsal else "cuda")
        if peer is None:
            print("no PyTorch for this device: it does not take part", flush=True)
        return peer

    def random_words(self, n: int) -> np.ndarray:
        """Random uint32 [n], the same for the same n."""
        draws = np.random.SFC64([self.seed, n]).random_raw(-(-n // 2))
        return draws.view(np.uint32)[:n]

    def measure(self, case: Case, variants: Sequence[Variant]) -> list[dict[str, Any]]:
        """Rows of a case, a variant each; none in a rehearsal."""
        if self.is_rehearsal:
            return self._rehearse(case, variants)
        rows = measure(
            case, variants, repeats=self.cases.repeats, seed=self.seed,
            environment=self._environment,
        )  # fmt: skip
        for row in rows:
            self._note(row["validated"], case, row["variant"])
        self.keep(rows)
        return rows

    def _rehearse(self, case: Case, variants: Sequence[Variant]) -> list[dict[str, Any]]:
        for variant in variants:
            is_right = variant.validate()
            self._note(is_right, case, variant.name)
            if is_right:
                variant.measure()
                if callable(variant.limit):
                    variant.limit()
        return []

    def _note(self, is_right: bool, case: Case, variant: str) -> None:
        params = [f"{key} {value}" for key, value in case.params.items()]
        text = f"{case.name}: {', '.join([*params, variant])}"
        (self.right if is_right else self.wrong).append(text)

    @cached_property
    def _environment(self) -> dict[str, Any]:
        facts = describe_environment()
        if self.commit is not None:
            facts |= {"commit": self.commit, "dirty": None}
        for name in _PACKAGES:
            try:
                facts["versions"][name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                facts["versions"][name] = None
        return facts


def close_to(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Whether all of `found` is within `tolerance` times the root mean square of `expected`."""
    error = np.abs(found.astype(np.float64) - expected).max()
    return bool(error <= tolerance * np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
