"""What a patch holds, tensor by tensor: for `--json`, and for people."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
        groups = ((stored.group, stored.whole_bytes) for stored in patch.groups)
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
    tensors = _count_tensors(plan.forward, (g for g in groups if g[0].directions & FORWARD))
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
    """Counts by name, of the touched runs in file order, then of what is lost."""
    starts = np.cumsum([0, *(run.n_pages for run in way.runs)])
    paired = starts[:-1] + np.array([run.n_paired for run in way.runs], np.int64)
    changed, added, copied = (np.zeros(len(way.runs), np.int64) for _ in range(3))
    shares = np.zeros(len(way.runs))
    for group, n_bytes in groups:
        pages = group.pages[group.pages < starts[-1]]  # others are refused when it is applied
        of_run = np.searchsorted(starts, pages, "right") - 1
        np.add.at(changed, of_run, 1)
        np.add.at(added, of_run, pages >= paired[of_run])
        np.add.at(shares, of_run, n_bytes / len(group.pages))
    for copy in way.copies:
        end = copy.first + copy.count
        first_run, last_run = np.searchsorted(starts, [copy.first, end - 1], "right") - 1
        for i in range(first_run, last_run + 1):
            begin, stop = max(copy.first, starts[i]), min(end, starts[i + 1])
            changed[i] += stop - begin
            copied[i] += stop - begin
            added[i] += max(stop - max(begin, paired[i]), 0)
    tensors: dict[str, dict[str, int]] = {}
    for i, run in enumerate(way.runs):
        name = run.name if run.kind == TENSOR else f"padding {run.name}"
        counts = tensors.setdefault(name, dict.fromkeys((*_COUNTS, "bytes"), 0))
        counts["added"] += int(added[i])
        counts["modified"] += int(changed[i] - added[i])
        counts["copied"] += int(copied[i])
        counts["bytes"] += round(shares[i])
    for lost in way.lost:
        counts = tensors.setdefault(lost.name, dict.fromkeys((*_COUNTS, "bytes"), 0))
        counts["deleted"] += lost.n_pages
    return tensors


def patch_text(facts: dict[str, Any], name: object, all_tensors: bool = True) -> str:
    """The facts for people; with few of the tensors unless all are wanted."""
    size = max(sum(file["bytes"] for file in facts["target"]), 1)
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
