"""What is said of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from experiments.validation import gguf_factory as factory
from experiments.validation.gguf_factory import Tensor
from forge.info import describe, describe_text

f = factory


def test_gguf(model: Path) -> None:
    facts = describe(model)
    assert facts["kind"] == "gguf"
    assert facts["files"] == [{"name": str(model), "bytes": model.stat().st_size}]
    assert (facts["version"], facts["alignment"]) == (3, 32)
    assert facts["metadata"] == {"general.architecture": "llama", "some.list": ["a", "bc"]}
    by_name = {t["name"]: t for t in facts["tensors"]}
    assert by_name["token_embd.weight"] == {
        "name": "token_embd.weight", "type": "Q8_0", "shape": [32, 130], "bytes": 130 * 34,
    }  # fmt: skip
    assert by_name["unknown.weight"]["type"] == "unknown (999)"
    text = describe_text(facts)
    assert text.startswith(f"{model}: GGUF v3, {model.stat().st_size / 1000:.2f} kB\n")
    assert "  general.architecture = llama\n" in text
    assert "6 tensors (1 Q8_0, 1 F32, 1 Q4_0, 1 F16, 1 unknown (999), 1 Q6_K)" in text


def test_sgmap(sharded: Path) -> None:
    facts = describe(sharded)
    assert (facts["kind"], facts["pages_per_shard"]) == ("sgmap", 1)
    assert facts["pages"] == facts["shards"]
    assert [zone["zone"] for zone in facts["priority_zones"]] == ["high", "normal", "cold"]
    by_name = {t["name"]: t for t in facts["tensors"]}
    assert "unknown.weight" not in by_name
    assert by_name["blk.0.ffn_gate_exps.weight"] == {
        "name": "blk.0.ffn_gate_exps.weight", "type": "F16", "shape": [32, 4, 2], "pages": 2,
        "zone": "cold",
    }  # fmt: skip
    text = describe_text(facts)
    assert text.startswith("source model.gguf: ")
    assert "shards of 1, column_major, policy lru, prefetch distance 8" in text
    assert "\n  zone high   pages 0..0\n" in text
    assert "5 tensors (" in text and " 2 pages, cold" in text


def test_long_values_are_shortened(tmp_path: Path) -> None:
    pairs = [
        f.pair("text", f.STRING, "x" * 100),
        f.array("numbers", f.U16, range(100)),
        f.array("few", f.F32, [0.5, 1.5]),
        f.array("texts", f.STRING, ["y" * 100, "b", "c", "d"]),
    ]
    metadata = describe(factory.write(tmp_path / "m.gguf", f.gguf(pairs=pairs)))["metadata"]
    assert metadata["text"] == "x" * 60 + "... (100 characters)"
    assert metadata["numbers"] == "[0, 1, 2, ...] (100 items)"
    assert metadata["few"] == [0.5, 1.5]
    assert metadata["texts"] == f"[{'y' * 60}... (100 characters), b, c, ...] (4 items)"


def test_hostile_values_can_be_printed(tmp_path: Path) -> None:
    """Not UTF-8, control characters for the terminal, numbers that JSON lacks."""
    pairs = [
        f.pair("bytes", f.STRING, b"\xff\x1b[2J\n"),
        f.pair("nan", f.F32, float("nan")),
        f.array("inf", f.F64, [float("inf")]),
    ]
    tensor = Tensor(b"\xfe\x1b[31m", int(Type.F32), (1,), b"1234")
    facts = describe(factory.write(tmp_path / "m.gguf", f.gguf([tensor], pairs)))
    json.loads(json.dumps(facts), parse_constant=pytest.fail)
    text = describe_text(facts)
    assert "\x1b" not in text
    text.encode()
    assert r"bytes = \udcff\x1b[2J\n" in text
    assert "nan = nan" in text and "inf = ['inf']" in text
