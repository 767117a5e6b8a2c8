"""The file of a patch: what is damaged is seen, and what lies is refused, however it is applied."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from gguf import GGMLQuantizationType as T

from delta.compression import compress_streams
from delta.diff import create_patch
from delta.page_coding import MODE_NAMES, ORDERED, RAW, SPARSE
from delta.patch_file import (
    FORWARD,
    PageGroup,
    PatchReader,
    PatchWriter,
    render_group,
)
from experiments.validation import gguf_factory as factory
from experiments.validation import hostile_patches as hostile
from experiments.validation.hostile_patches import (
    Case,
    Group,
    Patch,
    having,
    material,
)
from experiments.validation.lying_patches import ALL
from forge.errors import GGUFShardError
from forge.pending_file import PendingFile
from tests.delta.model_pairs import PAIRS
from tests.delta.refusals import refused_every_way


def refusal(path: Path, data: bytes | None = None) -> str:
    """What the reader says of a patch that is wrong."""
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(GGUFShardError) as caught:
        PatchReader(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and said.isprintable() and len(said) < 600, said
    return said


# ---- damage ----


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A model, and a reversible patch of a few hundred bytes for it."""
    folder = tmp_path_factory.mktemp("small")
    tensors = [factory.tensor("a.weight", T.F16, (64, 80), 1)]
    base = factory.write(folder / "base.gguf", factory.gguf(tensors, PAIRS))
    data = bytearray(base.read_bytes())
    data[-100:-90] = bytes(10)
    target = factory.write(folder / "target.gguf", bytes(data) + b"tail")
    create_patch(base, target, folder / "p", reversible=True)
    return base.read_bytes(), (folder / "p").read_bytes()


def test_any_bit_that_flips_is_seen(small: tuple[bytes, bytes], tmp_path: Path) -> None:
    path = factory.write(tmp_path / "p", small[1])
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(small[1]):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), place)
                refusal(path)
            os.pwrite(file.fileno(), bytes([byte]), place)
    PatchReader(path).close()


def test_any_end_that_is_missing_is_seen(small: tuple[bytes, bytes], tmp_path: Path) -> None:
    _, patch = small
    for length in range(len(patch)):
        refusal(tmp_path / "p", patch[:length])


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 4, b"x" * 32, b"y" * 5000])
def test_bytes_behind_the_end_are_seen(
    small: tuple[bytes, bytes], tmp_path: Path, tail: bytes
) -> None:
    refusal(tmp_path / "p", small[1] + tail)


