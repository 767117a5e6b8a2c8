"""What `shard` writes, and that it writes all of it or nothing."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from experiments.validation import gguf_factory as factory
from forge import shard
from forge.errors import GGUFShardError
from forge.sgmap import MAX_PREFETCH_DISTANCE
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.sharded_model import ShardedModel
from forge.verify import verify_model


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_container_is_a_gguf_file(sharded: Path) -> None:
    m = load_map(sharded)
    reader = GGUFReader(sharded.with_name("core.gguf"))
    assert reader.fields["general.architecture"].contents() == "gguf-shard"
    assert reader.fields["general.alignment"].contents() == 4096
    pages, table = reader.tensors
    assert (pages.name, pages.tensor_type, pages.shape.tolist()) == (
        "pages", Type.I8, [4096, m.n_pages],
    )  # fmt: skip
    assert (table.name, table.tensor_type, table.shape.tolist()) == (
        "page_crc32", Type.I32, [m.n_pages],
    )  # fmt: skip
    assert pages.data_offset == 4096
    crcs = [zlib.crc32(page[:4088].tobytes()) for page in pages.data]
    assert table.data.view(np.uint32).tolist() == crcs
    assert m.page_crc32_xxh3_128 == xxhash.xxh3_128_hexdigest(np.array(crcs, "<u4").tobytes())
    for page, crc in zip(pages.data, crcs, strict=True):
        assert page[4088:].tobytes() == crc.to_bytes(4, "little") + b"PGCR"


def test_shards_have_their_digests(model: Path, tmp_path: Path) -> None:
    map_path = shard_model(model, tmp_path / "out", ShardOptions(pages_per_shard=8))
    m = load_map(map_path)
    pages = (tmp_path / "out/core.gguf").read_bytes()[4096 : 4096 * (1 + m.n_pages)]
    assert m.n_pages % 8, "the last shard should be a short one"
    shards = [pages[i : i + 8 * 4096] for i in range(0, len(pages), 8 * 4096)]
    assert list(m.shard_xxh3_64) == [xxhash.xxh3_64_hexdigest(s) for s in shards]


def test_options_reach_the_map(model: Path, tmp_path: Path) -> None:
    options = ShardOptions("row_major", "pin", 3, 16)
    m = load_map(shard_model(model, tmp_path / "a/b", options))
    assert m.pages_per_shard == 16
    assert (m.atlas.memory_layout, m.atlas.cache_policy, m.atlas.prefetch_distance) == (
        "row_major", "pin", 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"memory_layout": "diagonal"}, "layout 'diagonal': not in"),
        ({"cache_policy": "guess"}, "policy 'guess': not in"),
        ({"prefetch_distance": -1}, r"prefetch distance -1: not in 0\.\.65536"),
        ({"prefetch_distance": MAX_PREFETCH_DISTANCE + 1}, "prefetch distance 65537"),
        *(
            ({"pages_per_shard": n}, f"pages per shard {n}: not a power of two up to 256")
            for n in (-1, 0, 3, 255, 512)
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(GGUFShardError, match=reason):
        ShardOptions(**options)


def test_source_header_is_kept(sharded: Path, model: Path) -> None:
    with ShardedModel(sharded) as opened:
        header = opened.source_header()
        assert header.metadata["general.architecture"] == "llama"
        assert header.file_bytes == model.stat().st_size
        tensors = {t.name: t for t in opened.map.tensors}
        for info in header.tensors:
            if info.ggml_type is not None:
                assert tensors[info.name].offset == info.offset
                assert tensors[info.name].shape == info.shape


def test_existing_files_stay_without_force(sharded: Path, model: Path) -> None:
    before = files_in(sharded.parent)
    with pytest.raises(GGUFShardError, match=r"core\.sgmap: exists already \(--force"):
        shard_model(model, sharded.parent)
    sharded.unlink()
    with pytest.raises(GGUFShardError, match=r"core\.gguf: exists already \(--force"):
        shard_model(model, sharded.parent)
    del before["core.sgmap"]
    assert files_in(sharded.parent) == before


def test_force_replaces_a_model_by_another(sharded: Path, tmp_path: Path) -> None:
    other = factory.write(tmp_path / "other.gguf", factory.small_model(seed=50))
    shard_model(other, sharded.parent, force=True)
    assert verify_model(sharded, against=other).ok


@pytest.mark.parametrize("name", ["core.gguf", "core.sgmap"])
def test_the_model_itself_is_not_overwritten(name: str, tmp_path: Path) -> None:
    model = factory.write(tmp_path / name, factory.small_model())
    with pytest.raises(GGUFShardError, match=rf"{name}: is the model itself"):
        shard_model(model, tmp_path, force=True)
    assert files_in(tmp_path) == {name: factory.small_model()}


def test_what_a_reader_would_refuse_is_not_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = model.rename(tmp_path / "back\\slash.gguf")
    with pytest.raises(GGUFShardError, match=r"slash\.gguf: a file name with a backslash"):
        shard_model(named, tmp_path / "out")
    monkeypatch.setattr("forge.sgmap_reader.MAX_MAP_BYTES", 1000)
    with pytest.raises(GGUFShardError, match="a map has at most 1000 bytes"):
        shard_model(named.rename(model), tmp_path / "out")
    assert files_in(tmp_path / "out") == {}


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "step",
    ["core_header", "scan_shards", "render_map", "commit_together", "pack_blocks", "pack_raw"],
)
@pytest.mark.parametrize("error", [GGUFShardError("broken"), KeyboardInterrupt()])
def test_an_error_at_any_step_changes_nothing(
    step: str, error: BaseException, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = factory.write(tmp_path / "other.gguf", factory.small_model(seed=9))
    before = files_in(tmp_path)
    monkeypatch.setattr(shard, step, fail_with(error))
    with pytest.raises(type(error)):
        shard_model(other, tmp_path, force=True)
    assert files_in(tmp_path) == before
    assert verify_model(sharded).ok


def test_the_kth_write_fails(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write the disk refuses, the old model stays; once none is, the new one is there."""
    other = factory.write(tmp_path / "other.gguf", factory.small_model(seed=9))
    before = files_in(tmp_path)
    pwrite = os.pwrite
    k = 0
    while True:
        left = [k]

        def failing(descriptor: int, data: Any, offset: int, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return pwrite(descriptor, data[: max(1, len(data) // 2)], offset)

        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", failing)
            try:
                shard_model(other, tmp_path, force=True)
            except GGUFShardError as error:
                assert "No space left on device" in str(error)
                assert files_in(tmp_path) == before
            else:
                break
        k += 1 if k < 20 else 37
    assert k > 100
    assert verify_model(sharded, against=other).ok


def test_pages_written_wrongly_are_found_before_the_rename(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def lying(descriptor: int, data: Any, offset: int) -> int:
        if offset == 4096 * 6:
            pwrite(descriptor, b"\0" * len(data), offset)
            return len(data)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", lying)
    with pytest.raises(GGUFShardError, match=r"core\.gguf\.sgnew: page 5: wrong after writing"):
        shard_model(model, tmp_path / "out")
    assert files_in(tmp_path / "out") == {}


def test_a_source_that_changes_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_pages = shard.plan_pages

    def touching(*args: Any) -> Any:
        os.utime(model, ns=(1, 1))
        return plan_pages(*args)

    monkeypatch.setattr(shard, "plan_pages", touching)
    with pytest.raises(GGUFShardError, match=r"model\.gguf: changed while it was read"):
        shard_model(model, tmp_path / "out")
    assert files_in(tmp_path / "out") == {}


# ---- a writer that dies between the two renames ----


def interrupted(sharded: Path, source: Path) -> Path:
    """The folder as a writer leaves it that died after the map's rename; returns the map."""
    work = sharded.parent / "work"
    shard_model(source, work)
    os.replace(work / "core.gguf", sharded.with_name("core.gguf.sgnew"))
    os.replace(work / "core.sgmap", sharded)
    work.rmdir()
    return sharded


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return factory.write(tmp_path / "other.gguf", factory.small_model(seed=77))


def test_opening_finishes_what_a_dead_writer_began(sharded: Path, other: Path) -> None:
    interrupted(sharded, other)
    assert verify_model(sharded, against=other).ok
    assert not sharded.with_name("core.gguf.sgnew").exists()


def test_so_does_it_where_there_were_no_pages_before(sharded: Path, other: Path) -> None:
    interrupted(sharded, other)
    sharded.with_name("core.gguf").unlink()
    assert verify_model(sharded, against=other).ok


def test_remains_of_another_write_are_left_alone(sharded: Path, model: Path) -> None:
    remains = sharded.with_name("core.gguf.sgnew")
    remains.write_bytes(b"half a file")
    assert verify_model(sharded, against=model).ok
    assert remains.read_bytes() == b"half a file"
    shard_model(model, sharded.parent, force=True)
    assert not remains.exists()


def test_the_next_writer_finishes_before_it_takes_over(
    sharded: Path, other: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its own failure would take away the pages of the map that stands."""
    interrupted(sharded, other)
    monkeypatch.setattr(shard, "scan_shards", fail_with(GGUFShardError("broken")))
    with pytest.raises(GGUFShardError, match="broken"):
        shard_model(model, sharded.parent, force=True)
    assert verify_model(sharded, against=other).ok


def fail_to_rename(name: str, error: BaseException) -> Callable[[Path, Path], None]:
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if target.name == name:
            raise error
        replace(source, target)

    return failing


rename_errors = pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=["interrupt", "I/O"]
)


@rename_errors
def test_an_error_before_the_first_rename_changes_nothing(
    error: BaseException, sharded: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_in(sharded.parent)
    monkeypatch.setattr(os, "replace", fail_to_rename("core.sgmap", error))
    with pytest.raises(type(error)):
        shard_model(other, sharded.parent, force=True)
    assert files_in(sharded.parent) == before


@rename_errors
def test_an_error_between_the_renames_loses_nothing(
    error: BaseException, sharded: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail_to_rename("core.gguf", error))
        with pytest.raises(type(error)):
            shard_model(other, sharded.parent, force=True)
    assert sharded.with_name("core.gguf.sgnew").exists()
    assert verify_model(sharded, against=other).ok


@rename_errors
def test_an_error_right_after_the_first_rename_loses_nothing(
    error: BaseException, sharded: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("forge.pending_file.sync_folder", fail_with(error))
        with pytest.raises(type(error)):
            shard_model(other, sharded.parent, force=True)
    assert sharded.with_name("core.gguf.sgnew").exists()
    assert verify_model(sharded, against=other).ok


@pytest.mark.parametrize("name", ["core.gguf", "core.gguf.sgnew", "core.sgmap.sgnew"])
def test_the_model_itself_is_never_written_over(tmp_path: Path, model: Path, name: str) -> None:
    source = model.rename(tmp_path / name)
    before = source.read_bytes()
    with pytest.raises(GGUFShardError, match="is the model itself; choose another folder"):
        shard_model(source, tmp_path, force=True)
    assert source.read_bytes() == before
