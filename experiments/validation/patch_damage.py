"""Damage at rest of patches, of the GGUF files they are for, and of journals.

patch        is refused, and neither the model nor a folder has changed
model.gguf   is no base and no source any more: refused, unless what was needed of it is right
journal      is refused and left alone, and so are its files: they are the old ones still
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from delta.apply import apply_patch
from delta.apply_in_place import update_in_place
from delta.diff import create_patch
from experiments.validation.damage import SECTION, SECTOR, cut_points, flip, spread
from experiments.validation.damaged_model import Intact, small_model
from experiments.validation.probe import Outcome, Probe, refused, require
from experiments.validation.scene import Scene, leftovers
from forge.journal import JournalWriter
from forge.pending_file import journal_path
from forge.repair import repair_model
from forge.restore import restore_model
from forge.sgmap import core_path
from forge.verify import verify_model

PATCH, MODEL, JOURNAL = "patch", "small.gguf", "core.sgmap.sgjournal"
#: Of so many faults of a patch one is put to a sharded model, too, which takes longer.
_SHARDED_EVERY = 10
_JUNK = (b"\0", b"SGPATCH\0", bytes(4096))


@dataclass(frozen=True)
class Damage:
    """The table's row, the place, and what is left of the file."""

    row: str
    place: str
    left: Callable[[], bytes]


def probes(scene: Scene) -> Iterator[Probe]:
    """Every probe of this part."""
    small = small_model(scene)
    yield from _patches(scene, small)
    yield from _models(scene, small)
    yield from _journals(scene, small)


