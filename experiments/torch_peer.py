"""PyTorch as the peer on a GPU: its dense products, where `torch` can be imported."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from atlas.ops.stopwatch import FLUSH_BYTES

NAME = "PyTorch"

#: Copies that keep the device busy for two milliseconds while the host queues what is measured.
_N_FLUSHES = 20
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


class TorchPeer:
    """PyTorch on a device.

    Parameters
    ----------
    torch
        The module.
    device
        "cuda", or "cpu" for a rehearsal.
    """

    def __init__(self, torch: Any, device: str) -> None:
        self._torch = torch
        self._device = device
        # On a GPU, float32 stays what it says.
        torch.backends.cuda.matmul.allow_tf32 = False
        n_words = FLUSH_BYTES // 4 if device == "cuda" else 4
        self._flush = [torch.zeros(n_words, device=device) for _ in range(2)]

    @classmethod
    def find(cls, device: str) -> TorchPeer | None:
        """PyTorch if it is installed and runs there."""
        try:
            import torch
        except ImportError:
            return None
        return cls(torch, device) if device == "cpu" or torch.cuda.is_available() else None

    def array(self, values: np.ndarray, ggml_type: str) -> Any:
        """A copy of a float32 array on the device, as "F16" or "BF16"."""
        tensor = self._torch.from_numpy(np.ascontiguousarray(values))
        return tensor.to(self._device, getattr(self._torch, _DTYPES[ggml_type]))

    def product(self, x: Any, weights: Any) -> Any:
        """x @ weights.T."""
        return self._torch.matmul(x, weights.T)

    def dense_flops(self, n: int) -> float:
        """Operations a second of a float16 product of n x n matrices."""
        # Not ones or zeros, with which a device draws less power and is faster.
        a = self._torch.randn((n, n), device=self._device).to(self._torch.float16)
        return 2 * n**3 / self.seconds(lambda: self.product(a, a))

    def get(self, tensor: Any) -> np.ndarray:
        """A float32 copy on the host."""
        return np.asarray(tensor.float().cpu().numpy())

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that the device takes, measured as `atlas.ops.stopwatch` does."""
        if self._device == "cpu":
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        start, stop = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_N_FLUSHES):
            self._flush[0].copy_(self._flush[1])
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
