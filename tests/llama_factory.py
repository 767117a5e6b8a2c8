"""Small random llama models of every kind: as GGUF files, cut into pages, opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

from atlas.errors import BudgetError
from atlas.infer.model import LlamaModel
from atlas.target import CpuTarget, Target
from experiments.make_model import vocabulary
from forge.block_layouts import block_layout
from forge.shard import ShardOptions, shard_model
from forge.sharded_model import ShardedModel
from forge.sizes import Size, parse_size

Types = GGMLQuantizationType
_QUANTISED_BY_GGUF = (Types.F32, Types.F16, Types.BF16, Types.Q8_0, Types.Q4_0, Types.Q5_0)


@dataclass(frozen=True)
class LlamaShape:
    """A model to write; the defaults are a dense one with grouped queries.

    `metadata` holds further keys, or None in place of one to leave out; `types` the types of
    single tensors by name, and `shapes` their shapes (NumPy order) or None to leave them out.
    """

    n_layer: int = 2
    n_embd: int = 64
    n_ff: int = 96
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int | None = None
    n_vocab: int = 96
    n_expert: int = 0
    n_expert_used: int = 0
    ggml_type: GGMLQuantizationType = Types.F32
    tied: bool = False
    biases: tuple[str, ...] = ()
    rope_factors: bool = False
    tokenizer: bool = False
    seed: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)


def write_llama(path: Path, shape: LlamaShape) -> Path:
    """Write the model; returns its path."""
    keys = _metadata(shape)
    writer = GGUFWriter(path, keys.pop("general.architecture"))
    for key, value in keys.items():
        _add(writer, key, value)
    rng = np.random.default_rng(shape.seed)
    for name, default in _tensor_shapes(shape).items():
        extents = shape.shapes.get(name, default)
        if extents is None:
            continue
        is_vector = len(default) == 1 or "gate_inp" in name
        kind = shape.types.get(name, Types.F32 if is_vector else shape.ggml_type)
        writer.add_tensor(name, _values(name, extents, kind, rng), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shard_llama(
    folder: Path, shape: LlamaShape, memory_layout: str = "column_major", per_shard: int = 1
) -> tuple[Path, Path]:
    """Write the model and cut it; returns the GGUF file and the map."""
    folder.mkdir(parents=True, exist_ok=True)
    model = write_llama(folder / "model.gguf", shape)
    options = ShardOptions(memory_layout=memory_layout, pages_per_shard=per_shard)
    return model, shard_model(model, folder / "sharded", options)


def opened(
    map_path: Path, budget: str | Size = "100%", target: Target | None = None, **options: Any
) -> LlamaModel:
    """The model, ready to run on the CPU within everything it needs."""
    size = parse_size(budget) if isinstance(budget, str) else budget
    arguments: dict[str, Any] = {"n_context": 24, **options}
    return LlamaModel(ShardedModel(map_path), target or CpuTarget(), size, **arguments)


def smallest_budget(map_path: Path, **options: Any) -> int:
    """Bytes of the smallest budget that the model opens with."""
    with pytest.raises(BudgetError) as caught:
        opened(map_path, Size(n_bytes=1), **options)
    return caught.value.smallest_bytes


def _metadata(shape: LlamaShape) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.block_count": shape.n_layer,
        "llama.embedding_length": shape.n_embd,
        "llama.feed_forward_length": shape.n_ff,
        "llama.attention.head_count": shape.n_head,
        "llama.attention.head_count_kv": shape.n_head_kv,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    if shape.head_dim is not None:
        keys["llama.attention.key_length"] = shape.head_dim
        keys["llama.attention.value_length"] = shape.head_dim
    if shape.n_expert:
        keys["llama.expert_count"] = shape.n_expert
        keys["llama.expert_used_count"] = shape.n_expert_used
    if shape.tokenizer:
        pieces, scores, types = vocabulary(shape.n_vocab)
        keys |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [int(kind) for kind in types],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    return {key: value for key, value in {**keys, **shape.metadata}.items() if value is not None}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _tensor_shapes(s: LlamaShape) -> dict[str, tuple[int, ...]]:
    head_dim = s.head_dim or s.n_embd // s.n_head
    width, width_kv = s.n_head * head_dim, s.n_head_kv * head_dim
    matrices: dict[str, tuple[int, ...]] = {
        "attn_q": (width, s.n_embd),
        "attn_k": (width_kv, s.n_embd),
        "attn_v": (width_kv, s.n_embd),
        "attn_output": (s.n_embd, width),
    }
    feed_forward: dict[str, tuple[int, ...]] = {
        "ffn_gate": (s.n_ff, s.n_embd),
        "ffn_up": (s.n_ff, s.n_embd),
        "ffn_down": (s.n_embd, s.n_ff),
    }
    if s.n_expert:
        matrices["ffn_gate_inp"] = (s.n_expert, s.n_embd)
        feed_forward = {
            f"{stem}_exps": (s.n_expert, *extents) for stem, extents in feed_forward.items()
        }
    matrices |= feed_forward
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (s.n_vocab, s.n_embd)}
    for layer in range(s.n_layer):
        block = f"blk.{layer}"
        shapes[f"{block}.attn_norm.weight"] = (s.n_embd,)
        shapes[f"{block}.ffn_norm.weight"] = (s.n_embd,)
        shapes |= {f"{block}.{stem}.weight": extents for stem, extents in matrices.items()}
        shapes |= {f"{block}.{stem}.bias": (matrices[stem][-2],) for stem in s.biases}
    shapes["output_norm.weight"] = (s.n_embd,)
    if not s.tied:
        shapes["output.weight"] = (s.n_vocab, s.n_embd)
    if s.rope_factors:
        n_rot = s.metadata.get("llama.rope.dimension_count", head_dim)
        shapes["rope_freqs.weight"] = (n_rot // 2,)
    return shapes


def _values(
    name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, rng: np.random.Generator
) -> np.ndarray:
    """Random values of about unit gain: float32, or the bytes of quantised blocks."""
    if name == "rope_freqs.weight":
        values = np.linspace(1, 8, shape[0])
    elif "norm" in name:
        values = rng.uniform(0.5, 1.5, shape)
    elif "bias" in name:
        values = rng.standard_normal(shape) * 0.5
    else:
        deviation = 1.0 if name.startswith("token_embd") else 1.5 / np.sqrt(shape[-1])
        if kind not in _QUANTISED_BY_GGUF:
            return _random_blocks(shape, kind, deviation, rng)
        values = rng.standard_normal(shape) * deviation
    return quants.quantize(values.astype(np.float32), kind)


def _random_blocks(
    shape: tuple[int, ...], kind: GGMLQuantizationType, deviation: float, rng: np.random.Generator
) -> np.ndarray:
    """Blocks of random bits, uint8 [..., bytes], whose values have about that deviation."""
    layout = block_layout(kind)
    n_blocks = int(np.prod(shape)) // layout.elements
    blocks = rng.integers(0, 256, (n_blocks, layout.bytes), dtype=np.uint8)
    places = {f.name: f.struct_offset for f in layout.fields if f.name in ("d", "dmin")}
    # A minimum's factor of 7.5 (31 of 5-bit values: 15.5) puts the mean of the values near zero.
    factors = {"d": 1.0, "dmin": 15.5 if kind == Types.Q5_K else 7.5}

    def set_scales(scale: float) -> None:
        for name, at in places.items():
            half = np.array([scale * factors[name]], np.float16).view(np.uint8)
            blocks[:, at : at + 2] = half

    if places:  # other types are written for their refusal only
        set_scales(1.0)
        set_scales(deviation / np.std(quants.dequantize(blocks.reshape(-1), kind)))
    return blocks.reshape(*shape[:-1], -1)
