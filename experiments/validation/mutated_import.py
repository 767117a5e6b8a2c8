"""Loading one module from changed text: nothing on disk changes, and no other module.

    install("forge.restore", "if digest != expected:", "if False:")

Installed before the module is imported, by `sitecustomize` in a process and all that it starts.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType


def changed_text(text: str, module: str, old: str, new: str) -> str:
    """A module's text with `new` for `old`; ValueError unless that stands there exactly once."""
    if text.count(old) != 1:
        raise ValueError(f"{module}: {text.count(old)} times {old!r}, not once")
    return text.replace(old, new)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, old: str, new: str) -> None:
        super().__init__(name, path)
        self._change = old, new

    def get_code(self, fullname: str) -> CodeType:
        """The changed code, and not what has been compiled of the file before."""
        text = self.get_data(self.path).decode("utf-8")
        text = changed_text(text, fullname, *self._change)
        return compile(text, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, old: str, new: str) -> None:
        self._module = module
        self._change = old, new

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if found is None or found.origin is None:
            return None
        loader = _Loader(fullname, found.origin, *self._change)
        return importlib.util.spec_from_file_location(fullname, found.origin, loader=loader)


def install(module: str, old: str, new: str) -> None:
    """Have a module loaded with `new` for `old`, from now on."""
    sys.meta_path.insert(0, _Finder(module, old, new))
