"""The header reader: what it reads, and everything that it refuses."""

from __future__ import annotations

import re
import struct
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import Tensor
from forge import gguf_file
from forge.errors import GGUFShardError
from forge.gguf_file import parse_header, read_gguf
from forge.split_model import read_model

LLAMA = factory.pair("general.architecture", factory.STRING, "llama")
VECTOR = factory.tensor("a", Type.F32, (4,))


def refusal(data: bytes) -> str:
    """The one line with which `data` is refused, within a second."""
    start = time.perf_counter()
    with pytest.raises(GGUFShardError) as caught:
        parse_header(data, "model.gguf")
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert message.startswith("model.gguf: offset ") and "\n" not in message
    assert len(message) < 400
    return message


# ---- what it reads ----


def assert_read_alike(path: Path) -> None:
    """`read_gguf` against the `gguf` package's own reader, field by field."""
    ours, theirs = read_gguf(path), GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert fields == {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in ours.metadata.items()
    }
    assert ours.alignment == theirs.alignment
    assert [(t.name, t.ggml_type, t.shape, t.offset, t.bytes) for t in ours.tensors] == [
        (t.name, t.tensor_type, tuple(t.shape.tolist()), t.data_offset, t.n_bytes)
        for t in theirs.tensors
    ]


def test_reads_real_models_as_the_gguf_package_does(models: Path) -> None:
    paths = sorted(models.glob("*.gguf"))
    assert paths
    for path in paths:
        assert_read_alike(path)


@pytest.mark.no_cover
def test_reads_vocabularies(models: Path) -> None:
    """All of them, but only the smallest beside the `gguf` package: it takes 5 s for the others."""
    by_size = sorted((models / "vocab").glob("*.gguf"), key=lambda path: path.stat().st_size)
    assert_read_alike(by_size[0])
    for path in by_size:
        metadata = read_gguf(path).metadata
        tokens = metadata["tokenizer.ggml.tokens"]
        assert len(set(tokens)) == len(tokens) == len(metadata["tokenizer.ggml.token_type"])


def test_every_kind_of_value() -> None:
    f = factory
    pairs = [
        f.pair("u8", f.U8, 255), f.pair("i8", f.I8, -128), f.pair("u16", f.U16, 65535),
        f.pair("i16", f.I16, -32768), f.pair("u32", f.U32, 2**32 - 1),
        f.pair("i32", f.I32, -(2**31)), f.pair("f32", f.F32, 0.5), f.pair("bool", f.BOOL, 1),
        f.pair("u64", f.U64, 2**64 - 1), f.pair("i64", f.I64, -(2**63)), f.pair("f64", f.F64, 0.1),
        f.pair("text", f.STRING, "π"), f.pair("empty", f.STRING, ""),
        f.pair("bytes", f.STRING, b"\xff\x00"),
        f.array("numbers", f.I16, [1, -2, 3]), f.array("none", f.F32, []),
        f.array("flags", f.BOOL, [0, 1]), f.array("texts", f.STRING, ["", "a", b"\x80"]),
    ]  # fmt: skip
    metadata = parse_header(f.gguf(pairs=pairs), "x").metadata
    arrays = {key: metadata.pop(key) for key in ("numbers", "none", "flags")}
    assert metadata == {
        "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31),
        "f32": 0.5, "bool": True, "u64": 2**64 - 1, "i64": -(2**63), "f64": 0.1,
        "text": "π", "empty": "", "bytes": "\udcff\0", "texts": ["", "a", "\udc80"],
    }  # fmt: skip
    assert arrays["numbers"].tolist() == [1, -2, 3] and arrays["numbers"].dtype == np.int16
    assert arrays["none"].tolist() == [] and arrays["none"].dtype == np.float32
    assert arrays["flags"].tolist() == [False, True] and arrays["flags"].dtype == bool


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
def test_versions_and_alignments(version: int, alignment: int) -> None:
    tensors = [VECTOR, factory.tensor("b", Type.Q8_0, (32, 3))]
    data = factory.gguf(tensors, alignment=alignment, version=version)
    header = parse_header(data, "x")
    assert (header.version, header.alignment) == (version, alignment)
    assert header.data_offset % alignment == 0
    for read, written in zip(header.tensors, tensors, strict=True):
        assert data[read.offset : read.offset + read.bytes] == written.data


