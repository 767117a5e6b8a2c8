"""Models of real shapes with random weights, made in a second without a file.

    LlamaModel(SyntheticModel("7b", "F16"), target, parse_size("2.8GB"), n_context=64)

Header, page plan and map are those that `make_model` and `forge.shard` would give the model. Its
pages are copies of some tens of MiB of distinct ones (`_TILE_PAGES` for each type and deviation of
weights), valid with tag and table, so all of them can be read at the speed of memory and are
checked like any others. A matrix that is larger than its tile repeats it. Their number is a prime,
so that rows of a matrix, which are not of a page's size, do not come out alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from experiments.make_model import (
    FILE_TYPES,
    PRESETS,
    Preset,
    TensorPlan,
    plan_tensors,
    write_header,
)
from experiments.random_blocks import Q4_0, Q6_K
from forge.block_layouts import block_layout
from forge.core_file import CoreFile, crc_table_digest
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader, parse_header
from forge.page_plan import PagePlan, plan_pages
from forge.pages import PAGE_BYTES, pack_blocks, pack_raw, tag_pages
from forge.sgmap import AtlasSettings, RawSegment, ShardMap, Slice, SourcePart, TensorEntry
from forge.sharded_model import ShardedModel

_TILE_PAGES = 2039
_PREFETCH_DISTANCE = 8
_NO_DIGEST = "0"


@dataclass(frozen=True)
class _Tile:
    """Distinct pages, uint8 [n, 4096], their CRCs, and the blocks in them without a gap."""

    pages: np.ndarray
    crcs: np.ndarray
    blocks: np.ndarray


class _TiledPages(CoreFile):
    """Pages of which each run repeats a tile."""

    def __init__(self, name: str, n_pages: int, runs: Sequence[tuple[int, int, _Tile]]) -> None:
        self.path = Path(name)
        self.n_pages = n_pages
        self.page_crc32 = np.empty(n_pages, np.uint32)
        self._runs = sorted(runs, key=lambda run: run[0])
        self._starts = np.array([first for first, _, _ in self._runs])
        for first, count, tile in self._runs:
            self.page_crc32[first : first + count] = np.resize(tile.crcs, count)

    def close(self) -> None:
        """Nothing is open."""

    def read_pages(self, first: int, pages: np.ndarray) -> None:
        """Fill `pages`, uint8 [n, 4096], with the pages from `first` on; nothing is checked."""
        pages = pages.reshape(-1, PAGE_BYTES)
        if first < 0 or first + len(pages) > self.n_pages:
            raise GGUFShardError(
                f"{self.path}: pages {first}..{first + len(pages)}: there are {self.n_pages}"
            )
        done = 0
        while done < len(pages):
            page = first + done
            start, count, tile = self._runs[int(np.searchsorted(self._starts, page, "right")) - 1]
            place = (page - start) % len(tile.pages)
            n = min(len(pages) - done, start + count - page, len(tile.pages) - place)
            pages[done : done + n] = tile.pages[place : place + n]
            done += n


class SyntheticModel(ShardedModel):
    """A `ShardedModel` without files.

    Parameters
    ----------
    preset
        A name in `experiments.make_model.PRESETS`, or a `Preset` of one's own.
    type_name
        Type of the matrices: "F16", "Q8_0" or "Q4_0" (then the output matrix is Q6_K, as in real
        files).
    seed
        Of the weights.
    pages_per_shard
        A power of two; None to choose by size.

    Raises
    ------
    GGUFShardError
        If there is no such preset or type.
    """

    def __init__(
        self,
        preset: str | Preset,
        type_name: str,
        *,
        seed: int = 0,
        pages_per_shard: int | None = None,
    ) -> None:
        name = f"{preset if isinstance(preset, str) else 'custom'} {type_name}"
        plans = _tensor_plans(preset, type_name)
        header, raw = _header(name, preset, type_name, plans)
        plan = plan_pages([header], [()], "column_major", pages_per_shard)
        self._by_name = {tensor.name: tensor for tensor in plans}
        self._tiles = _weight_tiles(plan, self._by_name, seed)
        raw_pages = np.empty((plan.raw[0].pages, PAGE_BYTES), np.uint8)
        raw_crcs = pack_raw(np.frombuffer(raw, np.uint8), raw_pages)
        runs = [(s.first_page, s.pages, self._tile(s.tensor.name)) for s in plan.slices]
        runs.append((plan.raw[0].first_page, len(raw_pages), _Tile(raw_pages, raw_crcs, raw_pages)))
        runs += _padding(runs)
        self.map_path = Path(name)
        core = _TiledPages(name, plan.n_pages, runs)
        self.core, self.page_crc32 = core, core.page_crc32
        self.map = _shard_map(header, plan, self.page_crc32)

    def copy_blocks(self, name: str, out: np.ndarray) -> None:
        """Fill `out`, uint8, with the first blocks of a tensor (or of each of its slices), in the
        order of a GGUF file."""
        tile = self._tile(name).blocks
        for start in range(0, out.size, tile.size):
            part = out[start : start + tile.size]
            part[:] = tile[: part.size]

    def _tile(self, name: str) -> _Tile:
        tensor = self._by_name[name]
        return self._tiles[tensor.ggml_type, tensor.std]


def _tensor_plans(preset: str | Preset, type_name: str) -> list[TensorPlan]:
    types = {ggml_type.name: ggml_type for ggml_type in FILE_TYPES}
    if type_name not in types:
        raise GGUFShardError(f"type {type_name!r}: not one of {', '.join(types)}")
    matrix_type = types[type_name]
    return plan_tensors(
        find_preset(preset), matrix_type, Q6_K if matrix_type == Q4_0 else matrix_type
    )


def find_preset(preset: str | Preset) -> Preset:
    """A preset by its name; GGUFShardError if there is none."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise GGUFShardError(f"preset {preset!r}: not one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def _header(
    name: str, preset: str | Preset, type_name: str, plans: Sequence[TensorPlan]
) -> tuple[GGUFHeader, bytes]:
    """The header of the GGUF file that the model would be, parsed and as its bytes."""
    file_type = FILE_TYPES[GGMLQuantizationType[type_name]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        write_header(path, f"random {name}", find_preset(preset), file_type, plans)
        data = path.read_bytes()
    aligned = sum(-(-plan.n_bytes // 32) * 32 for plan in plans)
    header = parse_header(data, f"{name}.gguf", -(-len(data) // 32) * 32 + aligned)
    return header, data[: header.header_bytes]


def _weight_tiles(
    plan: PagePlan, tensors: dict[str, TensorPlan], seed: int
) -> dict[tuple[GGMLQuantizationType, float | None], _Tile]:
    """A tile for each type and deviation, no longer than the longest tensor that it is for."""
    sizes: dict[tuple[GGMLQuantizationType, float | None], tuple[int, str]] = {}
    for piece in plan.slices:
        tensor = tensors[piece.tensor.name]
        key = tensor.ggml_type, tensor.std
        longest, name = sizes.get(key, (0, tensor.name))
        sizes[key] = max(longest, min(piece.pages, _TILE_PAGES)), name
    tiles = {}
    for (ggml_type, std), (n_pages, name) in sizes.items():
        layout = block_layout(ggml_type)
        n_elements = n_pages * layout.per_page * layout.elements
        drawn = TensorPlan(name, (n_elements,), ggml_type, std)
        blocks = np.concatenate([np.ravel(c).view(np.uint8) for c in drawn.chunks(seed)])
        pages = np.empty((n_pages, PAGE_BYTES), np.uint8)
        tiles[ggml_type, std] = _Tile(pages, pack_blocks(blocks, layout, pages), blocks)
    return tiles


def _padding(runs: Sequence[tuple[int, int, _Tile]]) -> list[tuple[int, int, _Tile]]:
    """Runs of zero pages between the others: groups start on shard boundaries."""
    zeros = np.zeros((1, PAGE_BYTES), np.uint8)
    tile = _Tile(zeros, tag_pages(zeros), zeros)
    found, end = [], 0
    for first, count, _ in sorted(runs, key=lambda run: run[0]):
        if first > end:
            found.append((end, first - end, tile))
        end = first + count
    return found


def _shard_map(header: GGUFHeader, plan: PagePlan, page_crc32: np.ndarray) -> ShardMap:
    """The map; nobody has read a source or a shard, so their digests are blank."""
    slices: dict[str, list[Slice]] = {}
    for piece in plan.slices:
        entry = Slice(piece.first_page, piece.pages, piece.zone)
        slices.setdefault(piece.tensor.name, []).append(entry)
    return ShardMap(
        source=(SourcePart(header.name, header.file_bytes, _NO_DIGEST * 64),),
        n_pages=plan.n_pages,
        pages_per_shard=plan.pages_per_shard,
        atlas=AtlasSettings("column_major", "auto", _PREFETCH_DISTANCE, plan.zones),
        tensors=tuple(
            TensorEntry(t.name, t.ggml_type, t.shape, 0, t.offset, tuple(slices[t.name]))
            for t in header.tensors
            if t.ggml_type is not None
        ),
        raw=tuple(RawSegment(r.part, r.offset, r.bytes, r.first_page) for r in plan.raw),
        page_crc32_xxh3_128=crc_table_digest(page_crc32),
        shard_xxh3_64=(_NO_DIGEST * 16,) * -(-plan.n_pages // plan.pages_per_shard),
    )
