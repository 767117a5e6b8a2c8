"""What everybody who reads a damaged sharded model must do, and what `repair` must make of it.

    verify     names each page that is not as it was, and nothing else; what it passes is as it was
    restore    the exact source, or nothing
    a page     is handed out only as it was
    Atlas      the exact tensors, or no tensor
    repair     the exact `core.gguf`, or nothing changes; from a wrong source always the latter

What is right is known from the undamaged originals, byte for byte: an exception alone proves
nothing.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atlas.manager import Atlas
from experiments.validation import gguf_factory as factory
from experiments.validation.probe import Outcome, refused, require
from experiments.validation.scene import Scene, leftovers
from forge.core_file import core_bytes, page_offset
from forge.pages import PAGE_BYTES
from forge.repair import repair_model
from forge.restore import restore_model
from forge.sgmap import ShardMap, core_path
from forge.sgmap_reader import load_map
from forge.shard import ShardOptions, shard_model
from forge.sharded_model import ShardedModel
from forge.verify import VerifyResult, verify_model

#: Content and CRC32 of a page: what precedes its magic.
_CONTENT_BYTES = 4088


@dataclass(frozen=True)
class Intact:
    """A sharded model as it should be.

    Attributes
    ----------
    source
        The GGUF file it was cut from.
    map_path
        Its map; `core.gguf` lies beside it.
    wrong_source
        A GGUF file that it was not cut from.
    """

    source: Path
    map_path: Path
    wrong_source: Path

    @functools.cached_property
    def map(self) -> ShardMap:
        return load_map(self.map_path)

    @functools.cached_property
    def core(self) -> bytes:
        return core_path(self.map_path).read_bytes()

    @functools.cached_property
    def text(self) -> bytes:
        """The map's bytes."""
        return self.map_path.read_bytes()

    @functools.cached_property
    def source_bytes(self) -> bytes:
        return self.source.read_bytes()

    @functools.cached_property
    def tensors(self) -> dict[str, bytes]:
        """What Atlas makes of each tensor."""
        with Atlas.open(self.map_path, "100%", "cpu") as atlas:
            return {tensor.name: _values(atlas, tensor.name) for tensor in self.map.tensors}

    def page(self, number: int) -> bytes:
        return self.core[page_offset(number) : page_offset(number + 1)]

    @functools.cached_property
    def wrong_map(self) -> Path:
        """The map of the wrong source, sharded in the same way."""
        folder = self.wrong_source.with_suffix("")
        options = ShardOptions(pages_per_shard=self.map.pages_per_shard)
        return shard_model(self.wrong_source, folder, options, force=True)

    @property
    def table_offset(self) -> int:
        return page_offset(self.map.n_pages)


def small_model(scene: Scene) -> Intact:
    """The small model of the scene; the wrong source is of the same shape."""
    other = factory.small_model(scene.seed + 100)
    wrong_source = factory.write(scene.folder / "other.gguf", other)
    return Intact(scene.small, scene.small_map, wrong_source)


def demonstration_model(scene: Scene) -> Intact:
    """The demonstration model, which is of some MB."""
    return Intact(scene.demo_model, scene.demo_map, scene.small)


