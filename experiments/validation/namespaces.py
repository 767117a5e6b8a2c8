"""What a process of its own may do to itself on Linux: a disk of its own size, no privileges.

All of it is for a forked child (`experiments.validation.children`): none can be taken back.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

from experiments.validation.probe import Unavailable

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 1 << 14, 1 << 18
_CAPABILITY_VERSION_3 = 0x20080522
_AMPLE = 256 << 20


def _system() -> ctypes.CDLL:
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"not on {sys.platform}")
    return ctypes.CDLL(None, use_errno=True)


def _require(result: int, what: str) -> None:
    if result != 0:
        raise Unavailable(f"{what}: {os.strerror(ctypes.get_errno())}")


class SmallDisk:
    """A file system in memory over a folder, seen by this process alone, whose size can change.

    Parameters
    ----------
    folder
        An empty folder.

    Raises
    ------
    Unavailable
        If this user may not mount anything here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._libc = _system()
        self._enter_namespace()
        _require(self._mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount /")
        self._resize(_AMPLE, 0, "mount")

    def leave_free(self, n_bytes: int) -> None:
        """Let it have so much room beside what it holds."""
        status = os.statvfs(self.folder)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        self._resize(max(used + n_bytes, status.f_frsize), _MS_REMOUNT, "remount")

    def make_read_only(self) -> None:
        """Refuse all writing."""
        self._resize(_AMPLE, _MS_REMOUNT | _MS_RDONLY, "remount")

    def make_ample(self) -> None:
        """Let it have all the room that anybody wants."""
        self._resize(_AMPLE, _MS_REMOUNT, "remount")

    def _resize(self, n_bytes: int, flags: int, what: str) -> None:
        target = os.fsencode(self.folder)
        options = f"size={n_bytes}".encode()
        _require(self._mount(b"none", target, b"tmpfs", flags, options), what)

    def _mount(
        self, source: bytes, target: bytes, kind: bytes | None, flags: int, options: bytes | None
    ) -> int:
        return int(self._libc.mount(source, target, kind, ctypes.c_ulong(flags), options))

    def _enter_namespace(self) -> None:
        if self._libc.unshare(_CLONE_NEWNS) == 0:
            return
        user, group = os.geteuid(), os.getegid()  # who may not do so, but be root among themselves
        _require(self._libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER), "unshare")
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        except OSError as error:
            raise Unavailable(f"user namespace: {error.strerror}") from None


def drop_privileges() -> None:
    """Let permissions count for this process even if it is root's.

    Raises
    ------
    Unavailable
        If the system has no capabilities that could be given up.
    """
    if os.geteuid() != 0:
        return
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    _require(_system().capset(header, bytes(24)), "capset")
