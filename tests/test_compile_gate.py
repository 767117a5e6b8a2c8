"""The compile gate: what it reads from a cubin, what it lets through, what it holds against
ceilings, and that all kernels pass."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numba import cuda, types

import atlas.ops
from atlas.ops.kernel import Kernel, kernel
from tests import compile_ceilings, compile_gate
from tests.compile_ceilings import Ceiling, Ceilings
from tests.compile_gate import Listed, OfflineKernel, Verdict, judge, listed, report
from tests.cubin import Resources, cubin_resources

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
    found = OfflineKernel(sound_kernel, SIGNATURE).resources(CAPABILITY)
    assert found.frame == 0
    assert found.shared == 256 * 4
    assert 8 <= found.registers <= 64
    assert found.code > 0 and found.code % 16 == 0  # instructions have 16 bytes


@needs_compiler
def test_hopper_reserves_shared_memory() -> None:
    """From compute capability 9.0 on the system takes 1 KiB of each block's shared memory."""
    assert OfflineKernel(sound_kernel, SIGNATURE).resources((9, 0)).shared == 256 * 4 + 1024


@needs_compiler
def test_architectures_that_are_compiled_for_together_differ_as_they_do_apart() -> None:
    kernels = [Listed("sound", sound_kernel, SIGNATURE)]
    apart = [judge(kernels, capability)[0] for capability in compile_gate.ARCHITECTURES]
    assert judge(kernels, *compile_gate.ARCHITECTURES) == apart
    assert len({str(verdict) for verdict in apart}) == len(apart)


@needs_compiler
def test_frame_of_a_local_array() -> None:
    assert OfflineKernel(local_array_kernel, SIGNATURE).resources(CAPABILITY).frame >= 64 * 4


@needs_compiler
def test_launch_options_of_the_kernel_are_kept() -> None:
    assert OfflineKernel(spilling_kernel, SIGNATURE).resources(CAPABILITY).registers <= 24


@needs_compiler
@pytest.mark.parametrize("bad", [local_array_kernel, spilling_kernel])
def test_local_memory_shuts_the_gate(bad: Any, tmp_path: Path) -> None:
    verdicts = judge([Listed("bad", bad, SIGNATURE)], CAPABILITY)
    assert not verdicts[0].passed
    assert str(verdicts[0]).endswith("LOCAL MEMORY")
    ceilings = tmp_path / "ceilings.json"
    assert report(verdicts, ceilings, update=True) == 1
    assert not ceilings.exists()  # no ceiling allows it


@needs_compiler
def test_what_does_not_compile_shuts_the_gate_and_hides_nothing_else() -> None:
    both = [
        Listed("bad", mistyped_kernel, SIGNATURE),
        Listed("good", sound_kernel, SIGNATURE),
    ]
    bad, good = judge(both, CAPABILITY)
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
    assert not Verdict("op.kernel", "sm_80", error="TypingError").passed
    assert "32      0    1024     640  ok" in str(Verdict("op.kernel", "sm_80", sound))


def test_main_says_why_it_checks_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_gate, "missing", lambda: "no compiler")
    assert compile_gate.main([]) == compile_gate.NOTHING_CHECKED
    assert capsys.readouterr().err == "compile gate: nothing checked: no compiler\n"


@needs_compiler
def test_a_kernel_for_newer_architectures_is_left_out_visibly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = Listed("op.newer_kernel", sound_kernel, SIGNATURE, min_capability=(8, 0))
    (old,), (new,) = judge([newer], (7, 5)), judge([newer], (8, 0))
    assert old.passed and old.resources is None
    assert str(old).endswith("sm_75  not compiled: needs sm_80")
    assert new.passed and new.resources is not None
    ceilings = tmp_path / "ceilings.json"
    assert report([old, new], ceilings, update=True) == 0
    assert set(compile_ceilings.read(ceilings).of) == {"op.newer_kernel sm_80"}
    assert report([old, new], ceilings) == 0
    assert "1 compiled, 1 for newer architectures, 0 failed" in capsys.readouterr().out


@needs_compiler
def test_a_kernel_object_is_compiled_with_the_unpacking_of_its_arguments() -> None:
    @kernel(*SIGNATURE)
    def scale_kernel(a, n):
        a[cuda.threadIdx.x] *= n

    (verdict,) = judge([listed("op.scale_kernel", scale_kernel)], CAPABILITY)
    assert verdict.passed, str(verdict)


@needs_compiler
def test_what_is_compiled_is_what_a_launch_asks_for() -> None:
    @kernel(*SIGNATURE)
    def scale_kernel(a, n):
        a[cuda.threadIdx.x] *= n

    asked = [scale_kernel.entry.typeof_pyval(word) for word in (0x7F12_3456_7800, 16, -1)]
    assert listed("op.scale_kernel", scale_kernel).signature == tuple(asked)


def found_now(**changes: int) -> dict[str, Resources | None]:
    """What a kernel takes that has its ceiling below; with changes."""
    taken = {"registers": 38, "frame": 0, "shared": 1024, "code": 1280}
    return {"op.kernel sm_80": Resources(**{**taken, **changes})}