class Damaged:
    """A copy of a model with a fault in it.

    Parameters
    ----------
    intact
        What it was.
    folder
        Where `core.gguf` and `core.sgmap` are, or what is left of them.
    """

    def __init__(self, intact: Intact, folder: Path) -> None:
        self.intact = intact
        self.map_path = folder / intact.map_path.name
        self.core_path = core_path(self.map_path)
        self._restored = folder / "restored.gguf"
        self._before = self._state()

    def _state(self) -> tuple[bytes | None, bytes | None]:
        core, text = (
            path.read_bytes() if path.exists() else None for path in (self.core_path, self.map_path)
        )
        return core, text

    @property
    def is_intact(self) -> bool:
        return self._before == (self.intact.core, self.intact.text)

    @functools.cached_property
    def bad_pages(self) -> set[int]:
        """Pages that are not what they were, in a `core.gguf` of the right size."""
        core = self._before[0]
        assert core is not None
        return {
            number
            for number in range(self.intact.map.n_pages)
            if core[page_offset(number) : page_offset(number + 1)] != self.intact.page(number)
        }

    @functools.cached_property
    def forged_pages(self) -> set[int]:
        """Those of them that differ in content, and in nothing that a CRC32 tells."""
        core = self._before[0]
        assert core is not None
        return {
            number
            for number in self.bad_pages
            if _is_forged(core[page_offset(number) :][:PAGE_BYTES], self.intact.page(number))
        }

    def has_table(self) -> bool:
        """Whether size, table and map are those of the model: then each page can be told apart."""
        core, text = self._before
        n_pages = self.intact.map.n_pages
        table = slice(self.intact.table_offset, self.intact.table_offset + 4 * n_pages)
        return (
            core is not None
            and len(core) == core_bytes(n_pages)
            and core[table] == self.intact.core[table]
            and text == self.intact.text
        )

    # ---- what each of them must do ----

    def check_verify(self, may_pass: bool = False) -> Outcome:
        """Verify it; with `may_pass` a fault may be one that it cannot know of."""
        result = verify_model(self.map_path)
        if self.is_intact:
            require(result.ok, f"verify finds what is not there: {result.bad}")
            return Outcome.HARMLESS
        require(may_pass or not result.ok, "verify finds nothing")
        for fault in result.bad:
            require("\n" not in str(fault), f"verify: not one line: {str(fault)!r}")
        if self.has_table():
            self._check_named(result)
        self._require_unchanged("verify")
        return Outcome.HARMLESS if result.ok else Outcome.DETECTED

    def _check_named(self, result: VerifyResult) -> None:
        per_shard = self.intact.map.pages_per_shard
        plain = self.bad_pages - self.forged_pages
        shards = {page // per_shard for page in plain}
        forged = {page // per_shard for page in self.forged_pages} - shards
        expected = sorted(plain | {shard * per_shard for shard in forged})
        named = sorted(fault.page for fault in result.bad if fault.page is not None)
        require(named == expected, f"verify names pages {named}, wrong are {expected}")

    def check_restore(self) -> bool:
        """Restore it; returns whether that was refused."""
        line = refused(lambda: restore_model(self.map_path, self._restored))
        if line is None:
            restored = self._restored.read_bytes()
            require(restored == self.intact.source_bytes, "restored: another file")
            self._restored.unlink()
        require(not self._restored.exists(), "restore refuses and leaves a file")
        self._require_unchanged("restore")
        return line is not None

    def check_pages(self) -> None:
        """Read page by page."""

        def read() -> None:
            with ShardedModel(self.map_path) as model:
                for page in range(model.map.n_pages):
                    self._check_page(model, page)

        line = refused(read)
        require(line is None or not self.has_table(), f"all pages are refused: {line}")
        self._require_unchanged("reading")

    def _check_page(self, model: ShardedModel, page: int) -> None:
        found: list[bytes] = []
        line = refused(lambda: found.append(model.read_checked(page, 1).tobytes()))
        if line is not None:
            require(page in self.bad_pages, f"page {page} is right and refused: {line}")
        elif page not in self.forged_pages:  # which only digests tell
            require(found == [self.intact.page(page)], f"page {page} is wrong and handed out")

    def check_atlas(self, is_consistent: bool = False) -> None:
        """Open it for running, and read every tensor (of experts the first); where the map is
        consistent in itself and not that of the model, all that can be asked is that it ends well.
        """
        if self.has_table() and self.forged_pages:
            return

        def read() -> None:
            with Atlas.open(self.map_path, "100%", "cpu") as atlas:
                for tensor in self.intact.map.tensors:
                    found: list[bytes] = []
                    refused(functools.partial(_take, atlas, tensor.name, found))
                    is_right = found in ([], [self.intact.tensors[tensor.name]])
                    require(is_right or is_consistent, f"{tensor.name}: wrong values")
                    first = tensor.slices[0].first_page
                    pages = range(first, first + tensor.slices[0].pages)
                    is_taken = found and self.has_table() and self.bad_pages.intersection(pages)
                    require(not is_taken, f"{tensor.name}: taken from damaged pages")

        refused(read)
        self._require_unchanged("Atlas")

    def check_repair(self, source: Path, may_refuse: bool = False) -> None:
        """Repair it; with `may_refuse` what is damaged may be what cannot be repaired."""
        self._put_fault_back()
        if not self.is_intact:
            line = refused(lambda: repair_model(self.map_path, self.intact.wrong_source))
            if line is not None:
                self._require_unchanged("a refused repair")
            else:  # no source was needed, or it has the same bytes there
                self._check_repaired()
                self._put_fault_back()
        line = refused(lambda: repair_model(self.map_path, source))
        if line is None:
            self._check_repaired()
        else:
            require(may_refuse, f"repair refuses: {line}")
            self._require_unchanged("a refused repair")

    def _check_repaired(self) -> None:
        core, text = self._state()
        require(text == self._before[1], "repair changes the map")
        if text == self.intact.text:
            require(core == self.intact.core, "repaired: another core.gguf")
        elif core != self._before[0]:  # as another model's map says, if the source is of that
            result = verify_model(self.map_path)
            require(result.ok, f"repaired: {result.bad}")
            line = refused(lambda: restore_model(self.map_path, self._restored))
            require(line is None, f"repaired, and cannot be restored: {line}")
            self._restored.unlink()
        left = leftovers(self.map_path.parent)
        require(not left, f"repair leaves {left}")

    def _put_fault_back(self) -> None:
        """Undo what repairing did to `core.gguf`."""
        core = self._before[0]
        if core is None:
            self.core_path.unlink(missing_ok=True)
        else:
            self.core_path.write_bytes(core)

    def _require_unchanged(self, who: str) -> None:
        require(self._state() == self._before, f"{who} changes files")
        left = leftovers(self.map_path.parent)
        require(not left, f"{who} leaves {left}")


def _take(atlas: Atlas, name: str, found: list[bytes]) -> None:
    found.append(_values(atlas, name))


def _values(atlas: Atlas, name: str) -> bytes:
    with np.errstate(invalid="ignore"):  # of random bytes some are no numbers
        return bytes(atlas.tensor(name).tobytes())


def _is_forged(found: bytes, right: bytes) -> bool:
    return found[_CONTENT_BYTES:] == right[_CONTENT_BYTES:] and zlib.crc32(
        found[:_CONTENT_BYTES]
    ) == zlib.crc32(right[:_CONTENT_BYTES])


def examine(
    scene: Scene, intact: Intact, fault: Callable[[Path], object], *, thorough: bool = True
) -> Outcome:
    """Put a fault into `core.gguf` of a copy, and look what all of them make of it.

    Parameters
    ----------
    fault
        Changes files of the folder it is given.
    thorough
        Whether it is also restored, run from, and repaired, which takes much longer.
    """
    with scene.copies(intact.map_path) as folder:
        fault(folder)
        damaged = Damaged(intact, folder)
        outcome = damaged.check_verify()
        damaged.check_pages()
        if thorough:
            damaged.check_restore()
            damaged.check_atlas()
            damaged.check_repair(intact.source)
            damaged.check_repair(intact.map_path)
    return outcome


def examine_map(
    scene: Scene, intact: Intact, fault: Callable[[Path], object], *, is_consistent: bool = False
) -> Outcome:
    """Put a fault into the map of a copy, and look what all of them make of it.

    Parameters
    ----------
    fault
        Changes the map in the folder it is given.
    is_consistent
        It has the digests that go with it, as if somebody had written it so. Then nobody but
        `restore` can know of it.
    """
    with scene.copies(intact.map_path) as folder:
        fault(folder)
        damaged = Damaged(intact, folder)
        outcome = damaged.check_verify(may_pass=is_consistent)
        if damaged.check_restore():
            outcome = Outcome.DETECTED
        damaged.check_atlas(is_consistent)
        damaged.check_repair(intact.source, may_refuse=True)
        damaged.check_repair(intact.map_path, may_refuse=True)
    return outcome
