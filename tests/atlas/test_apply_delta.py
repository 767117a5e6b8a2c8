"""`Atlas.apply_delta`: the base answers before a patch, the target after it, and the base if the
patch is no good; on the CPU target, and on a GPU or in the simulator."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from numba import config

from atlas import live_update
from atlas.infer.generate import generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.live_update import ModelUpdatedError
from atlas.target import Target
from delta.diff import create_patch
from delta.patch_file import PatchReader
from forge.errors import GGUFShardError
from forge.shard import ShardOptions, shard_model
from forge.verify import verify_model
from tests.llama_factory import LlamaShape, Types, opened, write_llama
from tests.update_factory import wait_for

_PROJECT_ROOT = Path(__file__).resolve().parents[2]
PROMPT, N_TOKENS = ([1, 7], 2) if config.ENABLE_CUDASIM else ([1, 7, 20], 4)
SHAPE = (
    LlamaShape(n_layer=1, n_embd=16, n_ff=8, n_head=2, n_head_kv=1, n_vocab=8, ggml_type=Types.F16)
    if config.ENABLE_CUDASIM
    else LlamaShape()
)


@dataclass(frozen=True)
class Scene:
    """Base and target, the patches between them, and a sharded base to be updated."""

    base: Path
    target: Path
    patch: Path
    map: Path
    fresh: Path


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    base, target = tmp_path / "base.gguf", tmp_path / "target.gguf"
    write_llama(base, SHAPE)
    write_llama(target, replace(SHAPE, seed=5))
    create_patch(base, target, tmp_path / "patch", reversible=True)
    options = ShardOptions(pages_per_shard=1)
    shard_map = shard_model(base, tmp_path / "sharded", options)
    fresh = shard_model(target, tmp_path / "fresh", options)
    return Scene(base, target, tmp_path / "patch", shard_map, fresh)


def running(map_path: Path, budget: str, target: Target, **options: Any) -> LlamaModel:
    return opened(map_path, budget, target, n_context=16, n_batch=2, **options)


def answer(model: LlamaModel) -> tuple[tuple[int, ...], bytes]:
    model.position = 0
    result = generate(model, PROMPT, N_TOKENS, Sampler(0))
    return tuple(result.tokens), result.prompt_logits.tobytes()


def answer_of(map_path: Path, target: Target) -> tuple[tuple[int, ...], bytes]:
    with running(map_path, "100%", target) as model:
        return answer(model)


def bad_page(patch: Path, to: Path) -> Path:
    """The patch with one byte of a page changed, and all digests of the patch right."""
    with PatchReader(patch) as reader:
        *_, group = reader.groups
    data = bytearray(patch.read_bytes())
    end = group.offset + group.n_bytes
    data[end - 20] ^= 0x10
    digest = xxhash.xxh3_64_intdigest(data[group.offset : end])
    data[group.offset - 8 : group.offset] = digest.to_bytes(8, "little")
    data[-32:] = hashlib.sha256(data[:-32]).digest()
    to.write_bytes(data)
    PatchReader(to).close()
    return to


@pytest.mark.parametrize(("budget", "policy"), [("100%", "pin"), ("60%", "pin"), ("60%", "lru")])
def test_before_the_base_after_the_target(
    scene: Scene, target: Target, budget: str, policy: str
) -> None:
    old, new = answer_of(scene.map, target), answer_of(scene.fresh, target)
    assert old != new
    with running(scene.map, budget, target, policy=policy) as model:
        assert answer(model) == old
        model.atlas.apply_delta(scene.patch)
        assert answer(model) == new
        model.atlas.apply_delta(scene.patch, reverse=True)
        assert answer(model) == old
        model.atlas.apply_delta(scene.patch)
    for name in ("core.gguf", "core.sgmap"):
        assert scene.map.with_name(name).read_bytes() == scene.fresh.with_name(name).read_bytes()


def test_a_bad_page_leaves_the_base_answering(scene: Scene, target: Target, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    data = bytearray(scene.patch.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    before = {path: path.read_bytes() for path in scene.map.parent.iterdir()}
    with running(scene.map, "60%", target, policy="pin") as model:
        old = answer(model)
        for patch in (damaged, bad_page(scene.patch, tmp_path / "sealed"), tmp_path / "none"):
            with pytest.raises(GGUFShardError) as refused:
                model.atlas.apply_delta(patch)
            assert "\n" not in str(refused.value)
            assert answer(model) == old
    assert {path: path.read_bytes() for path in scene.map.parent.iterdir()} == before


def test_memory_is_given_back(
    scene: Scene, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the patch was any good or not."""
    forgotten: list[bool] = []
    monkeypatch.setattr(live_update, "forget_scratch", lambda: forgotten.append(True))
    with running(scene.map, "100%", target) as model:
        with pytest.raises(GGUFShardError):
            model.atlas.apply_delta(bad_page(scene.patch, tmp_path / "sealed"))
        assert len(forgotten) == 1
        model.atlas.apply_delta(scene.patch)
    assert len(forgotten) == 2


