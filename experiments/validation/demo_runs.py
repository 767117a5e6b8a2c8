"""The demonstration model, run: what it answers, and another version of it that does otherwise."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from atlas.infer.generate import generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.infer.tokenizer import Tokenizer
from atlas.target import CpuTarget
from experiments.quickstart import PROMPT
from experiments.validation import gguf_factory as factory
from experiments.validation.scene import Scene
from forge.shard import ShardOptions, shard_model
from forge.sharded_model import ShardedModel
from forge.sizes import Size
from forge.split_model import read_model

#: Tokens of an answer.
N_TOKENS = 5


def prompt_tokens(map_path: Path) -> list[int]:
    """The prompt of the demonstration."""
    with ShardedModel(map_path) as model:
        return Tokenizer.from_metadata(model.source_header().metadata).encode(PROMPT)


def opened(map_path: Path, policy: str, budget: float, **options: Any) -> LlamaModel:
    """The demonstration model, open on the CPU within a share of its pages."""
    return LlamaModel(
        ShardedModel(map_path), CpuTarget(), Size(fraction=budget), n_context=64, policy=policy,
        **options,
    )  # fmt: skip


def answer(
    model: LlamaModel, prompt: Sequence[int], on_token: Callable[[int], Any] = lambda token: None
) -> list[int]:
    """The greedy continuation of a prompt by `N_TOKENS` tokens, begun anew."""
    model.position = 0
    return generate(model, prompt, N_TOKENS, Sampler(0), on_token=on_token).tokens


def reference_tokens(map_path: Path, prompt: Sequence[int]) -> list[int]:
    """What a model answers with everything resident and nobody beside it."""
    with opened(map_path, "lru", 1.0, prefetch_distance=0) as model:
        return answer(model, prompt)


@dataclass(frozen=True)
class Demo:
    """A sharded demonstration model, an older version's pages in the same places, and what it
    answers."""

    map_path: Path
    older: Path
    prompt: list[int]
    tokens: list[int]


class Demos:
    """The demonstration model in shards of several sizes; made when first asked for."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._made: dict[int, Demo] = {}

    def of(self, per_shard: int) -> Demo:
        """The model in shards of so many pages; not to be changed."""
        if per_shard not in self._made:
            self._made[per_shard] = self._make(per_shard)
        return self._made[per_shard]

    def _make(self, per_shard: int) -> Demo:
        maps, model = [], self.scene.demo_model
        for name, data in (("demo", model.read_bytes()), ("older", older_demo(model))):
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scene.folder))
            source = factory.write(folder / model.name, data)
            maps.append(shard_model(source, folder, ShardOptions(pages_per_shard=per_shard)))
        prompt = prompt_tokens(maps[0])
        return Demo(maps[0], maps[1], prompt, reference_tokens(maps[0], prompt))


def older_demo(model: Path) -> bytes:
    """Another version of the demonstration model, which differs in every page of weights."""
    data = np.fromfile(model, np.uint8)
    (header,) = read_model(model)
    for tensor in header.tensors:
        values = data[tensor.offset : tensor.offset + tensor.bytes]
        is_half = tensor.ggml_type == GGMLQuantizationType.F16
        weights = values.view("<f2" if is_half else "<f4")
        weights *= weights.dtype.type(-1.25)
    return data.tobytes()


def is_quick(scene: Scene) -> bool:
    """Whether a sample of the combinations will do."""
    return scene.effort.every > 1
