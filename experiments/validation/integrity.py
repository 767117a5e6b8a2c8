"""Integrity: right input gives the right bytes by every way, and a wrong page is told by each of
its three marks.

    checksums         CRC32 on every target against zlib; tag, magic and table entry each by itself
    reconstruction    every tensor type, layout and awkward size: shard, verify, restore, dequantise
    the table         entries exchanged, with their pages, and with the table's digest

Patches and the cache are in `patch_pairs` and `cached_pages` beside this.
The oracles are zlib, the `gguf` package's `dequantize`, and the bytes that went in.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from atlas.manager import Atlas
from atlas.ops.block_values import MATRIX_VALUES
from atlas.ops.crc32 import crc32_pages
from atlas.ops.gather import check_frames
from atlas.ops.page_faults import MAGIC_FAULT, TABLE_FAULT, TAG_FAULT
from atlas.target import Target, cuda_is_usable, select_target
from experiments.validation import cached_pages
from experiments.validation import gguf_factory as factory
from experiments.validation.demo_runs import is_quick
from experiments.validation.probe import Outcome, Probe, Unavailable, refused, require
from experiments.validation.scene import Scene, leftovers, sha256
from forge import crc32
from forge.block_layouts import MEMORY_LAYOUTS, block_layout
from forge.core_file import crc_table_bytes, crc_table_digest, page_offset
from forge.crc32 import CONTENT_BYTES
from forge.pages import CRC_OFFSET, MAGIC, MAGIC_OFFSET, PAGE_BYTES, tag_pages
from forge.restore import restore_model
from forge.sgmap import render_map
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.shard_scan import faulty_pages
from forge.sharded_model import ShardedModel
from forge.verify import verify_model

SECTION = "integrity"
#: Where pages are checked: by the tools on files, and by the cache on either target.
_CHECKERS = ("files", "cpu", "cuda")
_POISON = 0xDEADBEEF
_ALL_BYTES = GGMLQuantizationType.I8  # whose blocks are bytes


def probes(scene: Scene) -> Iterator[Probe]:
    """Every probe of this part."""
    yield from _checksums(scene)
    yield from _reconstructions(scene)
    for depth, fault in enumerate(_EXCHANGES, 1):
        yield _probe(fault, "core.gguf", "on disk", _exchange, scene, depth)


def _probe(
    fault: str, artefact: str, place: str, work: Callable[..., Outcome], *args: object
) -> Probe:
    return Probe(SECTION, fault, artefact, place, functools.partial(work, *args))


def _target(name: str) -> Target:
    if name == "cuda" and not cuda_is_usable():
        raise Unavailable("no CUDA device, and no simulator that runs warps")
    return select_target(name)


# ---- checksums ----


def _checksums(scene: Scene) -> Iterator[Probe]:
    for checker in _CHECKERS:
        is_here = checker != "cuda" or cuda_is_usable()
        # Kernels load 16 bytes at once and get whole arrays; loops take any 8-byte aligned page.
        starts = (0,) if checker == "cuda" else (0, 8, 24, 56)
        for n_pages in (0, 1, 2, 3, 65) if is_here else (1,):
            for start in starts:
                place = f"{checker}, {n_pages} pages at byte {start}"
                yield _probe("none: CRC32 is zlib's", "frames", place, _check_crc32, checker,
                             n_pages, start, scene.seed)  # fmt: skip
        for fault in _page_faults(scene) if is_here else _page_faults(scene)[:1]:
            yield _probe(fault.name, "frames", f"{checker}, {fault.place}", _check_page_fault,
                         checker, fault, scene.seed)  # fmt: skip


def _check_crc32(checker: str, n_pages: int, start: int, seed: int) -> Outcome:
    content = np.random.default_rng(seed).integers(0, 256, (n_pages, PAGE_BYTES), np.uint8)
    content[1:2], content[2:3] = 0, 255
    expected = [zlib.crc32(page[:CONTENT_BYTES]) for page in content]
    target = _target("cpu" if checker == "files" else checker)
    memory = target.empty(content.size + start, np.uint8)
    target.write(memory[start:], content.reshape(-1))
    pages = memory[start:].reshape(content.shape)
    out = target.full(n_pages, _POISON, np.uint32)
    if checker == "files":
        crc32.crc32_pages(pages, out)
    else:
        crc32_pages(target, pages, out)
    require(target.get(out).tolist() == expected, "a checksum is not zlib's")
    return Outcome.HARMLESS


@dataclass(frozen=True)
class _PageFault:
    """What is done to page 2 of four, or to its entry in the table, and the marks that differ."""

    name: str
    place: str
    bits: int
    damage: Callable[[np.ndarray, np.ndarray], None]


def _page_faults(scene: Scene) -> list[_PageFault]:
    both = int(TAG_FAULT | TABLE_FAULT)

    def flip(byte: int, bit: int, pages: np.ndarray, table: np.ndarray) -> None:
        pages[2, byte] ^= 1 << bit

    def zero(pages: np.ndarray, table: np.ndarray) -> None:
        pages[2] = 0

    def misplace(pages: np.ndarray, table: np.ndarray) -> None:
        pages[2] = pages[1]

    def age(pages: np.ndarray, table: np.ndarray) -> None:
        pages[2, 1000:1010] ^= 7
        tag_pages(pages[2:3])

    def take_tag(pages: np.ndarray, table: np.ndarray) -> None:
        pages[2, CRC_OFFSET:MAGIC_OFFSET] = pages[1, CRC_OFFSET:MAGIC_OFFSET]

    def take_entry(pages: np.ndarray, table: np.ndarray) -> None:
        table[2] = table[1]

    faults = [
        _PageFault("page zeroed", "whole", both | int(MAGIC_FAULT), zero),
        _PageFault("page of another place", "whole", int(TABLE_FAULT), misplace),
        _PageFault("page of an older version", "whole", int(TABLE_FAULT), age),
        _PageFault("tag of another page", "tag", int(TAG_FAULT), take_tag),
        _PageFault("table entry of another page", "entry", int(TABLE_FAULT), take_entry),
    ]
    for i, byte in enumerate(_bytes_to_flip(scene)):
        mark = both if byte < CRC_OFFSET else int(TAG_FAULT if byte < MAGIC_OFFSET else MAGIC_FAULT)
        place = f"byte {byte} bit {i % 8}"
        faults.append(_PageFault("bit flip", place, mark, functools.partial(flip, byte, i % 8)))
    return faults


def _bytes_to_flip(scene: Scene) -> list[int]:
    """Ends of content, tag and magic, and as many bytes between as the effort says."""
    n = scene.effort.flips or PAGE_BYTES
    spread = np.linspace(0, PAGE_BYTES - 1, n).astype(int).tolist()
    return sorted({*spread, 0, CRC_OFFSET - 1, *range(CRC_OFFSET, PAGE_BYTES)})


def _check_page_fault(checker: str, fault: _PageFault, seed: int) -> Outcome:
    pages = np.random.default_rng(seed).integers(0, 256, (4, PAGE_BYTES), np.uint8)
    table = tag_pages(pages)
    require(not _faults(checker, pages, table).any(), "sound pages are called faulty")
    fault.damage(pages, table)
    found = _faults(checker, pages, table)
    expected = [0, 0, fault.bits, 0]
    if checker == "files":  # which says only whether
        expected = [int(bits > 0) for bits in expected]
    require(found.tolist() == expected, f"faults are {found.tolist()}, not {expected}")
    return Outcome.DETECTED


def _faults(checker: str, pages: np.ndarray, table: np.ndarray) -> np.ndarray:
    n = len(pages)
    if checker == "files":
        flags = np.zeros(n, np.uint32)
        flags[faulty_pages(pages, table)] = 1
        return flags
    target = _target(checker)
    ids = target.put(np.arange(n, dtype=np.int32))
    faults = target.full(n, _POISON, np.uint32)
    check_frames(target, target.put(pages.reshape(-1)), ids, ids, 0, n, target.put(table), faults)
    return target.get(faults)


# ---- reconstruction ----


def _reconstructions(scene: Scene) -> Iterator[Probe]:
    for number, kind in enumerate(GGML_QUANT_SIZES):
        for layout in MEMORY_LAYOUTS:
            options = ShardOptions(layout, pages_per_shard=(1, 2, 64, None)[number % 4])
            yield _probe("none: every type", "model.gguf", f"{kind.name}, {layout}",
                         _check_type, scene, kind, options)  # fmt: skip
    for name in _shapes(scene):
        yield _probe("none: every shape", "model.gguf", name, _check_shape, scene, name)
    for name in ("cpu", "cuda"):
        # A loop has to be compiled for each.
        kinds = list(MATRIX_VALUES)[:: 3 if is_quick(scene) else 1]
        for kind in kinds if name == "cpu" or cuda_is_usable() else kinds[:1]:
            for layout in MEMORY_LAYOUTS:
                yield _probe("none: values are gguf's", "frames", f"{name}, {kind.name}, {layout}",
                             _check_values, scene, name, kind, layout)  # fmt: skip


def tensors_of_type(kind: GGMLQuantizationType, per_page: int, seed: int) -> list[factory.Tensor]:
    """Tensors of awkward sizes in blocks: one, and one less, exact, and one more than a page's;
    and three experts that end within a page."""
    sizes = (1, per_page - 1, per_page, per_page + 1)
    tensors = [factory.blocks(f"blk.{n}.attn_q.weight", kind, n, seed + n) for n in sizes]
    shape = (GGML_QUANT_SIZES[kind][0], per_page + 1, 3)
    return [*tensors, factory.tensor("blk.0.ffn_up_exps.weight", kind, shape, seed)]


def _check_type(scene: Scene, kind: GGMLQuantizationType, options: ShardOptions) -> Outcome:
    per_page = block_layout(kind, options.memory_layout).per_page
    with scene.copies() as folder:
        data = factory.gguf(tensors_of_type(kind, per_page, scene.seed), tail=b"end")
        return _round_trip(folder, [factory.write(folder / "model.gguf", data)], options)


def _shapes(scene: Scene) -> dict[str, Callable[[Path], list[Path]]]:
    """Models of one kind each: from a folder to the files written there."""

    def one(data: Callable[[], bytes]) -> Callable[[Path], list[Path]]:
        return lambda folder: [factory.write(folder / "model.gguf", data())]

    def split(folder: Path) -> list[Path]:
        tensors = factory.small_tensors(scene.seed)
        factory.split_model(folder, [tensors[:2], tensors[2:5], tensors[5:]])
        return sorted(folder.glob("model-*.gguf"))

    small = functools.partial(factory.small_tensors, scene.seed)
    return {
        "no tensors": one(factory.gguf),
        "one byte": one(lambda: factory.gguf([factory.blocks("a", _ALL_BYTES, 1)])),
        "every zone": one(lambda: factory.small_model(scene.seed)),
        "alignment 64": one(lambda: factory.gguf(small(), alignment=64)),
        "alignment 8192": one(lambda: factory.gguf(small(), alignment=8192)),
        "padding that is not zero": one(lambda: factory.gguf(small(), alignment=512, padding=9)),
        "bytes behind the last tensor": one(lambda: factory.gguf(small(), tail=b"x" * 5000)),
        "split in three": split,
        "demonstration model": one(scene.demo_model.read_bytes),
    }


def _check_shape(scene: Scene, name: str) -> Outcome:
    with scene.copies() as folder:
        return _round_trip(folder, _shapes(scene)[name](folder), ShardOptions())


def _round_trip(folder: Path, sources: Sequence[Path], options: ShardOptions) -> Outcome:
    before = [sha256(path) for path in sources]
    map_path = shard_model(sources[0], folder / "sharded", options)
    result = verify_model(map_path, sources[0])
    require(result.ok, f"verify: {result.bad[:1]}")
    _require_page_format(map_path)
    (folder / "restored").mkdir()
    restored = restore_model(map_path, folder / "restored" / sources[0].name)
    require([path.name for path in restored] == [path.name for path in sources], "other files")
    require([sha256(path) for path in restored] == before, "restored bytes differ")
    require([sha256(path) for path in sources] == before, "the source has changed")
    require(not leftovers(folder), f"left behind: {leftovers(folder)}")
    return Outcome.HARMLESS


def _require_page_format(map_path: Path) -> None:
    """Every page has zlib's CRC32 in its tag and in the table, and the magic."""
    n_pages = load_map(map_path).n_pages
    core = map_path.with_suffix(".gguf").read_bytes()
    end = page_offset(n_pages)
    require(len(core) == end + crc_table_bytes(n_pages), "core.gguf has another size")
    table = np.frombuffer(core, "<u4", n_pages, end)
    for page in range(n_pages):
        data = core[page_offset(page) : page_offset(page + 1)]
        crc = zlib.crc32(data[:CRC_OFFSET])
        tag = int.from_bytes(data[CRC_OFFSET:MAGIC_OFFSET], "little")
        require(crc == tag == table[page], f"page {page}: another CRC32 in tag or table")
        require(data[MAGIC_OFFSET:] == MAGIC, f"page {page}: no magic")


