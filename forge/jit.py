"""`cached_njit`: Numba's `njit` with an on-disk cache that sees edits to every helper.

Numba's own cache looks only at the file of the function it caches, so an edit to a helper in
another file is missed. Here the folder of the cache carries a digest of *all* sources that hold
compiled code: change one line of one operation and everything compiles anew; change nothing and
a command starts in a second instead of half a minute.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent
_COMPILED_SOURCES = ("forge", "delta", "atlas/ops")
_KEPT_DIGESTS = 8
_DIGEST = re.compile("[0-9a-f]{16}")


def _sources_digest() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for folder in _COMPILED_SOURCES:
        for path in sorted((_PACKAGE_ROOT / folder).glob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_root() -> Path:
    if config.CACHE_DIR:
        return Path(config.CACHE_DIR) / "gguf-shard"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "gguf-shard" / "numba"


def _prepare_cache_dir() -> Path | None:
    """The folder of this version of the sources, or None where nothing can be written."""
    root = _cache_root()
    folder = root / _sources_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        by_age = sorted(
            (d for d in root.iterdir() if _DIGEST.fullmatch(d.name) and d.is_dir()),
            key=lambda d: d.stat().st_mtime,
        )
        for stale in by_age[:-_KEPT_DIGESTS]:
            shutil.rmtree(stale, ignore_errors=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


_CACHE_DIR = _prepare_cache_dir()


def cached_njit(*, parallel: bool = False, fastmath: Any = False) -> Callable[..., Any]:
    """Decorator: `numba.njit(nogil=True)`, cached under a digest of the compiled sources.

    Parameters
    ----------
    parallel
        Allow `prange` over Numba's threads. Only for code that never runs on a background
        thread: not every threading layer may be entered by two threads at once.
    fastmath
        As for `numba.njit`: a flag or the set of LLVM flags that may be assumed.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if parallel:
            # Numba's index knows a function by name and code, not by this flag.
            function.__qualname__ += "_parallel"
        before = config.CACHE_DIR
        try:
            if _CACHE_DIR is not None:
                config.CACHE_DIR = str(_CACHE_DIR)
            return numba.njit(
                function,
                nogil=True,
                parallel=parallel,
                fastmath=fastmath,
                error_model="numpy",
                cache=_CACHE_DIR is not None,
            )
        finally:
            config.CACHE_DIR = before

    return decorate
