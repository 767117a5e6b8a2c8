"""Which shards of a model a pass reads, in which order, and what a pool must hold at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from atlas.eviction import CacheShape
from atlas.ops.paged import PagedMatrix
from forge.errors import GGUFShardError
from forge.sgmap import ShardMap, TensorEntry

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"


@dataclass(frozen=True)
class Band:
    """Rows of a matrix that are computed on at once, and the shards that hold them."""

    begin: int
    end: int
    first_shard: int
    last_shard: int


def is_expert(tensor: TensorEntry) -> bool:
    """Whether a pass reads only some slices of a tensor."""
    return len(tensor.slices) > 1


class ModelShards:
    """Which shards of a model are cached, and how a pass comes by them.

    Parameters
    ----------
    shard_map
        The model.
    order
        Tensors in the order in which every pass reads them; None for all that are no experts, in
        the order of their pages. The rows of an embedding that is not also the output matrix are
        looked up on the host, a page at a time, and take no room in the cache.
    """

    def __init__(self, shard_map: ShardMap, order: Sequence[str] | None = None) -> None:
        self.map = shard_map
        self.tensors = {tensor.name: tensor for tensor in shard_map.tensors}
        looked_up = {EMBEDDING} if OUTPUT in self.tensors else set()
        cached = [t for t in shard_map.tensors if t.name not in looked_up]
        high = [t for t in cached if t.slices[0].zone == "high"]
        experts = [t for t in cached if is_expert(t)]
        if order is None:
            rest = [t for t in cached if t.slices[0].zone != "high" and not is_expert(t)]
            rest.sort(key=lambda t: t.slices[0].first_page)
        else:
            rest = [self._tensor(name) for name in order]
        self.high = self._shards(high)
        self.schedule = [s for s in self._shards(rest) if s not in set(self.high)]
        taken = {*self.high, *self.schedule}
        self.unscheduled = [s for s in self._shards(experts) if s not in taken]
        self.cached = [*high, *rest, *experts]

    def _shards(self, tensors: Iterable[TensorEntry]) -> list[int]:
        shift = self.map.shard_shift
        shards: dict[int, None] = {}
        for tensor in tensors:
            for s in tensor.slices:
                last = s.first_page + s.pages - 1
                shards.update(dict.fromkeys(range(s.first_page >> shift, (last >> shift) + 1)))
        return list(shards)

    def _tensor(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise GGUFShardError(f"tensor {name!r}: the model has none of this name")
        return self.tensors[name]

    def matrix(self, name: str, index: int = 0) -> PagedMatrix:
        """Slice `index` of a tensor as a matrix of rows.

        Raises
        ------
        GGUFShardError
            If the model has no such tensor, or the tensor no such slice.
        """
        tensor = self._tensor(name)
        if not 0 <= index < len(tensor.slices):
            raise GGUFShardError(f"tensor {name!r}: slice {index} of {len(tensor.slices)}")
        layout = tensor.layout(self.map.atlas.memory_layout)
        n_rows = tensor.n_blocks * layout.elements // tensor.shape[0] // len(tensor.slices)
        first_page = tensor.slices[index].first_page
        return PagedMatrix(name, n_rows, tensor.shape[0], first_page, layout)

    def shape(self) -> CacheShape:
        """What a pool has to serve."""
        min_band = 1
        for tensor in self.cached:
            m = self.matrix(tensor.name)
            row_pages = -(-m.blocks_per_row // m.layout.per_page) + 1
            pages = min(row_pages, tensor.slices[0].pages)
            min_band = max(min_band, -(-(pages - 1) // self.map.pages_per_shard) + 1)
        return CacheShape(len(self.high), len(self.schedule), len(self.unscheduled), min_band)

    def cut(self, w: PagedMatrix, band: int) -> Iterable[Band]:
        """The rows of a matrix in bands of at most `band` shards."""
        shift = self.map.shard_shift
        begin = 0
        while begin < w.n_rows:
            first = w.pages_of_rows(begin, begin + 1)[0] >> shift
            # The last row that ends within the shards a band may have.
            end_page = ((first + band) << shift) - w.first_page
            end = min(end_page * w.layout.per_page // w.blocks_per_row, w.n_rows)
            last = w.pages_of_rows(begin, end)[-1] >> shift
            yield Band(begin, end, first, last)
            begin = end
