"""A llama model's matrices on cached pages, and multiplication by them, band by band."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from atlas.infer.config import LlamaConfig
from atlas.manager import Atlas
from atlas.model_shards import EMBEDDING, OUTPUT
from atlas.ops.block_values import MATRIX_VALUES
from atlas.ops.matmul import matmul
from atlas.ops.matvec import matvec, matvecs
from atlas.ops.paged import PagedMatrix
from atlas.target import as_vector
from forge.errors import GGUFShardError
from forge.sgmap import ShardMap

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_ROUTER = "ffn_gate_inp"
_DENSE = ("ffn_gate", "ffn_up", "ffn_down")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def execution_order(shard_map: ShardMap, config: LlamaConfig) -> list[str]:
    """Matrices in the order in which every pass multiplies by them; GGUFShardError if one is
    missing, or its rows are not as long as the hyperparameters say."""
    widths = {tensor.name: tensor.shape[0] for tensor in shard_map.tensors}
    n_columns = {stem: shape[1] for stem, shape in _matrix_shapes(config).items()}
    n_columns |= {EMBEDDING: config.n_embd, OUTPUT: config.n_embd}
    per_layer = (*_ATTENTION, *_DENSE)
    if config.n_expert:
        # Of many experts a pass reads some, of a single one all; the router it always reads.
        per_layer = (*_ATTENTION, _ROUTER, *(_EXPERTS if config.n_expert == 1 else ()))
    last = OUTPUT if OUTPUT in widths else EMBEDDING
    layers = ((f"blk.{i}.{stem}.weight", stem) for i in range(config.n_layer) for stem in per_layer)
    order = []
    # One by one: a header may claim billions of layers, or columns.
    for name, stem in chain([(EMBEDDING, EMBEDDING)], layers, [(last, last)]):
        if name not in widths:
            raise GGUFShardError(f"tensor {name!r}: the model has none of this name")
        if widths[name] != n_columns[stem]:
            reason = f"has {widths[name]} columns, not {n_columns[stem]}"
            raise GGUFShardError(f"tensor {name!r}: {reason}")
        order.append(name)
    return order[1:]


def _matrix_shapes(c: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's matrices."""
    shapes = {
        "attn_q": (c.n_head * c.head_dim, c.n_embd),
        "attn_k": (c.n_embd_kv, c.n_embd),
        "attn_v": (c.n_embd_kv, c.n_embd),
        "attn_output": (c.n_embd, c.n_head * c.head_dim),
        "ffn_gate": (c.n_ff, c.n_embd),
        "ffn_up": (c.n_ff, c.n_embd),
        "ffn_down": (c.n_embd, c.n_ff),
        _ROUTER: (c.n_expert, c.n_embd),
    }
    return shapes | {f"{name}_exps": shapes[name] for name in _DENSE}


