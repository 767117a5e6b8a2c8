"""A patch held against the base it is for: every page of the target has its place and its source.

Nothing is written here. What the patch says is checked against the headers of both models, so that
whoever writes the target may trust it: each page is kept, copied, or stored, and none is twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from delta.byte_planes import element_kind
from delta.compare import read_spans
from delta.moved_pages import numbered
from delta.page_coding import RAW, decode, decode_edits, decode_reverse
from delta.page_grid import PADDING, Run, RunKey, model_runs, n_paired, stretches
from delta.patch_file import BOTH, FORWARD, REVERSE, PageGroup, PatchReader, StoredGroup
from delta.patch_plan import Direction, FileRecord, PageCopy, TouchedRun, decode_header
from delta.source_model import SourceModel
from forge.buffers import scratch
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader, parse_header
from forge.info import printable
from forge.split_model import check_parts

#: Where a page of the target comes from: the base's page of the same place, a copy, or else the
#: group of this number.
KEPT, COPIED = -1, -2
#: A target may be so many times the base and the patch (and a GiB): more is no model's update.
_MAX_GROWTH = 64


@dataclass(frozen=True)
class Piece:
    """Bytes of consecutive pages of a run of the target."""

    run: Run
    first_page: int
    data: np.ndarray


@dataclass(frozen=True)
class RunEdits:
    """Changed bytes of a run of the target.

    Attributes
    ----------
    run
        The run.
    places
        Where in it, int64 [n_edits], ascending.
    values
        The XOR with the base's bytes, uint8 [n_edits].
    """

    run: Run
    places: np.ndarray
    values: np.ndarray


class BoundPatch:
    """A patch and its base.

    Parameters
    ----------
    patch
        The open patch.
    base
        The model it is applied to.
    reverse
        Go back from the target to the base.

    Attributes
    ----------
    files
        What the target's files will be.
    headers, header_bytes
        Their headers, parsed, and as they will be in the files.
    runs
        The target's runs, in file order.
    others
        For each run its namesake in the base, or None.
    groups
        What is stored for this direction.
    sources
        For each run where its pages come from, int32 [n_pages]: `KEPT`, `COPIED`, or the index of
        the group.

    Raises
    ------
    GGUFShardError
        If the patch does not fit the models it names. That may be because the base is another
        one, which only its SHA-256 tells: see `delta.checked_patch`.
    """

    def __init__(
        self,
        patch: PatchReader,
        base: SourceModel,
        reverse: bool = False,
    ) -> None:
        plan = patch.plan
        self.patch = patch
        self.base = base
        self.is_reverse = reverse
        if reverse and plan.reverse is None:
            raise GGUFShardError(f"{patch.path}: holds no way back: it was made without reversible")
        self._way: Direction = plan.reverse if reverse and plan.reverse else plan.forward
        self.files: tuple[FileRecord, ...] = plan.base if reverse else plan.target
        self._require_size()
        self._rebuild_headers()
        self.runs = model_runs(self.headers)
        self._base_runs = model_runs(base.headers)
        by_key = {run.key: run for run in self._base_runs}
        self.others = [by_key.get(run.key) for run in self.runs]
        self._place_touched()
        self.groups: list[StoredGroup] = []
        self.sources = [np.full(run.n_pages, KEPT, np.int32) for run in self.runs]
        for stored in patch.groups:
            if stored.group.directions & self._direction:
                self._claim_group(stored.group, len(self.groups))
                self.groups.append(stored)
        self._copy_source: dict[RunKey, np.ndarray] = {}
        for copy in self._way.copies:
            self._claim_copy(copy)
        self._require_all()

    @property
    def _direction(self) -> int:
        return REVERSE if self.is_reverse else FORWARD

    def decode(self, stored: StoredGroup) -> list[Piece]:
        """The pages of a group; may be called by several threads.

        Raises
        ------
        GGUFShardError
            If the group does not hold what it says, or the base cannot be read.
        """
        pages = self._pages_here(stored.group)
        spans = self._spans(pages)
        lengths = np.concatenate([run.page_lengths(own) for run, _, own in self._of_runs(pages)])
        base = None
        if stored.group.mode != RAW:
            pairs = ((self.others[index], first, n) for index, first, n in spans)
            others = ((other, first, n) for other, first, n in pairs if other is not None)
            base = read_spans(self.base, others, scratch("base", stored.group.n_bytes))
        data = self._decode_content(stored, base, lengths)
        pieces = []
        begin = 0
        for index, first, n in spans:
            run = self.runs[index]
            size = run.span(first, n)[1]
            pieces.append(Piece(run, first, data[begin : begin + size]))
            begin += size
        return pieces

    def decode_edits(self, stored: StoredGroup) -> list[RunEdits]:
        """The changed bytes of a group in SPARSE; errors as of `decode`."""
        pages = self._pages_here(stored.group)
        of_runs = list(self._of_runs(pages))
        lengths = np.concatenate([run.page_lengths(own) for run, _, own in of_runs])
        try:
            edits = decode_edits(self.patch.streams(stored), lengths)
        except GGUFShardError as error:
            raise self._fail(f"offset {stored.offset}: group: {error}") from None
        begins = np.cumsum(lengths) - lengths
        found = []
        page = edit = 0
        for run, _, own in of_runs:
            counts = edits.counts[page : page + len(own)]
            moves = own * run.page_bytes - begins[page : page + len(own)]
            moves = np.repeat(moves, counts)
            here = slice(edit, edit + len(moves))
            found.append(RunEdits(run, edits.places[here] + moves, edits.values[here]))
            page, edit = page + len(own), here.stop
        return found

    def _decode_content(
        self, stored: StoredGroup, base: np.ndarray | None, lengths: np.ndarray
    ) -> np.ndarray:
        group = stored.group
        kind = element_kind(group.ggml_type)
        streams = self.patch.streams(stored)
        symmetric = group.directions == BOTH
        try:
            if self.is_reverse and symmetric and group.mode != RAW:
                assert base is not None
                return decode_reverse(kind, group.mode, streams, base, lengths)
            return decode(kind, group.mode, streams, base, lengths, symmetric=symmetric)
        except GGUFShardError as error:
            raise self._fail(f"offset {stored.offset}: group: {error}") from None

    def index_of(self, run: Run) -> int:
        """The place of a run of the target among its runs."""
        return self._index[run.key]

    def require_digests(self, sha256: Sequence[str]) -> None:
        """GGUFShardError if the files of the target are not what the patch says, by their SHA-256,
        hexadecimal."""
        for file, found in zip(self.files, sha256, strict=True):
            if found != file.sha256:
                raise self._fail(
                    f"{printable(file.name)} would have SHA-256 {found}, not {file.sha256}: the "
                    "patch does not make its target"
                )

    def copied(self, run: Run, first: int, count: int) -> Iterator[tuple[int, int, Run, int, bool]]:
        """Where copied pages of a run come from, in pieces of consecutive ones.

        Yields
        ------
        tuple
            First page, pages; run they equal, its first page, and whether that is one of the
            target's own.
        """
        codes = self._copy_source[run.key][first : first + count]
        bounds = [0, *(np.flatnonzero(np.diff(codes) != 2) + 1).tolist(), len(codes)]
        for begin, end in pairwise(bounds):
            while begin < end:
                source, from_target = divmod(int(codes[begin]), 2)
                runs = self._touched_runs if from_target else self._base_runs
                starts = self._touched_starts if from_target else self._base_starts
                if source >= starts[-1]:
                    raise self._fail(f"copy: page {source} of {int(starts[-1])}")
                i = int(np.searchsorted(starts, source, "right")) - 1
                page = source - int(starts[i])
                n = min(end - begin, runs[i].n_pages - page)
                yield first + begin, n, runs[i], page, bool(from_target)
                begin += n

    def _fail(self, reason: str) -> GGUFShardError:
        return GGUFShardError(f"{self.patch.path}: {reason}")

    def _require_size(self) -> None:
        room = _MAX_GROWTH * (self.base.n_bytes + self.patch.n_bytes) + (1 << 30)
        if total_bytes(self.files) > room:
            raise self._fail(f"target of {total_bytes(self.files)} bytes: too large for this base")

    def _rebuild_headers(self) -> None:
        headers: list[GGUFHeader] = []
        self.header_bytes: list[bytes] = []
        for part, (edit, file) in enumerate(zip(self._way.headers, self.files, strict=True)):
            like = min(part, len(self.base.names) - 1)
            origin, known = self.base.header_bytes(like), self.base.headers[like]
            data = decode_header(edit, origin, self.patch.path)
            if len(data) > file.bytes:
                raise self._fail(f"header {part}: {len(data)} bytes in a file of {file.bytes}")
            name = f"{self.patch.path}: {printable(file.name)}"
            if data == origin and file.bytes == known.file_bytes:
                # A large vocabulary takes long to parse.
                header = replace(known, name=name, identity=None)
            else:
                header = parse_header(data, name, file.bytes)
            if header.header_bytes != len(data):
                raise self._fail(f"header {part}: {len(data) - header.header_bytes} bytes too many")
            headers.append(header)
            self.header_bytes.append(data)
        self.headers = tuple(headers)
        try:
            check_parts(headers)
        except GGUFShardError as error:
            raise self._fail(f"not a model: {error}") from None

    def _place_touched(self) -> None:
        """Find the runs that the patch names."""
        self._index = {run.key: i for i, run in enumerate(self.runs)}
        places = []
        for touched in self._way.runs:
            i = self._index.get(touched.key)
            if i is None or touched != TouchedRun.of(
                self.runs[i], n_paired(self.runs[i], self.others[i])
            ):
                raise self._fail(f"run {touched.name!r}[{touched.index}]: the models have no such")
            places.append(i)
        if places != sorted(places):
            raise self._fail("runs: are not in the order of the file")
        self._touched = places
        self._touched_runs = [self.runs[i] for i in places]
        self._touched_starts = numbered(self._touched_runs)
        self._base_starts = numbered(self._base_runs)

    def _pages_here(self, group: PageGroup) -> np.ndarray:
        """Numbers of a group's pages over the touched runs of this direction."""
        if not (self.is_reverse and group.directions == BOTH):
            return group.pages
        # Numbered the forward way: each page stands for its counterpart here.
        forward = self.patch.plan.forward.runs
        starts = np.cumsum([0, *(run.n_pages for run in forward)])
        if int(group.pages[-1]) >= starts[-1]:
            raise self._fail(f"group: page {int(group.pages[-1])} of {int(starts[-1])}")
        here: dict[RunKey, int] = {
            run.key: int(start)
            for run, start in zip(self._touched_runs, self._touched_starts, strict=False)
        }
        which = np.searchsorted(starts, group.pages, "right") - 1
        pages = np.empty_like(group.pages)
        for i in np.unique(which).tolist():
            run = forward[i]
            of_run = which == i
            numbers = group.pages[of_run] - int(starts[i])
            if run.key not in here or int(numbers[-1]) >= run.n_paired:
                raise self._fail(f"group: run {run.name!r} has no such page in both models")
            pages[of_run] = numbers + here[run.key]
        return pages

    def _claim_group(self, group: PageGroup, number: int) -> None:
        pages = self._pages_here(group)
        self._claim(pages, number, "group")
        n_bytes = 0
        for run, other, own in self._of_runs(pages):
            if run.ggml_type != group.ggml_type:
                raise self._fail(f"group: {run.label} is not of its type")
            if group.mode != RAW and int(own[-1]) >= n_paired(run, other):
                raise self._fail(f"group: {run.label}: a page has no counterpart in the base")
            n_bytes += int(run.page_lengths(own).sum())
        if n_bytes != group.n_bytes:
            raise self._fail(f"group: its pages have {n_bytes} bytes, not {group.n_bytes}")
        if group.directions == BOTH and group.mode == RAW:
            raise self._fail("group: raw pages cannot serve both directions")

    def _claim_copy(self, copy: PageCopy) -> None:
        pages = np.arange(copy.first, copy.first + copy.count)
        self._claim(pages, COPIED, "copy")
        source = copy.source
        for index, first, count in self._spans(pages):
            run = self.runs[index]
            codes = self._copy_source.setdefault(run.key, np.zeros(run.n_pages, np.int64))
            codes[first : first + count] = 2 * np.arange(source, source + count) + copy.from_target
            source += count

    def _claim(self, pages: np.ndarray, source: int, what: str) -> None:
        if len(pages) and int(pages.max()) >= self._touched_starts[-1]:
            raise self._fail(f"{what}: page {int(pages.max())} of {int(self._touched_starts[-1])}")
        for run, _, own in self._of_runs(pages):
            sources = self.sources[self._index[run.key]]
            if (sources[own] != KEPT).any():
                raise self._fail(f"{what}: a page of {run.label} is given twice")
            sources[own] = source

    def _require_all(self) -> None:
        """Every page is the base's, or given."""
        for run, other, sources in zip(self.runs, self.others, self.sources, strict=True):
            missing = np.flatnonzero(sources[n_paired(run, other) :] == KEPT)
            if len(missing) and run.kind != PADDING:  # that is zero where nothing is said
                page = int(missing[0]) + n_paired(run, other)
                raise self._fail(f"page {page} of {run.label}: is neither stored nor in the base")
            self._require_sources(run, sources)

    def _require_sources(self, run: Run, sources: np.ndarray) -> None:
        """Copies are of pages of the same size, and of none that are copies themselves."""
        for begin, end in stretches(sources == COPIED):
            for first, count, source, page, from_target in self.copied(run, begin, end - begin):
                numbers = np.arange(count)
                if (run.page_lengths(first + numbers) != source.page_lengths(page + numbers)).any():
                    raise self._fail(f"copy: pages of {run.label}, {source.label} differ in size")
                if from_target:
                    theirs = self.sources[self._index[source.key]]
                    if (theirs[page : page + count] < 0).any():
                        raise self._fail(f"copy: a page of {source.label} is itself not stored")

    def _of_runs(self, pages: np.ndarray) -> Iterator[tuple[Run, Run | None, np.ndarray]]:
        """Some pages of this direction by run: it, its namesake, and which of its pages."""
        which = np.searchsorted(self._touched_starts, pages, "right") - 1
        bounds = np.flatnonzero(np.diff(which, prepend=-1, append=-1))
        for begin, end in pairwise(bounds.tolist()):
            i = int(which[begin])
            index = self._touched[i]
            own = pages[begin:end] - self._touched_starts[i]
            yield self.runs[index], self.others[index], own

    def _spans(self, pages: np.ndarray) -> list[tuple[int, int, int]]:
        """Consecutive pages of one run: (index of the run, first page, count)."""
        which = np.searchsorted(self._touched_starts, pages, "right") - 1
        breaks = (np.diff(pages, prepend=-2) != 1) | (np.diff(which, prepend=-1) != 0)
        begins = np.flatnonzero(breaks)
        which = which[begins]
        return list(
            zip(
                np.asarray(self._touched, np.int64)[which].tolist(),
                (pages[begins] - self._touched_starts[which]).tolist(),
                np.diff(begins, append=len(pages)).tolist(),
                strict=True,
            )
        )


def total_bytes(files: Sequence[FileRecord]) -> int:
    """Bytes of a model's files together."""
    return sum(file.bytes for file in files)