def ceilings(tools: dict[str, str] | None = None) -> Ceilings:
    ours = compile_ceilings.tools()
    return Ceilings(tools or ours, {"op.kernel sm_80": Ceiling(38, 1024, 1280)})


def test_at_the_ceiling_there_is_nothing_to_say() -> None:
    assert ceilings().complaints(found_now()) == []
    assert ceilings().notes(found_now()) == []


@pytest.mark.parametrize(
    ("what", "allowed", "excess"),
    [("registers", 40, 3), ("shared", 1024, 1), ("code", 1344, 65)],
)
def test_above_the_ceiling_and_its_slack(what: str, allowed: int, excess: int) -> None:
    assert ceilings().complaints(found_now(**{what: allowed})) == []
    (line,) = ceilings().complaints(found_now(**{what: allowed + 1}))
    assert line.startswith(f"op.kernel sm_80: {what} {allowed + 1}, {excess} above the ceiling")


@pytest.mark.parametrize(("what", "allowed"), [("registers", 48), ("shared", 1024), ("code", 1600)])
def test_other_tools_have_more_slack_and_are_named(what: str, allowed: int) -> None:
    other = ceilings(compile_ceilings.tools() | {"nvidia-nvvm": "13.0.1"})
    assert other.complaints(found_now(**{what: allowed})) == []
    assert len(other.complaints(found_now(**{what: allowed + 1}))) == 1
    (note,) = other.notes(found_now())
    assert note.startswith("note: nvidia-nvvm ") and "13.0.1" in note


def test_room_to_spare_is_noted() -> None:
    assert "1 take less" in ceilings().notes(found_now(registers=30))[0]
    assert ceilings().notes(found_now(registers=30, code=1300)) == []


def test_missing_and_left_over_ceilings() -> None:
    here, gone = ceilings().complaints({"op.other sm_80": Resources(8, 0, 0, 128)})
    assert here == "op.other sm_80: no ceiling (--update writes it)"
    assert gone == "op.kernel sm_80: a ceiling without a kernel (--update drops it)"


def test_what_did_not_compile_keeps_its_ceiling() -> None:
    assert ceilings().complaints({"op.kernel sm_80": None}) == []


def test_ceilings_shut_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ceilings.json"
    small, grown = (
        Verdict("op.kernel", "sm_80", Resources(registers, 0, 0, 640)) for registers in (32, 41)
    )
    assert report([small], path) == 1  # no ceiling yet
    assert report([small], path, update=True) == 0
    assert report([small], path) == 0
    capsys.readouterr()
    assert report([grown], path) == 1
    assert "op.kernel sm_80: registers 41, 9 above the ceiling of 32" in capsys.readouterr().out
    assert report([], path) == 1  # nothing compiled is nothing checked


def test_ceilings_are_written_sorted_a_line_each(tmp_path: Path) -> None:
    path, again = tmp_path / "ceilings.json", tmp_path / "again.json"
    found = {f"op.{name}_kernel sm_{sm}": Resources(32, 0, 16, 640)
             for name in "ba" for sm in (90, 75)}  # fmt: skip
    compile_ceilings.write(path, found)
    compile_ceilings.write(again, dict(reversed(found.items())))
    text = path.read_text()
    assert again.read_text() == text
    assert json.loads(text)["tools"] == compile_ceilings.tools()
    lines = [line for line in text.splitlines() if "registers" in line]
    assert len(lines) == 4 and lines == sorted(lines)
    assert compile_ceilings.read(path).complaints(dict(found)) == []


def kernels_of(module: ModuleType) -> list[tuple[str, Any]]:
    """Every kernel that a module names or holds in a dictionary: ours, or of `cuda.jit` alone."""
    named: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, dict) and name != "KERNELS" and not name.startswith("__"):
            named |= {f"{name}[{key!r}]": item for key, item in value.items()}
        else:
            named[name] = value
    return [
        (f"{module.__name__}.{name}", value)
        for name, value in named.items()
        if isinstance(value, Kernel)
        or (isinstance(value, type(sound_kernel)) and not value.targetoptions.get("device"))
    ]


def test_every_kernel_is_listed() -> None:
    """A kernel of an operation that no `KERNELS` names would slip past the gate."""
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.iter_modules(atlas.ops.__path__, "atlas.ops.")
    ]
    entries = {id(kernel.entry) for kernel in compile_gate.kernels()}
    found = [named for module in modules for named in kernels_of(module)]
    assert entries and found
    assert [n for n, value in found if id(getattr(value, "entry", value)) not in entries] == []


def test_unlisted_kernels_are_found() -> None:
    module = ModuleType("operation")
    helper = cuda.jit(device=True)(lambda a: a)
    ours = kernel(types.float32[::1])(lambda a: None)
    vars(module).update(bare=sound_kernel, helper=helper, ours=ours, _MADE={"F16": ours})
    assert [name for name, _ in kernels_of(module)] == [
        "operation.bare", "operation.ours", "operation._MADE['F16']",
    ]  # fmt: skip


@needs_compiler
def test_all_kernels_pass(capsys: pytest.CaptureFixture[str]) -> None:
    code = compile_gate.main([])
    table = capsys.readouterr().out
    assert code == 0, table
    assert "gather.gather_pages_kernel" in table
