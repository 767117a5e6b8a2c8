"""Maps that lie: each digest in them is right, and something else is wrong.

The writer here is not that of `forge`: it knows the format alone (`forge/FORMAT.md`), and can write
what that cannot. A `MapKind` makes the bytes of a map from those of a right one, of a small model
whose pages lie beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

_MIB = 1 << 20
_HUGE = (-1, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30)
_NASTY = "a\n\x1b[2J\u202e"


@dataclass(frozen=True)
class MapKind:
    """One kind of map.

    Attributes
    ----------
    fault, name
        What is wrong, in general and exactly.
    change
        Makes its bytes from those of a right one.
    prepare
        Does something to its folder, too.
    is_odd
        Nothing is wrong with it: it is taken.
    """

    fault: str
    name: str
    change: Callable[[bytes], bytes]
    prepare: Callable[[Path], None] = lambda folder: None
    is_odd: bool = False


# ---- the bytes of a map ----


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(", ", ": "))


def sealed(document: Any) -> Any:
    """With the digests of its sections as they are; anything that is no map as it is."""
    if not isinstance(document, dict) or not isinstance(document.get("digests"), dict):
        return document
    digests = document["digests"]
    of_sections = digests.get("map_xxh3_128")
    if isinstance(of_sections, dict):
        for name in of_sections.keys() & document.keys():
            text = _compact(document[name])
            of_sections[name] = xxhash.xxh3_128_hexdigest(text.encode("ascii"))
    return document


def render(document: Any) -> bytes:
    """The canonical bytes: one line a section, one line an item where a section is a list."""
    if not isinstance(document, dict):
        return _compact(document).encode("ascii")
    lines = []
    for key, value in document.items():
        text = _compact(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(_compact, value)) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def edited(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """A map whose document `change` changes, with the right digests for it."""

    def apply(data: bytes) -> bytes:
        document = json.loads(data)
        changed = change(document)
        return render(sealed(document if changed is None else changed))

    return apply


# ---- fields ----

#: Paths of fields, and what is put there beside what is put everywhere.
_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "format/name": ("gguf", _NASTY),
    "format/version": (0, 2),
    "source": ([],),
    "source/0/name": ("", ".", "..", "../x", "/etc/passwd", "a\0b", "x" * 256, "a\\b", "\ud800"),
    "source/0/bytes": (0, 1 << 60),
    "source/0/sha256": ("", "0" * 63, "0" * 65, "G" * 64, "\u0660" * 64),
    "pages": (),
    "pages/count": (0, 1, 1 << 40),
    "pages/bytes": (0, 8192),
    "pages/content_bytes": (4096,),
    "pages/per_shard": (0, 3, 4, 512),
    "atlas/memory_layout": (_NASTY,),
    "atlas/cache_policy": (_NASTY,),
    "atlas/prefetch_distance": (1 << 17,),
    "atlas/priority_zones": ([],),
    "atlas/priority_zones/0/first_page": (1 << 20,),
    "atlas/priority_zones/0/pages": (0,),
    "tensors": ([],),
    "tensors/0/name": ("", "x" * 64, _NASTY),
    "tensors/0/ggml_type": ("Q9_9", "F64"),
    "tensors/0/shape": ([], [0], [1] * 5, [1 << 62] * 4, [32, -1], [33, 130]),
    "tensors/0/shape/0": (0,),
    "tensors/0/blocks_per_page": (0,),
    "tensors/0/part": (1,),
    "tensors/0/offset": (0, 1 << 40),
    "tensors/0/slices": ([],),
    "tensors/0/slices/0/first_page": (0, 1 << 20),
    "tensors/0/slices/0/pages": (0, 1),
    "tensors/0/slices/0/zone": (_NASTY,),
    "raw": ([],),
    "raw/0/offset": (1, 1 << 40),
    "raw/0/bytes": (0, 1),
    "raw/0/first_page": (3, 1 << 20),
    "digests/page_crc32_xxh3_128": ("", "0" * 31, "0" * 32, "g" * 32),
    "digests/map_xxh3_128": (),
    "digests/shard_xxh3_64": ([], ["0" * 16] * 99),
    "digests/shard_xxh3_64/0": ("", "0" * 15, "0" * 16, "0" * 17),
}
_EVERYWHERE: tuple[Any, ...] = (None, True, 1.5, float("nan"), float("-inf"), "1", {}, [[]], *_HUGE)


def _place(document: Any, path: str) -> tuple[Any, Any]:
    """What holds a field, and its key there."""
    *outer, last = (int(step) if step.isdecimal() else step for step in path.split("/"))
    for step in outer:
        document = document[step]
    return document, last


def put(path: str, value: Any) -> Callable[[bytes], bytes]:
    """Another value in a field."""

    def change(document: Any) -> None:
        holder, key = _place(document, path)
        holder[key] = deepcopy(value)

    return edited(change)


def _missing(path: str) -> Callable[[bytes], bytes]:
    def change(document: Any) -> None:
        holder, key = _place(document, path)
        del holder[key]

    return edited(change)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 24 else f"{text[:20]}... ({len(text)})"


def _fields() -> list[MapKind]:
    kinds = []
    for path, values in _FIELDS.items():
        kinds += [MapKind("wrong value", f"{path}: {_short(v)}", put(path, v)) for v in values]
        kinds += [MapKind("wrong type or range", f"{path}: {_short(value)}", put(path, value))
                  for value in _EVERYWHERE
                  # A file may end in zeros that no page holds, and 2 GiB of them take their time.
                  if (path, value) != ("source/0/bytes", 1 << 31)]  # fmt: skip
        kinds.append(MapKind("missing", path, _missing(path)))
    return kinds


# ---- what does not fit together ----


def _twice(key: bytes) -> Callable[[bytes], bytes]:
    """A member of the top object, given a second time before the first."""
    return lambda data: data.replace(b"{\n", b'{\n "' + key + b'": {},\n', 1)


def _shift_pages(document: Any) -> None:
    """All pages of a tensor over those of another."""
    first, second = document["tensors"][0], document["tensors"][2]
    first["slices"][0]["first_page"] = second["slices"][0]["first_page"]


def _same_bytes(document: Any) -> None:
    document["tensors"][0]["offset"] = document["tensors"][2]["offset"]


def _same_names(document: Any) -> None:
    document["tensors"][0]["name"] = document["tensors"][1]["name"]


def _exchange(document: Any) -> None:
    """Two tensors' slices, of different sizes."""
    first, second = document["tensors"][0], document["tensors"][2]
    first["slices"], second["slices"] = second["slices"], first["slices"]


