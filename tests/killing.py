"""Ending a process at its k-th call that changes anything on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def killed_at(k: int, work: Callable[[], object], half: bool = False) -> bool:
    """Run `work` in a process that ends at the k-th call that changes anything on the disk."""
    pid = os.fork()
    if pid == 0:
        left = k

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    if half and call is pwrite:
                        call(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                    os._exit(0)
                return call(*arguments)

            return counted

        pwrite = os.pwrite
        try:
            for name in ("pwrite", "fsync", "replace", "unlink", "ftruncate"):
                setattr(os, name, dying(getattr(os, name)))
            work()
            os._exit(1)
        finally:
            os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1)
    return status == 0
