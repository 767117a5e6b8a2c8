"""The shape of the sources: who imports whom, how long things are, who prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("forge", "delta", "atlas", "experiments")
_MAX_FILE_LINES = 500
_MAX_FUNCTION_LINES = 60  # without the docstring, and without functions inside
_MAX_KERNEL_LINES = 100  # its phases share registers and barriers, and cannot all be moved apart

#: What each package may import of the project beside itself.
_MAY_IMPORT = {
    "forge": set(),
    "delta": {"forge"},
    "atlas": {"forge", "delta"},
    "experiments": {"forge", "delta", "atlas"},
}

#: Modules of atlas from the bottom to the top: each imports from its own layer and those below.
_LAYERS = (
    ("atlas.driver_queue", "atlas.pinned"),
    ("atlas.target", "atlas.errors", "atlas.stats", "atlas.ops.paged", "atlas.ops.checks"),
    ("atlas.ops",),
    (
        "atlas.eviction", "atlas.host_store", "atlas.model_shards", "atlas.prefetch",
        "atlas.frame_pool", "atlas.swap", "atlas.cuda_graph", "atlas.device_check",
        "atlas.live_update", "atlas.copy_queue",
    ),
    ("atlas.shard_cache",),
    ("atlas.host_tier",),
    ("atlas.swap_queue",),
    ("atlas.device_cache",),
    ("atlas.budget",),
    ("atlas.manager",),
    ("atlas.limits", "atlas.infer"),
    ("atlas.run_command", "atlas.fit_command"),
    ("atlas.cli",),
)  # fmt: skip

#: Modules whose business is to talk to people.
_COMMANDS = {
    "atlas.cli",
    "atlas.fit_command",
    "atlas.run_command",
    "forge.command",
    "forge.model_sharding_tool",
    "delta.incremental_model_updater",
}


def sources(*packages: str) -> list[Path]:
    return [path for name in packages for path in sorted((_ROOT / name).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every imported module or name with its full path, also from inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def layer_of(name: str) -> int:
    """Layer of a module of atlas, by the longest name in the list that it is within."""
    found = [
        (len(module), number)
        for number, modules in enumerate(_LAYERS)
        for module in modules
        if is_within(name, module)
    ]
    assert found, f"{name} has no layer"
    return max(found)[1]


ALL = sources(*_PACKAGES)


def test_there_is_something_to_look_at() -> None:
    names = {module_name(path) for path in ALL}
    assert {"atlas", "atlas.manager", "atlas.ops.lru", "atlas.infer.model", "forge.pages"} <= names


@pytest.mark.parametrize("path", ALL, ids=module_name)
def test_packages_import_one_way(path: Path) -> None:
    package = path.relative_to(_ROOT).parts[0]
    used = {name.split(".")[0] for name in imports(path)} & {*_PACKAGES, "tests"}
    assert used - {package} <= _MAY_IMPORT[package]


@pytest.mark.parametrize("path", sources("atlas"), ids=module_name)
def test_layers_of_atlas_import_downwards(path: Path) -> None:
    name = module_name(path)
    if name in ("atlas", "atlas.ops", "atlas.infer"):
        eager = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import)]
        assert not eager  # the packages themselves load nothing
        return
    layer = layer_of(name)
    above = [used for used in imports(path) if is_within(used, "atlas") and layer_of(used) > layer]
    assert not above


def imports_cuda(path: Path) -> bool:
    return any(is_within(name, "numba.cuda") or is_within(name, "cuda") for name in imports(path))


@pytest.mark.parametrize("path", sources("forge", "delta", "experiments"), ids=module_name)
def test_only_atlas_imports_cuda(path: Path) -> None:
    assert not imports_cuda(path)


def test_in_atlas_only_what_is_below_targets_graphs_and_operations_import_cuda() -> None:
    found = {module_name(path) for path in sources("atlas") if imports_cuda(path)}
    assert {name for name in found if not is_within(name, "atlas.ops")} == {
        "atlas.cuda_graph",
        "atlas.driver_queue",
        "atlas.pinned",
        "atlas.target",
    }


def own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, without its docstring and the functions inside it."""

    def length(inner: ast.stmt) -> int:
        assert inner.end_lineno is not None
        return inner.end_lineno - inner.lineno + 1

    n_lines = length(node) - sum(
        length(inner) for inner in node.body if isinstance(inner, ast.FunctionDef)
    )
    return n_lines - (length(node.body[0]) if ast.get_docstring(node) is not None else 0)


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Name)
        and decorator.func.id == "kernel"
        for decorator in node.decorator_list
    )


@pytest.mark.parametrize("path", ALL, ids=module_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= _MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            longest = _MAX_KERNEL_LINES if is_kernel(node) else _MAX_FUNCTION_LINES
            assert own_lines(node) <= longest, f"{path.name}:{node.lineno}: {node.name}"


@pytest.mark.parametrize(
    "path",
    [path for path in sources("forge", "delta", "atlas") if module_name(path) not in _COMMANDS],
    ids=module_name,
)
def test_libraries_do_not_print(path: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not calls


@pytest.mark.parametrize("path", ALL, ids=module_name)
def test_modules_say_what_they_are_and_postpone_annotations(path: Path) -> None:
    text = path.read_text()
    if not text.strip():
        assert path.name == "__init__.py"
        return
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert "__future__.annotations" in set(imports(path))
