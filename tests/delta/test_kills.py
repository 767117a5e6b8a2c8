"""`kill -9` at random moments of applying a patch: the old model, the new one, or one that the next
call makes the new one; never a third.

`GGUF_SHARD_KILLS` says how many moments for each way (default 70).
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from delta.apply import apply_patch
from delta.apply_in_place import update_in_place
from delta.diff import create_patch
from experiments.validation import gguf_factory as factory
from forge.errors import GGUFShardError
from forge.gguf_file import read_gguf
from forge.pending_file import journal_path
from forge.restore import restore_model
from forge.shard import shard_model
from forge.verify import verify_model
from tests.delta.model_pairs import PAIRS, edited

_KILLS = int(os.environ.get("GGUF_SHARD_KILLS", "70"))
_N_TENSORS = 6


def _model(seed: int) -> list[factory.Tensor]:
    return [
        factory.tensor(f"blk.{i}.ffn_up.weight", T.F16, (512, 256), seed + i)
        for i in range(_N_TENSORS)
    ]


def _change_half(data: np.ndarray) -> None:
    data.reshape(-1, 256)[::2, 3] ^= 0x15


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Scene:
    """A folder with base, target and patch, and what they are known by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.target = folder / "base.gguf", folder / "target.gguf"
        self.patch, self.new = folder / "patch", folder / "new.gguf"
        factory.write(self.base, factory.gguf(_model(0), PAIRS))
        changed = [edited(t, _change_half) for t in _model(0)]
        factory.write(self.target, factory.gguf(changed, PAIRS))
        create_patch(self.base, self.target, self.patch)
        self.old_sha256, self.new_sha256 = sha256(self.base), sha256(self.target)

    def leftovers(self) -> list[str]:
        return [p.name for p in self.folder.rglob("*") if "sgnew" in p.name or "journal" in p.name]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("kills"))


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Run `work` in a process of its own and kill that; whether it was alive still."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WIFSIGNALED(status), "the work failed by itself"
    return os.WIFSIGNALED(status)


def kill_often(work: Callable[[], object], prepare: Callable[[], None],
               check: Callable[[], None]) -> None:  # fmt: skip
    """Prepare, kill the work at a random moment, check; as often as it takes."""
    duration = 0.0
    for _ in range(2):  # the first one compiles
        prepare()
        started = time.perf_counter()
        work()
        duration = time.perf_counter() - started
    moments = random.Random(1)
    n_alive = 0
    for _ in range(_KILLS):
        prepare()
        n_alive += killed_after(moments.uniform(0, 1.2 * duration), work)
        check()
    assert n_alive > _KILLS // 4, "most kills came too late to mean anything"


def test_new_file(scene: Scene) -> None:
    def prepare() -> None:
        scene.new.unlink(missing_ok=True)

    def work() -> None:
        apply_patch(scene.base, scene.patch, scene.new, force=True)

    def check() -> None:
        assert sha256(scene.base) == scene.old_sha256
        if scene.new.exists():
            assert sha256(scene.new) == scene.new_sha256
        work()
        assert sha256(scene.new) == scene.new_sha256
        assert not scene.leftovers()

    kill_often(work, prepare, check)


def test_in_place(scene: Scene) -> None:
    model = scene.folder / "model.gguf"
    second = random.Random(2)

    def prepare() -> None:
        shutil.copyfile(scene.base, model)

    def work() -> None:
        update_in_place(model, scene.patch)

    def check() -> None:
        if journal_path(model).exists():
            with pytest.raises(GGUFShardError, match="interrupted"):
                read_gguf(model)
            killed_after(second.uniform(0, 0.02), work)
        if not journal_path(model).exists():
            assert sha256(model) in (scene.old_sha256, scene.new_sha256)
        if journal_path(model).exists() or sha256(model) == scene.old_sha256:
            work()
        assert sha256(model) == scene.new_sha256
        read_gguf(model)

    kill_often(work, prepare, check)


def test_sharded(scene: Scene) -> None:
    original = shard_model(scene.base, scene.folder / "original")
    fresh = shard_model(scene.target, scene.folder / "fresh")
    folder = scene.folder / "sharded"
    shard_map, restored = folder / "core.sgmap", scene.folder / "restored.gguf"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original.parent, folder)

    def work() -> None:
        update_in_place(shard_map, scene.patch)

    def check() -> None:
        assert verify_model(shard_map).ok
        restore_model(shard_map, restored, force=True)
        assert sha256(restored) in (scene.old_sha256, scene.new_sha256)
        if sha256(restored) == scene.old_sha256:
            work()
        for name in ("core.gguf", "core.sgmap"):
            assert sha256(folder / name) == sha256(fresh.with_name(name))
        assert not scene.leftovers()

    kill_often(work, prepare, check)