def test_no_tensors() -> None:
    header = parse_header(factory.gguf(pairs=[LLAMA]), "x")
    assert header.tensors == () and header.data_offset == header.header_bytes


def test_unknown_types_reach_to_the_next_tensor() -> None:
    strange = Tensor("strange", factory.UNKNOWN_TYPE, (3, 5), b"x" * 40)
    data = factory.gguf([strange, VECTOR, Tensor("last", 37, (1,), b"y" * 9)])
    first, _, last = parse_header(data, "x").tensors
    assert (first.ggml_type, first.type_id, first.bytes) == (None, factory.UNKNOWN_TYPE, 64)
    assert (last.ggml_type, last.type_id, last.bytes) == (None, 37, 9)


def test_offsets_may_come_in_any_order() -> None:
    behind = Tensor("behind", 0, (8,), b"", offset=32)
    front = Tensor("front", 0, (8,), bytes(64), offset=0)
    header = parse_header(factory.gguf([behind, front]), "x")
    assert [t.offset - header.data_offset for t in header.tensors] == [32, 0]


def test_names_may_have_63_bytes() -> None:
    header = parse_header(factory.gguf([factory.tensor("n" * 63, Type.F32, (1,))]), "x")
    assert header.tensors[0].name == "n" * 63


# ---- what it refuses ----

f = factory
KEY = f.string("k")


def raw_pair(kind: int, content: bytes) -> bytes:
    return f.header([KEY + struct.pack("<I", kind) + content], []) + bytes(64)


def with_info(info: bytes) -> bytes:
    return f.header([], [info]) + bytes(256)


def raw_info(name: bytes = b"a", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0,
             n_dims: int | None = None) -> bytes:  # fmt: skip
    count = len(dims) if n_dims is None else n_dims
    shape = struct.pack(f"<I{len(dims)}Q", count, *dims)
    return f.string(name) + shape + struct.pack("<IQ", kind, offset)


