"""The compile gate: every kernel becomes machine code for every architecture, without a GPU.

    python -m tests.compile_gate [--update]

Each entry of each `KERNELS` dictionary in `atlas/ops/*.py` is compiled as numba-cuda does at a
first launch: Numba to NVVM's LTO-IR, nvJitLink to a cubin. The registers, the local-memory frame,
the shared memory and the size of the code are read from the cubin and printed. The gate is shut
(exit code 1)

- if a kernel does not compile, or has a local-memory frame: then registers spill or an array of a
  thread lies in memory, which costs more than anything a kernel here could gain by it;
- if a kernel takes more than its ceiling (`compile_ceilings`), or has none, or a ceiling has no
  kernel. `--update` makes what was compiled the ceilings; review the difference.

A kernel whose `min_capability` is above an architecture is not compiled for it. Exit code 3 means
that nothing was checked, because numba-cuda is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from numba.core import config

from tests import compile_ceilings
from tests.cubin import Resources, cubin_resources

ARCHITECTURES = ((7, 5), (8, 0), (9, 0))
NUMBA_CUDA_SERIES = "0.30."  # whose internals `offline` knows

NOTHING_CHECKED = 3


@dataclass(frozen=True)
class Listed:
    """A kernel of a `KERNELS` dictionary.

    Attributes
    ----------
    name
        "operation.kernel".
    entry, signature
        What is compiled, with the types of its arguments.
    min_capability
        The lowest compute capability it is for.
    """

    name: str
    entry: Any
    signature: tuple[Any, ...]
    min_capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Verdict:
    """One line of the gate's table: a kernel on an architecture.

    `resources` is None where there is no code, either because of an `error` or because the kernel
    `needs` another architecture.
    """

    kernel: str
    architecture: str
    resources: Resources | None = None
    error: str = ""
    needs: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.architecture}"

    @property
    def passed(self) -> bool:
        return bool(self.needs) or (self.resources is not None and self.resources.frame == 0)

    def __str__(self) -> str:
        start = f"{self.kernel:<56} {self.architecture}"
        if self.needs:
            return f"{start}  not compiled: needs {self.needs}"
        if self.resources is None:
            return f"{start}  DOES NOT COMPILE: {self.error}"
        r = self.resources
        end = "ok" if self.passed else "LOCAL MEMORY"
        return f"{start} {r.registers:>10} {r.frame:>6} {r.shared:>7} {r.code:>7}  {end}"


HEADING = f"{'kernel':<56} arch   registers  frame  shared    code"


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if config.ENABLE_CUDASIM:
        return "the CUDA simulator is on, and it compiles nothing"
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed (pip install 'gguf-shard[cuda13]')"
    version = importlib.metadata.version("numba-cuda")
    if not version.startswith(NUMBA_CUDA_SERIES):
        return f"numba-cuda {version} is not of the series {NUMBA_CUDA_SERIES}x that the gate knows"
    return None


def kernels() -> Iterator[Listed]:
    """Every entry of every `KERNELS` in `atlas.ops`."""
    package = importlib.import_module("atlas.ops")
    for info in pkgutil.iter_modules(package.__path__, "atlas.ops."):
        for name, kernel in getattr(importlib.import_module(info.name), "KERNELS", {}).items():
            yield listed(f"{info.name.rpartition('.')[2]}.{name}", kernel)


def listed(name: str, kernel: Any) -> Listed:
    """A `Kernel`, under a name: as a launch compiles it."""
    return Listed(name, kernel.entry, kernel.entry_types, kernel.min_capability)


def judge(some_kernels: Iterable[Listed], *capabilities: tuple[int, int]) -> list[Verdict]:
    """Compile kernels for compute capabilities and say what became of each."""
    verdicts = []
    for kernel in some_kernels:
        compiled = OfflineKernel(kernel.entry, kernel.signature)
        verdicts += [_verdict(kernel, compiled, capability) for capability in capabilities]
    return verdicts


def _verdict(kernel: Listed, compiled: OfflineKernel, capability: tuple[int, int]) -> Verdict:
    architecture = _architecture(capability)
    if capability < kernel.min_capability:
        return Verdict(kernel.name, architecture, needs=_architecture(kernel.min_capability))
    try:
        return Verdict(kernel.name, architecture, compiled.resources(capability))
    except Exception as error:  # whatever the compiler raises is this kernel's verdict
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Verdict(kernel.name, architecture, error=reason)


def _architecture(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


class OfflineKernel:
    """A `@cuda.jit` kernel, compiled for architectures that need not be here.

    Python becomes LLVM's code once, which takes four times as long as the rest. numba-cuda makes
    the same of it for all that the gate knows: in that step it asks whether a capability is below
    6.0, and for a `tanh` whether it is below 7.5.
    """

    def __init__(self, kernel: Any, signature: tuple[Any, ...]) -> None:
        self._kernel, self._signature = kernel, signature
        self._compiled: Any = None

    def resources(self, capability: tuple[int, int]) -> Resources:
        """What it takes on an architecture."""
        from numba.cuda.dispatcher import _Kernel

        # As on a first launch, less the step that loads the cubin into a device. Link-time
        # optimisation is what numba-cuda chooses itself wherever nvJitLink is found; it also
        # spares the PTX assembler of the driver, which may be older than NVVM.
        with offline(capability):
            if self._compiled is None:
                options = {**self._kernel.targetoptions, "lto": True}
                self._compiled = _Kernel(self._kernel.py_func, self._signature, **options)
            cubin = bytes(self._compiled._codelibrary.get_cubin().code)
        return cubin_resources(cubin)[self._compiled.entry_name]


@contextmanager
def offline(capability: tuple[int, int]) -> Iterator[None]:
    """Let numba-cuda 0.30 compile without a driver.

    Compilation itself needs none, but in two places asks the current device for its compute
    capability: the dispatcher for the kernel and its device functions, the code library for the
    architecture to link for, which has the suffix `a` from 9.0 on. Both get their answer here.
    PTX is not made: numba-cuda looks in it for helpers to link with, which no kernel here has (one
    that had would not link), and it takes as long as the LTO-IR that becomes the cubin.
    """
    from numba.cuda import codegen, dispatcher

    device = SimpleNamespace(compute_capability=capability)
    target = (*capability, "a" if capability >= (9, 0) else "")
    with (
        mock.patch.object(dispatcher, "get_current_device", lambda: device),
        mock.patch.object(
            codegen.CUDACodeLibrary, "_ensure_cc", lambda self, cc: target if cc is None else cc
        ),
        mock.patch.object(codegen.CUDACodeLibrary, "get_asm_str", lambda self, cc=None: ""),
    ):
        yield


def report(verdicts: Sequence[Verdict], ceilings_path: Path, *, update: bool = False) -> int:
    """Print the table and what is wrong with it; 0 if nothing is, else 1.

    With `update`, ceilings are written and not compared, unless a kernel failed.
    """
    print(HEADING)
    for verdict in verdicts:
        print(verdict)
    found = {verdict.name: verdict.resources for verdict in verdicts if not verdict.needs}
    failed = sum(not verdict.passed for verdict in verdicts)
    complaints: list[str] = []
    if not update:
        ceilings = compile_ceilings.read(ceilings_path)
        complaints = ceilings.complaints(found)
        for line in [*ceilings.notes(found), *complaints]:
            print(line)
    elif not failed:
        sound = {name: resources for name, resources in found.items() if resources is not None}
        compile_ceilings.write(ceilings_path, sound)
        print(f"{ceilings_path.name}: {len(sound)} ceilings written")
    print(
        f"{len(found)} compiled, {len(verdicts) - len(found)} for newer architectures, "
        f"{failed} failed, {len(complaints)} complaints about ceilings"
    )
    return 1 if failed or complaints or not found else 0


def _judge_part(part: slice) -> list[Verdict]:
    return judge(list(kernels())[part], *ARCHITECTURES)


def judge_all() -> list[Verdict]:
    """Verdicts on all kernels for all architectures, by name; a part of them by each processor."""
    n = os.cpu_count() or 1
    parts = [slice(first, None, n) for first in range(n)]
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        verdicts = [v for judged in pool.map(_judge_part, parts, chunksize=1) for v in judged]
    return sorted(verdicts, key=lambda verdict: (verdict.kernel, verdict.architecture))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if all is well, 1 if something is not, 3 if nothing could be checked."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.compile_gate", description="Compile every kernel without a GPU."
    )
    parser.add_argument("--update", action="store_true", help="write the ceilings anew")
    args = parser.parse_args(argv)
    reason = missing()
    if reason is not None:
        print(f"compile gate: nothing checked: {reason}", file=sys.stderr)
        return NOTHING_CHECKED
    return report(judge_all(), compile_ceilings.PATH, update=args.update)


if __name__ == "__main__":
    sys.exit(main())
