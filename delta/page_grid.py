"""The pages of a model, told by its headers alone, in source bytes.

Each file of a model is a header, tensors, and padding. A *run* is a slice of a tensor (an expert's,
or the whole tensor) or a piece of padding. It is cut in *source pages*: as many blocks as a page of
`core.gguf` holds. So a source page is one page of the sharded model in either memory layout, and a
patch fits the plain file and the sharded model alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from gguf import GGMLQuantizationType

from forge.block_layouts import block_layout
from forge.crc32 import CONTENT_BYTES
from forge.errors import GGUFShardError
from forge.gguf_file import GGUFHeader, TensorInfo
from forge.info import printable
from forge.page_plan import is_expert, padding_ranges

TENSOR, PADDING = 0, 1
#: Padding comes in pieces of so many bytes, as the raw segments of a sharded model do.
PIECE_BYTES = 4 << 20
#: Slices and pieces of a model; the largest mixtures of experts have a third of that.
MAX_RUNS = 1 << 17

#: What a run is called: kind, name, number of the slice or piece.
RunKey = tuple[int, str, int]


@dataclass(frozen=True)
class Run:
    """Consecutive bytes of a source file that are cut in pages.

    Attributes
    ----------
    kind
        `TENSOR` or `PADDING`.
    name
        The tensor's name; of padding its place, "part.gap".
    index
        Number of the slice of the tensor, or of the piece of padding.
    ggml_type
        None for tensors of unknown type, and padding.
    part, offset, bytes
        Place in the source.
    page_bytes
        Bytes of a page; the last one may have fewer.
    """

    kind: int
    name: str
    index: int
    ggml_type: GGMLQuantizationType | None
    part: int
    offset: int
    bytes: int
    page_bytes: int

    @property
    def key(self) -> RunKey:
        return self.kind, self.name, self.index

    @property
    def n_pages(self) -> int:
        return -(-self.bytes // self.page_bytes)

    @property
    def end(self) -> int:
        return self.offset + self.bytes

    @property
    def label(self) -> str:
        """What messages call it."""
        if self.kind == PADDING:
            return f"padding {self.name}"
        name = printable(self.name)
        return name if self.index == 0 else f"{name}[{self.index}]"

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Offset and bytes of pages `first` to `first + count` - 1."""
        begin = first * self.page_bytes
        return self.offset + begin, min(count * self.page_bytes, self.bytes - begin)

    def page_lengths(self, pages: np.ndarray) -> np.ndarray:
        """Bytes of each of some pages, int64 [n]."""
        return np.minimum(self.page_bytes, self.bytes - pages.astype(np.int64) * self.page_bytes)


def n_paired(run: Run, other: Run | None) -> int:
    """How many pages of a run, from the first on, have one of the same length in its namesake."""
    if other is None or other.ggml_type != run.ggml_type:
        return 0
    if run.bytes == other.bytes:
        return run.n_pages
    return min(run.bytes, other.bytes) // run.page_bytes


def stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each stretch of pages that are flagged, bool [n_pages]."""
    bounds = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return [(begin, end) for begin, end in bounds.reshape(-1, 2).tolist()]


def _n_slices(tensor: TensorInfo) -> int:
    return tensor.shape[2] if tensor.ggml_type is not None and is_expert(tensor) else 1


def consecutive(pages: np.ndarray) -> list[tuple[int, int]]:
    """First page and count of each stretch of consecutive numbers in `pages`, ascending int64."""
    begins = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    counts = np.diff(begins, append=len(pages))
    return list(zip(pages[begins].tolist(), counts.tolist(), strict=True))


def tensor_runs(part: int, tensor: TensorInfo) -> Iterator[Run]:
    """The slices of a tensor."""
    page_bytes = CONTENT_BYTES
    if tensor.ggml_type is not None:
        layout = block_layout(tensor.ggml_type)
        page_bytes = layout.per_page * layout.bytes
    n_slices = _n_slices(tensor)
    n_bytes = tensor.bytes // n_slices
    for i in range(n_slices):
        offset = tensor.offset + i * n_bytes
        yield Run(TENSOR, tensor.name, i, tensor.ggml_type, part, offset, n_bytes, page_bytes)


def padding_runs(part: int, header: GGUFHeader) -> Iterator[Run]:
    """The padding of a file, in pieces, zero or not."""
    for gap, (start, n_bytes) in enumerate(padding_ranges(header)):
        for i, begin in enumerate(range(0, n_bytes, PIECE_BYTES)):
            size = min(PIECE_BYTES, n_bytes - begin)
            name = f"{part}.{gap}"
            yield Run(PADDING, name, i, None, part, start + begin, size, CONTENT_BYTES)


def model_runs(headers: Sequence[GGUFHeader]) -> list[Run]:
    """All runs of a model, in the order of the files.

    Raises
    ------
    GGUFShardError
        If there are more than any model has: tensors can claim millions of experts.
    """
    runs: list[Run] = []
    for part, header in enumerate(headers):
        # Counted before any is made.
        if len(runs) + sum(map(_n_slices, header.tensors)) > MAX_RUNS:
            raise GGUFShardError(f"{header.name}: more than {MAX_RUNS} slices of tensors")
        runs += chain.from_iterable(tensor_runs(part, t) for t in header.tensors)
        runs += islice(padding_runs(part, header), MAX_RUNS + 1 - len(runs))
        if len(runs) > MAX_RUNS:
            raise GGUFShardError(f"{header.name}: more than {MAX_RUNS} slices of tensors")
    return sorted(runs, key=lambda run: (run.part, run.offset))
