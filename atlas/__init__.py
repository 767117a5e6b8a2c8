"""GPU memory as a cache of a model's pages, and inference straight on them.

`Atlas.open` is the way in. Names are loaded when they are first used, so that importing the package
costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas.errors import BudgetError, CorruptPageError
    from atlas.live_update import ModelUpdatedError
    from atlas.manager import Atlas
    from atlas.target import CpuTarget, CudaTarget, select_target

__all__ = [
    "Atlas",
    "BudgetError",
    "CorruptPageError",
    "CpuTarget",
    "CudaTarget",
    "ModelUpdatedError",
    "select_target",
]

_HOMES = {
    "Atlas": "atlas.manager",
    "BudgetError": "atlas.errors",
    "CorruptPageError": "atlas.errors",
    "CpuTarget": "atlas.target",
    "CudaTarget": "atlas.target",
    "ModelUpdatedError": "atlas.live_update",
    "select_target": "atlas.target",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atlas' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