def test_another_models_patch(scene: Scene, target: Target, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    write_llama(other, replace(SHAPE, seed=77))
    create_patch(other, scene.target, tmp_path / "p")
    with running(scene.map, "100%", target) as model:
        old = answer(model)
        with pytest.raises(GGUFShardError, match="not the patch's base"):
            model.atlas.apply_delta(tmp_path / "p")
        assert answer(model) == old


def test_a_patch_that_adds_a_tensor(scene: Scene, target: Target, tmp_path: Path) -> None:
    larger = tmp_path / "larger.gguf"
    write_llama(larger, replace(SHAPE, n_layer=SHAPE.n_layer + 1))
    create_patch(scene.base, larger, tmp_path / "p")
    with running(scene.map, "100%", target) as model:
        old = answer(model)
        with pytest.raises(GGUFShardError, match="keeps its layout"):
            model.atlas.apply_delta(tmp_path / "p")
        assert answer(model) == old
    assert verify_model(scene.map, scene.base).ok


def test_a_sequence_does_not_go_on(scene: Scene, target: Target) -> None:
    with running(scene.map, "100%", target) as model:
        model.forward(PROMPT)
        model.atlas.apply_delta(scene.patch)
        with pytest.raises(ModelUpdatedError):
            model.forward([1])


def test_files_that_somebody_else_has_updated(scene: Scene, target: Target) -> None:
    with running(scene.map, "100%", target) as model:
        old = answer(model)
        for name in ("core.gguf", "core.sgmap"):  # as `shard --force` does it
            os.replace(scene.fresh.with_name(name), scene.map.with_name(name))
        with pytest.raises(GGUFShardError, match="another version"):
            model.atlas.apply_delta(scene.patch)
        assert answer(model) == old


@pytest.mark.skipif(config.ENABLE_CUDASIM, reason="threads of the simulator are the host's")
def test_while_another_thread_generates(scene: Scene, target: Target) -> None:
    """Every whole answer is one version's; a sequence that an update cuts ends with an error."""
    old, new = answer_of(scene.map, target), answer_of(scene.fresh, target)
    answers, stop = [], threading.Event()
    with running(scene.map, "60%", target, policy="pin") as model:

        def talk() -> None:
            while not stop.is_set():
                try:
                    answers.append(answer(model))
                except ModelUpdatedError:
                    continue

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            for turn in range(6):
                wait_for(lambda: len(answers) > turn)  # noqa: B023 - called at once
                time.sleep(0.01 * turn)
                model.atlas.apply_delta(scene.patch, reverse=bool(turn % 2))
        finally:
            stop.set()
            thread.join(60)
        assert answer(model) == old
    assert set(answers) <= {old, new}


_UPDATE = """
import sys
from pathlib import Path
from atlas.target import CpuTarget
from tests.llama_factory import opened

with opened(Path(sys.argv[1]), "100%", CpuTarget(), n_context=16, n_batch=2) as model:
    model.forward([1])
    print("!", end="", flush=True)
    model.atlas.apply_delta(sys.argv[2])
print("?", end="", flush=True)
"""


@pytest.mark.skipif(config.ENABLE_CUDASIM, reason="a process of its own has no simulator")
def test_killed_while_it_updates(scene: Scene, tmp_path: Path) -> None:
    """Whoever opens the model next finds the old version or the new one. (A forked process could
    not run a model: its threads would be those of its parent.)"""
    from atlas.target import CpuTarget

    old, new = answer_of(scene.map, CpuTarget()), answer_of(scene.fresh, CpuTarget())
    n_alive = 0
    for delay in (0.0, 0.005, 0.02, 0.05):
        copy = Path(shutil.copytree(scene.map.parent, tmp_path / f"{delay}")) / "core.sgmap"
        command = [sys.executable, "-c", _UPDATE, str(copy), str(scene.patch)]
        child = subprocess.Popen(command, cwd=_PROJECT_ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.read(1) == b"!"
        time.sleep(delay)
        child.kill()
        n_alive += child.communicate()[0] == b""
        assert answer_of(copy, CpuTarget()) in (old, new)
    assert n_alive > 1, "most kills came too late to mean anything"
