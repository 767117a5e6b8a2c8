"""Fuzzing: saved inputs hold, what is broken is found, and changes reach behind the digests."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from delta.patch_file import PatchReader
from experiments.validation import fuzz, fuzz_targets
from experiments.validation.fuzz import CORPUS, Coverage, Fuzzer, saved_inputs, try_input
from experiments.validation.fuzz_targets import TARGETS, Target, resealed
from experiments.validation.probe import Outcome, refused, run_probe
from forge.errors import GGUFShardError
from forge.sgmap_reader import parse_map

by_name = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


@by_name
def test_saved_inputs_and_some_more_hold(target: Target) -> None:
    fuzzer = Fuzzer(target, 1, saved_inputs(target))
    n_tried = fuzzer.n_tried
    assert n_tried == len(target.seeds()) + len(saved_inputs(target)) > len(target.seeds())
    for _ in range(30):
        fuzzer.step()
    assert fuzzer.n_tried == n_tried + 30
    assert [wrong for _, wrong in fuzzer.failures] == []


def test_the_corpus_is_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < 200_000


@by_name
def test_a_seed_gives_the_same_inputs(target: Target) -> None:
    a, b = target.seeds()[0], target.seeds()[-1]
    made = [[target.mutate(random.Random(i), a, b) for i in range(9)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 5


def _raises(error: BaseException) -> Target:
    def try_one(folder: Path, data: bytes) -> None:
        if data == b"bad":
            raise error

    return Target("x", lambda: [b"good"], lambda rng, data, other: b"bad", try_one)


@pytest.mark.parametrize(
    ("error", "says"),
    [(KeyError(1), "KeyError: 1"), (MemoryError(), "MemoryError"),
     (GGUFShardError("two\nlines"), "not one line"), (RecursionError("deep"), "RecursionError")],
)  # fmt: skip
def test_what_is_not_a_refusal_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    fuzzer = Fuzzer(_raises(error), 0)
    fuzzer.run(30.0)  # ends as enough has failed
    assert len(fuzzer.failures) == 5 and says in fuzzer.failures[0][1]
    monkeypatch.chdir(tmp_path)
    fuzz._report(fuzzer, None)
    (saved,) = (tmp_path / "fuzz-failures").iterdir()
    assert saved.read_bytes() == b"bad"


def test_a_refusal_is_none() -> None:
    assert try_input(_raises(GGUFShardError("x: no")), b"bad", Coverage()) is None
    assert try_input(_raises(OSError(2, "No such file")), b"bad", Coverage()) is None


def test_time_memory_and_leftovers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(folder: Path, data: bytes) -> None:
        (folder / "x.sgnew").write_bytes(b"")

    target = Target("x", list, fuzz_targets.mutate_bytes, leave)
    assert "left behind" in str(try_input(target, b"", Coverage()))
    slow = replace(target, try_one=lambda folder, data: None)
    monkeypatch.setattr(fuzz, "MOST_CPU_SECONDS", 0.0)
    assert "took 0.00 s" in str(try_input(slow, b"", Coverage()))


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that restores another file."""

    def restore(path: Path, output: Path) -> None:
        output.write_bytes(b"other")

    (target,) = (t for t in TARGETS if t.name == "gguf")
    data = target.seeds()[0]
    assert try_input(target, data, Coverage()) is None
    monkeypatch.setattr(fuzz_targets, "restore_model", restore)
    assert "another file" in str(try_input(target, data, Coverage()))


def test_lines_are_counted_once() -> None:
    coverage = Coverage()
    coverage.trace(lambda: refused(lambda: parse_map(b"[]", "x")))
    first = coverage.n_lines
    assert first > 0
    coverage.trace(lambda: refused(lambda: parse_map(b"[]", "x")))
    assert coverage.n_lines == first
    coverage.trace(lambda: refused(lambda: parse_map(b"{}", "x")))
    assert coverage.n_lines > first


def test_changed_maps_and_patches_are_sealed(tmp_path: Path) -> None:
    """Most are refused for what they say, not for their digests."""
    targets = {target.name: target for target in TARGETS}
    rng = random.Random(1)
    seed = targets["map"].seeds()[0]
    said = []
    for _ in range(60):
        data = targets["map"].mutate(rng, seed, seed)
        said.append(refused(lambda data=data: parse_map(data, "x")) or "")  # type: ignore[misc]
    assert sum("digest" in line for line in said) < 15
    patch = targets["patch"].seeds()[0]
    assert resealed(patch) == patch
    changed = bytearray(patch)
    changed[-40] ^= 1  # of the last group
    (tmp_path / "p").write_bytes(resealed(bytes(changed)))
    PatchReader(tmp_path / "p").close()


def test_a_failing_target_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.validation.effort import QUICK
    from experiments.validation.scene import Scene

    monkeypatch.setattr(fuzz, "TARGETS", TARGETS[:1])
    scene = Scene(Path("unused"), replace(QUICK, fuzz_seconds=0))
    (probe,) = fuzz.fuzz_probes(scene)
    assert run_probe(probe).outcome is Outcome.HARMLESS
    monkeypatch.setattr(fuzz.sys, "executable", "/bin/false")
    assert run_probe(probe).outcome is Outcome.MISSED
