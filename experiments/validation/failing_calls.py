"""The k-th system call fails, for every k until an operation comes through clean.

Every kind of call, alone (a bad sector, a signal's moment) and for good from some call on (a disk
that dies, or is full): then what cleans up fails, too. Calls may also do half of their work, which
is no failure and must be no harm. After an `fsync` that has failed nothing new is claimed, as the
system says it once and then never again.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

from experiments.validation.operations import Operation, operations, prepared, told
from experiments.validation.probe import Outcome, Probe, require
from experiments.validation.scene import Scene
from experiments.validation.system_calls import KINDS, Counted, Failing, intercepted
from forge import pending_file


@dataclass(frozen=True)
class _Fault:
    """The table's row, the kinds of calls it befalls, and how they fail (None: half is done).

    What befalls many calls at once need not begin at so many of them.
    """

    row: str
    kinds: tuple[str, ...]
    code: int | None = errno.EIO
    lasting: bool = False

    def places(self, calls: Mapping[str, int], every: int) -> range:
        """The calls at which it begins."""
        return sampled(self._count(calls), every**2 if self.lasting else every)

    def _count(self, calls: Mapping[str, int]) -> int:
        return sum(calls.get(kind, 0) for kind in self.kinds)


FAULTS = (
    *(_Fault(f"k-th {kind} fails", (kind,)) for kind in KINDS),
    _Fault("reads do half from the k-th on", ("read",), None, lasting=True),
    _Fault("writes do half from the k-th on", ("write",), None, lasting=True),
    _Fault("disk full from the k-th write on", ("write",), errno.ENOSPC, lasting=True),
    _Fault("disk dies at the k-th call", tuple(KINDS), lasting=True),
)


def sampled(n: int, every: int) -> range:
    """Each `every`-th of 0 to n - 1, the last one always among them."""
    return range((n - 1) % every, n, every)


def probes(scene: Scene) -> Iterator[Probe]:
    """One for each operation, fault and k."""
    for operation in operations(scene):
        calls = _calls(scene, operation)
        for fault in FAULTS:
            for k in fault.places(calls, scene.effort.every):
                yield Probe(
                    "chaos", fault.row, operation.name, f"{operation}: {k}",
                    partial(_check, scene, operation, fault, k),
                )  # fmt: skip


def _calls(scene: Scene, operation: Operation) -> Mapping[str, int]:
    """How many calls of each kind an operation makes when none fails."""
    hook = Counted()
    with prepared(scene, operation) as folder, _eager(), intercepted(folder, hook):
        operation.work(folder)
    return hook.calls


def _eager() -> AbstractContextManager[Any]:
    """Small files are written back early, as large ones are."""
    return mock.patch.object(pending_file, "_WRITE_BACK_BYTES", 1)


def _check(scene: Scene, operation: Operation, fault: _Fault, k: int) -> Outcome:
    with prepared(scene, operation) as folder:
        hook = Failing(fault.kinds, k, fault.code, fault.lasting)
        with _eager(), intercepted(folder, hook):
            line = told(lambda: operation.work(folder))
        if line is None:
            lost = [path for kind, path in hook.failed if kind == "fsync"]
            require(not lost, f"claims success though fsync has failed: {lost}")
        return operation.judge(folder, line)
