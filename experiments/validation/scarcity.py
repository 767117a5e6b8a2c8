"""Too little of everything: room on the disk, permissions, memory, descriptors, budget.

    disk full         a file system of so many pages; with all the room it claims, or less
    file size         a limit on how large a process may make its files
    permissions       folders and files that may not be written, or read
    memory            a limit on addresses; the k-th array cannot be had
    descriptors       a limit on open files

Each befalls every operation. Budgets of a running model are in `budgets`.
"""

from __future__ import annotations

import builtins
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from experiments.validation.budgets import budget_probes
from experiments.validation.children import Child, check_in_child
from experiments.validation.failing_calls import sampled
from experiments.validation.namespaces import SmallDisk, drop_privileges
from experiments.validation.operations import (
    Operation,
    checked_line,
    operations,
    prepared,
    told,
)
from experiments.validation.probe import Outcome, Probe
from experiments.validation.scene import Scene
from forge.pages import PAGE_BYTES

_Check = Callable[[Scene, Operation], Outcome]
_Case = tuple[str, str, _Check]  # the table's row, the place

_PACKAGES = ("forge.", "delta.")
_ARRAYS = ("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "concatenate", "array")
_MOST_DESCRIPTORS = 10
_MOST_ADDRESS_BITS = 9  # 256 MiB beyond what the process has


def probes(scene: Scene) -> Iterator[Probe]:
    """Those of all kinds, for each operation, and budgets."""
    for operation in operations(scene):
        n_bytes, n_arrays = _measured(scene, operation)
        for row, place, check in (
            *_without_room(scene, operation, -(-n_bytes // PAGE_BYTES) + 2),
            *_without_permission(scene, operation),
            *_without_memory(scene, operation, n_arrays),
        ):
            yield Probe(
                "chaos", row, operation.name, f"{operation}: {place}",
                partial(check, scene, operation),
            )  # fmt: skip
    yield from budget_probes(scene)


def _without_room(scene: Scene, operation: Operation, n_pages: int) -> Iterator[_Case]:
    """Of disks with room for fewer pages than an operation makes, and a few more."""
    every = scene.effort.every
    for n in sampled(n_pages, every):
        yield "disk full", f"{n} pages free", partial(_on_full_disk, n_pages=n)
    for n in sampled(n_pages, 2 * every - 1):
        yield "disk fills up", f"{n} pages free", partial(_on_full_disk, n_pages=n, is_known=False)
        limit = partial(int, n * PAGE_BYTES)
        yield "file size limited", f"{n} pages", _limited(resource.RLIMIT_FSIZE, limit)
    yield "read-only file system", "", _on_read_only_disk


def _without_permission(scene: Scene, operation: Operation) -> Iterator[_Case]:
    for name, mode in _refusals(operation).items():
        row = "unreadable file" if mode == 0 else "read-only folder or file"
        yield row, name, partial(_forbidden, name=name, mode=mode)


def _without_memory(scene: Scene, operation: Operation, n_arrays: int) -> Iterator[_Case]:
    every = scene.effort.every
    for k in sampled(n_arrays, every**2):
        yield "no memory for the k-th array", str(k), partial(_without_array, k=k)
    for bits in sampled(_MOST_ADDRESS_BITS, every):
        limit = partial(_address_space, beside=1 << bits + 20)
        row = "address space limited"
        yield row, f"{1 << bits} MiB more", _limited(resource.RLIMIT_AS, limit)
    for n in sampled(_MOST_DESCRIPTORS, every):
        limit = partial(_first_free, beside=n)
        yield "descriptors limited", f"{n} more", _limited(resource.RLIMIT_NOFILE, limit)


def _measured(scene: Scene, operation: Operation) -> tuple[int, int]:
    """Bytes of an operation's outputs, and how many arrays it makes."""
    with prepared(scene, operation) as folder, _allocations() as allocations:
        operation.work(folder)
        return sum((folder / name).stat().st_size for name in operation.new), allocations.n


# ---- the disk ----


def _on_full_disk(
    scene: Scene, operation: Operation, n_pages: int, is_known: bool = True
) -> Outcome:
    """On a disk with so many free pages; if that is not known, it is found out by writing."""
    ample = SimpleNamespace(free=1 << 40)

    def scant(disk: SmallDisk, folder: Path) -> str | None:
        disk.leave_free(n_pages * PAGE_BYTES)
        with ExitStack() as stack:
            if not is_known:
                stack.enter_context(mock.patch.object(shutil, "disk_usage", lambda _: ample))
            return told(lambda: operation.work(folder))

    return _on_disk(scene, operation, scant)


def _on_read_only_disk(scene: Scene, operation: Operation) -> Outcome:
    def scant(disk: SmallDisk, folder: Path) -> str | None:
        disk.make_read_only()
        return told(lambda: operation.work(folder))

    return _on_disk(scene, operation, scant)


def _on_disk(
    scene: Scene, operation: Operation, scant: Callable[[SmallDisk, Path], str | None]
) -> Outcome:
    with scene.copies() as root:

        def check() -> Outcome:
            disk = SmallDisk(root)
            folder = root / "probe"
            folder.mkdir()
            operation.prepare(folder)
            line = scant(disk, folder)
            disk.make_ample()
            return operation.judge(folder, line)

        return check_in_child(check)


# ---- permissions ----


def _refusals(operation: Operation) -> Mapping[str, int]:
    """What to forbid: names of files and folders, and their modes then."""
    folder = str(Path(operation.owner).parent)
    modes = {folder: 0o555}
    modes |= {name: 0 for name in (*operation.inputs, *operation.old)}
    if operation.undo is not None:
        modes |= {f"{name} ": 0o444 for name in operation.old}
    return modes


def _forbidden(scene: Scene, operation: Operation, name: str, mode: int) -> Outcome:
    with prepared(scene, operation) as folder:
        path = folder / name.strip()
        before = path.stat().st_mode
        path.chmod(mode)

        def work() -> None:
            drop_privileges()
            operation.work(folder)

        line = _line_of(work)
        if path.exists():
            path.chmod(before)
        return operation.judge(folder, line)


def _line_of(work: Callable[[], object]) -> str | None:
    """What a child says that does some work; None if it succeeds."""
    ended = Child(work).wait()
    return checked_line(ended.status, ended.said)


# ---- limits of a process ----


def _limited(which: int, limit: Callable[[], int]) -> _Check:
    """The check of a process that limits itself."""

    def check(scene: Scene, operation: Operation) -> Outcome:
        with prepared(scene, operation) as folder:

            def work() -> None:
                resource.setrlimit(which, (limit(), resource.getrlimit(which)[1]))
                operation.work(folder)

            return operation.judge(folder, _line_of(work))

    return check


def _address_space(beside: int) -> int:
    """Bytes of addresses that this process has, and some more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize() + beside


def _first_free(beside: int) -> int:
    """The descriptor that would be opened next, and some more."""
    descriptor = os.dup(2)
    os.close(descriptor)
    return descriptor + beside


class _Allocations:
    """Counts arrays that the project makes, and lets one of them fail."""

    def __init__(self, fails: int | None) -> None:
        self.n = 0
        self._fails = fails

    def counted(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def making(*arguments: Any, **keywords: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(_PACKAGES):
                self.n += 1
                if self.n - 1 == self._fails:
                    raise MemoryError
            return make(*arguments, **keywords)

        return making


@contextmanager
def _allocations(fails: int | None = None) -> Iterator[_Allocations]:
    """Within this context arrays are counted, and the one of this number, from 0, cannot be had."""
    allocations = _Allocations(fails)
    making = allocations.counted(builtins.bytearray)
    with ExitStack() as stack:
        for name in _ARRAYS:
            counted = allocations.counted(getattr(np, name))
            stack.enter_context(mock.patch.object(np, name, counted))
        for name, module in list(sys.modules.items()):
            if name.startswith(_PACKAGES):
                stack.enter_context(mock.patch.object(module, "bytearray", making, create=True))
        yield allocations


def _without_array(scene: Scene, operation: Operation, k: int) -> Outcome:
    with prepared(scene, operation) as folder:
        with _allocations(k):
            line = told(lambda: operation.work(folder))
        return operation.judge(folder, line)
