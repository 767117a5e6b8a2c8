"""Random matrices of any type, cut into pages and scattered over frames."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from gguf import GGMLQuantizationType, quants
from numba import config

from atlas.ops.block_values import MATRIX_VALUES
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.target import Target
from forge.block_layouts import BlockLayout, block_layout
from forge.pages import PAGE_BYTES, pack_blocks

TYPES = list(MATRIX_VALUES)
K_TYPES = (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K)
FIRST_PAGE = 3
SHARD_SHIFT = 1


@dataclass
class Sample:
    """A matrix in pages on a target, and what its elements are."""

    cache: PageCache
    matrix: PagedMatrix
    weights: np.ndarray  # float32 [n_rows, n_cols], by the gguf package

    def ranges(self) -> list[tuple[int, int]]:
        """Ranges of rows at the ends and across pages; small ones where no compiler helps."""
        n_rows = self.matrix.n_rows
        crossing = self.matrix.layout.per_page // self.matrix.blocks_per_row
        ranges = [(0, 1), (crossing, crossing + 1), (n_rows - 1, n_rows)]
        return ranges if config.DISABLE_JIT else [*ranges, (crossing - 1, n_rows), (0, n_rows)]

    def with_resident(self, target: Target, begin: int, end: int) -> PageCache:
        """The cache with no shard resident but those of rows `begin` to `end` - 1."""
        table = np.array(target.get(self.cache.table))
        needed = {page >> SHARD_SHIFT for page in self.matrix.pages_of_rows(begin, end)}
        table[[shard for shard in range(len(table)) if shard not in needed]] = -1
        return self.cache._replace(table=target.put(table))


def random_blocks(layout: BlockLayout, n_blocks: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks of random bits whose floats are finite: uint8 [n_blocks, layout.bytes]."""
    blocks = rng.integers(0, 256, (n_blocks, layout.bytes), dtype=np.uint8)
    if layout.elements == 1:
        normal = rng.standard_normal(n_blocks, dtype=np.float32)
        normal[::7] *= np.float32(1e-6)  # subnormal as float16
        return quants.quantize(normal, layout.ggml_type).view(np.uint8).reshape(blocks.shape)
    for field in layout.fields:
        if field.name in ("d", "dmin"):
            scales = (rng.standard_normal(n_blocks) * 0.01).astype(np.float16)
            scales[::5] = [0, 6e-8, -3e-6, 1][rng.integers(4)]
            at = field.struct_offset
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


def sample(
    target: Target,
    ggml_type: GGMLQuantizationType,
    memory_layout: str,
    blocks_per_row: int | None = None,
    n_rows: int | None = None,
) -> Sample:
    """A matrix over three pages, whose rows cross from one into the next, or of so many rows.

    Frames are a shuffle of the shards, and bytes that hold no page are 0xFF.
    """
    rng = np.random.default_rng(int(ggml_type))
    layout = block_layout(ggml_type, memory_layout)
    # Of plain elements: vectors in fours, single vectors and single elements.
    if blocks_per_row is None:
        blocks_per_row = {1: 117, 32: 5, 256: 3}[layout.elements]
    n_rows = n_rows or 5 * layout.per_page // (2 * blocks_per_row)
    n_cols = blocks_per_row * layout.elements
    blocks = random_blocks(layout, n_rows * blocks_per_row, rng)
    pages = np.empty((layout.pages_for(len(blocks)), PAGE_BYTES), np.uint8)
    pack_blocks(blocks.reshape(-1), layout, pages)

    n_shards = (FIRST_PAGE + len(pages) - 1 >> SHARD_SHIFT) + 1
    table = rng.permutation(n_shards).astype(np.int32)
    frames = np.full((n_shards, 1 << SHARD_SHIFT, PAGE_BYTES), 0xFF, np.uint8)
    for i, content in enumerate(pages):
        shard, slot = divmod(FIRST_PAGE + i, 1 << SHARD_SHIFT)
        frames[table[shard], slot] = content
    pool = target.put(frames.reshape(-1))
    return Sample(
        PageCache(pool, target.put(table), SHARD_SHIFT, pool.view(np.uint32)),
        PagedMatrix("w", n_rows, n_cols, FIRST_PAGE, layout),
        quants.dequantize(blocks.reshape(-1), ggml_type).reshape(n_rows, n_cols),
    )


def of_unknown_type(sample: Sample) -> PagedMatrix:
    """The matrix, said to be of a type that no operation reads."""
    return replace(sample.matrix, layout=block_layout(GGMLQuantizationType.IQ4_NL))