def _add_unknown(document: Any) -> None:
    document["source"][0]["path"] = "/etc/passwd"


def _reverse(document: Any) -> Any:
    return dict(reversed(document.items()))


def _one_shard(document: Any, n: int) -> None:
    """Another number of digests of shards."""
    document["digests"]["shard_xxh3_64"] = document["digests"]["shard_xxh3_64"][:1] * n


def _many_pages(document: Any) -> None:
    """A page count that its digests allow, and the pages' file does not."""
    document["pages"]["count"] += 1


def _no_header(document: Any) -> None:
    document["raw"] = document["raw"][1:]


def _misfits() -> list[MapKind]:
    changes: dict[str, Callable[[Any], Any]] = {
        "pages of two tensors": _shift_pages, "bytes of two tensors": _same_bytes,
        "a name twice": _same_names, "slices exchanged": _exchange,
        "an unknown field": _add_unknown, "sections in another order": _reverse,
        "one digest of a shard": lambda d: _one_shard(d, 1),
        "no digest of a shard": lambda d: _one_shard(d, 0),
        "100,000 digests of shards": lambda d: _one_shard(d, 100_000),
        "a page more than there is": _many_pages, "no raw segment with the header": _no_header,
    }  # fmt: skip
    kinds = [MapKind("does not fit", name, edited(change)) for name, change in changes.items()]
    for name in ("format", "digests", "tensors"):
        kinds.append(MapKind("twice", name, _twice(name.encode())))
    return kinds


# ---- text ----


def _nested(depth: int) -> Callable[[bytes], bytes]:
    """A list in a list ... in place of a number, with the digest that it would have."""

    def change(data: bytes) -> bytes:
        nest = "[" * depth + "]" * depth
        document = json.loads(data)
        document["format"]["version"] = 0
        text = _compact(document["format"]).replace(" 0}", f" {nest}}}")
        digests = sealed(document)["digests"]
        digests["map_xxh3_128"]["format"] = xxhash.xxh3_128_hexdigest(text.encode("ascii"))
        return render(document).replace(_compact(document["format"]).encode(), text.encode(), 1)

    return change


