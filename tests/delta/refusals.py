"""A patch that must be refused, applied in every way there is."""

from __future__ import annotations

import io
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from delta.incremental_model_updater import main
from experiments.validation import gguf_factory as factory
from experiments.validation.hostile_patches import GIB, MIB
from forge.shard import ShardOptions, shard_model

_MOST_MEMORY = 200 * MIB
_ROOM = 2 * GIB  # beyond that there is no memory: a bomb must not hurt who runs the tests
_PATIENCE_SECONDS = 30  # until a test that hangs is given up


def _status(field: str) -> int:
    """Bytes of memory that the system counts for this process."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) << 10


def _give_up(*_: object) -> None:
    raise TimeoutError(f"nothing after {_PATIENCE_SECONDS} s")


@contextmanager
def guarded() -> Iterator[None]:
    """Fails if the process grows by much, and keeps it from growing without end."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _ROOM, limits[1]))
    previous = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(_PATIENCE_SECONDS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = _status("VmHWM") - before
    assert grown < _MOST_MEMORY, f"took {grown >> 20} MiB"


def snapshot(folder: Path) -> dict[Path, bytes]:
    """All there is below a folder."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@cache
def _sharded(data: bytes) -> dict[str, bytes]:
    """The files of a sharded model, by name."""
    with TemporaryDirectory() as folder:
        path = factory.write(Path(folder) / "model.gguf", data)
        shard_model(path, folder, ShardOptions(pages_per_shard=2))
        return {name: (Path(folder) / name).read_bytes() for name in ("core.gguf", "core.sgmap")}


def refused_every_way(folder: Path, base: bytes, data: bytes, reverse: bool = False) -> set[str]:
    """Apply a patch as a new file, in place, and to a sharded model: nothing may come of it.

    Returns what is said, one line each time, without the paths.
    """
    model, patch = folder / "model.gguf", folder / "hostile.sgpatch"
    for name, content in {"model.gguf": base, **_sharded(base), "hostile.sgpatch": data}.items():
        (folder / name).write_bytes(content)
    before, said = snapshot(folder), set()
    to_file, in_place = ["-o", folder / "new.gguf"], ["--in-place"]
    for of, how in product((model, folder / "core.sgmap"), (to_file, in_place)):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), guarded():
            code = main([*map(str, ["apply", of, patch, *how]), *["--reverse"] * reverse])
        line = err.getvalue().removesuffix("\n")
        assert (code, out.getvalue()) == (1, ""), line
        assert line.isprintable() and len(line) < 800, line
        assert line.startswith((f"{patch}: ", f"{of}: ")), line
        assert snapshot(folder) == before
        said.add(line.replace(f"{folder}/", ""))
    return said