def test_nothing_comes_of_a_damaged_patch(small: tuple[bytes, bytes], tmp_path: Path) -> None:
    base, patch = small
    flipped = []
    for place in range(0, len(patch), len(patch) // 12):
        damaged = bytearray(patch)
        damaged[place] ^= 1 << place % 8
        flipped.append(bytes(damaged))
    cut = [patch[:length] for length in (0, 7, 8, 55, 56, len(patch) - 33, len(patch) - 1)]
    for data in (*flipped, *cut, patch + b"\0"):
        for reverse in (False, True):
            (said,) = refused_every_way(tmp_path, base, data, reverse)
            assert said.startswith("hostile.sgpatch: ")


def test_what_is_no_patch(tmp_path: Path) -> None:
    assert "magic" in refusal(tmp_path / "p", b"")
    assert "magic" in refusal(tmp_path / "p", b"GGUF" + bytes(1000))
    with pytest.raises(GGUFShardError, match="No such file"):
        PatchReader(tmp_path / "none")
    with pytest.raises(GGUFShardError, match="directory"):
        PatchReader(tmp_path)


# ---- what is right ----


def group_of(pages: list[int], mode: int = RAW, directions: int = FORWARD) -> PageGroup:
    return PageGroup(
        T.F16, mode, directions, np.array(pages), 4088 * len(pages), 3 * (mode in (SPARSE, ORDERED))
    )


@pytest.mark.parametrize(
    "pages", [[0], [1], [255], [256], [257], [65536], [65537], [1 << 32], [(1 << 40) - 1],
              [0, 1, 2], [0, 256, 258], [7, 1 << 20, 1 << 40]]
)  # fmt: skip
@pytest.mark.parametrize("mode", range(len(MODE_NAMES)))
def test_groups_come_back(tmp_path: Path, pages: list[int], mode: int) -> None:
    """Page numbers of any width, and streams, compressed or not."""
    group = group_of(pages, mode)
    rng = np.random.default_rng(1)
    streams = [rng.integers(0, 3 if i % 2 else 256, n).astype(np.uint8)
               for i, n in enumerate(group.stream_sizes())]  # fmt: skip
    right = material()
    rendered = render_group(group, compress_streams(streams, 3))
    data = hostile.sealed(head_and_plan(right) + rendered + bytes(4))
    (tmp_path / "p").write_bytes(data)
    with PatchReader(tmp_path / "p") as patch:
        (stored,) = patch.groups
        found = stored.group
        assert (found.ggml_type, found.mode, found.directions) == (T.F16, mode, FORWARD)
        assert found.pages.tolist() == pages and found.pages.dtype == np.int64
        assert (found.n_bytes, found.n_items) == (group.n_bytes, group.n_items)
        for stream_found, expected in zip(patch.streams(stored), streams, strict=True):
            assert np.array_equal(stream_found, expected)


def test_streams_stay_as_they_are_while_others_are_read(tmp_path: Path) -> None:
    """Those that are not compressed, too."""
    groups = [group_of([page]) for page in (0, 1)]
    streams = [
        [np.random.default_rng(seed).integers(0, 256, n).astype(np.uint8) for n in g.stream_sizes()]
        for seed, g in enumerate(groups)
    ]
    rendered = [
        render_group(g, [s.data for s in own]) for g, own in zip(groups, streams, strict=True)
    ]
    data = hostile.sealed(head_and_plan(material()) + b"".join(rendered) + bytes(4))
    (tmp_path / "p").write_bytes(data)
    with PatchReader(tmp_path / "p") as patch:
        found = [patch.streams(stored) for stored in patch.groups]
        for own, expected in zip(found, streams, strict=True):
            assert [s.tolist() for s in own] == [s.tolist() for s in expected]


def head_and_plan(patch: Patch) -> bytes:
    return having(groups=(), end=b"")(patch).data()[:-32]


def test_a_writer_writes_what_the_format_says(tmp_path: Path) -> None:
    """The writer against the one of the tests, which knows the format alone."""
    right = material()
    (tmp_path / "right").write_bytes(right.data())
    with PatchReader(tmp_path / "right") as reader, PendingFile(tmp_path / "made", 0) as file:
        writer = PatchWriter(file, reader.plan)
        n_groups = 0
        for stored in reader.groups:
            writer.write_group(render_group(stored.group, reader.streams(stored)))
            n_groups += 1
        writer.finish()
        file.commit()
    made = (tmp_path / "made").read_bytes()
    assert n_groups == 3 and writer.n_bytes == len(made)
    assert made[-32:] == hashlib.sha256(made[:-32]).digest() and made[-36:-32] == bytes(4)
    magic, version, flags, page_bytes, plan_bytes = struct.unpack("<8sHHII", made[:20])
    assert (magic, version, flags, page_bytes) == (b"SGPATCH\0", 1, 0, 4096)
    offset = 20 + plan_bytes
    for group in right.groups:
        assert isinstance(group, Group)
        n_bytes, digest = struct.unpack_from("<IQ", made, offset)
        body = made[offset + 12 : offset + 12 + n_bytes]
        assert xxhash.xxh3_64_intdigest(body) == digest and body == group.body()
        offset += 12 + n_bytes
    assert offset == len(made) - 36


def test_a_group_is_checked_again_where_it_is_read(tmp_path: Path) -> None:
    """The file may change while it is open."""
    path = tmp_path / "p"
    data = bytearray(material().data())
    path.write_bytes(data)
    with PatchReader(path) as patch:
        first, stored, _ = patch.groups
        data[stored.offset + stored.n_bytes - 1] ^= 1
        path.write_bytes(data)
        patch.streams(first)
        with pytest.raises(GGUFShardError, match=f"offset {stored.offset}: group: its xxh3-64"):
            patch.streams(stored)


# ---- lies ----


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{of}: {name}") for of, cases in ALL.items()
             for name, case in cases.items()]
)  # fmt: skip
def test_lies_are_refused(tmp_path: Path, case: Case) -> None:
    patch = case.change(case.of())
    for said in refused_every_way(tmp_path, patch.base, patch.data()):
        assert said.startswith("hostile.sgpatch: ") and case.says in said, said
