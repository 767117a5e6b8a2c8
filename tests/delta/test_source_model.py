"""SHA-256 of a model's files, in pieces that are read while others are hashed."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from delta import hashed_reads, source_model
from delta.hashed_reads import HashedReads
from delta.source_model import open_source
from experiments.validation import gguf_factory as factory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return factory.write(
        tmp_path / "model.gguf", factory.gguf([factory.tensor("a", T.F16, (9999,))])
    )


@pytest.mark.parametrize("piece_bytes", [1, 100, 4096, 10_000, 20_000, 1 << 20])
def test_hash_of_many_pieces(
    model: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    expected = (hashlib.sha256(model.read_bytes()).hexdigest(),)
    done: list[int] = []
    monkeypatch.setattr(source_model, "_HASH_CHUNK", piece_bytes)
    monkeypatch.setattr(hashed_reads, "_PIECE_BYTES", piece_bytes)
    with open_source(model) as source:
        assert source.sha256(done.append) == expected
        assert sum(done) == model.stat().st_size and max(done) <= piece_bytes
        with HashedReads(source, "base") as hashed:
            middle = hashed.read(0, 5000, 7000)  # what comes before is read for the hash alone
            assert middle.tobytes() == model.read_bytes()[5000:12000]
            hashed.read_into(0, 100, np.empty(50, np.uint8))  # and this comes late
            assert hashed.sha256() == expected


def test_memory_is_used_again_once_its_bytes_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not under the hands of the reader, who may hold a piece while he reads others."""
    tensors = [factory.tensor("a", T.F16, (250_000,))]
    path = factory.write(tmp_path / "model.gguf", factory.gguf(tensors))
    content = path.read_bytes()
    hash_piece = HashedReads._hash

    def slowly(hashed: HashedReads, part: int, offset: int, data: np.ndarray) -> None:
        time.sleep(0.001)
        hash_piece(hashed, part, offset, data)

    monkeypatch.setattr(HashedReads, "_hash", slowly)
    offsets = range(0, len(content) - 8192, 8192)
    with (
        open_source(path) as source,
        HashedReads(source, "one") as one,
        HashedReads(source, "other") as other,
    ):
        last = [(np.zeros(0, np.uint8), b"")] * 2
        for offset, back in zip(offsets, reversed(offsets), strict=True):
            for hashed, place in ((one, offset), (other, back)):
                piece = hashed.read(0, place, 8192)
                for held, expected in last:
                    assert held.tobytes() == expected
                last = [last[1], (piece, content[place : place + 8192])]
        digest = (hashlib.sha256(content).hexdigest(),)
        assert one.sha256() == digest == other.sha256()
