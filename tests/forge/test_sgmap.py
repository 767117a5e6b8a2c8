"""The map: what it says, how it is written, and everything that its reader refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge import sgmap_reader
from forge.errors import GGUFShardError
from forge.sgmap import (
    SECTIONS,
    AtlasSettings,
    RawSegment,
    ShardMap,
    Slice,
    SourcePart,
    TensorEntry,
    core_path,
    render_map,
)
from forge.sgmap_reader import load_map, parse_map

Document = dict[str, Any]
SHA256 = "0123456789abcdef" * 4


def digest(section: Any) -> str:
    """As the format page says: xxh3-128 of the section on one line."""
    return xxhash.xxh3_128_hexdigest(json.dumps(section).encode())


def rendered(document: Document) -> bytes:
    """As the format page says, written again: a line a section, a line an item of a list."""
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            items = ",\n".join(f"  {json.dumps(item)}" for item in value)
            lines.append(f' "{key}": [\n{items}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def with_digests(document: Document) -> bytes:
    """A map whose digests fit its sections, whatever those hold."""
    document["digests"]["map_xxh3_128"] = {name: digest(document[name]) for name in SECTIONS}
    return rendered(document)


@pytest.fixture
def document(sharded: Path) -> Document:
    """The map of the small model, as JSON reads it."""
    return json.loads(sharded.read_bytes())


def refusal(data: bytes) -> str:
    with pytest.raises(GGUFShardError) as caught:
        parse_map(data, "core.sgmap")
    message = str(caught.value)
    assert message.startswith("core.sgmap: ") and "\n" not in message and len(message) < 600
    return message.removeprefix("core.sgmap: ")


def test_rendering_is_canonical(sharded: Path, document: Document) -> None:
    data = sharded.read_bytes()
    assert data == with_digests(copy.deepcopy(document)) == rendered(document)
    assert render_map(load_map(sharded)) == data
    assert list(document) == [*SECTIONS, "digests"]


def test_says_what_it_should(sharded: Path, document: Document, model: Path) -> None:
    assert document["format"] == {"name": "gguf-shard", "version": 1}
    assert document["source"][0]["bytes"] == model.stat().st_size
    assert document["pages"].items() >= {"bytes": 4096, "content_bytes": 4088}.items()
    embedding = document["tensors"][0]
    assert embedding.items() >= {
        "name": "token_embd.weight", "ggml_type": "Q8_0", "shape": [32, 130],
        "blocks_per_page": 120, "part": 0,
    }.items()  # fmt: skip
    (whole,) = embedding["slices"]
    assert (whole["pages"], whole["zone"]) == (2, "cold")
    experts = load_map(sharded).tensors[3]
    assert experts.slice_bytes == 32 * 4 * 2 and len(experts.slices) == 2


def test_pages_know_what_they_hold(sharded: Path) -> None:
    m = load_map(sharded)
    experts = next(t for t in m.tensors if "_exps" in t.name)
    held = [m.tensor_of_page(page) for page in range(m.n_pages)]
    assert held[experts.slices[1].first_page] == "blk.0.ffn_gate_exps.weight[1]"
    assert held[0] == "blk.0.attn_norm.weight"
    assert held[-1] == "raw bytes of model.gguf"
    assert m.tensor_of_page(m.n_pages) == "padding"
    assert (m.n_shards, m.shard_shift) == (m.n_pages, 0)


def test_pages_lie_beside_the_map() -> None:
    assert core_path("some/core.sgmap") == Path("some/core.gguf")


# ---- what is refused ----


def at(*path: str | int, value: Any) -> Callable[[Document], None]:
    """Set a member of the document."""

    def change(document: Document) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def without(*path: str | int) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


def first_page_of(tensor: int, other: int) -> Callable[[Document], None]:
    """Let one tensor begin where another does."""

    def change(document: Document) -> None:
        slices = document["tensors"]
        slices[tensor]["slices"][0]["first_page"] = slices[other]["slices"][0]["first_page"]

    return change


def in_tensor(name: str, value: Any) -> Callable[[Document], None]:
    return at("tensors", 0, name, value=value)


def in_slice(name: str, value: Any) -> Callable[[Document], None]:
    return at("tensors", 0, "slices", 0, name, value=value)


REFUSED: dict[str, tuple[Callable[[Document], None], str]] = {
    "format.name": (at("format", "name", value="other"), "field format.name: 'other' is none of"),
    "format.version": (at("format", "version", value=2), "field format.version: 2 is not"),
    "format": (at("format", value=[]), "field format: is not an object"),
    "format more": (at("format", "x\n", value=1), r"field format.'x\n': is not known"),
    "pages.count 0": (at("pages", "count", value=0), "field pages.count: 0 is not an integer"),
    "pages.count 2^62": (at("pages", "count", value=2**62), "field pages.count: "),
    "pages.count true": (at("pages", "count", value=True), "field pages.count: True is not"),
    "pages.count text": (at("pages", "count", value="1\n2"), r"field pages.count: '1\n2' is not"),
    "pages.count missing": (without("pages", "count"), "field pages.count: is missing"),
    "pages.count long": (at("pages", "count", value="9" * 10**5), "field pages.count: '999"),
    "pages.count other": (
        at("pages", "count", value=99), "field digests.shard_xxh3_64: 12 digests for 99 pages"),
    "pages.bytes": (at("pages", "bytes", value=8192), "field pages.bytes: 8192 is not"),
    "pages.content": (at("pages", "content_bytes", value=4096), "field pages.content_bytes: 4096"),
    "pages.per_shard": (at("pages", "per_shard", value=3), "per_shard: 3 is not a power of two"),
    "pages.per_shard 512": (at("pages", "per_shard", value=512), "per_shard: 512 is not an int"),
    "source none": (at("source", value=[]), "field source: is empty"),
    "source no list": (at("source", value={}), "field source: is not a list"),
    "source.name empty": (at("source", 0, "name", value=""), "field source[0].name: '' is not of"),
    **{
        f"source.name {name}": (at("source", 0, "name", value=name), "field source[0].name: ")
        for name in ("a/b", "..", ".", "\\", "\0", "x" * 256)
    },
    "source.bytes": (at("source", 0, "bytes", value=0), "field source[0].bytes: 0 is not"),
    "source.bytes float": (at("source", 0, "bytes", value=1e3), "field source[0].bytes: 1000.0"),
    "source.sha256": (at("source", 0, "sha256", value="F" * 64), "field source[0].sha256: 'FF"),
    "source too short": (at("source", 0, "bytes", value=600), "overlap or leave the source"),
    "layout": (at("atlas", "memory_layout", value="x"), "field atlas.memory_layout: 'x' is none"),
    "policy": (at("atlas", "cache_policy", value=[]), "field atlas.cache_policy: [] is none of"),
    "distance": (at("atlas", "prefetch_distance", value=-1), "field atlas.prefetch_distance: -1"),
    "zones": (at("atlas", "priority_zones", 0, "zone", value="hot"), "priority_zones[0].zone: 'h"),
    "zones.pages": (at("atlas", "priority_zones", 0, "pages", value=99), "zones[0].pages: 99 is"),
    "tensors": (at("tensors", value=None), "field tensors: is not a list"),
    "tensor": (at("tensors", 0, value=7), "field tensors[0]: is not an object"),
    "name": (in_tensor("name", ""), "field tensors[0].name: '' is not of the form"),
    "name long": (in_tensor("name", "n" * 64), "field tensors[0].name: 'nnn"),
    "name twice": (in_tensor("name", "output.weight"), "field tensors: two have the same name"),
    "type": (in_tensor("ggml_type", "Q9_9"), "field tensors[0].ggml_type: 'Q9_9' is none of"),
    "type other": (in_tensor("ggml_type", "Q4_0"), "field tensors[0].blocks_per_page: 120 is not"),
    "shape empty": (in_tensor("shape", []), "tensors[0].shape: 0 dimensions are not within 1..4"),
    "shape of 5": (in_tensor("shape", [32] + [1] * 4), "tensors[0].shape: 5 dimensions"),
    "shape of 0": (in_tensor("shape", [32, 0]), "field tensors[0].shape: 0 is not an integer"),
    "shape huge": (in_tensor("shape", [2**62] * 4), "field tensors[0].slices[0].pages: 2 is not"),
    "shape no blocks": (in_tensor("shape", [33, 130]), "[33, 130] are not whole blocks and slices"),
    "part": (in_tensor("part", 1), "field tensors[0].part: 1 is not an integer within 0..0"),
    "offset": (in_tensor("offset", 2**62), "field tensors[0].offset: 4420 bytes at"),
    "offset overlaps": (in_tensor("offset", 0), "bytes at 0 overlap or leave the source"),
    "slices none": (in_tensor("slices", []), "are not whole blocks and slices"),
    "slice page": (in_slice("first_page", 12), "field tensors[0].slices[0].first_page: 12 is not"),
    "slice pages": (in_slice("pages", 1), "field tensors[0].slices[0].pages: 1 is not an integer"),
    "slice zone": (in_slice("zone", "hot"), "field tensors[0].slices[0].zone: 'hot' is none of"),
    "slice more": (in_slice("more", 1), "field tensors[0].slices[0].'more': is not known"),
    "page of two": (first_page_of(0, 2), "belongs to two"),
    "raw page of two": (at("raw", 1, "first_page", value=0), "belongs to two"),
    "raw.part": (at("raw", 0, "part", value=-1), "field raw[0].part: -1 is not"),
    "raw.bytes": (at("raw", 0, "bytes", value=2**40), "field raw[0].bytes / 4088: "),
    "raw.bytes 0": (at("raw", 0, "bytes", value=0), "field raw[0].bytes: 0 is not an integer"),
    "raw.offset": (at("raw", 1, "offset", value=4), "overlap or leave the source"),
    "digests": (at("digests", "shard_xxh3_64", value=None), "digests.shard_xxh3_64: is not a list"),
    "digest": (at("digests", "shard_xxh3_64", 3, value="x" * 16), "digests.shard_xxh3_64[3]: 'xx"),
    "digests.table": (
        at("digests", "page_crc32_xxh3_128", value=0), "field digests.page_crc32_xxh3_128: 0 is"),
    "more": (at("more", value=1), "field 'more': is not known"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_field(case: str, document: Document) -> None:
    change, reason = REFUSED[case]
    change(document)
    assert reason in refusal(with_digests(document))


@pytest.mark.parametrize("name", SECTIONS)
def test_missing_sections_and_digests_are_named(name: str, document: Document) -> None:
    del document["digests"]["map_xxh3_128"][name]
    assert refusal(rendered(document)) == f"field digests.map_xxh3_128.{name}: is missing"
    del document[name]
    assert refusal(rendered(document)) == f"field {name}: is missing"


def test_a_section_must_match_its_digest(document: Document) -> None:
    document["source"][0]["name"] = "nodel.gguf"
    assert refusal(rendered(document)) == (
        "field source: does not match its digest (digests.map_xxh3_128.source)"
    )


def spaced(data: bytes) -> bytes:
    return data.replace(b'"format": ', b'"format":  ')


def reordered(data: bytes) -> bytes:
    document = json.loads(data)
    return rendered({key: document[key] for key in sorted(document)})


@pytest.mark.parametrize(
    "change",
    [
        spaced, reordered, lambda data: data + b"\n", lambda data: data[:-1],
        lambda data: data.replace(b"\n", b"\r\n"), lambda data: data.replace(b'"Q8', b'"\\u00518'),
    ],
)  # fmt: skip
def test_other_spellings_are_refused(change: Callable[[bytes], bytes], sharded: Path) -> None:
    data = change(sharded.read_bytes())
    assert data != sharded.read_bytes()
    assert "not as written (spacing, order or spelling)" in refusal(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON: "),
        (b"{", "not JSON: "),
        (b"[]", "field (top): is not an object"),
        (b"\xff{}", "byte 0: not ASCII"),
        (b'{"format": 1, "format": 2}', "field 'format': is given twice"),
        (b"[" * 100_000, "nested too deep"),
        (b"9" * 5000, "not JSON: "),
        (b"{}", "field format: is missing"),
    ],
)
def test_what_is_no_map_is_refused(data: bytes, reason: str) -> None:
    assert reason in refusal(data)


def test_deep_nesting_is_refused(
    document: Document, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested = b"[" * 400 + b"]" * 400
    data = rendered(document).replace(b' "raw": [', b' "raw": [' + nested + b",")
    assert refusal(data) == "field raw: does not match its digest (digests.map_xxh3_128.raw)"

    def too_deep(value: Any) -> str:
        raise RecursionError

    monkeypatch.setattr(sgmap_reader, "section_digest", too_deep)
    assert refusal(sharded.read_bytes()) == "field format: nested too deep"


def test_size_is_bounded_before_reading(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgmap_reader, "MAX_MAP_BYTES", sharded.stat().st_size)
    assert load_map(sharded).n_pages == 12
    monkeypatch.setattr(sgmap_reader, "MAX_MAP_BYTES", sharded.stat().st_size - 1)
    with pytest.raises(GGUFShardError, match=r"core\.sgmap: a map has at most \d+ bytes"):
        load_map(sharded)


def test_a_missing_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(GGUFShardError, match=r"core\.sgmap: No such file or directory"):
        load_map(tmp_path / "core.sgmap")
    with pytest.raises(GGUFShardError, match="Is a directory"):
        load_map(tmp_path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused(data: st.DataObject, sharded: Path) -> None:
    good = sharded.read_bytes()
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 8)))
    changed = good[:start] + data.draw(st.binary(max_size=8)) + good[end:]
    if changed == good:
        assert parse_map(changed, "core.sgmap") == load_map(sharded)
    else:
        try:
            m = parse_map(changed, "core.sgmap")
        except GGUFShardError as error:
            assert "\n" not in str(error)
        else:  # a digest of pages, which are not looked at here
            assert render_map(m) == changed
            assert b'"digests"' in good[:start]


# ---- any map comes back ----


@st.composite
def maps(draw: st.DrawFn) -> ShardMap:
    """Maps whose tensors and raw bytes follow each other in pages and source."""
    per_shard = draw(st.sampled_from([1, 2, 256]))
    texts = st.text(st.characters(), min_size=1, max_size=63)
    names = draw(st.lists(texts, unique=True, max_size=4))
    page = offset = 0
    tensors = []
    for name in names:
        ggml_type = draw(st.sampled_from(list(Type)))
        n_slices, rows = draw(st.integers(1, 3)), draw(st.integers(1, 200))
        entry = TensorEntry(name, ggml_type, (256, rows, n_slices), 0, offset, ())
        layout = entry.layout("row_major")
        pages = layout.pages_for(entry.n_blocks // n_slices)
        zone = draw(st.sampled_from(["high", "normal", "cold"]))
        slices = tuple(Slice(page + i * pages, pages, zone) for i in range(n_slices))
        tensors.append(TensorEntry(name, ggml_type, entry.shape, 0, offset, slices))
        page += n_slices * pages + draw(st.integers(0, 2))
        offset += entry.n_blocks * layout.bytes + draw(st.integers(0, 40))
    raw = RawSegment(0, offset, draw(st.integers(1, 10000)), page)
    page += raw.pages
    hexadecimal = st.text("0123456789abcdef", min_size=16, max_size=16)
    name = draw(st.text(st.characters(exclude_characters="/\\\0"), min_size=1, max_size=20))
    return ShardMap(
        (SourcePart("_" + name, offset + raw.bytes, SHA256),),
        page,
        per_shard,
        AtlasSettings("row_major", draw(st.sampled_from(["auto", "mru"])), 8, (("cold", 0, page),)),
        tuple(tensors),
        (raw,),
        SHA256[:32],
        tuple(draw(hexadecimal) for _ in range(-(-page // per_shard))),
    )


@settings(max_examples=50)
@given(maps())
def test_any_map_comes_back(m: ShardMap) -> None:
    assert parse_map(render_map(m), "core.sgmap") == m


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[" + b"[]," * (1 << 18) + b"0]", "more lists, objects or values"),
        (b"[" + b"{}," * (1 << 18) + b"0]", "more lists, objects or values"),
        (b"[" + b"0," * ((1 << 22) + 1) + b"0]", "more lists, objects or values"),
        (b"{" + b"".join(b'"%x": 0, ' % i for i in range(50_000)) + b'"a": 0, "f": 1}', "twice"),
    ],
    ids=["lists", "objects", "values", "keys, the last one twice"],
)
def test_bulk_is_refused_before_it_is_parsed(data: bytes, says: str) -> None:
    with pytest.raises(GGUFShardError, match=says):
        parse_map(data, "core.sgmap")
