"""Soak: run, damage, repair, update, again and again on the demonstration model; memory stays flat.

A round runs the model on several budgets, damages a page and repairs it, and updates it with a
patch and back: in the files, and while it is running. Every answer is compared with one that was
taken at the start, every file with its copy.

At the end of the first rounds, in which loops are compiled and pools of threads are made, and at
the end of all, resident memory, threads and open files are counted. Memory may have grown by
`GROWTH_SHARE` and `GROWTH_BYTES`, for what the allocator keeps; threads and files not at all.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from atlas.errors import CorruptPageError
from delta.apply_in_place import update_in_place
from delta.diff import create_patch
from experiments.validation.cached_pages import read_page, write_page
from experiments.validation.demo_runs import Demo, Demos, answer, opened, reference_tokens
from experiments.validation.probe import Outcome, Probe, Unavailable, require
from experiments.validation.scene import Scene, leftovers, sha256
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.repair import repair_model
from forge.sgmap_reader import load_map
from forge.verify import verify_model

SECTION = "soak"
GROWTH_SHARE, GROWTH_BYTES = 0.05, 16 << 20
_WARM_UP_ROUNDS = 2
_LEAST_ROUNDS = 3
_SHARD_PAGES = 8
_BUDGETS = (("lru", 1.0), ("pin", 0.4), ("lru", 0.4))
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Footprint:
    """What this process holds: resident bytes, threads, open files."""

    memory: int
    threads: int
    files: int


def footprint() -> Footprint:
    """What this process holds now.

    Raises
    ------
    Unavailable
        Where there is no `/proc`.
    """
    gc.collect()
    try:
        pages = int((_PROCESS / "statm").read_text().split()[1])
        threads, files = (len(os.listdir(_PROCESS / name)) for name in ("task", "fd"))
    except OSError:
        raise Unavailable("no /proc/self to count memory, threads and files by") from None
    return Footprint(pages * os.sysconf("SC_PAGE_SIZE"), threads, files)


def probes(scene: Scene, minutes: float) -> Iterator[Probe]:
    """Rounds for so many minutes, at least three; a probe for each thing done, and one for memory.

    Parameters
    ----------
    scene
        Where to work.
    minutes
        How long; a round that has begun is finished.
    """
    soak = Soak(scene)
    deadline = time.monotonic() + 60 * minutes
    number = 0
    while number < _LEAST_ROUNDS or time.monotonic() < deadline:
        for fault, artefact, work in (
            ("none: run again", "run", soak.run),
            ("corrupted, repaired", "core.gguf", soak.corrupt_and_repair),
            ("updated, reversed", "apply in place", soak.update_files),
            ("updated, reversed", "run", soak.update_live),
        ):
            check = partial(work, random.Random(f"{scene.seed} {number}"))
            yield Probe(SECTION, fault, artefact, f"round {number}", check)
        number += 1
        if number == _WARM_UP_ROUNDS:
            yield Probe(SECTION, "memory grows", "run", "warmed up", soak.remember)
    yield Probe(SECTION, "memory grows", "run", f"{number} rounds", soak.compare)


class Soak:
    """A sharded model and what is done to it.

    Parameters
    ----------
    scene
        Where to work.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._before: Footprint | None = None

    @cached_property
    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="soak-", dir=self.scene.folder))

    @cached_property
    def _known(self) -> Demo:
        return Demos(self.scene).of(_SHARD_PAGES)

    @cached_property
    def map_path(self) -> Path:
        """The map of the model in use."""
        original = self._known.map_path
        shutil.copytree(original.parent, self._folder / "model")
        return self._folder / "model" / original.name

    @cached_property
    def _other_tokens(self) -> list[int]:
        tokens = reference_tokens(self._known.older, self._known.prompt)
        require(tokens != self._known.tokens, "both versions answer the same")
        return tokens

    @cached_property
    def _patch(self) -> Path:
        path = self._folder / "patch"
        create_patch(self._known.map_path, self._known.older, path, reversible=True)
        return path

    def run(self, draw: random.Random) -> Outcome:
        """Run within every budget."""
        for policy, budget in _BUDGETS:
            with opened(self.map_path, policy, budget) as model:
                found = answer(model, self._known.prompt)
            require(found == self._known.tokens, f"other tokens, {policy}, {budget:.0%}")
        return Outcome.HARMLESS

    def corrupt_and_repair(self, draw: random.Random) -> Outcome:
        """Damage a page: verify must name it, no wrong token may come; repair must mend it."""
        known, map_path = self._known, self.map_path
        page = draw.randrange(load_map(map_path).n_pages)
        place = f"page {page}"
        wrong = read_page(map_path, page).copy()
        wrong[draw.randrange(PAGE_BYTES)] ^= 1 << draw.randrange(8)
        write_page(map_path, page, wrong)
        bad = [fault.page for fault in verify_model(map_path).bad]
        require(bad == [page], f"{place}: verify names {bad}")
        told: list[int] = []
        try:
            with opened(map_path, "lru", 0.4) as model:
                answer(model, known.prompt, told.append)
        except CorruptPageError as error:
            require(error.page == page, f"{place}: the run names page {error.page}")
        except GGUFShardError as error:  # of the source's header
            require(f"page {page} " in str(error), f"{place}: {error}")
        else:
            require(len(told) == len(known.tokens), f"{place}: the text has ended early")
        require(told == known.tokens[: len(told)], f"{place}: other tokens")
        mended = repair_model(map_path, self.scene.demo_model)
        found = [fault.page for fault in mended.repaired]
        require(mended.ok and found == [page], f"{place}: repair has mended {found}")
        self._require_files_of(known.map_path)
        return self.run(draw) and Outcome.DETECTED

    def update_files(self, draw: random.Random) -> Outcome:
        """Update the files and go back."""
        known = self._known
        for is_reverse, map_path, tokens in (
            (False, known.older, self._other_tokens),
            (True, known.map_path, known.tokens),
        ):
            update_in_place(self.map_path, self._patch, reverse=is_reverse)
            self._require_files_of(map_path)
            with opened(self.map_path, *draw.choice(_BUDGETS)) as model:
                require(answer(model, known.prompt) == tokens, "other tokens after an update")
        return Outcome.HARMLESS

    def update_live(self, draw: random.Random) -> Outcome:
        """Update the model while it is open and go back."""
        known = self._known
        with opened(self.map_path, *draw.choice(_BUDGETS)) as model:
            require(answer(model, known.prompt) == known.tokens, "other tokens before")
            model.atlas.apply_delta(self._patch)
            found = answer(model, known.prompt)
            require(found == self._other_tokens, "not the new version's tokens")
            self._require_files_of(known.older)
            model.atlas.apply_delta(self._patch, reverse=True)
            require(answer(model, known.prompt) == known.tokens, "not the old version's tokens")
        self._require_files_of(known.map_path)
        return Outcome.HARMLESS

    def _require_files_of(self, map_path: Path) -> None:
        for suffix in (".sgmap", ".gguf"):
            found, expected = self.map_path.with_suffix(suffix), map_path.with_suffix(suffix)
            require(sha256(found) == sha256(expected), f"{found.name}: other bytes")
        folder = self.map_path.parent
        require(not leftovers(folder), f"left behind: {leftovers(folder)}")

    def remember(self) -> Outcome:
        """Note down what the process holds."""
        self._before = footprint()
        return Outcome.HARMLESS

    def compare(self) -> Outcome:
        """Hold what the process holds now against what was noted down."""
        after, before = footprint(), self._before
        require(before is not None, "what was held at the start is not known")
        assert before is not None
        room = GROWTH_SHARE * before.memory + GROWTH_BYTES
        grown = after.memory - before.memory
        require(grown <= room, f"memory has grown by {grown} bytes from {before.memory}")
        for what in ("threads", "files"):
            counts = getattr(before, what), getattr(after, what)
            require(counts[1] <= counts[0], f"{what}: {counts[0]} before, {counts[1]} after")
        return Outcome.HARMLESS
