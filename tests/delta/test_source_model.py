"""SHA-256 of a model's files, in pieces that are read while others are hashed."""

from __future__ import annotations

import hashlib
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


def test_what_was_read_last_is_good_while_it_is_hashed(model: Path) -> None:
    """Memory is used again, but not before its bytes are hashed, nor under the reader's hands."""
    content = model.read_bytes()
    expected = (hashlib.sha256(content).hexdigest(),)
    with (
        open_source(model) as source,
        HashedReads(source, "one") as one,
        HashedReads(source, "other") as other,
    ):
        for offset in range(0, len(content) - 99, 99):
            pieces = [hashed.read(0, offset, 99) for hashed in (one, other, one)]
            assert {piece.tobytes() for piece in pieces} == {content[offset : offset + 99]}
        assert one.sha256() == other.sha256() == expected