def _bulk(item: bytes, n_bytes: int, before: bytes = b"[", after: bytes = b"0]") -> bytes:
    return before + item * (n_bytes // len(item)) + after


def _always(data: bytes) -> Callable[[bytes], bytes]:
    return lambda _: data


def _texts() -> list[MapKind]:
    changes: dict[str, Callable[[bytes], bytes]] = {
        "empty": _always(b""), "a brace": _always(b"{"), "null": _always(b"null\n"),
        "NaN": _always(b"NaN"), "a number": _always(b"1e999"), "NULs": _always(bytes(5000)),
        "not ASCII": lambda data: data.replace(b"gguf-shard", "gguf-sh\u00e4rd".encode(), 1),
        "UTF-16": lambda data: data.decode().encode("utf-16"),
        "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
        "cut short": lambda data: data[:-3], "cut in half": lambda data: data[: len(data) // 2],
        "twice the whole": lambda data: data * 2, "a line feed more": lambda data: data + b"\n",
        "a blank more": lambda data: data.replace(b"  {", b"   {", 1),
        "carriage returns": lambda data: data.replace(b"\n", b"\r\n"),
        "an escape that is not needed": lambda data: data.replace(b'"format"', b'"\\u0066ormat"'),
        "control characters": lambda data: b'{"\\n\\u001b[2J": 1}',
        "a raw control character": lambda data: data.replace(b"gguf-shard", b"gguf\x1b[2J", 1),
        "a lone surrogate as a key": _always(b'{"\\ud800": 1}'),
        "an integer of 5,000 digits": _always(b"1" * 5000),
        "lists, 100,000 deep": _always(b"[" * 100_000),
        "objects, 100,000 deep": _always(b'{"a":' * 100_000),
    }  # fmt: skip
    return [MapKind("not such a text", name, change) for name, change in changes.items()]


def _large_texts() -> list[MapKind]:
    size = 60 * _MIB
    texts: dict[str, Callable[[], bytes]] = {
        "an integer of 60 MiB": lambda: b"1" * size,
        "an integer of 100 MiB": lambda: b"1" * (100 * _MIB),
        "a fraction of 8 MiB": lambda: b"0." + b"1" * (8 * _MIB),
        "a text of 60 MiB": lambda: _bulk(b"x", size, b'"', b'"'),
        "60 MiB of empty lists": lambda: _bulk(b"[],", size),
        "60 MiB of empty objects": lambda: _bulk(b"{},", size),
        "60 MiB of zeros": lambda: _bulk(b"0,", size),
        "60 MiB of empty texts": lambda: _bulk(b'"",', size),
        "200,000 keys, the last one twice": lambda: (
            b"{" + b"".join(b'"%08x":0,' % i for i in range(200_000)) + b'"a":0,"a":0}'
        ),
    }
    return [
        MapKind("text too large", name, lambda _, make=make: make())  # type: ignore[misc]
        for name, make in texts.items()
    ]


def _depths() -> list[MapKind]:
    depths = (3, 100, 300, *range(900, 1001, 4), 5000, 50_000)
    return [MapKind("nested", f"{depth} deep", _nested(depth)) for depth in depths]


# ---- files ----


def _files() -> list[MapKind]:
    def replaced(name: str, target: str) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            (folder / name).unlink()
            (folder / name).symlink_to(target)

        return prepare

    def moved(folder: Path) -> None:
        (folder / "core.gguf").rename(folder / "elsewhere")
        (folder / "core.gguf").symlink_to("elsewhere")

    def short(folder: Path) -> None:
        with open(folder / "core.gguf", "r+b") as file:
            file.truncate(5000)

    def no_core(folder: Path) -> None:
        (folder / "core.gguf").unlink()

    def a_folder(folder: Path) -> None:
        no_core(folder)
        (folder / "core.gguf").mkdir()

    makers = {
        "pages: a link to nothing": replaced("core.gguf", "nothing"),
        "pages: a link to itself": replaced("core.gguf", "core.gguf"),
        "pages: /dev/zero": replaced("core.gguf", "/dev/zero"),
        "pages: the map": replaced("core.gguf", "core.sgmap"),
        "pages: a folder": a_folder, "pages: missing": no_core, "pages: cut short": short,
        "map: a link to nothing": replaced("core.sgmap", "nothing"),
        "map: a link to itself": replaced("core.sgmap", "core.sgmap"),
        "map: /dev/zero": replaced("core.sgmap", "/dev/zero"),
        "map: /dev/null": replaced("core.sgmap", "/dev/null"),
        "map: a folder": replaced("core.sgmap", "."),
        "map: the pages": replaced("core.sgmap", "core.gguf"),
    }  # fmt: skip
    kinds = [MapKind("not a file", name, lambda data: data, make) for name, make in makers.items()]
    odd = MapKind("odd file", "pages: a link to the pages", lambda data: data, moved, is_odd=True)
    return [*kinds, odd]


def kinds() -> list[MapKind]:
    """All of them."""
    return [*_fields(), *_misfits(), *_texts(), *_large_texts(), *_depths(), *_files()]
