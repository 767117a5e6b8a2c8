"""Warp-level CUDA without a GPU: another scheduler inside Numba's CUDA simulator.

    python -m tests.warp_simulator -m pytest -k cuda tests/atlas
    python -m tests.warp_simulator -m package.module arguments...

Numba's own simulator gives each CUDA thread a thread of the host, and knows neither warps nor
barriers between blocks. Here threads are run one at a time by greenlets, in a fixed order: a thread
runs until it exits or has to meet others, and goes on when all of them have arrived. A meeting that
can never take place is an error (`DeadlockError`) that says who waits where:

    block   syncthreads, syncthreads_count, _and, _or: all threads of the block that have not
            exited, at one place in the source
    warp    syncwarp, shfl*_sync, all, any, eq, ballot, match*_sync, `exchange`: all lanes of the
            mask that have not exited, at the same operation with the same mask
    grid    cg.this_grid().sync(): all threads of all blocks that have not exited

(CUDA C++ Programming Guide, "Synchronization Functions" and "Warp Vote, Match and Shuffle
Functions"; that exited threads do not count is the rule from sm_70 on.)

Blocks run one after another; one whose threads wait for other blocks is kept until those have come
as far. `activemask` gives the lanes that wait at the same place when nothing else in the block can
move, which is the most converged answer a GPU may give; `nanosleep` lets everyone else go first.

What a GPU leaves undefined is filled with a pattern that is NaN in every float format and far from
any index as an integer: new shared and local arrays, and what a shuffle reads from a lane that is
not there. A missing barrier goes unseen while threads happen to run in the right order;
WARP_SIMULATOR_ORDER=reverse starts them in falling order. Arithmetic in kernels does not warn.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import runpy
import sys
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
from greenlet import getcurrent
from numba import config, cuda
from numba.cuda.simulator import api, kernel, kernelapi

from tests.warp_operations import OPERATIONS, KernelModule, current_lane, exchange
from tests.warp_scheduler import DeadlockError, Launch, Worker, poison

__all__ = ["DeadlockError", "current_lane", "exchange", "install", "poison"]

_COOPERATIVE_BLOCKS = 4  # what `max_cooperative_grid_blocks` answers: enough to go wrong
_PTX_MODULE = "atlas.ops.ptx"  # emulates inline PTX with `exchange`, where it exists


def _argument(value: Any, write_backs: list[Callable[[], None]]) -> Any:
    """What a kernel is handed: the plain array behind a device array, or the value itself."""
    if type(value) is tuple:
        return tuple(_argument(item, write_backs) for item in value)
    if isinstance(value, np.ndarray) and value.ndim > 0:
        value = api.InOut(value)
    if isinstance(value, kernel.ArgHint):
        value = value.to_device(write_backs)
    elif isinstance(value, np.void):
        value = kernel.FakeCUDAArray(value)
    if not isinstance(value, kernel.FakeCUDAArray):
        return value
    is_record = value._ary.dtype.names is not None
    return kernel.FakeWithinKernelCUDAArray(value) if is_record else value._ary


def _call(self: Any, *args: Any) -> Any:
    if self._device or isinstance(getcurrent(), Worker):
        return self.fn(*args)
    grid, block = kernel.normalize_kernel_dimensions(self.grid_dim, self.block_dim)
    write_backs: list[Callable[[], None]] = []
    arguments = [_argument(value, write_backs) for value in args]
    Launch(self, grid, block, arguments).run()
    for write_back in write_backs:
        write_back()
    return None


def _configure(self: Any, configuration: Any) -> Any:
    """`kernel[grid, block, stream, bytes]`, which leaves the kernel itself as it was."""
    configured = copy(self)
    configured.grid_dim, configured.block_dim = kernel.normalize_kernel_dimensions(
        *configuration[:2]
    )
    configured.dynshared_size = configuration[3] if len(configuration) > 3 else 0
    return configured


def _jit(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`cuda.jit` that ignores options of the compiler and leaves device functions as they are."""
    known = set(inspect.signature(stock).parameters)

    @functools.wraps(stock)
    def jit(func_or_sig: Any = None, **options: Any) -> Any:
        made = stock(func_or_sig, **{k: v for k, v in options.items() if k in known})
        if not options.get("device"):
            return made
        return made.fn if isinstance(made, kernel.FakeCUDAKernel) else lambda function: function

    return jit


def install() -> None:
    """Replace the scheduler of Numba's simulator, once, for the rest of the process.

    Raises
    ------
    RuntimeError
        If the simulator is off.
    """
    if not config.ENABLE_CUDASIM:
        raise RuntimeError(
            "the warp simulator needs NUMBA_ENABLE_CUDASIM=1 and NUMBA_DISABLE_JIT=1, "
            "set before numba is imported"
        )
    if isinstance(cuda, KernelModule):
        return
    stock = kernelapi.FakeCUDAModule((1, 1, 1), (1, 1, 1), 0)
    for name in set(dir(stock)) - set(dir(KernelModule)):
        if not name.startswith("_"):
            setattr(cuda, name, getattr(stock, name))
    vars(cuda).update(OPERATIONS)
    cuda.__class__ = KernelModule
    cuda.jit = cuda.simulator.jit = api.jit = _jit(api.jit)
    kernel.FakeCUDAKernel.__call__ = _call
    kernel.FakeCUDAKernel.__getitem__ = _configure
    kernel.FakeOverload.max_cooperative_grid_blocks = lambda *_: _COOPERATIVE_BLOCKS
    if importlib.util.find_spec(_PTX_MODULE) is not None:
        ptx = importlib.import_module(_PTX_MODULE)
        if hasattr(ptx, "warp_exchange"):
            ptx.warp_exchange, ptx.current_lane = exchange, current_lane


def main(arguments: list[str]) -> None:
    """Run `-m module arguments...` in the simulator; restarts Python if it is off."""
    if len(arguments) < 2 or arguments[0] != "-m":
        raise SystemExit("usage: python -m tests.warp_simulator -m module [arguments...]")
    needed = {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "1"}
    if any(os.environ.get(name) != value for name, value in needed.items()):
        command = [sys.executable, "-m", "tests.warp_simulator", *arguments]
        os.execve(sys.executable, command, {**os.environ, **needed})
    # Under its own name: what is installed must be what others import.
    importlib.import_module("tests.warp_simulator").install()
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
