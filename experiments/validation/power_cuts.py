"""The power goes at the k-th system call: what was not made durable by then may be lost.

What a file system promises is little: bytes are on the disk once `fsync` of their file has
returned, names once that of their folder has. What comes before that is kept or lost as it pleases.
So the folder is rebuilt from what is there when the power goes, in each of these ways:

    files that were there before    as of their last `fsync`, or as they are
    files that are new              likewise; empty if there was none
    names                           as of the last `fsync` of their folder, or as they are

Old or new must come out of each; and new, once an operation has said that it has succeeded.
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.validation.failing_calls import sampled
from experiments.validation.operations import Operation, operations, prepared, told
from experiments.validation.probe import Missed, Outcome, Probe
from experiments.validation.scene import Scene
from experiments.validation.system_calls import Call, Counted, intercepted


@dataclass(frozen=True)
class _Kept:
    """What the disk keeps of what was not made durable."""

    old_data: bool
    new_data: bool
    names: bool

    def __str__(self) -> str:
        kept = [name for name, is_kept in vars(self).items() if is_kept]
        return f"kept: {', '.join(kept).replace('_', ' ') or 'nothing'}"


# If all of it is kept, that is no more than a kill.
_WAYS = [_Kept(*flags) for flags in itertools.product((False, True), repeat=3)][:-1]


class _Disk:
    """A hook that knows what is durable of a folder, and stops the time at the k-th call.

    Parameters
    ----------
    folder
        The folder; all that is in it now is durable.
    k
        Before which call, from 0, the power goes; if there are fewer, at the end.
    """

    def __init__(self, folder: Path, k: int) -> None:
        self._folder = folder.resolve()
        self._left = k
        self._lock = threading.Lock()
        self._names = self._current_names()
        self._data = {inode: (self._folder / name).read_bytes()
                      for name, inode in self._names.items()}  # fmt: skip
        self._is_old = set(self._data)
        self.cut: dict[_Kept, dict[str, bytes]] | None = None

    def __call__(self, call: Call) -> Any:
        with self._lock:
            self._left -= 1
            if self._left < 0 and self.cut is None:
                self.stop()
            is_made = call.kind == "open" and not os.path.lexists(call.path)
            result = call.proceed()
            if is_made and isinstance(result, int):
                inode = os.fstat(result).st_ino  # which a file that is gone may have had
                self._data.pop(inode, None)
                self._is_old.discard(inode)
            if call.kind == "fsync":
                self._make_durable(call.arguments[0])
            return result

    def _make_durable(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            self._data[status.st_ino] = os.pread(descriptor, status.st_size, 0)
            return
        folder = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(self._folder)
        beside = {name for name in self._names if Path(name).parent != folder}
        now = self._current_names()
        self._names = {name: self._names[name] for name in beside}
        self._names |= {name: inode for name, inode in now.items() if Path(name).parent == folder}

    def _current_names(self) -> dict[str, int]:
        paths = [path for path in self._folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self._folder)): path.stat().st_ino for path in paths}

    def stop(self) -> None:
        """The power goes now."""
        names = self._current_names()
        data = {inode: (self._folder / name).read_bytes() for name, inode in names.items()}
        self.cut = {way: self._rebuilt(way, names, data) for way in _WAYS}

    def _rebuilt(
        self, way: _Kept, names: dict[str, int], data: dict[int, bytes]
    ) -> dict[str, bytes]:
        files = {}
        for name, inode in (names if way.names else self._names).items():
            is_kept = way.old_data if inode in self._is_old else way.new_data
            durable = self._data.get(inode, b"")
            files[name] = data.get(inode, durable) if is_kept else durable
        return files


def probes(scene: Scene) -> Iterator[Probe]:
    """One for each operation and call, and for its end."""
    for operation in operations(scene):
        hook = Counted()
        with prepared(scene, operation) as folder, intercepted(folder, hook):
            operation.work(folder)
        n_calls = hook.calls.total()
        # Each is looked at in several ways.
        for k in sampled(n_calls + 1, 2 * scene.effort.every - 1):
            yield Probe(
                "chaos", "power cut at the k-th call", operation.name, f"{operation}: {k}",
                partial(_check, scene, operation, k),
            )  # fmt: skip


def _check(scene: Scene, operation: Operation, k: int) -> Outcome:
    """All ways of one cut; those that come to the same are looked at once."""
    with prepared(scene, operation) as folder:
        disk = _Disk(folder, k)
        with intercepted(folder, disk):
            line = told(lambda: operation.work(folder))
        if disk.cut is None:
            disk.stop()
        else:
            line = "power cut"
    assert disk.cut is not None
    seen: list[dict[str, bytes]] = []
    for way, files in disk.cut.items():
        if files not in seen:
            seen.append(files)
            try:
                _judge(scene, operation, files, line)
            except Missed as error:
                raise Missed(f"{way}: {error}") from None
    return Outcome.HARMLESS


def _judge(scene: Scene, operation: Operation, files: dict[str, bytes], line: str | None) -> None:
    with scene.copies() as folder:
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        operation.judge(folder, line)