MALFORMED = {
    "empty": (b"", "magic"),
    "wrong magic": (f.gguf([VECTOR], magic=b"GGML"), "magic: b'GGML' is not b'GGUF'"),
    "swapped magic": (f.gguf([VECTOR], magic=b"FUGG"), "magic"),
    "version 0": (f.gguf([VECTOR], version=0), "version: 0x0 is not supported"),
    "version 1": (f.gguf([VECTOR], version=1), "version: 0x1 is not supported"),
    "version 99": (f.gguf([VECTOR], version=99), "version: 0x63 is not supported"),
    "big-endian": (f.gguf([], [], order=">"), "big-endian files are not supported"),
    "n_kv 2^63": (f.gguf([VECTOR], n_pairs=2**63), "n_kv: 9223372036854775808 do not fit"),
    "n_kv 2^64-1": (f.gguf([VECTOR], n_pairs=2**64 - 1), "n_kv"),
    "n_kv one too many": (f.gguf([], [LLAMA], n_pairs=2), "key 1 length: needs 8 bytes, 0 remain"),
    "n_kv too many": (f.gguf([], [LLAMA], n_pairs=5), "n_kv: 5 do not fit in the 45 bytes left"),
    "n_tensors 2^63": (f.gguf([VECTOR], n_tensors=2**63), "n_tensors: 9223372036854775808 do not"),
    "n_tensors too many": (f.header([], [], n_tensors=1), "n_tensors: 1 do not fit"),
    "array of 2^40": (f.gguf([], [f.array("k", f.U8, [1], count=2**40)]), "'k' length"),
    "string array of 2^40": (f.gguf([], [f.array("k", f.STRING, ["a"], count=2**40)]), "'k' len"),
    "array of 2^61 u64": (f.gguf([], [f.array("k", f.U64, [1], count=2**61)]), "'k' length"),
    "string of 2^50": (raw_pair(f.STRING, struct.pack("<Q", 2**50) + b"abc"), "'k' length"),
    "string of 2^64-1": (raw_pair(f.STRING, struct.pack("<Q", 2**64 - 1)), "'k' length"),
    "long string in an array": (
        raw_pair(f.ARRAY, struct.pack("<IQQ", f.STRING, 1, 2**50)), r"'k'\[0\]: length"),
    "strings run out": (
        f.header([f.array("k", f.STRING, [b"x" * 20, b""], count=3)], []), r"'k'\[2\]"),
    "nested array": (raw_pair(f.ARRAY, struct.pack("<IQ", f.ARRAY, 1)), "nested arrays"),
    "array of unknown items": (raw_pair(f.ARRAY, struct.pack("<IQ", 13, 1)), "item type 13"),
    "unknown value type": (raw_pair(13, b""), "'k': value type 13 is unknown"),
    "bool 2": (raw_pair(f.BOOL, b"\x02"), "a bool is neither 0 nor 1"),
    "bool 2 in an array": (f.gguf([], [f.array("k", f.BOOL, [0, 2])]) + bytes(9), "a bool"),
    "empty key": (f.gguf([], [f.pair("", f.U32, 1)]), r"key 0: length 0 is not within 1\.\.65535"),
    "long key": (f.gguf([], [f.pair("k" * 65536, f.U32, 1)]), "key 0: length 65536"),
    "duplicate key": (f.gguf([], [LLAMA, LLAMA]), "key 1: 'general.architecture' is given twice"),
    "long duplicate key": (f.gguf([], [f.pair("\n" * 60000, f.U8, 1)] * 2), "given twice"),
    "alignment 0": (f.gguf([], [f.pair("general.alignment", f.U32, 0)]), "alignment: 0 is not"),
    "alignment 3": (f.gguf([], [f.pair("general.alignment", f.U32, 3)]), "alignment: 3 is not"),
    "alignment 2^31": (
        f.gguf([], [f.pair("general.alignment", f.U32, 2**31)]), "alignment: 2147483648 is not"),
    "alignment -32": (f.gguf([], [f.pair("general.alignment", f.I32, -32)]), "alignment: -32"),
    "alignment a string": (
        f.gguf([], [f.pair("general.alignment", f.STRING, "32\n")]), r"alignment: '32\\n' is not"),
    "alignment a float": (f.gguf([], [f.pair("general.alignment", f.F32, 32)]), "alignment: 32.0"),
    "alignment a bool": (f.gguf([], [f.pair("general.alignment", f.BOOL, 1)]), "alignment: True"),
    "alignment an array": (
        f.gguf([], [f.array("general.alignment", f.U8, range(200))]), "alignment: array"),
    "empty name": (with_info(raw_info(b"")), r"name of tensor 0: length 0 is not within 1\.\.63"),
    "name of 64": (with_info(raw_info(b"n" * 64)), "name of tensor 0: length 64"),
    "name of 2^50": (f.header([], [struct.pack("<Q", 2**50)]) + bytes(99), "name of tensor 0 len"),
    "duplicate name": (f.gguf([VECTOR, VECTOR]), "tensor 'a': the name is given twice"),
    "no dimensions": (with_info(raw_info(dims=())), "0 dimensions are not within"),
    "five dimensions": (with_info(raw_info(dims=(1,) * 5)), "5 dimensions are not within"),
    "2^32-1 dimensions": (with_info(raw_info(n_dims=2**32 - 1)), "4294967295 dimensions"),
    "a dimension of zero": (with_info(raw_info(dims=(4, 0))), r"shape \[4, 0\] has a zero"),
    "product of 2^64": (with_info(raw_info(dims=(2**32, 2**32))), "do not lie in the file"),
    "product wraps to 4": (with_info(raw_info(dims=(2**62 + 1, 4))), "do not lie in the file"),
    "product of 2^254": (with_info(raw_info(dims=(2**63,) * 4)), "do not lie in the file"),
    "half a block": (with_info(raw_info(dims=(33,), kind=int(Type.Q8_0))),
                     "rows of 33 are not whole blocks of 32"),
    "rows of half a block": (with_info(raw_info(dims=(16, 2), kind=int(Type.Q8_0))), "rows of 16"),
    "offset past the end": (with_info(raw_info(offset=2**20)), "do not lie in the file"),
    "offset wraps": (with_info(raw_info(offset=2**64 - 32)), "do not lie in the file"),
    "unknown type past the end": (with_info(raw_info(kind=999, offset=2**20)), "do not lie"),
    "unknown type without bytes": (f.gguf([Tensor("a", 999, (4,), b"")]), "0 bytes at"),
    "end past the end": (with_info(raw_info(dims=(100,))), "400 bytes at 64 do not lie"),
    "misaligned": (with_info(raw_info(offset=4)), "offset 4 is not a multiple of 32"),
    "overlap": (
        f.gguf([f.tensor("a", Type.F32, (9,)), Tensor("b", 0, (32,), bytes(128), offset=32)]),
        "'a': 36 bytes at 0 overlap the next tensor"),
    "same offset": (f.gguf([VECTOR, Tensor("b", 0, (4,), bytes(16), offset=0)]), "same offset"),
    "same offset, unknown type": (
        f.gguf([Tensor("a", 999, (4,), bytes(16)), Tensor("b", 998, (4,), bytes(16), offset=0)]),
        "same offset"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers_are_refused(case: str) -> None:
    data, reason = MALFORMED[case]
    assert re.search(reason, refusal(data))


def test_truncation_anywhere_is_refused() -> None:
    data = factory.small_model()
    header = parse_header(data, "x")
    end_of_tensors = max(t.offset + t.bytes for t in header.tensors if t.ggml_type is not None)
    ends = [*range(header.data_offset + 1), *range(header.data_offset, end_of_tensors, 97)]
    assert all(refusal(data[:end]) for end in ends)


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for start in (b"", b"GGUF\3\0\0\0", struct.pack("<4sIQQ", b"GGUF", 3, 1, 1)):
        try:
            header = parse_header(start + data, "model.gguf")
        except GGUFShardError as error:
            assert "\n" not in str(error)
        else:
            assert header.file_bytes == len(start + data)


@pytest.mark.no_cover
@settings(max_examples=300)
@given(st.data())
def test_any_damage_to_a_header_is_read_or_refused(data: st.DataObject) -> None:
    model = bytearray(factory.small_model())
    end = parse_header(model, "x").header_bytes
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, end - 1), st.integers(0, 255)), max_size=8)
    ):
        model[place] = byte
    try:
        header = parse_header(bytes(model), "model.gguf")
    except GGUFShardError as error:
        assert "\n" not in str(error)
    else:
        spans = sorted((t.offset, t.offset + t.bytes) for t in header.tensors)
        assert all(header.data_offset <= a < b <= len(model) for a, b in spans)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_errors_name_the_path(tmp_path: Path) -> None:
    path = factory.write(tmp_path / "x.gguf", b"GGUF")
    with pytest.raises(GGUFShardError, match=r"x\.gguf: offset 4: version: needs 4 bytes, 0 rem"):
        read_gguf(path)
    with pytest.raises(GGUFShardError, match=r"e\.gguf: offset 0: magic: the file is empty"):
        read_gguf(factory.write(tmp_path / "e.gguf", b""))
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "missing.gguf")


