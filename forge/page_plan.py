"""Which pages a model's tensors go to: zones, execution order, shard boundaries.

Pages come in the order in which a forward pass wants them: first the *high* zone (small, touched
by every token), then the layers, then the *cold* zone (embedding rows, experts: most are not
touched by a given token), last the raw pages that only `restore` reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forge.block_layouts import block_layout
from forge.crc32 import CONTENT_BYTES
from forge.gguf_file import GGUFHeader, TensorInfo

ZONES = ("high", "normal", "cold")
MAX_PAGES_PER_SHARD = 256
MIN_SHARDS = 512
_MAX_HIGH_BYTES = 1 << 20
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)$")
#: Matrices of a layer in the order in which the llama forward pass multiplies by them.
_EXECUTION_ORDER = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output",
    "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
)  # fmt: skip


#: (part of the model, tensor, slice of the tensor)
_Member = tuple[int, TensorInfo, int]


@dataclass(frozen=True)
class SlicePlan:
    """A run of blocks of one tensor that gets pages of its own.

    Attributes
    ----------
    part, tensor
        The tensor and the file of the model it is in.
    index
        Number of the slice: the expert, or 0.
    offset, bytes
        Place of the blocks in that file.
    """

    part: int
    tensor: TensorInfo
    index: int
    offset: int
    bytes: int
    zone: str
    first_page: int
    pages: int


@dataclass(frozen=True)
class RawPlan:
    """Bytes of a source file that are no tensor of a known type, 4088 to a page."""

    part: int
    offset: int
    bytes: int
    first_page: int

    @property
    def pages(self) -> int:
        return -(-self.bytes // CONTENT_BYTES)


@dataclass(frozen=True)
class PagePlan:
    """Every page of a sharded model.

    `zones` are (zone, first page, pages); pages that belong to nothing are padding and zero.
    """

    pages_per_shard: int
    n_pages: int
    slices: tuple[SlicePlan, ...]
    raw: tuple[RawPlan, ...]
    zones: tuple[tuple[str, int, int], ...]

    @property
    def runs(self) -> list[SlicePlan | RawPlan]:
        """All runs of consecutive pages, tensors' and raw."""
        return [*self.slices, *self.raw]


def zone_of(tensor: TensorInfo, has_output: bool) -> str:
    """Zone of a tensor: by what a forward pass does with it.

    Vectors and router gates are small and touched by every token; expert matrices and the rows
    of an embedding that is not also the output matrix mostly are not.
    """
    if is_expert(tensor):  # even one of vectors: each expert starts on a shard of its own
        return "cold"
    is_vector = all(extent == 1 for extent in tensor.shape[1:])
    is_router = tensor.name.endswith("ffn_gate_inp.weight")
    if (is_vector or is_router) and tensor.bytes <= _MAX_HIGH_BYTES:
        return "high"
    if "_exps." in tensor.name or (tensor.name == "token_embd.weight" and has_output):
        return "cold"
    return "normal"


def _execution_key(tensor: TensorInfo) -> tuple[int, int]:
    match = _BLOCK.match(tensor.name)
    if match is None:
        # What stands outside the layers and is multiplied by (output, tied embedding) comes last.
        return (1 << 62, 0)
    stem = match[2].split(".")[0]
    known = stem in _EXECUTION_ORDER
    return int(match[1]), _EXECUTION_ORDER.index(stem) if known else len(_EXECUTION_ORDER)


def is_expert(tensor: TensorInfo) -> bool:
    """Whether a tensor has one slice for each expert."""
    return "_exps." in tensor.name and len(tensor.shape) == 3