def _damages(scene: Scene, content: bytes, other: bytes) -> Iterator[Damage]:
    """What befalls a file; `other` is another one of its kind."""
    bits = random.Random(scene.seed)
    for offset in spread(len(content), scene.effort.flips):
        bit = bits.randrange(8)
        flipped = functools.partial(_flipped, content, offset, bit)
        yield Damage("bit flip", f"byte {offset} bit {bit}", flipped)
    structure = [0, 8, 20, len(content) - 32, len(content)]
    for point in cut_points(len(content), structure, scene.effort.flips // 10):
        yield Damage("truncation", f"to {point} bytes", _always(content[:point]))
    for junk in (*_JUNK, content):
        yield Damage("trailing junk", f"{len(junk)} bytes", _always(content + junk))
    n_sectors = -(-len(content) // SECTOR)
    for sector in spread(n_sectors, scene.effort.flips // 10):
        begin, end = sector * SECTOR, min((sector + 1) * SECTOR, len(content))
        for row, left in (
            ("sector zeroed", content[:begin] + bytes(end - begin) + content[end:]),
            ("torn write", other[:end] + content[end:]),
        ):
            if left not in (content, other):
                yield Damage(row, f"{begin}..{end}", _always(left))


def _always(left: bytes) -> Callable[[], bytes]:
    return lambda: left


def _flipped(content: bytes, offset: int, bit: int) -> bytes:
    data = bytearray(content)
    flip(offset, bit, data)
    return bytes(data)


def _judged(
    artefact: str, judge: Callable[[bytes, int], Outcome], damages: Iterable[Damage]
) -> Iterator[Probe]:
    """Probes of an artefact; `judge` is given what is left of it, and the probe's number."""
    for number, damage in enumerate(damages):
        yield Probe(
            SECTION, damage.row, artefact, damage.place,
            functools.partial(_put_question, judge, damage, number),
        )  # fmt: skip


def _put_question(judge: Callable[[bytes, int], Outcome], damage: Damage, number: int) -> Outcome:
    return judge(damage.left(), number)


def _require_refused(work: Callable[[], object], who: str, *files: Path) -> None:
    """`work` refuses, the files are as they were, and nothing is left behind."""
    before = [file.read_bytes() for file in files]
    require(refused(work) is not None, f"{who} goes through")
    for file, content in zip(files, before, strict=True):
        require(file.read_bytes() == content, f"{who} refuses, and changes {file.name}")
    left = leftovers(files[0].parent)
    require(not left, f"{who} leaves {left}")


# ---- patches ----


def _patches(scene: Scene, small: Intact) -> Iterator[Probe]:
    other = scene.folder / "other.patch"
    create_patch(small.wrong_source, scene.newer, other, reversible=True, force=True)
    judge = functools.partial(_check_patch, scene)
    yield from _judged(PATCH, judge, _damages(scene, scene.patch.read_bytes(), other.read_bytes()))
    foreign = Damage("patch of another model", other.name, other.read_bytes)
    yield from _judged(PATCH, judge, [foreign])
    yield Probe(SECTION, "missing", PATCH, PATCH, functools.partial(judge, None, 0))


def _check_patch(scene: Scene, left: bytes | None, number: int) -> Outcome:
    with scene.copies(scene.small, scene.patch) as folder:
        model, patch, new = folder / MODEL, folder / PATCH, folder / "new.gguf"
        if left is None:
            patch.unlink()
        else:
            patch.write_bytes(left)
        _require_refused(lambda: apply_patch(model, patch, new), "apply", model)
        require(not new.exists(), "apply refuses, and leaves a file")
        _require_refused(lambda: update_in_place(model, patch), "apply in place", model)
        if number % _SHARDED_EVERY == 0:
            with scene.copies(scene.small_map) as sharded:
                files = [sharded / "core.sgmap", sharded / "core.gguf"]
                who = "apply to a sharded model"
                _require_refused(lambda: update_in_place(files[0], patch), who, *files)
    return Outcome.DETECTED


# ---- GGUF files ----


def _models(scene: Scene, small: Intact) -> Iterator[Probe]:
    """With a patch of one direction: of pages that it holds whole the base matters to no byte."""
    patch = scene.folder / "forward.patch"
    create_patch(small.source, scene.newer, patch, force=True)
    judge = functools.partial(check_model, scene, small, patch)
    damages = _damages(scene, small.source_bytes, small.wrong_source.read_bytes())
    yield from _judged("model.gguf", judge, damages)


def check_model(scene: Scene, small: Intact, patch: Path, left: bytes, number: int = 0) -> Outcome:
    """As a base; as what a sharded model is held against; as the source of a repair."""
    with scene.copies(small.source, patch, small.map_path) as folder:
        model, patch, new = folder / MODEL, folder / patch.name, folder / "new.gguf"
        model.write_bytes(left)
        _require_refused(lambda: apply_patch(model, patch, new), "apply", model)
        require(not new.exists(), "apply refuses, and leaves a file")
        _require_refused(lambda: update_in_place(model, patch), "apply in place", model)
        map_path, core = folder / "core.sgmap", folder / "core.gguf"
        require(not verify_model(map_path, against=model).ok, "verify finds nothing")
        core.unlink()
        line = refused(lambda: _repair_from_damaged(map_path, model))
        if line is None:
            require(core.read_bytes() == small.core, "repaired: another core.gguf")
        require((line is None) == core.exists(), "repair refuses, and leaves pages")
    return Outcome.DETECTED


def _repair_from_damaged(map_path: Path, model: Path) -> None:
    result = repair_model(map_path, model)
    require(result.ok, f"repaired, and does not hold: {result.bad}")
    require(result.source_differs, "repair does not tell that its source is damaged")


# ---- journals ----


def _journals(scene: Scene, small: Intact) -> Iterator[Probe]:
    journal, other = _journal(scene, scene.newer_map), _journal(scene, small.wrong_map)
    judge = functools.partial(_check_journal, scene)
    yield from _judged("journal", judge, _damages(scene, journal, other))
    for place, owner in (("the same model, newer", scene.newer_map), ("another", small.wrong_map)):
        yield Probe(
            SECTION, "journal of another model", "journal", place,
            functools.partial(_check_foreign_journal, scene, journal, owner),
        )  # fmt: skip
    for name in ("core.gguf", "core.sgmap"):
        yield Probe(
            SECTION, "missing", name, "with a journal",
            functools.partial(_check_journal_without, scene, journal, name),
        )  # fmt: skip


def _journal(scene: Scene, target: Path) -> bytes:
    """A committed journal that makes another version of the small model."""
    new = {path.name: path.read_bytes() for path in (core_path(target), target)}
    with scene.copies(scene.small_map) as folder:
        owner = folder / scene.small_map.name
        sizes = [(name, len(content)) for name, content in new.items()]
        with JournalWriter(owner, sizes, sum(map(len, new.values()))) as journal:
            for number, (name, content) in enumerate(new.items()):
                old = (folder / name).read_bytes()
                for at in range(0, len(content), SECTOR):
                    sector = content[at : at + SECTOR]
                    if sector != old[at : at + SECTOR]:
                        journal.record(number, at, sector)
            journal.commit()
        return journal_path(owner).read_bytes()


def _require_stopped(folder: Path, files: list[Path]) -> None:
    """Whoever opens the model refuses, and leaves it and its journal alone."""
    before = {path.name: path.read_bytes() for path in files}
    map_path, output = folder / "core.sgmap", folder / "restored.gguf"
    require(not verify_model(map_path).ok, "verify goes through")
    for work, who in (
        (lambda: restore_model(map_path, output), "restore"),
        (lambda: repair_model(map_path, folder / MODEL), "repair"),
    ):
        require(refused(work) is not None, f"{who} goes through")
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MODEL}
    require(after == before, f"files have changed: {sorted(after)}")


def _check_journal(scene: Scene, left: bytes, number: int) -> Outcome:
    with scene.copies(scene.small, scene.small_map) as folder:
        files = [folder / name for name in (JOURNAL, "core.gguf", "core.sgmap")]
        files[0].write_bytes(left)
        _require_stopped(folder, files)
    return Outcome.DETECTED


def _check_journal_without(scene: Scene, journal: bytes, name: str) -> Outcome:
    with scene.copies(scene.small, scene.small_map) as folder:
        (folder / JOURNAL).write_bytes(journal)
        (folder / name).unlink()
        files = [path for path in folder.iterdir() if path.name != MODEL]
        _require_stopped(folder, files)
    return Outcome.DETECTED


def _check_foreign_journal(scene: Scene, journal: bytes, owner: Path) -> Outcome:
    """Of the version that it makes it changes nothing; other files are not touched."""
    with scene.copies(scene.small, owner) as folder:
        files = [folder / name for name in (JOURNAL, "core.gguf", "core.sgmap")]
        files[0].write_bytes(journal)
        if owner != scene.newer_map:
            _require_stopped(folder, files)
            return Outcome.DETECTED
        require(verify_model(files[2]).ok, "verify finds faults")
        require(files[1].read_bytes() == core_path(owner).read_bytes(), "another core.gguf")
        require(files[2].read_bytes() == owner.read_bytes(), "another map")
        require(not leftovers(folder), f"left: {leftovers(folder)}")
    return Outcome.HARMLESS