# ---- split models ----


def parts_of(n: int) -> list[list[Tensor]]:
    return [[factory.tensor(f"t{i}", Type.F32, (8,), seed=i)] for i in range(n)]


def test_reads_all_parts(tmp_path: Path) -> None:
    first = factory.split_model(tmp_path, parts_of(3))
    headers = read_model(first)
    assert [Path(h.name).name for h in headers] == [
        f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]
    assert [t.name for h in headers for t in h.tensors] == ["t0", "t1", "t2"]


def test_a_model_of_one_part_is_no_split_model(tmp_path: Path) -> None:
    path = factory.split_model(tmp_path, parts_of(1)).rename(tmp_path / "any.gguf")
    assert len(read_model(path)) == 1


def test_parts_must_be_there_and_named(tmp_path: Path) -> None:
    first = factory.split_model(tmp_path, parts_of(3))
    second = first.with_name("model-00002-of-00003.gguf")
    with pytest.raises(GGUFShardError, match=r"its first, NAME-00001-of-00003\.gguf"):
        read_model(second)
    renamed = factory.write(tmp_path / "x.gguf", first.read_bytes())
    with pytest.raises(GGUFShardError, match="taken by the name of its first"):
        read_model(renamed)
    second.unlink()
    with pytest.raises(GGUFShardError, match=r"part model-00002-of-00003\.gguf is missing"):
        read_model(first)


