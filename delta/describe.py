"""What a patch holds, tensor by tensor: for `--json`, and for people."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from delta.page_grid import TENSOR
from delta.patch_file import FORWARD, PageGroup, PatchReader
from delta.patch_plan import Direction, FileRecord, PatchPlan
from forge.info import printable
from forge.sizes import format_bytes

_SHOWN_TENSORS = 40
_COUNTS = ("added", "modified", "deleted", "copied")


def describe_patch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Facts about the patch at `path`; GGUFShardError if it is damaged."""
    with PatchReader(path) as patch:
        groups = [(stored.group, stored.n_bytes) for stored in patch.groups]
        return patch_facts(patch.plan, groups, patch.n_bytes)


def patch_facts(
    plan: PatchPlan, groups: Iterable[tuple[PageGroup, int]], n_bytes: int
) -> dict[str, Any]:
    """Facts about a patch.

    Parameters
    ----------
    plan
        Its plan.
    groups
        Its groups, and the bytes that each takes in the file.
    n_bytes
        Its size.

    Returns
    -------
    dict
        `pages` and each of `tensors` count pages `added`, `modified`, `deleted` and, of those added
        and modified, `copied`. `bytes` of a tensor is its share, by pages, of its groups.
    """
    tensors = _count_tensors(plan.forward, [g for g in groups if g[0].directions & FORWARD])
    return {
        "kind": "patch",
        "bytes": n_bytes,
        "base": _files(plan.base),
        "target": _files(plan.target),
        "reversible": plan.reverse is not None,
        "header_bytes": sum(len(edit.data) for edit in plan.forward.headers),
        "pages": {name: sum(t[name] for t in tensors.values()) for name in _COUNTS},
        "tensors": [{"name": name, **counts} for name, counts in tensors.items()],
    }


def _files(files: Iterable[FileRecord]) -> list[dict[str, Any]]:
    return [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in files]


def _count_tensors(
    way: Direction, groups: Iterable[tuple[PageGroup, int]]
) -> dict[str, dict[str, int]]:
    starts = np.cumsum([0, *(run.n_pages for run in way.runs)])
    tensors: dict[str, dict[str, int]] = {}
    names = [run.name if run.kind == TENSOR else f"padding {run.name}" for run in way.runs]
    paired = np.array([run.n_paired for run in way.runs], np.int64)
    shares = np.zeros(len(names))

    def count(pages: np.ndarray, is_copy: bool) -> Iterator[tuple[int, int]]:
        """(run, pages) of what is counted."""
        of_run = np.searchsorted(starts, pages, "right") - 1
        is_added = pages - starts[of_run] >= paired[of_run]
        for i in np.unique(of_run).tolist():
            n = int((of_run == i).sum())
            n_added = int(is_added[of_run == i].sum())
            counts = tensors.setdefault(names[i], dict.fromkeys((*_COUNTS, "bytes"), 0))
            counts["added"] += n_added
            counts["modified"] += n - n_added
            counts["copied"] += n if is_copy else 0
            yield i, n

    for group, n_bytes in groups:
        known = group.pages[group.pages < starts[-1]]  # others are refused when it is applied
        for i, n in count(known, False):
            shares[i] += n_bytes * n / len(group.pages)
    for copy in way.copies:
        for _ in count(np.arange(copy.first, copy.first + copy.count), True):
            pass
    for name, share in zip(names, shares, strict=True):
        if name in tensors:
            tensors[name]["bytes"] += round(share)
    for lost in way.lost:
        counts = tensors.setdefault(lost.name, dict.fromkeys((*_COUNTS, "bytes"), 0))
        counts["deleted"] += lost.n_pages
    return tensors


def patch_text(facts: dict[str, Any], name: object, all_tensors: bool = True) -> str:
    """The facts for people; with few of the tensors unless all are wanted."""
    size = sum(file["bytes"] for file in facts["target"])
    share = f"{100 * facts['bytes'] / size:.3f} % of the target"
    kind = "reversible patch" if facts["reversible"] else "patch"
    lines = [f"{name}: {kind}, {format_bytes(facts['bytes'])}, {share}"]
    for role in ("base", "target"):
        for file in facts[role]:
            lines.append(f"{role} {printable(file['name'])}: {format_bytes(file['bytes'])}")
            lines.append(f"  sha256 {file['sha256']}")
    if facts["header_bytes"]:
        lines.append(f"header: {format_bytes(facts['header_bytes'])}")
    lines.append(f"{_counted(facts['pages'])} in {len(facts['tensors'])} tensors")
    shown = facts["tensors"] if all_tensors else facts["tensors"][:_SHOWN_TENSORS]
    for tensor in shown:
        lines.append(
            f"  {printable(tensor['name']):<34} {_counted(tensor)}, {format_bytes(tensor['bytes'])}"
        )
    if len(shown) < len(facts["tensors"]):
        lines.append(f"  and {len(facts['tensors']) - len(shown)} more")
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    said = [f"{counts[name]} {name}" for name in _COUNTS if counts[name]]
    return "pages: " + (", ".join(said) or "none")
