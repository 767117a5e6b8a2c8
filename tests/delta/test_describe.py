"""What is said of a patch: the true counts, the same each time, and fit to print."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from atlas.cli import main as gguf_shard
from delta.describe import describe_patch, patch_facts, patch_text
from delta.diff import create_patch
from delta.page_coding import RAW
from delta.page_grid import PADDING, TENSOR, Run, model_runs, n_paired
from delta.patch_file import FORWARD, PatchReader
from experiments.validation import gguf_factory as factory
from experiments.validation import hostile_patches as hostile
from experiments.validation.hostile_patches import (
    Group,
    forward,
    having,
    in_group,
    material,
    touched,
)
from forge.gguf_file import parse_header
from forge.sizes import format_bytes
from tests.delta.model_pairs import CASES, PAIRS, edited, tensors
from tests.delta.refusals import guarded

COUNTS = ("added", "modified", "deleted", "copied")
_HEAD = 12  # bytes of a group before its body


# ---- counts ----


def _pages(data: bytes, run: Run) -> Iterator[bytes]:
    for i in range(run.n_pages):
        offset, n_bytes = run.span(i, 1)
        yield data[offset : offset + n_bytes]


def _label(run: Run) -> str:
    return run.name if run.kind == TENSOR else f"padding {run.name}"


def true_counts(base: bytes, target: bytes) -> dict[str, dict[str, int]]:
    """Pages of each tensor, told by the bytes of both files alone."""
    runs, others = (model_runs([parse_header(data, "model")]) for data in (target, base))
    namesakes = {run.key: run for run in others}
    counts: dict[str, dict[str, int]] = {}
    known = {(r.page_bytes, p) for r in others if r.kind == TENSOR for p in _pages(base, r)}
    for run in runs:
        other = namesakes.get(run.key)
        paired = n_paired(run, other)
        theirs = [] if other is None else list(_pages(base, other))[:paired]
        for i, page in enumerate(_pages(target, run)):
            is_same = page == theirs[i] if i < paired else run.kind == PADDING and not any(page)
            if is_same:
                continue
            of = counts.setdefault(_label(run), dict.fromkeys(COUNTS, 0))
            of["modified" if i < paired else "added"] += 1
            if run.kind == TENSOR and len(page) >= 64:
                of["copied"] += (run.page_bytes, page) in known
                known.add((run.page_bytes, page))
    here = {run.key: run for run in runs}
    for run in others:
        n_lost = run.n_pages - n_paired(run, here.get(run.key))
        if run.kind == TENSOR and n_lost:
            of = counts.setdefault(run.name, dict.fromkeys(COUNTS, 0))
            of["deleted"] += n_lost
    return counts


def counted(facts: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {of["name"]: {name: of[name] for name in COUNTS} for of in facts["tensors"]}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Sequence[Path]:
    """Paths of base and target, and one of a patch."""
    paths = [tmp_path / name for name in ("base.gguf", "target.gguf", "some.sgpatch")]
    for path, data in zip(paths, CASES[request.param], strict=False):
        path.write_bytes(data)
    return paths


@pytest.mark.parametrize("reversible", [False, True])
def test_counts_are_true(pair: Sequence[Path], reversible: bool) -> None:
    """And those of the way there, also where there is one back."""
    base, target, patch = pair
    create_patch(base, target, patch, reversible=reversible)
    facts = describe_patch(patch)
    expected = true_counts(base.read_bytes(), target.read_bytes())
    assert counted(facts) == expected
    assert facts["pages"] == {name: sum(of[name] for of in expected.values()) for name in COUNTS}
    assert facts["reversible"] == reversible and facts["bytes"] == patch.stat().st_size
    with PatchReader(patch) as read:
        plan = read.plan
        sizes = [_HEAD + s.n_bytes for s in read.groups if s.group.directions & FORWARD]
    assert facts["header_bytes"] == len(plan.forward.headers[0].data)
    shares = [of["bytes"] for of in facts["tensors"]]
    assert abs(sum(shares) - sum(sizes)) <= len(shares)
    assert all(of["bytes"] == 0 for of in facts["tensors"] if of["copied"] == _n_changed(of))


def _n_changed(of: dict[str, int]) -> int:
    return of["added"] + of["modified"]


def test_the_bytes_of_a_tensor_are_its_share(tmp_path: Path) -> None:
    """Of a group of three pages, two of d.weight, one of c.weight."""
    path = factory.write(tmp_path / "p", material().data())
    facts = {of["name"]: of for of in describe_patch(path)["tensors"]}
    with PatchReader(path) as patch:
        sizes = [_HEAD + stored.n_bytes for stored in patch.groups]
    assert [facts[name]["bytes"] for name in ("a.weight", "b.weight")] == sizes[:2]
    assert facts["c.weight"]["bytes"] == round(sizes[2] / 3)
    assert facts["d.weight"]["bytes"] == round(2 * sizes[2] / 3)
    assert counted({"tensors": facts.values()}) == {
        "a.weight": {"added": 0, "modified": 4, "deleted": 0, "copied": 0},
        "b.weight": {"added": 0, "modified": 2, "deleted": 0, "copied": 0},
        "c.weight": {"added": 0, "modified": 2, "deleted": 0, "copied": 1},
        "d.weight": {"added": 3, "modified": 0, "deleted": 0, "copied": 1},
    }


def test_slices_of_a_tensor_count_together(tmp_path: Path) -> None:
    base = factory.tensor("x_exps.weight", T.F16, (64, 40, 3), 1)
    target = edited(base, lambda data: data.__setitem__([0, 5119, 15359], 1))
    paths = [factory.write(tmp_path / name, factory.gguf([t], PAIRS))
             for name, t in (("b", base), ("t", target))]  # fmt: skip
    create_patch(*paths, tmp_path / "p")
    (of,) = describe_patch(tmp_path / "p")["tensors"]
    assert (of["name"], of["modified"]) == ("x_exps.weight", 3)


def test_making_a_patch_says_what_reading_it_does(pair: Sequence[Path]) -> None:
    base, target, patch = pair
    made = create_patch(base, target, patch)
    assert patch_facts(made.plan, made.groups, made.n_bytes) == describe_patch(patch)


# ---- for programs ----


def test_json_is_the_same_each_time(
    pair: Sequence[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, target, patch = pair
    create_patch(base, target, patch)
    said = []
    for _ in range(2):
        assert gguf_shard(["info", str(patch), "--json"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].isascii() and said[0].count("\n") == 1
    facts = json.loads(said[0])
    assert facts == describe_patch(patch)
    assert list(facts) == ["kind", "bytes", "base", "target", "reversible", "header_bytes", "pages",
                           "tensors"]  # fmt: skip
    assert facts["kind"] == "patch"
    assert facts["base"][0]["name"] == "base.gguf" and len(facts["base"][0]["sha256"]) == 64
    create_patch(base, target, patch, force=True)
    assert gguf_shard(["info", str(patch), "--json"]) == 0
    assert capsys.readouterr().out == said[0]  # a patch is the same each time as well


# ---- for people ----

_NASTY = "a\n\x1b[31m\u202eb"


def test_text_is_fit_to_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names with control characters, of tensors and files, and bytes that are not UTF-8."""
    base, target = tmp_path / "base\x1b[31m\n.gguf", tmp_path / "target.gguf"
    names = [_NASTY, b"\xff\xfe", "plain"]
    model = [replace(tensors()[2], name=name) for name in names]
    base.write_bytes(factory.gguf(model, PAIRS))
    changed = [edited(t, lambda data: data.__setitem__(5, 7)) for t in model]
    target.write_bytes(factory.gguf(changed, PAIRS))
    create_patch(base, target, tmp_path / "p")
    assert gguf_shard(["info", str(tmp_path / "p")]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert all(line.isprintable() for line in lines) and len(lines) == text.count("\n")
    assert any(line.strip().startswith("plain ") for line in lines)
    assert sum("\\x1b[31m" in line for line in lines) == 2
    facts = describe_patch(tmp_path / "p")
    assert {of["name"] for of in facts["tensors"]} == {_NASTY, "\udcff\udcfe", "plain"}
    assert gguf_shard(["info", str(tmp_path / "p"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts


def test_text_says_what_there_is(tmp_path: Path) -> None:
    facts = describe_patch(factory.write(tmp_path / "p", material().data()))
    share = 100 * facts["bytes"] / len(material().target)
    lines = patch_text(facts, "some.sgpatch").splitlines()
    assert lines[0] == (
        f"some.sgpatch: patch, {format_bytes(facts['bytes'])}, {share:.3f} % of the target"
    )
    assert lines[1] == f"base model.gguf: {format_bytes(len(material().base))}"
    assert lines[5] == f"header: {format_bytes(facts['header_bytes'])}"
    assert lines[6] == "pages: 3 added, 8 modified, 2 copied in 4 tensors"
    assert [line.split()[0] for line in lines[7:]] == [f"{of}.weight" for of in "abcd"]
    assert "pages: 2 modified, 1 copied, " in lines[9]


def test_text_of_many_tensors(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(45)]
    models = [factory.gguf([factory.tensor(n, T.F32, (64,), i) for i, n in enumerate(names, seed)])
              for seed in (0, 100)]  # fmt: skip
    paths = [factory.write(tmp_path / str(i), data) for i, data in enumerate(models)]
    create_patch(*paths, tmp_path / "p")
    facts = describe_patch(tmp_path / "p")
    assert len(facts["tensors"]) == 45
    assert len(patch_text(facts, "p").splitlines()) == 51
    few = patch_text(facts, "p", all_tensors=False).splitlines()
    assert len(few) == 47 and few[-1] == "  and 5 more"


def test_text_of_a_patch_of_nothing(tmp_path: Path) -> None:
    path = factory.write(tmp_path / "m", CASES["nothing"][0])
    create_patch(path, path, tmp_path / "p", reversible=True)
    text = patch_text(describe_patch(tmp_path / "p"), "p")
    assert text.startswith("p: reversible patch, ") and text.endswith("pages: none in 0 tensors")


# ---- patches that lie ----

_MANY = 1 << 33
_BEYOND = {"n_pages": (1 << 16) + 1, "n_bytes": 1 << 19, "width": 8,
           "gaps": np.full((1 << 16) + 1, (1 << 48) - 1, "<u8").tobytes()}  # fmt: skip

LIES = {
    "a copy of 2^33 pages": lambda: forward(
        runs=(hostile.run("a.weight", 1 << 40),), copies=(hostile.copy(0, _MANY, 0, 0),)
    )(having(groups=())(material())),
    "pages beyond 2^63": lambda: in_group(0, **_BEYOND)(material()),
    "pages beyond 2^63 and no runs": lambda: forward(runs=(), copies=())(
        having(groups=(replace(material().groups[0], **_BEYOND),))(material())
    ),
    "a page of no run": lambda: touched(3)(forward(copies=())(material())),
    "a target of no bytes": lambda: hostile.target_file(n_bytes=0)(material()),
    "a target of 2^63 - 1 bytes": lambda: hostile.target_file(n_bytes=(1 << 63) - 1)(material()),
    "runs of 2^40 pages": lambda: forward(
        runs=tuple(hostile.run(f"t{i}", 1 << 40) for i in range(500)), copies=()
    )(material()),
    "500 groups of four million pages": lambda: having(groups=500 * (Group(
        RAW, 1, 0, hostile.GROUP_CONTENT, hostile.GROUP_CONTENT,
        hostile.bomb(hostile.GROUP_CONTENT), ()),))(material()),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES, ids=lambda name: name.replace(" ", "-"))
def test_lies_do_no_harm(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are told of as they are, or refused in a line."""
    path = factory.write(tmp_path / "p", LIES[name]().data())
    for options in ([], ["--json"]):
        with guarded():
            code = gguf_shard(["info", str(path), *options])
        said = capsys.readouterr()
        if code == 0:
            assert said.err == "" and said.out
        else:
            assert code == 1 and said.err.startswith(f"{path}: ") and said.err.count("\n") == 1
