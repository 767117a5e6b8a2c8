"""What launchers have in common: checks, so that kernels and loops can trust, and grid sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from atlas.target import Target

MAX_BLOCKS = 65535  # of a launch: kernels stride on
MAX_THREADS = 1024  # of a block, on every device


def check_array(name: str, array: Any, dtype: Any, shape: tuple[int | None, ...]) -> None:
    """Raise unless an array is C-contiguous with this dtype and shape (None: any length)."""
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, expected {np.dtype(dtype)}")
    actual = array.shape
    if actual != shape and (  # the common case first: this runs some thousand times a token
        len(actual) != len(shape)
        or any(want is not None and want != have for want, have in zip(shape, actual, strict=True))
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {list(actual)}, expected [{wanted}]")
    if not array.flags["C_CONTIGUOUS"]:
        raise ValueError(f"{name} is not C-contiguous")


def check_range(name: str, begin: int, end: int, length: int) -> None:
    """Raise unless 0 <= begin <= end <= length."""
    if not 0 <= begin <= end <= length:
        raise ValueError(f"{name}: rows {begin}..{end} are not within 0..{length}")


def check_positions(target: Target, position: Any, n_tokens: int, n_context: int) -> None:
    """Raise unless `position` is an int32 [1]; on the CPU also unless `n_tokens` from there on are
    within the context. (What lies on a device is not known here.)"""
    check_array("position", position, np.int32, (1,))
    if not target.is_cuda:
        first = int(position[0])
        if first < 0 or first + n_tokens > n_context:
            raise ValueError(
                f"positions {first}..{first + n_tokens} are not within a context of {n_context}"
            )


def grid_size(target: Target, n_items: int) -> int:
    """Blocks of a grid-stride kernel over `n_items` threads."""
    return max(1, min(-(-n_items // target.block), MAX_BLOCKS))