def _groups(parts: Sequence[GGUFHeader]) -> Iterator[tuple[str, list[_Member]]]:
    """(zone, members) in page order; each group starts on a shard boundary."""
    known = [
        (i, t) for i, part in enumerate(parts) for t in part.tensors if t.ggml_type is not None
    ]
    has_output = any(t.name == "output.weight" for _, t in known)
    by_zone: dict[str, list[tuple[int, TensorInfo]]] = {zone: [] for zone in ZONES}
    for part, tensor in known:
        by_zone[zone_of(tensor, has_output)].append((part, tensor))
    for zone in ZONES:
        plain = [(p, t) for p, t in by_zone[zone] if not is_expert(t)]
        plain.sort(key=lambda item: _execution_key(item[1]))
        if plain:
            yield zone, [(p, t, 0) for p, t in plain]
    experts = [(p, t) for p, t in by_zone["cold"] if is_expert(t)]
    for layer in sorted({_execution_key(t)[0] for _, t in experts}):
        matrices = sorted(
            ((p, t) for p, t in experts if _execution_key(t)[0] == layer),
            key=lambda item: _execution_key(item[1]),
        )
        for expert in range(max(t.shape[2] for _, t in matrices)):
            yield "cold", [(p, t, expert) for p, t in matrices if expert < t.shape[2]]


def _raw_ranges(
    part: GGUFHeader, nonzero_padding: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    yield 0, part.header_bytes
    yield from ((t.offset, t.bytes) for t in part.tensors if t.ggml_type is None)
    yield from nonzero_padding


def padding_ranges(part: GGUFHeader) -> list[tuple[int, int]]:
    """(offset, bytes) of what lies between header and tensors and behind them."""
    ranges = []
    end = part.header_bytes
    for tensor in sorted(part.tensors, key=lambda t: t.offset):
        if tensor.offset > end:
            ranges.append((end, tensor.offset - end))
        end = tensor.offset + tensor.bytes
    if part.file_bytes > end:
        ranges.append((end, part.file_bytes - end))
    return ranges


def choose_pages_per_shard(n_pages: int) -> int:
    """The largest power of two up to 256 that leaves a model at least 512 shards."""
    per_shard = MAX_PAGES_PER_SHARD
    while per_shard > 1 and n_pages < per_shard * MIN_SHARDS:
        per_shard //= 2
    return per_shard


def plan_pages(
    parts: Sequence[GGUFHeader],
    nonzero_padding: Sequence[Sequence[tuple[int, int]]],
    memory_layout: str,
    pages_per_shard: int | None = None,
) -> PagePlan:
    """Give every byte of a model its page.

    Parameters
    ----------
    parts
        Headers of the model's files.
    nonzero_padding
        For each part the ranges of its padding that are not zero, (offset, bytes).
    memory_layout
        "column_major" or "row_major".
    pages_per_shard
        A power of two; None to choose by size.
    """
    groups = list(_groups(parts))
    if pages_per_shard is None:
        content = sum(part.file_bytes for part in parts) // CONTENT_BYTES
        pages_per_shard = choose_pages_per_shard(content)
    page = 0
    slices: list[SlicePlan] = []
    zones: list[tuple[str, int, int]] = []
    for zone, members in groups:
        page = -(-page // pages_per_shard) * pages_per_shard
        start = page
        for part, tensor, index in members:
            assert tensor.ggml_type is not None
            layout = block_layout(tensor.ggml_type, memory_layout)
            n_bytes = tensor.bytes // (tensor.shape[2] if is_expert(tensor) else 1)
            pages = layout.pages_for(n_bytes // layout.bytes)
            offset = tensor.offset + index * n_bytes
            slices.append(SlicePlan(part, tensor, index, offset, n_bytes, zone, page, pages))
            page += pages
        if zones and zones[-1][0] == zone:
            zone, start, _ = zones.pop()
        zones.append((zone, start, page - start))
    raw = []
    page = -(-page // pages_per_shard) * pages_per_shard
    for number, header in enumerate(parts):
        for offset, n_bytes in _raw_ranges(header, nonzero_padding[number]):
            raw.append(RawPlan(number, offset, n_bytes, page))
            page += raw[-1].pages
    return PagePlan(pages_per_shard, page, tuple(slices), tuple(raw), tuple(zones))
