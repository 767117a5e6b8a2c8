"""What `cuda.` offers inside a kernel under `warp_simulator`: shuffles, votes, barriers, arrays.

Values are typed as Numba types them (a ballot is an int32, `activemask` a uint32).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from greenlet import getcurrent
from numba.cuda.simulator import kernelapi

from tests.warp_scheduler import (
    BLOCK,
    CONVERGED,
    GRID,
    SLEEP,
    WARP,
    WARP_SIZE,
    current_thread,
    mask_of,
    meet,
    poison,
)

FULL_MASK = 0xFFFFFFFF


def current_lane() -> int:
    """The lane (0 to 31) of the thread that is running."""
    return current_thread().lane


def exchange(mask: int, value: Any, what: str = "exchange") -> dict[int, Any]:
    """Meet the lanes of `mask` and learn their values, by lane; exited lanes are left out.

    `what` names the operation: lanes that wait at another one do not count.
    """
    thread = current_thread()
    mask = int(mask) & FULL_MASK
    if not mask >> thread.lane & 1:
        raise RuntimeError(f"{what}: mask {mask:#010x} leaves out lane {thread.lane}, which calls")
    return meet(WARP, what, value, thread.warp, mask)


def _shuffle(what: str, source: Callable[[int, int], int]) -> Callable[[Any, Any, Any], Any]:
    def operation(mask: Any, value: Any, operand: Any) -> Any:
        values = exchange(mask, value, what)
        lane = source(current_lane(), int(operand))
        if not 0 <= lane < WARP_SIZE:
            return value
        return values[lane] if lane in values else poison(1, np.asarray(value).dtype)[0]

    return operation


def _vote(what: str, result: Callable[[dict[int, bool]], Any]) -> Callable[[Any, Any], Any]:
    return lambda mask, predicate: result(exchange(mask, bool(predicate), what))


def _signed_mask(lanes: Iterable[int]) -> np.int32:
    """A mask as Numba types it: int32, negative when lane 31 is in it."""
    return np.uint32(mask_of(lanes)).view(np.int32)


def _match_any(mask: Any, value: Any) -> np.int32:
    values = exchange(mask, value, "match_any_sync")
    return _signed_mask(lane for lane, other in values.items() if other == value)


def _match_all(mask: Any, value: Any) -> tuple[np.int32, bool]:
    values = exchange(mask, value, "match_all_sync")
    is_same = all(other == value for other in values.values())
    return _signed_mask(values if is_same else ()), is_same


def _site(frame: FrameType) -> int:
    return hash((id(frame.f_code), frame.f_lasti))


def _activemask() -> np.uint32:
    thread = current_thread()
    together = meet(CONVERGED, "activemask", None, thread.warp, _site(sys._getframe(1)))
    return np.uint32(mask_of(rank % WARP_SIZE for rank in together))


def _barrier(what: str, result: Callable[[Iterable[Any]], int]) -> Callable[[Any], int]:
    def operation(value: Any) -> int:
        site = _site(sys._getframe(1))
        return int(result(map(bool, meet(BLOCK, what, value, detail=site).values())))

    return operation


def _syncthreads() -> None:
    meet(BLOCK, "syncthreads", detail=_site(sys._getframe(1)))


def _syncwarp(mask: Any = FULL_MASK) -> None:
    exchange(mask, None, "syncwarp")


def _grid(n_dim: int) -> Any:
    thread = current_thread()
    launch, index, place = thread.block.launch, thread.block.index, thread.index
    position = (
        index.x * launch.block.x + place.x,
        index.y * launch.block.y + place.y,
        index.z * launch.block.z + place.z,
    )
    return position[0] if n_dim == 1 else position[:n_dim]


def _gridsize(n_dim: int) -> Any:
    launch = current_thread().block.launch
    size = tuple(a * b for a, b in zip(launch.grid, launch.block, strict=True))
    return size[0] if n_dim == 1 else size[:n_dim]


@functools.cache
def _dtype(dtype: Any) -> np.dtype:
    is_numba = isinstance(dtype, kernelapi.types.Type)
    return np.dtype(kernelapi.numpy_support.as_dtype(dtype) if is_numba else dtype)


def _shared_array(shape: Any, dtype: Any, alignment: int | None = None) -> np.ndarray:
    """One array for a block and a place in the source; shape 0 is the dynamic shared memory."""
    block = current_thread().block
    dtype = _dtype(dtype)
    if isinstance(shape, int) and shape == 0:
        whole = len(block.dynamic) // dtype.itemsize * dtype.itemsize
        return block.dynamic[:whole].view(dtype)
    frame = sys._getframe(1)
    key = id(frame.f_code), frame.f_lasti
    if key not in block.shared:
        block.shared[key] = poison(shape, dtype)
    return block.shared[key]


def _local_array(shape: Any, dtype: Any, alignment: int | None = None) -> np.ndarray:
    return poison(shape, _dtype(dtype))


def _bits(value: Any) -> str:
    """Binary digits of an integer in its width; of a Python integer in 32 bits."""
    width = 8 * value.itemsize if isinstance(value, np.integer) else 32
    return f"{int(value) & ((1 << width) - 1):0{width}b}"


def _load(array: Any, index: Any) -> Any:
    return array[index]


def _store(array: Any, index: Any, value: Any) -> None:
    array[index] = value


OPERATIONS: dict[str, Any] = {
    "warpsize": WARP_SIZE,
    "grid": _grid,
    "gridsize": _gridsize,
    "shared": SimpleNamespace(array=_shared_array),
    "local": SimpleNamespace(array=_local_array),
    "cg": SimpleNamespace(
        this_grid=lambda: SimpleNamespace(sync=lambda: meet(GRID, "grid sync") and None)
    ),
    "syncthreads": _syncthreads,
    "syncthreads_count": _barrier("syncthreads_count", sum),
    "syncthreads_and": _barrier("syncthreads_and", all),
    "syncthreads_or": _barrier("syncthreads_or", any),
    "syncwarp": _syncwarp,
    "nanosleep": lambda nanoseconds: meet(SLEEP, "nanosleep") and None,
    "activemask": _activemask,
    "lanemask_lt": lambda: np.uint32((1 << current_lane()) - 1),
    "shfl_sync": _shuffle("shfl_sync", lambda lane, source: source % WARP_SIZE),
    "shfl_up_sync": _shuffle("shfl_up_sync", lambda lane, delta: lane - delta),
    "shfl_down_sync": _shuffle("shfl_down_sync", lambda lane, delta: lane + delta),
    "shfl_xor_sync": _shuffle("shfl_xor_sync", lambda lane, bits: lane ^ bits),
    "all_sync": _vote("all_sync", lambda votes: all(votes.values())),
    "any_sync": _vote("any_sync", lambda votes: any(votes.values())),
    "eq_sync": _vote("eq_sync", lambda votes: len(set(votes.values())) == 1),
    "ballot_sync": _vote("ballot_sync", lambda votes: _signed_mask(k for k in votes if votes[k])),
    "match_any_sync": _match_any,
    "match_all_sync": _match_all,
    "popc": lambda value: _bits(value).count("1"),
    "brev": lambda value: int(_bits(value)[::-1], 2),
    "clz": lambda value: len(_bits(value)) - len(_bits(value).lstrip("0")),
    "ffs": lambda value: _bits(value)[::-1].find("1") + 1,
    **dict.fromkeys(("ldca", "ldcg", "ldcs", "ldlu", "ldcv"), _load),
    **dict.fromkeys(("stcg", "stcs", "stwb", "stwt"), _store),
}


class KernelModule(ModuleType):
    """`numba.cuda` with what depends on the running thread as attributes."""

    threadIdx = property(lambda self: getcurrent().thread.index)
    blockIdx = property(lambda self: getcurrent().thread.block.index)
    blockDim = property(lambda self: getcurrent().thread.block.launch.block)
    gridDim = property(lambda self: getcurrent().thread.block.launch.grid)
    laneid = property(lambda self: getcurrent().thread.lane)
