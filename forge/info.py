"""`describe`: what a GGUF file or a sharded model holds, as plain data and as text."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from forge.journal import finish_journal
from forge.sgmap_reader import load_map
from forge.sizes import format_bytes
from forge.split_model import read_model

_SHOWN_ITEMS = 3
_SHOWN_TEXT = 60


def _shown(value: Any) -> Any:
    """A metadata value short enough to print."""
    if isinstance(value, np.ndarray | list):
        head = [_shown(item) for item in list(value[:_SHOWN_ITEMS])]
        if len(value) <= _SHOWN_ITEMS:
            return head
        return f"[{', '.join(map(str, head))}, ...] ({len(value)} items)"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    if isinstance(value, str) and len(value) > _SHOWN_TEXT:
        return value[:_SHOWN_TEXT] + f"... ({len(value)} characters)"
    return value


def printable(text: str) -> str:
    """Text of a file as it may go to a terminal: control characters and stray bytes escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def describe_gguf(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Files, metadata and tensors of a GGUF model."""
    parts = read_model(path)
    tensors = [
        {
            "name": t.name,
            "type": t.ggml_type.name if t.ggml_type is not None else f"unknown ({t.type_id})",
            "shape": list(t.shape),
            "bytes": t.bytes,
        }
        for part in parts
        for t in part.tensors
    ]
    return {
        "kind": "gguf",
        "files": [{"name": part.name, "bytes": part.file_bytes} for part in parts],
        "version": parts[0].version,
        "alignment": parts[0].alignment,
        "metadata": {key: _shown(value) for key, value in parts[0].metadata.items()},
        "tensors": tensors,
    }


def describe_map(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Pages, zones and tensors of a sharded model."""
    finish_journal(path)  # an interrupted update may have left half a map
    m = load_map(path)
    return {
        "kind": "sgmap",
        "source": [vars(source) for source in m.source],
        "pages": m.n_pages,
        "pages_per_shard": m.pages_per_shard,
        "shards": m.n_shards,
        "memory_layout": m.atlas.memory_layout,
        "cache_policy": m.atlas.cache_policy,
        "prefetch_distance": m.atlas.prefetch_distance,
        "priority_zones": [
            {"zone": zone, "first_page": first, "pages": pages}
            for zone, first, pages in m.atlas.priority_zones
        ],
        "tensors": [
            {
                "name": t.name,
                "type": t.ggml_type.name,
                "shape": list(t.shape),
                "pages": sum(s.pages for s in t.slices),
                "zone": t.slices[0].zone,
            }
            for t in m.tensors
        ],
    }


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`describe_map` of a `.sgmap` file, `describe_gguf` of anything else."""
    return describe_map(path) if Path(path).suffix == ".sgmap" else describe_gguf(path)


def describe_text(facts: dict[str, Any]) -> str:
    """The facts of `describe` for people."""
    lines = []
    types = Counter(tensor["type"] for tensor in facts["tensors"])
    kinds = ", ".join(f"{count} {name}" for name, count in types.most_common())
    if facts["kind"] == "gguf":
        for file in facts["files"]:
            size = format_bytes(file["bytes"])
            lines.append(f"{printable(file['name'])}: GGUF v{facts['version']}, {size}")
        lines += [printable(f"  {key} = {value}") for key, value in facts["metadata"].items()]
        lines.append(f"{len(facts['tensors'])} tensors ({kinds})")
        lines += [
            f"  {printable(t['name']):<34} {t['type']:<8} {t['shape']} {format_bytes(t['bytes'])}"
            for t in facts["tensors"]
        ]
        return "\n".join(lines)
    for source in facts["source"]:
        lines.append(f"source {printable(source['name'])}: {format_bytes(source['bytes'])}")
        lines.append(f"  sha256 {source['sha256']}")
    lines.append(
        f"{facts['pages']} pages in {facts['shards']} shards of {facts['pages_per_shard']}, "
        f"{facts['memory_layout']}, policy {facts['cache_policy']}, "
        f"prefetch distance {facts['prefetch_distance']}"
    )
    for zone in facts["priority_zones"]:
        end = zone["first_page"] + zone["pages"] - 1
        lines.append(f"  zone {zone['zone']:<6} pages {zone['first_page']}..{end}")
    lines.append(f"{len(facts['tensors'])} tensors ({kinds})")
    lines += [
        f"  {printable(t['name']):<34} {t['type']:<8} {t['shape']} {t['pages']} pages, {t['zone']}"
        for t in facts["tensors"]
    ]
    return "\n".join(lines)
