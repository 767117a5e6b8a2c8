"""Versions of a small model, and a running one that goes over from one to another."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from numba import config

from atlas.infer.generate import generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.manager import Atlas
from atlas.shard_cache import ShardCache
from atlas.target import Target
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.sizes import Size
from tests.llama_factory import LlamaShape, Types, opened, shard_llama

TIMEOUT = 60  # seconds; a deadlock, not a slow machine
# In the simulator every thread of a kernel is one of the host: each weight and token counts.
PROMPT, N_TOKENS = ([1, 7], 2) if config.ENABLE_CUDASIM else ([1, 7, 20], 3)
SHAPE = (
    LlamaShape(n_layer=1, n_embd=16, n_ff=8, n_head=2, n_head_kv=1, n_vocab=8,
               ggml_type=Types.F16, biases=("attn_q",), rope_factors=True)
    if config.ENABLE_CUDASIM
    else LlamaShape(biases=("attn_q",), rope_factors=True)
)  # fmt: skip
#: A new version has other weights everywhere, and another rotation and norm.
NEW_KEYS = {"llama.rope.freq_base": 500.0, "llama.attention.layer_norm_rms_epsilon": 0.1}
OLD_KEYS = {"llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5}
OLD, NEW = replace(SHAPE, metadata=OLD_KEYS), replace(SHAPE, metadata=NEW_KEYS, seed=5)
MIXTURE = replace(SHAPE, n_ff=SHAPE.n_embd, n_expert=3, n_expert_used=1)
MATRIX, EMBEDDING = "blk.0.ffn_down.weight", "token_embd.weight"
NORM, ROPE = "output_norm.weight", "rope_freqs.weight"  # whose values all versions share

Answer = tuple[list[int], bytes]


class Editions:
    """Versions of a model, made once, and what each of them answers when it is opened afresh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, Path] = {}
        self._answers: dict[tuple[Path, str], Answer] = {}

    def of(self, name: str, shape: LlamaShape) -> Path:
        if name not in self._maps:
            self._maps[name] = shard_llama(self.folder / name, shape)[1]
        return self._maps[name]

    @property
    def old(self) -> Path:
        return self.of("old", OLD)

    @property
    def new(self) -> Path:
        return self.of("new", NEW)

    def with_tensors_of_new(self, *names: str) -> Path:
        """The old version, but for these tensors."""
        name = " ".join(names)
        if name not in self._maps:
            folder = self.folder / f"partly {len(self._maps)}"
            folder.mkdir()
            data = bytearray((self.old.parent.parent / "model.gguf").read_bytes())
            donor = (self.new.parent.parent / "model.gguf").read_bytes()
            for tensor in load_map(self.old).tensors:
                if tensor.name in names:
                    end = tensor.offset + tensor.slice_bytes * len(tensor.slices)
                    data[tensor.offset : end] = donor[tensor.offset : end]
            (folder / "model.gguf").write_bytes(data)
            options = ShardOptions(pages_per_shard=1)
            self._maps[name] = shard_model(folder / "model.gguf", folder / "sharded", options)
        return self._maps[name]

    def answer(self, map_path: Path, target: Target) -> Answer:
        """What a version answers, opened for itself with all the memory it can use."""
        key = (map_path, target.name)
        if key not in self._answers:
            with running(map_path, "100%", type(target)()) as model:
                self._answers[key] = answer(model)
        return self._answers[key]


def running(
    map_path: Path, budget: str | Size, target: Target | None = None, **options: Any
) -> LlamaModel:
    return opened(map_path, budget, target, **{"n_context": 8, "n_batch": 2, **options})


def answer(model: LlamaModel) -> Answer:
    """Tokens of a text begun anew, and the bits of the logits behind its prompt."""
    model.position = 0
    result = generate(model, PROMPT, N_TOKENS, Sampler(0))
    return result.tokens, result.prompt_logits.tobytes()


def copy(map_path: Path, folder: Path) -> Path:
    """A version in files of its own, to be changed."""
    return Path(shutil.copytree(map_path.parent, folder)) / map_path.name


def rewrite(map_path: Path, other: Path) -> None:
    """Put another version's bytes into the files of a version, under its readers."""
    for suffix in (".gguf", ".sgmap"):
        with open(map_path.with_suffix(suffix), "r+b") as file:
            file.write(other.with_suffix(suffix).read_bytes())
            file.truncate()
            os.fsync(file.fileno())


def page_of(map_path: Path, tensor: str) -> int:
    return next(t for t in load_map(map_path).tensors if t.name == tensor).slices[0].first_page


def cpu_cache(atlas: Atlas) -> ShardCache:
    """The cache that the host drives: on a GPU, the one in host memory."""
    found = atlas.shard_cache
    return found if isinstance(found, ShardCache) else found.host.cache


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_for(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not reached():
        assert time.monotonic() < deadline, "deadlock"
        time.sleep(1e-4)


def join(thread: threading.Thread) -> None:
    thread.join(TIMEOUT)
    assert not thread.is_alive(), "deadlock"