def _check_values(scene: Scene, name: str, kind: GGMLQuantizationType, layout: str) -> Outcome:
    target = _target(name)
    with scene.copies() as folder, np.errstate(invalid="ignore", over="ignore"):
        tensors = tensors_of_type(kind, block_layout(kind, layout).per_page, scene.seed)
        source = factory.write(folder / "model.gguf", factory.gguf(tensors))
        map_path = shard_model(source, folder, ShardOptions(layout, pages_per_shard=1))
        with Atlas.open(map_path, "100%", target) as atlas:
            for tensor in tensors:
                raw = np.frombuffer(tensor.data, np.uint8)
                n_slices = tensor.shape[2] if len(tensor.shape) == 3 else 1
                for index, part in enumerate(raw.reshape(n_slices, -1)):
                    found = target.get(atlas.tensor(str(tensor.name), index)).reshape(-1)
                    same = np.array_equal(found, dequantize(part, kind).reshape(-1), equal_nan=True)
                    require(same, f"{tensor.name!r}, slice {index}: other values")
    return Outcome.HARMLESS


# ---- the table ----

_EXCHANGES = (
    "table entry of another page",
    "page and table entry exchanged",
    "page, table and its digest exchanged",
)


def _exchange(scene: Scene, depth: int) -> Outcome:
    """Two entries of the table exchanged (1), with their pages (2), and the digest (3)."""
    with scene.copies(scene.small_map) as folder:
        map_path = folder / scene.small_map.name
        with ShardedModel(map_path) as model:
            table, n_pages = model.page_crc32.copy(), model.map.n_pages
        a, b = 1, 3
        require(table[a] != table[b], "the pages are the same")
        table[[a, b]] = table[[b, a]]
        if depth > 1:
            pages = cached_pages.read_page(map_path, a), cached_pages.read_page(map_path, b)
            cached_pages.write_page(map_path, a, pages[1])
            cached_pages.write_page(map_path, b, pages[0])
        with open(map_path.with_suffix(".gguf"), "r+b") as core:
            core.seek(page_offset(n_pages))
            core.write(table.astype("<u4").tobytes())
        if depth > 2:
            shard_map = replace(load_map(map_path), page_crc32_xxh3_128=crc_table_digest(table))
            map_path.write_bytes(render_map(shard_map))
        # Once the map vouches for the table, only its digests of shards and source are left.
        told = refused(lambda: ShardedModel(map_path).close())
        require((told is None) == (depth > 2), f"opened, or not, against its map: {told}")
        require(not verify_model(map_path).ok, "verify finds nothing")
        told = refused(lambda: restore_model(map_path, folder / "restored.gguf"))
        require(told is not None, "restored a model that is not the source")
        require(not (folder / "restored.gguf").exists(), "a refused restoration has left a file")
    return Outcome.DETECTED
