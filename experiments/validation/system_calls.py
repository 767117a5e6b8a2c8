"""What happens at a system call: it fails, does half of its work, or something else happens first.

    with intercepted(folder, hook):
        work()                      # each call on a file in the folder goes through the hook

The functions through which the project reaches the system are replaced in Python, so nothing but
calls on paths and descriptors within the folder is touched. What is not seen: reading through a
mapping of a file, and what compiled code does by itself.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from experiments.validation.probe import Unavailable

_DESCRIPTORS = Path("/proc/self/fd")

#: For each kind of call the functions that make it: module, name.
KINDS: Mapping[str, tuple[tuple[Any, str], ...]] = {
    "open": ((os, "open"), (builtins, "open")),
    "read": ((os, "preadv"),),
    "write": ((os, "pwrite"),),
    "fsync": ((os, "fsync"),),
    "hint": ((os, "posix_fadvise"),),
    "rename": ((os, "replace"),),
    "truncate": ((os, "ftruncate"),),
    "unlink": ((os, "unlink"),),
    "mkdir": ((os, "mkdir"),),
    "lock": ((fcntl, "flock"),),
}


@dataclass(frozen=True)
class Call:
    """A call that is about to be made.

    Attributes
    ----------
    kind
        One of `KINDS`.
    path
        The file, as it is called now.
    real
        What makes the call.
    arguments, keywords
        With what.
    """

    kind: str
    path: str
    real: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def proceed(self) -> Any:
        """Make it."""
        return self.real(*self.arguments, **self.keywords)

    def do_half(self) -> Any:
        """Read or write the first half only, and at least a byte, as the system is free to.

        Reads through a file object, which makes up for it, are left alone.
        """
        if len(self.arguments) < 3:
            return self.proceed()
        descriptor, what, offset = self.arguments
        is_read = self.kind == "read"
        view = memoryview(what[0] if is_read else what)
        half = view[: max(len(view) // 2, 1)]
        return self.real(descriptor, [half] if is_read else half, offset)

    def error(self, code: int) -> OSError:
        """How it fails; of an open file the system does not say the name."""
        if self.kind == "read" or isinstance(self.arguments[0], int):
            return OSError(code, os.strerror(code))
        return OSError(code, os.strerror(code), self.path)


Hook = Callable[[Call], Any]


def _path_of(what: Any) -> str:
    """The path that a call speaks of; of a descriptor that of its file."""
    if isinstance(what, int):
        try:
            return os.readlink(_DESCRIPTORS / str(what))
        except OSError:
            return ""
    return os.path.abspath(os.fspath(what))


def _is_within(path: str, root: str) -> bool:
    return f"{path}/".startswith(root)


def _watched(kind: str, real: Callable[..., Any], root: str, hook: Hook) -> Callable[..., Any]:
    def watching(*arguments: Any, **keywords: Any) -> Any:
        path = _path_of(arguments[0])
        if keywords.get("dir_fd") is not None or not _is_within(path, root):
            return real(*arguments, **keywords)
        return hook(Call(kind, path, real, arguments, keywords))

    return watching


def _watched_files(root: str, hook: Hook) -> type[io.FileIO]:
    """Files whose reads, by whatever buffers them, go through a hook."""

    class WatchedFile(io.FileIO):
        def readinto(self, buffer: Any) -> Any:
            path = _path_of(self.fileno())
            if not _is_within(path, root):
                return super().readinto(buffer)
            return hook(Call("read", path, super().readinto, (buffer,), {}))

    return WatchedFile


@contextmanager
def intercepted(folder: Path, hook: Hook) -> Iterator[None]:
    """Within this context all calls on files in a folder, and on itself, go through `hook`.

    It returns what the call should, mostly by `Call.proceed`; it is called by several threads.

    Raises
    ------
    Unavailable
        If the system does not tell which file a descriptor is of.
    """
    if not _DESCRIPTORS.is_dir():
        raise Unavailable(f"no {_DESCRIPTORS}")
    root = f"{folder.resolve()}/"
    with ExitStack() as stack:
        for kind, functions in KINDS.items():
            for module, name in functions:
                watching = _watched(kind, getattr(module, name), root, hook)
                stack.enter_context(mock.patch.object(module, name, watching))
        stack.enter_context(mock.patch.object(io, "FileIO", _watched_files(root, hook)))
        yield


class Counted:
    """A hook that lets calls pass and counts them.

    Attributes
    ----------
    calls
        Calls of each kind.
    on_files
        Calls of each kind on each file: (kind, bare name).
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.on_files: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def __call__(self, call: Call) -> Any:
        with self._lock:
            number = self.calls.total()
            self.calls[call.kind] += 1
            self.on_files[call.kind, os.path.basename(call.path)] += 1
        return self.at(call, number)

    def at(self, call: Call, number: int) -> Any:
        """Make a call, the one of this number, from 0."""
        return call.proceed()


class Failing(Counted):
    """The k-th call fails, or does half of its work.

    Parameters
    ----------
    kinds
        Of calls of these kinds.
    k
        Which one, from 0.
    code
        How it fails, an `errno`; None to do half.
    lasting
        All later ones fail, too.

    Attributes
    ----------
    failed
        What has failed, as (kind, path).
    """

    def __init__(
        self, kinds: Sequence[str], k: int, code: int | None = errno.EIO, lasting: bool = False
    ) -> None:
        super().__init__()
        self.failed: list[tuple[str, str]] = []
        self._kinds = frozenset(kinds)
        self._k = k
        self._code = code
        self._lasting = lasting

    def __call__(self, call: Call) -> Any:
        return super().__call__(call) if call.kind in self._kinds else call.proceed()

    def at(self, call: Call, number: int) -> Any:
        if number != self._k and not (self._lasting and number > self._k):
            return call.proceed()
        if self._code is None:
            return call.do_half()
        self.failed.append((call.kind, call.path))
        raise call.error(self._code)


class Signalled(Counted):
    """Before the k-th call of all this process gets a signal, half-way through if it is a write."""

    def __init__(self, k: int, number: signal.Signals) -> None:
        super().__init__()
        self._k = k
        self._signal = number

    def at(self, call: Call, number: int) -> Any:
        if number == self._k:
            if call.kind == "write" and self._signal == signal.SIGKILL:
                call.do_half()
            os.kill(os.getpid(), self._signal)
        return call.proceed()


class Disturbed(Counted):
    """Before the k-th call of a kind on a path something happens, once."""

    def __init__(self, kind: str, path: Path, k: int, action: Callable[[], None]) -> None:
        super().__init__()
        self.has_happened = False
        self._kind = kind
        self._path = str(path.resolve())
        self._left = k
        self._action = action

    def at(self, call: Call, number: int) -> Any:
        if (call.kind, call.path) == (self._kind, self._path):
            self._left -= 1
            if self._left == -1:
                self.has_happened = True
                self._action()
        return call.proceed()
