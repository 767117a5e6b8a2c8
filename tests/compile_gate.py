"""The compile gate: every kernel becomes machine code for every architecture, without a GPU.

    python tests/compile_gate.py

Each entry of each `KERNELS` dictionary in `atlas/ops/*.py` is compiled as numba-cuda does at a
first launch: Numba to NVVM's LTO-IR, nvJitLink to a cubin. The registers, the local-memory frame,
the shared memory and the size of the code are read from the cubin and printed. The gate is shut
(exit code 1) if a kernel does not compile or has a local-memory frame: then registers spill or an
array of a thread lies in memory, which costs more than anything a kernel here could gain by it.
Exit code 3 means that nothing was checked, because numba-cuda is missing.

A cubin is an ELF64 file (System V ABI). Its section `.nv.info` is a list of attributes, of which
`cuobjdump -elf` shows the names used below; `.text.K` and `.nv.shared.K` are code and shared memory
of kernel K.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import pkgutil
import struct
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from numba.core import config

ARCHITECTURES = ((7, 5), (8, 0), (9, 0))
NUMBA_CUDA_SERIES = "0.30."  # whose internals `offline` knows

NOTHING_CHECKED = 3

_SYMBOL_BYTES = 24
_INFO_FORMAT_SIZED = 4  # EIFMT_SVAL: the attribute's size in bytes follows, then its value
_ATTRIBUTES = {0x2F: "registers", 0x11: "frame", 0x12: "stack"}
# EIATTR_REGCOUNT, EIATTR_FRAME_SIZE, EIATTR_MIN_STACK_SIZE


@dataclass(frozen=True)
class Resources:
    """What a function in a cubin takes: registers and, in bytes, memory and code.

    `frame` is the local memory of a thread: the function's own, or with all it calls if that is
    more.
    """

    registers: int
    frame: int
    shared: int
    code: int


@dataclass(frozen=True)
class Verdict:
    """One line of the gate's table: a kernel on an architecture."""

    kernel: str
    architecture: str
    resources: Resources | None
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.resources is not None and self.resources.frame == 0

    def __str__(self) -> str:
        start = f"{self.kernel:<44} {self.architecture}"
        if self.resources is None:
            return f"{start}  DOES NOT COMPILE: {self.error}"
        r = self.resources
        end = "ok" if self.passed else "LOCAL MEMORY"
        return f"{start} {r.registers:>10} {r.frame:>6} {r.shared:>7} {r.code:>7}  {end}"


HEADING = f"{'kernel':<44} arch   registers  frame  shared    code"


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


