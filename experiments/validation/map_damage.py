"""Damage at rest of `core.sgmap`, and maps that somebody has edited.

A map of any other text than it was written with is refused. One that was edited with all its
digests adapted is as good as any other, if nothing in it contradicts the rest: then `restore` is
left, which knows the SHA-256 of what must come out.
"""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from experiments.validation.damage import SECTION, cut_points, flip, spread, torn
from experiments.validation.damaged_model import Intact, examine_map, small_model
from experiments.validation.probe import Probe
from experiments.validation.scene import Scene
from forge.shard import ShardOptions, shard_model

MAP = "core.sgmap"
#: Marks a member that is to be there a second time; no name holds it.
_TWICE = "@twice"
#: Values of every type of JSON.
_OF_EACH_TYPE: tuple[Any, ...] = (None, True, 1, 1.5, "text", [], {})
_HUGE = (1 << 62, 1 << 64, 10**400)

#: Names and numbers that lead to a value in the document.
Place = tuple[str | int, ...]


def probes(scene: Scene) -> Iterator[Probe]:
    """Every probe of this part."""
    small = small_model(scene)
    yield from _text(scene, small)
    yield from _others(scene, small)
    yield from _contradictions(scene, small)
    yield from _edits(scene, small)


def _probe(
    scene: Scene, intact: Intact, row: str, place: str, text: bytes, is_consistent: bool = False
) -> Probe:
    def damage(folder: Path) -> None:
        (folder / MAP).write_bytes(text)

    return Probe(
        SECTION, row, MAP, place,
        functools.partial(examine_map, scene, intact, damage, is_consistent=is_consistent),
    )  # fmt: skip


def _changed(text: bytes, fault: Callable[[bytearray], None]) -> bytes:
    data = bytearray(text)
    fault(data)
    return bytes(data)


# ---- the text ----


def _text(scene: Scene, small: Intact) -> Iterator[Probe]:
    text, newer = small.text, scene.newer_map.read_bytes()
    bits = random.Random(scene.seed)
    for offset in spread(len(text), scene.effort.flips):
        for bit in [bits.randrange(8)] if scene.effort.flips else range(8):
            flipped = _changed(text, functools.partial(flip, offset, bit))
            yield _probe(scene, small, "bit flip", f"byte {offset} bit {bit}", flipped)
    lines = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for point in cut_points(len(text), lines, 0):
        yield _probe(scene, small, "truncation", f"to {point} bytes", text[:point])
    for junk in (b"\0", b" ", b"\n", b"{}", text):
        yield _probe(scene, small, "trailing junk", repr(junk[:8]), text + junk)
    for done, fault in torn(0, newer, 512):
        if _changed(text, fault) != text:
            torn_text = _changed(text, fault)
            yield _probe(scene, small, "torn write", f"{done} bytes", torn_text)
    for begin in range(0, len(text), 512):
        zeroed = text[:begin] + bytes(len(text[begin : begin + 512])) + text[begin + 512 :]
        yield _probe(scene, small, "sector zeroed", f"byte {begin}", zeroed)


def _others(scene: Scene, small: Intact) -> Iterator[Probe]:
    """Maps that are right, of something else."""
    for place, options in (
        ("another shard size", ShardOptions(pages_per_shard=4)),
        ("another layout", ShardOptions("row_major", pages_per_shard=2)),
    ):
        folder = scene.folder / place
        other = shard_model(small.source, folder, options, force=True)
        yield _probe(scene, small, "map of another model", place, other.read_bytes())
    for place, path in (("another version", scene.newer_map), ("other weights", small.wrong_map)):
        yield _probe(scene, small, "map of another model", place, path.read_bytes())
    yield Probe(
        SECTION, "missing", MAP, MAP,
        functools.partial(examine_map, scene, small, lambda folder: (folder / MAP).unlink()),
    )  # fmt: skip


# ---- the document ----


def render(document: dict[str, Any]) -> bytes:
    """The text of a map, as rule 10 of the format says; what it holds need not make sense."""
    members = []
    for name, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        members.append(f' "{name}": {text}')
    return ("{\n" + ",\n".join(members) + "\n}\n").replace(_TWICE, "").encode("ascii")