class Weights:
    """Access to a llama model's tensors by their role.

    Parameters
    ----------
    atlas
        The cache, with this model's execution order.
    config
        The model's hyperparameters.
    scratch
        float32 [>= widest row], for products with several tokens.

    Raises
    ------
    GGUFShardError
        If a tensor is missing, has the wrong shape, or a type that cannot be computed with.
    """

    def __init__(self, atlas: Atlas, config: LlamaConfig, scratch: Any) -> None:
        self.atlas = atlas
        self.config = config
        self.scratch = scratch
        self._shapes = _matrix_shapes(config)
        self._vectors: dict[str, Any] = {}
        self.embedding = self._matrix(EMBEDDING, (None, config.n_embd))
        self.n_vocab = self.embedding.n_rows
        output = OUTPUT if OUTPUT in atlas.shards.tensors else EMBEDDING
        self.output = self._matrix(output, (self.n_vocab, config.n_embd))
        self.output_norm = self._vector("output_norm.weight", config.n_embd)
        self.layers = [self._layer(i) for i in range(config.n_layer)]

    def _layer(self, number: int) -> dict[str, Any]:
        prefix = f"blk.{number}."
        stems = (*_ATTENTION, *((_ROUTER,) if self.config.n_expert else _DENSE))
        layer: dict[str, Any] = {
            stem: self._matrix(f"{prefix}{stem}.weight", self._shapes[stem]) for stem in stems
        }
        if self.config.n_expert:
            for stem in _EXPERTS:
                layer[stem] = self._experts(f"{prefix}{stem}.weight", self._shapes[stem])
        for stem in ("attn_norm", "ffn_norm"):
            layer[stem] = self._vector(f"{prefix}{stem}.weight", self.config.n_embd)
        for stem in stems:
            name = f"{prefix}{stem}.bias"
            if name in self.atlas.shards.tensors:
                layer[f"{stem}.bias"] = self._vector(name, self._shapes[stem][0])
        return layer

    def _matrix(self, name: str, shape: Sequence[int | None], index: int = 0) -> PagedMatrix:
        w = self.atlas.matrix(name, index)
        found = (w.n_rows, w.n_cols)
        if any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
            raise GGUFShardError(f"tensor {name!r}: has {found} rows and columns, not {shape}")
        if w.ggml_type not in MATRIX_VALUES:
            raise GGUFShardError(
                f"tensor {name!r}: type {w.ggml_type.name} cannot be computed with "
                f"({', '.join(kind.name for kind in MATRIX_VALUES)} can)"
            )
        return w

    def _experts(self, name: str, shape: Sequence[int]) -> list[PagedMatrix]:
        if name not in self.atlas.shards.tensors:
            raise GGUFShardError(f"tensor {name!r}: the model has none of this name")
        n_slices = len(self.atlas.shards.tensors[name].slices)
        if n_slices != self.config.n_expert:
            raise GGUFShardError(f"tensor {name!r}: {n_slices} slices, not {self.config.n_expert}")
        return [self._matrix(name, shape, i) for i in range(n_slices)]

    def _vector(self, name: str, n: int) -> Any:
        """A vector, dequantised once: too small and too often used to be worth a lookup."""
        self._matrix(name, (1, n))
        vector = self._vectors[name] = self.atlas.tensor(name).reshape(n)
        return vector

    def read_vectors_again(self) -> None:
        """Dequantise the vectors once more, where they are: the model is another version.

        Raises
        ------
        CorruptPageError
            If a page fails its check twice.
        """
        for name, vector in self._vectors.items():
            self.atlas.tensor(name, out=vector.reshape(1, vector.shape[0]))

    def multiply(self, y: Any, w: PagedMatrix, x: Any) -> None:
        """y = x @ w.T with whatever is not resident brought in on the way.

        Parameters
        ----------
        y
            float32 [n_tokens, n_rows] to fill.
        w
            The matrix.
        x
            float32 [n_tokens, n_cols].

        Raises
        ------
        CorruptPageError
            If a page of `w` fails its check.
        """
        atlas = self.atlas
        is_row = x.shape[0] == 1
        if is_row:
            y, x = as_vector(y), as_vector(x)
        for band in atlas.bands(w):
            atlas.acquire(band)
            if is_row:
                matvec(atlas.target, y, atlas.cache, w, x, band.begin, band.end)
            else:
                matmul(atlas.target, y, atlas.cache, w, x, band.begin, band.end, self.scratch)

    def multiply_all(self, ys: Sequence[Any], matrices: Sequence[PagedMatrix], x: Any) -> None:
        """`multiply` for several matrices with the same x: by one kernel for a single token, if
        everything is on the device to stay."""
        atlas = self.atlas
        if x.shape[0] > 1 or not atlas.is_complete:
            for y, w in zip(ys, matrices, strict=True):
                self.multiply(y, w, x)
            return
        for w in matrices:
            for band in atlas.bands(w):
                atlas.acquire(band)  # which counts its use
        matvecs(atlas.target, [as_vector(y) for y in ys], atlas.cache, matrices, as_vector(x))

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """Rows of the embedding for `tokens`, float32 [n_tokens, n_embd] on the host."""
        return self.atlas.rows(self.embedding, tokens)

    def rope_factors(self) -> np.ndarray | None:
        """The model's own divisors of the rotation's frequencies, if it has any."""
        name = "rope_freqs.weight"
        if name not in self.atlas.shards.tensors:
            return None
        factors = self._matrix(name, (1, self.config.n_rot // 2))
        return self.atlas.rows(factors, [0])[0].astype(np.float64)


def vector_bytes(shard_map: ShardMap) -> int:
    """Device memory of the vectors that `Weights` keeps dequantised."""
    return sum(
        4 * tensor.shape[0] for tensor in shard_map.tensors if all(e == 1 for e in tensor.shape[1:])
    )
