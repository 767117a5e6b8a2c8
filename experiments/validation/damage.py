"""Damage at rest of `core.gguf`, and what dead writers left beside it.

Bits, pages, sectors of 512 bytes, and lengths: what disks and copies do to files. Pages that are
right in themselves and not the ones that belong here: swapped, doubled, of an older version, of
another model with the table adapted to them, with a forged CRC32.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.validation.damaged_model import (
    Intact,
    demonstration_model,
    examine,
    small_model,
)
from experiments.validation.probe import Outcome, Probe, refused, require
from experiments.validation.scene import Scene
from forge.core_file import page_offset
from forge.pages import PAGE_BYTES
from forge.repair import repair_model
from forge.restore import restore_model
from forge.sgmap import core_path
from forge.verify import verify_model

SECTION = "chaos"
SECTOR = 512
CORE = "core.gguf"
#: Of so many faults of a kind one is also restored, run from and repaired, which takes long.
_THOROUGH = 10
_MAX_THOROUGH = 500
#: Files that a writer which died may leave, and of what; each counts for nothing.
_REMAINS = {
    "core.gguf.sgnew": CORE,
    "core.sgmap.sgnew": "core.sgmap",
    "core.sgmap.sgjournal.sgnew": "journal",
}
#: CRC32 is linear: adding a multiple of its polynomial leaves it as it is.
_POLYNOMIAL = int(f"{0x104C11DB7:033b}"[::-1], 2).to_bytes(5, "little")

Fault = Callable[[bytearray], None]


def probes(scene: Scene) -> Iterator[Probe]:
    """Every probe of this part."""
    small = small_model(scene)
    yield from _flips(scene, small)
    yield from _pages(scene, small)
    yield from _torn_writes(scene, small)
    yield from _lengths(scene, small)
    yield from _remains(scene, small)
    yield from _large(scene)


def flip(offset: int, bit: int, data: bytearray) -> None:
    """Flip one bit."""
    data[offset] ^= 1 << bit


def spread(n: int, count: int) -> list[int]:
    """`count` of the numbers 0 to n - 1, evenly, the first and the last among them; 0 for all."""
    if not 0 < count < n:
        return [*range(n)]
    return sorted({i * (n - 1) // max(count - 1, 1) for i in range(count)})


def edited(path: Path, fault: Fault) -> None:
    """Put a fault into a file."""
    data = bytearray(path.read_bytes())
    fault(data)
    path.write_bytes(data)


def _probe(scene: Scene, intact: Intact, row: str, place: str, fault: Fault,
           thorough: bool = True) -> Probe:  # fmt: skip
    def damage(folder: Path) -> None:
        edited(folder / CORE, fault)

    return Probe(
        SECTION, row, CORE, place,
        functools.partial(examine, scene, intact, damage, thorough=thorough),
    )  # fmt: skip


# ---- bits ----


def _flips(scene: Scene, small: Intact) -> Iterator[Probe]:
    """Spread over the file, and in everything that is short: header, tags, table.

    Of every byte one bit, where all are tried: a byte's bits are told by nothing apart.
    """
    bits = random.Random(scene.seed)
    offsets = set(spread(len(small.core), scene.effort.flips))
    offsets |= {0, 4, 8, 16, 24, 300, PAGE_BYTES - 1}
    offsets |= {small.table_offset + i for i in (0, 3, 4 * small.map.n_pages - 1)}
    tags = {page_offset(page) + 4088 + page % 8 for page in range(small.map.n_pages)}
    offsets |= tags  # which everybody has to compare, though nobody needs them for anything else
    thorough_every = max(_THOROUGH, len(offsets) // _MAX_THOROUGH)
    for number, offset in enumerate(sorted(offsets)):
        bit = bits.randrange(8)
        yield _probe(scene, small, "bit flip", f"byte {offset} bit {bit}",
                     functools.partial(flip, offset, bit),
                     number % thorough_every == 0 or offset in tags)  # fmt: skip


def _large(scene: Scene) -> Iterator[Probe]:
    """Flips at random places of a model of some MB, one by one and a hundred at once."""
    large = demonstration_model(scene)
    size = len(large.core)
    places = random.Random(scene.seed + 1)
    for number in range(scene.effort.random_flips):
        offset, bit = places.randrange(size), places.randrange(8)
        yield _probe(scene, large, "bit flip", f"demonstration model, byte {offset} bit {bit}",
                     functools.partial(flip, offset, bit), number % _THOROUGH == 0)  # fmt: skip
    for number in range(-(-scene.effort.random_flips // _THOROUGH)):
        many = [(places.randrange(size), places.randrange(8)) for _ in range(100)]

        def flip_many(data: bytearray, many: Sequence[tuple[int, int]] = many) -> None:
            for offset, bit in many:
                flip(offset, bit, data)

        yield _probe(scene, large, "100 bit flips", f"demonstration model, {number}", flip_many)


# ---- pages ----


def _put(place: int, page: bytes, data: bytearray) -> None:
    data[page_offset(place) : page_offset(place + 1)] = page


def _put_with_entry(place: int, page: bytes, data: bytearray, table: int) -> None:
    """A page whose content, tag and entry in the table agree with each other."""
    _put(place, page, data)
    data[table + 4 * place : table + 4 * place + 4] = page[4088:4092]


def _swap(a: int, b: int, data: bytearray) -> None:
    page_a, page_b = (bytes(data[page_offset(n) : page_offset(n + 1)]) for n in (a, b))
    _put(a, page_b, data)
    _put(b, page_a, data)


def _forge(place: int, data: bytearray) -> None:
    for i, byte in enumerate(_POLYNOMIAL):
        data[page_offset(place) + 100 + i] ^= byte


def _pages(scene: Scene, small: Intact) -> Iterator[Probe]:
    for page in range(small.map.n_pages):
        for number, (row, fault) in enumerate(_page_faults(scene, small, page)):
            thorough = (page + number) % (_THOROUGH // 2) == 0
            yield _probe(scene, small, row, f"page {page}", fault, thorough)
    table = small.table_offset
    for row, begin, size in (
        ("table zeroed", table, len(small.core) - table),
        ("header zeroed", 0, PAGE_BYTES),
    ):
        fault = functools.partial(_write, begin, bytes(size))
        yield _probe(scene, small, row, f"byte {begin}", fault)


def _page_faults(scene: Scene, small: Intact, page: int) -> Iterator[tuple[str, Fault]]:
    """Each kind that changes this page."""
    yield "page zeroed", functools.partial(_put, page, bytes(PAGE_BYTES))
    yield "page with a forged CRC32", functools.partial(_forge, page)
    second = next(n for n in range(small.map.n_pages) if small.page(n) != small.page(page))
    yield "pages swapped", functools.partial(_swap, page, second)
    yield "page doubled", functools.partial(_put, page, small.page(second))
    span = slice(page_offset(page), page_offset(page + 1))
    for row, map_path in (
        ("page of another version", scene.newer_map),
        ("page of another model", small.wrong_map),
    ):
        foreign = core_path(map_path).read_bytes()[span]
        if foreign != small.page(page):
            yield row, functools.partial(_put, page, foreign)
            yield (
                f"{row}, table adapted",
                functools.partial(_put_with_entry, page, foreign, table=small.table_offset),
            )


def _write(offset: int, new: bytes, data: bytearray) -> None:
    data[offset : offset + len(new)] = new


# ---- sectors and lengths ----


def torn(offset: int, new: bytes, step: int) -> Iterator[tuple[int, Fault]]:
    """Writing `new` at an offset, ended after each `step` bytes but the last."""
    for done in range(step, len(new), step):
        yield done, functools.partial(_write, offset, new[:done])


def _torn_writes(scene: Scene, small: Intact) -> Iterator[Probe]:
    """The newer version's pages and table, half written over the old ones."""
    newer = core_path(scene.newer_map).read_bytes()
    n_pages = small.map.n_pages
    places = [(f"page {page}", page_offset(page), PAGE_BYTES) for page in range(n_pages)]
    places += [("table", small.table_offset, PAGE_BYTES), ("all pages", 0, len(newer))]
    changed = [
        (name, offset, newer[offset : offset + size])
        for name, offset, size in places
        if newer[offset : offset + size] != small.core[offset : offset + size]
    ]
    for number, (name, offset, new) in enumerate(changed):
        points = [*torn(offset, new, SECTOR)]
        for i in spread(len(points), 0 if len(new) == PAGE_BYTES else scene.effort.flips // 15):
            done, fault = points[i]
            if scene.effort.flips and len(new) == PAGE_BYTES and (number + i) % 2:
                continue
            yield _probe(scene, small, "torn write", f"{name}, {done} bytes", fault, i == number)


def _truncate(size: int, data: bytearray) -> None:
    del data[size:]


def _append(junk: bytes, data: bytearray) -> None:
    data += junk


def cut_points(size: int, structure: Sequence[int], count: int) -> list[int]:
    """Lengths to truncate a file to: every 512 bytes (`count` of them), and around structures."""
    sectors = [*range(0, size, SECTOR)]
    points = {sectors[i] for i in spread(len(sectors), count)}
    points |= {at + d for at in structure for d in (-1, 0, 1) if 0 <= at + d < size}
    return sorted(points)


def _lengths(scene: Scene, small: Intact) -> Iterator[Probe]:
    size, table = len(small.core), small.table_offset
    structure = [0, 24, PAGE_BYTES, page_offset(1), table, table + 4 * small.map.n_pages, size]
    for point in cut_points(size, structure, scene.effort.flips // 10):
        fault = functools.partial(_truncate, point)
        yield _probe(scene, small, "truncation", f"to {point} bytes", fault, point % 5 == 0)
    for junk in (b"\0", b"GGUF", bytes(PAGE_BYTES), small.core):
        fault = functools.partial(_append, junk)
        yield _probe(scene, small, "trailing junk", f"{len(junk)} bytes", fault)
    yield Probe(
        SECTION, "missing", CORE, CORE,
        functools.partial(examine, scene, small, lambda folder: (folder / CORE).unlink()),
    )  # fmt: skip


# ---- what dead writers left ----


def _remains(scene: Scene, small: Intact) -> Iterator[Probe]:
    newer = core_path(scene.newer_map).read_bytes()
    contents = {
        "empty": b"",
        "junk": random.Random(scene.seed).randbytes(1000),
        "another version": newer,
        "half of it": small.core[: len(small.core) // 2].ljust(len(small.core), b"\0"),
    }
    damages: dict[str, Fault | None] = {
        "": None,
        ", and a damaged page": functools.partial(_put, 3, bytes(PAGE_BYTES)),
        ", and a damaged table": functools.partial(_write, small.table_offset, b"lost"),
    }
    for name, artefact in _REMAINS.items():
        for what, content in contents.items():
            for damage, fault in damages.items():
                yield Probe(
                    SECTION, "remains of a dead writer", artefact, f"{name}: {what}{damage}",
                    functools.partial(_check_remains, scene, small, name, content, fault),
                )  # fmt: skip


def _check_remains(
    scene: Scene, small: Intact, name: str, content: bytes, fault: Fault | None
) -> Outcome:
    """They change nothing for readers, and the next writer takes them away."""
    with scene.copies(small.map_path) as folder:
        map_path, core, output = folder / "core.sgmap", folder / CORE, folder / "restored.gguf"
        if fault is not None:
            edited(core, fault)
        before = core.read_bytes()
        (folder / name).write_bytes(content)
        result = verify_model(map_path)
        require(result.ok == (fault is None), f"verify finds {result.bad}")
        line = refused(lambda: restore_model(map_path, output))
        require((line is None) == (fault is None), f"restore: {line}")
        if line is None:
            require(output.read_bytes() == small.source_bytes, "restored: another file")
        require(core.read_bytes() == before, "readers change core.gguf")
        require(repair_model(map_path, small.source).ok, "repair: still bad")
        require(core.read_bytes() == small.core, "repaired: another core.gguf")
        require(map_path.read_bytes() == small.text, "another map")
    return Outcome.HARMLESS if fault is None else Outcome.DETECTED