def adapt_digests(document: dict[str, Any]) -> None:
    """Give each section the digest of what a reader will make of it (rule 9)."""
    digests = document.get("digests")
    of_sections = digests.get("map_xxh3_128") if isinstance(digests, dict) else None
    if isinstance(of_sections, dict):
        for name, value in json.loads(render(document)).items():
            if name in of_sections:
                text = json.dumps(value).encode("ascii")
                of_sections[name] = xxhash.xxh3_128_hexdigest(text)


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every member and, of lists, the first item and the last."""
    if isinstance(value, dict):
        keys: list[str | int] = [*value]
    elif isinstance(value, list):
        keys = sorted({0, len(value) - 1}) if value else []
    else:
        return
    for key in keys:
        yield (*place, key)
        yield from _places(value[key], (*place, key))


def _at(document: Any, place: Place) -> Any:
    for key in place:
        document = document[key]
    return document


def _replacements(value: Any) -> Iterator[tuple[str, Any]]:
    """(row of the table, what to put in place of a value)."""
    for other in _OF_EACH_TYPE:
        if type(other) is not type(value):
            yield "map field of a wrong type", other
    if type(value) is int:
        yield from (("map field negative", n) for n in (-1, -value - 2))
        yield from (("map field huge", n) for n in _HUGE)
        yield from (("map field off by one", n) for n in (value - 1, value + 1))
    elif isinstance(value, str):
        yield "map field huge", value * 2000
        yield "map field changed", value[:-1] + ("0" if value[-1:] != "0" else "1")
        yield "map field changed", ""
        yield "map field changed", "../" + value
    elif isinstance(value, list):
        yield "map field huge", value * 1000
        yield "map field twice", value + value[-1:]
        yield "map field missing", value[:-1]


def _edit_value(place: Place, new: Any, document: dict[str, Any]) -> None:
    _at(document, place[:-1])[place[-1]] = new


def _edit_members(row: str, place: Place, document: dict[str, Any]) -> None:
    holder = _at(document, place[:-1])
    if row == "map field missing":
        del holder[place[-1]]
    elif row == "map field twice":
        holder[f"{place[-1]}{_TWICE}"] = holder[place[-1]]
    else:
        holder["extra"] = 0


def _all_edits(document: dict[str, Any]) -> Iterator[tuple[str, Place, str, Any]]:
    """(row, place, how it is told, edit of a document)."""
    for place in _places(document):
        value = _at(document, place)
        for row, new in _replacements(value):
            if new != value or type(new) is not type(value):
                yield (
                    row,
                    place,
                    f" = {json.dumps(new)[:20]}",
                    functools.partial(_edit_value, place, new),
                )
        if isinstance(place[-1], str):
            for row in ("map field missing", "map field twice", "map field unknown"):
                yield row, place, "", functools.partial(_edit_members, row, place)


def _contradictions(scene: Scene, small: Intact) -> Iterator[Probe]:
    """Maps whose numbers are possible one by one, and not together: rules 12 and 13."""
    tensors, raw, shards = "tensors", "raw", ("digests", "shard_xxh3_64")
    original = json.loads(small.text)
    first = original[tensors][0]
    changes: dict[str, tuple[Place, Any]] = {
        "two tensors of one name": ((tensors, 1, "name"), first["name"]),
        "a page of two tensors": (
            (tensors, 1, "slices", 0, "first_page"), first["slices"][0]["first_page"],
        ),
        "a page of a tensor and raw": ((raw, 0, "first_page"), first["slices"][0]["first_page"]),
        "source bytes of two": ((tensors, 1, "offset"), first["offset"]),
        "source bytes of a tensor and raw": ((tensors, 0, "offset"), 0),
        "source bytes outside the file": ((raw, -1, "offset"), original["source"][0]["bytes"]),
        "a part that is not there": ((raw, 0, "part"), 1),
        "a digest of a shard too few": (shards, small.map.shard_xxh3_64[:-1]),
        "a digest of a shard too many": (shards, [*small.map.shard_xxh3_64, "0" * 16]),
        "a page too few": (("pages", "count"), small.map.n_pages - 1),
        "a slice too few": ((tensors, 2, "slices"), []),
    }  # fmt: skip
    for name, (place, new) in changes.items():
        document = copy.deepcopy(original)
        _edit_value(place, new, document)
        adapt_digests(document)
        yield _probe(scene, small, "map contradicts itself", name, render(document))


def _edits(scene: Scene, small: Intact) -> Iterator[Probe]:
    """Every edit with its digests adapted, which leaves the reader's other checks; and without."""
    original = json.loads(small.text)
    assert render(original) == small.text
    edits = [*_all_edits(original)]
    for i in spread(len(edits), 2 * scene.effort.flips):
        row, place, what, edit = edits[i]
        document = copy.deepcopy(original)
        edit(document)
        plain = render(document)
        adapt_digests(document)
        adapted = render(document)
        name = ".".join(map(str, place)) + what
        if i % 4 == 0 or adapted == plain:
            yield _probe(scene, small, row, name, plain)
        if adapted not in (plain, small.text):
            yield _probe(scene, small, f"{row}, digests adapted", name, adapted, True)
