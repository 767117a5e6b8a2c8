"""Patches between models that differ in one way each, applied in every way: the target's bytes.

apply                     a new file
apply in place            the GGUF file itself
apply in place, pages     a sharded model: what sharding the target gives, byte for byte
diff                      a patch made of sharded models, applied to pages and to a file
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gguf import GGMLQuantizationType

from delta.apply import apply_patch
from delta.apply_in_place import update_in_place
from delta.diff import create_patch
from experiments.validation import gguf_factory as factory
from experiments.validation.demo_runs import is_quick
from experiments.validation.probe import Outcome, Probe, require
from experiments.validation.scene import Scene, leftovers, sha256
from forge.shard import ShardOptions, shard_model
from forge.verify import verify_model


def probes(scene: Scene) -> Iterator[Probe]:
    """A probe for each pair, way and direction; of the directions, in quick, one."""
    for number, (name, pair) in enumerate(_pairs(scene).items()):
        for turn, (artefact, work) in enumerate(_WAYS.items()):
            directions = [False, True]
            if is_quick(scene):
                directions = [(number + turn) % 2 == 1]
            for is_reverse in directions:
                place = f"{name}, reverse" if is_reverse else name
                check = partial(_check_patch, scene, pair, work, is_reverse)
                yield Probe("integrity", "none: every pair", artefact, place, check)


Pair = tuple[Callable[[], bytes], Callable[[], bytes]]


def _pairs(scene: Scene) -> dict[str, Pair]:
    """Base and target that differ in one way each."""
    tensors = factory.small_tensors(scene.seed)
    more = factory.tensor("blk.1.extra.weight", GGMLQuantizationType.F16, (32, 300), scene.seed + 9)
    retyped = factory.tensor(str(tensors[1].name), GGMLQuantizationType.F16, tensors[1].shape)
    grown = factory.tensor(str(tensors[2].name), GGMLQuantizationType.Q4_0, (32, 500), scene.seed)
    others = factory.small_tensors(scene.seed + 100)
    note = factory.pair("general.note", factory.STRING, "x" * 9000)
    renamed = replace(tensors[0], name="other.weight")
    plain = factory.gguf(tensors)

    def pair(*target: bytes | Sequence[factory.Tensor]) -> Pair:
        data = [part if isinstance(part, bytes) else factory.gguf(part) for part in target]
        return (lambda: data[0] if len(data) > 1 else plain), (lambda: data[-1])

    return {
        "scattered bytes": pair(factory.small_model(scene.seed),
                                factory.newer_small_model(scene.seed)),
        "nothing": pair(tensors),
        "every byte": pair(others),
        "one tensor": pair([*tensors[:3], others[3], *tensors[4:]]),
        "metadata longer": pair(factory.gguf(tensors, [note])),
        "tensor added": pair([*tensors, more]),
        "tensor taken away": pair(tensors[:-1]),
        "tensor renamed": pair([renamed, *tensors[1:]]),
        "tensors in another order": pair(tensors[::-1]),
        "tensor grown": pair([*tensors[:2], grown, *tensors[3:]]),
        "another type": pair([tensors[0], retyped, *tensors[2:]]),
        "another alignment": pair(factory.gguf(tensors, alignment=256)),
        "bytes behind": pair(factory.gguf(tensors, tail=b"junk" * 3000)),
        "no tensors": pair([]),
    }  # fmt: skip


@dataclass(frozen=True)
class _PatchCase:
    """A patch in a folder: `base` is what it is applied to here, `target` what that must give."""

    folder: Path
    base: Path
    target: Path
    patch: Path
    is_reverse: bool


def _check_patch(
    scene: Scene, pair: Pair, work: Callable[[_PatchCase], Outcome], is_reverse: bool
) -> Outcome:
    with scene.copies() as folder:
        base = factory.write(folder / "base.gguf", pair[0]())
        target = factory.write(folder / "target.gguf", pair[1]())
        create_patch(base, target, folder / "patch", reversible=True)
        if is_reverse:
            base, target = target, base
        outcome = work(_PatchCase(folder, base, target, folder / "patch", is_reverse))
        require(not leftovers(folder), f"left behind: {leftovers(folder)}")
        return outcome


def _apply_to_file(case: _PatchCase) -> Outcome:
    made = apply_patch(case.base, case.patch, case.folder / "made.gguf", reverse=case.is_reverse)
    require([sha256(path) for path in made] == [sha256(case.target)], "other bytes")
    return Outcome.HARMLESS


def _apply_in_place(case: _PatchCase) -> Outcome:
    expected = sha256(case.target)
    update_in_place(case.base, case.patch, reverse=case.is_reverse)
    require(sha256(case.base) == expected, "other bytes")
    return Outcome.HARMLESS


def _sharded(case: _PatchCase, source: Path) -> Path:
    return shard_model(source, case.folder / source.stem, ShardOptions(pages_per_shard=2))


def _apply_in_place_to_pages(case: _PatchCase) -> Outcome:
    updated, fresh = _sharded(case, case.base), _sharded(case, case.target)
    update_in_place(updated, case.patch, reverse=case.is_reverse)
    for suffix in (".sgmap", ".gguf"):
        same = sha256(updated.with_suffix(suffix)) == sha256(fresh.with_suffix(suffix))
        require(same, f"core{suffix} is not what sharding the target gives")
    result = verify_model(updated)
    require(result.ok, f"verify: {result.bad[:1]}")
    return Outcome.HARMLESS


def _diff_of_pages(case: _PatchCase) -> Outcome:
    """A patch made of sharded models, applied to a sharded one and to a file."""
    base, target = _sharded(case, case.base), _sharded(case, case.target)
    patch = case.folder / "of-pages"
    create_patch(base, target, patch)
    for number, source in enumerate((base, case.base)):
        made = apply_patch(source, patch, case.folder / f"made-{number}.gguf")
        require([sha256(path) for path in made] == [sha256(case.target)], "other bytes")
    return Outcome.HARMLESS


_WAYS = {
    "apply": _apply_to_file,
    "apply in place": _apply_in_place,
    "apply in place, pages": _apply_in_place_to_pages,
    "diff": _diff_of_pages,
}
