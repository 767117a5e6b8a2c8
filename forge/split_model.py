"""A model in several files, as llama.cpp's `gguf-split` writes them: NAME-00001-of-00003.gguf, ...

Each file is a GGUF file with tensors of its own, which says its number, how many files there are
and how many tensors they hold together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader, read_gguf, shown

_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$", re.DOTALL)


def read_model(path: str | os.PathLike[str]) -> list[GGUFHeader]:
    """Headers of all files of a model; a split one is taken by naming its first part.

    Raises
    ------
    GGUFShardError
        If a part is missing, is not what its name says, two parts share a tensor, or an update in
        place was interrupted (the journal of a split model lies beside its first part).
    """
    first = read_gguf(path)
    n_parts = _split_number(first, "split.count", 0)
    if n_parts in (0, 1):
        return [first]
    match = _SPLIT_NAME.match(str(path))
    if match is None or int(match[3]) != n_parts or int(match[2]) != 1:
        raise GGUFShardError(
            f"{path}: split.count: a model of {n_parts} parts is taken by the name of its first, "
            f"NAME-00001-of-{n_parts:05d}.gguf"
        )
    parts = [first]
    for i in range(2, n_parts + 1):
        part = Path(f"{match[1]}-{i:05d}-of-{n_parts:05d}.gguf")
        if not part.exists():
            raise GGUFShardError(f"{path}: split.count: part {part.name} is missing")
        parts.append(read_gguf(part))
    check_parts(parts)
    return parts


def _split_number(part: GGUFHeader, key: str, default: int | None = None) -> int:
    """A number that llama.cpp's `gguf-split` wrote."""
    value = part.metadata.get(key, default)
    if type(value) is not int:
        raise GGUFShardError(f"{part.name}: {key}: {shown(value)} is not an integer")
    return value


def part_paths(first: Path, n_parts: int) -> list[Path]:
    """Files of a model of `n_parts` parts whose first one is called `first`; a name that is none of
    a first part gets the ending that makes it one."""
    if n_parts == 1:
        return [first]
    match = _SPLIT_NAME.match(first.name)
    stem = match[1] if match and int(match[2]) == 1 else first.stem
    return [first.with_name(f"{stem}-{i + 1:05d}-of-{n_parts:05d}.gguf") for i in range(n_parts)]


def is_later_part(name: str, first: str) -> bool:
    """Whether `name` is that of a part of the split model whose first file is called `first`."""
    ours, theirs = _SPLIT_NAME.fullmatch(first), _SPLIT_NAME.fullmatch(name)
    if ours is None or theirs is None or (ours[1], ours[3]) != (theirs[1], theirs[3]):
        return False
    return 1 == int(ours[2]) < int(theirs[2]) <= int(ours[3])


def check_parts(parts: Sequence[GGUFHeader]) -> None:
    """GGUFShardError unless these are the files of one model, in order."""
    if len(parts) == 1 and _split_number(parts[0], "split.count", 0) in (0, 1):
        return
    names: set[str] = set()
    for i, part in enumerate(parts):
        number, count = _split_number(part, "split.no"), _split_number(part, "split.count")
        if (number, count) != (i, len(parts)):
            raise GGUFShardError(
                f"{part.name}: split.no: says part {number} of {count}, not {i} of {len(parts)}"
            )
        for tensor in part.tensors:
            if tensor.name in names:
                raise GGUFShardError(f"{part.name}: tensor {tensor.name!r}: in two parts")
            names.add(tensor.name)
    total = _split_number(parts[0], "split.tensors.count", len(names))
    if total != len(names):
        raise GGUFShardError(
            f"{parts[0].name}: split.tensors.count: {total}, but the parts hold {len(names)}"
        )
