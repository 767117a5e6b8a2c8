"""The compile gate: what it reads from a cubin, what it lets through, and that all kernels pass."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest
from numba import cuda, types

import atlas.ops
from tests import compile_gate
from tests.compile_gate import Resources, Verdict, compile_offline, cubin_resources, judge

SIGNATURE = (types.float32[::1], types.int64)
CAPABILITY = (8, 0)

needs_compiler = pytest.mark.skipif(
    compile_gate.missing() is not None, reason=str(compile_gate.missing())
)


@cuda.jit
def sound_kernel(a, n):
    shared = cuda.shared.array(256, np.float32)
    i = cuda.threadIdx.x
    shared[i] = a[i]
    cuda.syncthreads()
    a[i] = shared[n - i]


@cuda.jit
def local_array_kernel(a, n):
    kept = cuda.local.array(64, np.float32)
    for i in range(64):
        kept[i] = a[i]
    for i in range(64):
        a[i] = kept[(i * n) % 64]


@cuda.jit(max_registers=24)
def spilling_kernel(a, n):
    """Thirty-two values that all depend on each other, in fewer registers.

    They differ from thread to thread, or the compiler would move them to uniform registers.
    """
    values = cuda.local.array(32, np.float32)
    first = cuda.threadIdx.x
    for j in range(32):
        values[j] = a[first + j]
    for _ in range(n):
        last = values[31]
        for j in range(32):
            last, values[j] = values[j], values[j] * last + values[31 - j]
    for j in range(32):
        a[first + j] = values[j]


@cuda.jit
def mistyped_kernel(a, n):
    a[0] = "text"


@needs_compiler
def test_resources_of_a_sound_kernel() -> None:
    found = compile_offline(sound_kernel, SIGNATURE, CAPABILITY)
    assert found.frame == 0
    assert found.shared == 256 * 4
    assert 8 <= found.registers <= 64
    assert found.code > 0 and found.code % 16 == 0  # instructions have 16 bytes


@needs_compiler
def test_hopper_reserves_shared_memory() -> None:
    """From compute capability 9.0 on the system takes 1 KiB of each block's shared memory."""
    assert compile_offline(sound_kernel, SIGNATURE, (9, 0)).shared == 256 * 4 + 1024


@needs_compiler
def test_frame_of_a_local_array() -> None:
    assert compile_offline(local_array_kernel, SIGNATURE, CAPABILITY).frame >= 64 * 4


@needs_compiler
def test_launch_options_of_the_kernel_are_kept() -> None:
    assert compile_offline(spilling_kernel, SIGNATURE, CAPABILITY).registers <= 24


@needs_compiler
@pytest.mark.parametrize("kernel", [local_array_kernel, spilling_kernel])
def test_local_memory_shuts_the_gate(kernel: Any) -> None:
    (verdict,) = judge([("bad", kernel, SIGNATURE)], CAPABILITY)
    assert not verdict.passed
    assert str(verdict).endswith("LOCAL MEMORY")


@needs_compiler
def test_what_does_not_compile_shuts_the_gate_and_hides_nothing_else() -> None:
    bad, good = judge(
        [("bad", mistyped_kernel, SIGNATURE), ("good", sound_kernel, SIGNATURE)], CAPABILITY
    )
    assert not bad.passed
    assert "DOES NOT COMPILE: TypingError" in str(bad) and "\n" not in str(bad)
    assert good.passed


@needs_compiler
def test_a_cubin_cut_short_is_refused() -> None:
    from numba.cuda.dispatcher import _Kernel

    with compile_gate.offline(CAPABILITY):
        compiled = _Kernel(sound_kernel.py_func, SIGNATURE, lto=True)
        cubin = bytes(compiled._codelibrary.get_cubin().code)
    assert len(cubin_resources(cubin)) == 1
    for size in (6, 0x30, 0x40, len(cubin) // 2):
        with pytest.raises(ValueError, match="cubin: broken or cut short"):
            cubin_resources(cubin[:size])


def test_what_is_no_cubin_is_refused() -> None:
    with pytest.raises(ValueError, match="not a little-endian ELF64"):
        cubin_resources(b"#!/bin/sh")


def test_verdict() -> None:
    sound, framed = Resources(32, 0, 1024, 640), Resources(32, 8, 0, 640)
    assert Verdict("op.kernel", "sm_80", sound).passed
    assert not Verdict("op.kernel", "sm_80", framed).passed
    assert not Verdict("op.kernel", "sm_80", None, "TypingError").passed
    assert "32      0    1024     640  ok" in str(Verdict("op.kernel", "sm_80", sound))


def test_main_says_why_it_checks_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_gate, "missing", lambda: "no compiler")
    assert compile_gate.main() == compile_gate.NOTHING_CHECKED
    assert capsys.readouterr().err == "compile gate: nothing checked: no compiler\n"


def test_every_kernel_is_listed() -> None:
    """A `*_kernel` of an operation that no `KERNELS` names would slip past the gate. (`_kernel` is
    what makes the kernels of an operation that has one a type.)"""
    listed = {id(kernel) for _, kernel, _ in compile_gate.kernels()}
    left_out = []
    for info in pkgutil.iter_modules(atlas.ops.__path__, "atlas.ops."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if name.endswith("_kernel") and name != "_kernel" and id(value) not in listed:
                left_out.append(f"{info.name}.{name}")
    assert listed
    assert left_out == []


@needs_compiler
def test_all_kernels_pass(capsys: pytest.CaptureFixture[str]) -> None:
    code = compile_gate.main()
    table = capsys.readouterr().out
    assert code == 0, table
    assert "gather.gather_pages_kernel" in table
