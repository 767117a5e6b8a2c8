"""Loading one module from changed text: nothing on disk changes, and no other module.

    install("forge.restore", ("if digest != expected:", "if False:"))

Installed before the module is imported, by `sitecustomize` in a process and all that it starts.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType


def changed_text(text: str, module: str, *changes: tuple[str, str]) -> str:
    """A module's text with new for old pieces; ValueError unless each stands there exactly once."""
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f"{module}: {text.count(old)} times {old!r}, not once")
        text = text.replace(old, new)
    return text


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, changes: Sequence[tuple[str, str]]) -> None:
        super().__init__(name, path)
        self._changes = changes

    def get_code(self, fullname: str) -> CodeType:
        """The changed code, and not what has been compiled of the file before."""
        text = self.get_data(self.path).decode("utf-8")
        text = changed_text(text, fullname, *self._changes)
        return compile(text, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, changes: Sequence[tuple[str, str]]) -> None:
        self._module = module
        self._changes = changes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if found is None or found.origin is None:
            return None
        loader = _Loader(fullname, found.origin, self._changes)
        return importlib.util.spec_from_file_location(fullname, found.origin, loader=loader)


def install(module: str, *changes: tuple[str, str]) -> None:
    """Have a module loaded with new for old pieces of its text, from now on."""
    sys.meta_path.insert(0, _Finder(module, changes))
