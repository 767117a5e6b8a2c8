"""A dequantised tensor of a cached model as a PyTorch tensor, without a copy.

    python -m experiments.torch_interop [CORE.sgmap] [--tensor NAME] [--target auto|cuda|cpu]

`Atlas.tensor` gives an array on the target. On a GPU it has `__cuda_array_interface__`, so PyTorch
and CuPy take it as it lies there (numba-cuda 0.30 exports no DLPack; CuPy does, for those who want
it); on the CPU it is a NumPy array, which has both. The script shows that both see the same memory,
and that PyTorch computes with it what NumPy does. Without a model it takes the demonstration model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas import Atlas
from atlas.target import Target, select_target
from experiments.quickstart import MODEL
from forge.command import run_command
from forge.errors import GGUFShardError
from forge.shard import shard_model


def as_torch(array: Any, target: Target) -> Any:
    """A PyTorch tensor over the memory of an array on a target.

    Raises
    ------
    GGUFShardError
        If PyTorch is not installed, or has no CUDA where the array is on a GPU.
    """
    try:
        import torch
    except ImportError:
        raise GGUFShardError("PyTorch is not installed (pip install torch)") from None
    if not target.is_cuda:
        return torch.from_numpy(array)
    if not torch.cuda.is_available():
        raise GGUFShardError("PyTorch sees no CUDA device")
    return torch.as_tensor(array, device="cuda")


def show(map_path: Path, name: str | None, target: Target) -> dict[str, Any]:
    """Share a tensor with PyTorch: its name and shape, whether memory is shared, and the largest
    difference between what PyTorch and NumPy compute with it."""
    with Atlas.open(map_path, "100%", target) as atlas:
        name = name or next(t.name for t in atlas.map.tensors if len(t.shape) > 1)
        array = atlas.tensor(name)
        tensor = as_torch(array, target)
        x = np.random.default_rng(0).standard_normal(array.shape[1], dtype=np.float32)
        product = tensor @ tensor.new_tensor(x)
        expected = target.get(array).astype(np.float64) @ x
        # What PyTorch writes is in the array, too, if both are the same memory.
        tensor[0, 0] = 12345.0
        if target.is_cuda:
            import torch

            torch.cuda.synchronize()
        return {
            "tensor": name,
            "shape": list(array.shape),
            "shares_memory": bool(target.get(array)[0, 0] == 12345.0),
            "largest_difference": float(np.abs(product.cpu().numpy() - expected).max()),
            "largest_value": float(np.abs(expected).max()),
        }


def _run(args: argparse.Namespace) -> int:
    target = select_target(args.target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.map) if args.map else shard_model(MODEL, folder)
        facts = show(path, args.tensor, target)
    shared = "the same memory" if facts["shares_memory"] else "A COPY"
    print(f"{facts['tensor']} {facts['shape']}: PyTorch sees {shared}")
    print(
        f"matrix times vector: largest difference {facts['largest_difference']:.2e}, "
        f"largest value {facts['largest_value']:.2e}"
    )
    return 0 if facts["shares_memory"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="experiments.torch_interop",
        description="Share a dequantised tensor of a cached model with PyTorch, without a copy.",
    )
    parser.add_argument("map", nargs="?", metavar="CORE.sgmap")
    parser.add_argument("--tensor", metavar="NAME", help="default: the first matrix")
    parser.add_argument("--target", choices=("auto", "cuda", "cpu"), default="auto")
    parser.set_defaults(run=_run)
    return run_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