def test_parts_must_be_in_order_and_apart(tmp_path: Path) -> None:
    first = factory.split_model(tmp_path, parts_of(2))
    second = first.with_name("model-00002-of-00002.gguf")
    good = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(GGUFShardError, match=r"says part 0 of 2, not 1 of 2"):
        read_model(first)
    second.write_bytes(good)
    twice = factory.split_model(tmp_path, [[VECTOR], [VECTOR]])
    with pytest.raises(GGUFShardError, match="tensor 'a': in two parts"):
        read_model(twice)


SPLIT_PAIRS = {
    "split.count": (f.pair("split.count", f.STRING, "2"), "split.count: '2' is not an integer"),
    "split.count array": (f.array("split.count", f.U8, [1, 2]), r"split.count: array\(\[1, 2\]"),
    "split.count negative": (f.pair("split.count", f.I32, -2), "a model of -2 parts"),
    "split.count huge": (f.pair("split.count", f.U64, 2**63), "parts is taken by the name"),
}


@pytest.mark.parametrize("case", SPLIT_PAIRS)
def test_malformed_split_count(case: str, tmp_path: Path) -> None:
    pair, reason = SPLIT_PAIRS[case]
    path = factory.write(tmp_path / "m-00001-of-00002.gguf", factory.gguf([VECTOR], [pair]))
    with pytest.raises(GGUFShardError, match=reason) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([f.array("split.no", f.U16, [0, 1])], "split.no: array"),
        ([], "split.no: None is not an integer"),
        (
            [f.pair("split.no", f.U16, 0), f.array("split.tensors.count", f.I32, [2, 2])],
            "split.tensors.count: array",
        ),
        (
            [f.pair("split.no", f.U16, 0), f.pair("split.tensors.count", f.I32, 7)],
            "split.tensors.count: 7, but the parts hold 2",
        ),
    ],
)
def test_malformed_split_numbers(pairs: list[bytes], reason: str, tmp_path: Path) -> None:
    first = factory.split_model(tmp_path, parts_of(2), stem="m")
    count = f.pair("split.count", f.U16, 2)
    first.write_bytes(factory.gguf(parts_of(1)[0], [count, *pairs]))
    with pytest.raises(GGUFShardError, match=reason):
        read_model(first)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (factory.header([], [], n_pairs=(1 << 15) + 1) + bytes(1 << 19), "n_kv: 32769 are more"),
        (factory.header([], [], n_tensors=(1 << 15) + 1) + bytes(1 << 21), "n_tensors: 32769 are"),
        (factory.header([factory.array("x", factory.STRING, [], (1 << 20) + 1)], [])
         + bytes(1 << 24), "'x' length: 1048577 are more"),
        (factory.header([factory.array("x", factory.U8, [], 1 << 26)], []) + bytes(65 << 20),
         "do not fit"),
    ],
    ids=["keys", "tensors", "strings", "a header of 64 MiB"],
)  # fmt: skip
def test_more_than_any_model_has(data: bytes, says: str) -> None:
    """Though the file is as large as it says."""
    with pytest.raises(GGUFShardError, match=says):
        parse_header(data, "model.gguf")


def test_headers_are_read_in_steps(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = read_gguf(model)
    for first in (1, 8, 24, usual.header_bytes - 1, usual.header_bytes, usual.header_bytes + 1):
        steps = (first, 2 * first, gguf_file.MAX_HEADER_BYTES)
        monkeypatch.setattr(gguf_file, "_HEADER_READS", steps)
        assert read_gguf(model).tensors == usual.tensors
        with pytest.raises(GGUFShardError, match="do not lie in the file"):
            read_gguf(factory.write(model.with_name("cut"), model.read_bytes()[:-5000]))


def test_a_header_of_megabytes(tmp_path: Path) -> None:
    words = [f"word {i}" for i in range(150_000)]
    data = factory.gguf(
        [factory.blocks("a", Type.F32, 8)], [factory.array("tokens", factory.STRING, words)]
    )
    header = read_gguf(factory.write(tmp_path / "model.gguf", data))
    assert header.header_bytes > 2 << 20
    assert header.metadata["tokens"] == words and header.tensors[0].name == "a"