def kernels() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, kernel and signature of every entry of every `KERNELS` in `atlas.ops`."""
    package = importlib.import_module("atlas.ops")
    for info in pkgutil.iter_modules(package.__path__, "atlas.ops."):
        listed = getattr(importlib.import_module(info.name), "KERNELS", {})
        for name, (kernel, signature) in listed.items():
            yield f"{info.name.rpartition('.')[2]}.{name}", kernel, signature


def judge(
    listed: Iterable[tuple[str, Any, tuple[Any, ...]]], capability: tuple[int, int]
) -> list[Verdict]:
    """Compile kernels for a compute capability and say what became of each."""
    architecture = f"sm_{capability[0]}{capability[1]}"
    verdicts = []
    for name, kernel, signature in listed:
        try:
            resources = compile_offline(kernel, signature, capability)
        except Exception as error:  # whatever the compiler raises is this kernel's verdict
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            verdicts.append(Verdict(name, architecture, None, reason))
        else:
            verdicts.append(Verdict(name, architecture, resources))
    return verdicts


def compile_offline(
    kernel: Any, signature: tuple[Any, ...], capability: tuple[int, int]
) -> Resources:
    """What a `@cuda.jit` kernel takes on an architecture that need not be here."""
    from numba.cuda.dispatcher import _Kernel

    with offline(capability):
        # As on a first launch, less the step that loads the cubin into a device. Link-time
        # optimisation is what numba-cuda chooses itself wherever nvJitLink is found; it also
        # spares the PTX assembler of the driver, which may be older than NVVM.
        compiled = _Kernel(kernel.py_func, signature, **{**kernel.targetoptions, "lto": True})
        cubin = bytes(compiled._codelibrary.get_cubin().code)
    return cubin_resources(cubin)[compiled.entry_name]


@contextmanager
def offline(capability: tuple[int, int]) -> Iterator[None]:
    """Let numba-cuda 0.30 compile without a driver.

    Compilation itself needs none, but in two places asks the current device for its compute
    capability: the dispatcher for the kernel and its device functions, the code library for the
    architecture to link for, which has the suffix `a` from 9.0 on. Both get their answer here.
    """
    from numba.cuda import codegen, dispatcher

    device = SimpleNamespace(compute_capability=capability)
    target = (*capability, "a" if capability >= (9, 0) else "")
    with (
        mock.patch.object(dispatcher, "get_current_device", lambda: device),
        mock.patch.object(
            codegen.CUDACodeLibrary, "_ensure_cc", lambda self, cc: target if cc is None else cc
        ),
    ):
        yield


def cubin_resources(cubin: bytes) -> dict[str, Resources]:
    """The resources of every function in a cubin, by its symbol.

    Raises
    ------
    ValueError
        If the bytes are no ELF64 file with the sections of a cubin.
    """
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("cubin: not a little-endian ELF64 file")
    try:
        sections = _sections(cubin)
        attributes = _attributes(cubin, sections)
    except (struct.error, KeyError, IndexError) as error:
        raise ValueError(f"cubin: broken or cut short ({error!r})") from error
    nothing = _Section(0, 0, 0)
    return {
        name: Resources(
            registers=found["registers"],
            frame=max(found.get("frame", 0), found.get("stack", 0)),
            shared=sections.get(f".nv.shared.{name}", nothing).size,
            code=sections[f".text.{name}"].size,
        )
        for name, found in attributes.items()
        if f".text.{name}" in sections and "registers" in found
    }


@dataclass(frozen=True)
class _Section:
    offset: int
    size: int
    link: int  # of a symbol table: the index of the section with its names


def _sections(cubin: bytes) -> dict[str, _Section]:
    """The sections by name, in the order of their indices."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQII", cubin, table + i * entry_bytes) for i in range(count)
    ]
    names_offset = headers[names_index][4]
    return {
        _string(cubin, names_offset + name): _Section(offset, size, link)
        for name, _, _, _, offset, size, link, _ in headers
    }


def _attributes(cubin: bytes, sections: dict[str, _Section]) -> dict[str, dict[str, int]]:
    """What `.nv.info` says of each symbol."""
    symbols = _symbols(cubin, sections)
    info = sections[".nv.info"]
    found: dict[str, dict[str, int]] = {}
    at, end = info.offset, info.offset + info.size
    while at < end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form != _INFO_FORMAT_SIZED:
            continue  # the value is in the two bytes where others have their size
        if attribute in _ATTRIBUTES:
            symbol, value = struct.unpack_from("<II", cubin, at)
            found.setdefault(symbols[symbol], {})[_ATTRIBUTES[attribute]] = value
        at += size
    return found


def _symbols(cubin: bytes, sections: dict[str, _Section]) -> list[str]:
    table = sections[".symtab"]
    names = list(sections.values())[table.link]
    return [
        _string(cubin, names.offset + struct.unpack_from("<I", cubin, at)[0])
        for at in range(table.offset, table.offset + table.size, _SYMBOL_BYTES)
    ]


def _string(data: bytes, start: int) -> str:
    end = data.find(b"\0", start)
    if end < 0:
        raise IndexError(start)
    return data[start:end].decode()


def _judge_all(capability: tuple[int, int]) -> list[Verdict]:
    return judge(kernels(), capability)


def main() -> int:
    """Print the table; 0 if all is well, 1 if a kernel failed, 3 if nothing could be checked."""
    reason = missing()
    if reason is not None:
        print(f"compile gate: nothing checked: {reason}", file=sys.stderr)
        return NOTHING_CHECKED
    # A process for each architecture: device functions are compiled once in a process, for the
    # architecture that first asked.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        verdicts = [v for judged in pool.map(_judge_all, ARCHITECTURES) for v in judged]
    print(HEADING)
    for verdict in verdicts:
        print(verdict)
    failed = sum(not verdict.passed for verdict in verdicts)
    print(f"{len(verdicts)} compiled, {failed} failed")
    return 1 if failed or not verdicts else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
