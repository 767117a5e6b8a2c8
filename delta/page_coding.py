"""How the changed pages of a patch are coded: four modes, streams, and Zstandard.

Pages are coded in groups of up to `GROUP_BYTES` of content, all of one kind of element and one
mode. A group becomes a few *streams* of bytes:

    RAW      the planes of the pages themselves (`delta.byte_planes`)
    XOR      the planes of the pages XOR their counterparts in the base
    ORDERED  the planes of the zigzagged steps from the base's elements to the target's; those of
             floating-point elements are sorted by the exponent of the base's element, and the last
             ones, if they are small, give half a byte each to a stream of their own
    SPARSE   the changed bytes one by one

The streams of SPARSE are, for each page, the number of its changed bytes, and for each changed
byte the distance to the one before it in its page (from -1 at first) less one, and its XOR with
the base's, which is never 0. The first two are u16, low bytes and high bytes in streams of their
own: five streams in all.

XOR and SPARSE lead back from the target to the base as well. So does ORDERED where the group is
`symmetric`: then nothing is sorted, because who goes back does not know the exponents yet.

Streams come from strangers when they are decoded. Their sizes follow from the group's, so what
they expand to is known before; what SPARSE says is checked where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from delta.byte_planes import (
    ElementKind,
    add_ordered_difference,
    check_pages,
    check_sizes,
    join_planes,
    ordered_difference,
    plane_sizes,
    split_planes,
)
from delta.compression import compress_streams, decompress
from delta.exponent_sort import add_sorted_difference, sorted_difference
from delta.mode_choice import MODE_NAMES, ORDERED, RAW, SPARSE, XOR, choose_modes
from delta.small_steps import check_pairs, count_pairs, put_pairs, take_pairs
from forge.buffers import recycled, scratch
from forge.errors import GGUFShardError
from forge.jit import cached_njit

__all__ = [
    "GROUP_BYTES", "MODE_NAMES", "ORDERED", "RAW", "SPARSE", "XOR", "Edits", "choose_modes",
    "compress_streams", "count_items", "decode", "decode_edits", "decode_reverse", "decompress",
    "encode", "stream_sizes",
]  # fmt: skip

GROUP_BYTES = 4 << 20


def _check_mode(kind: ElementKind, mode: int) -> None:
    """GGUFShardError for a mode that pages of this kind cannot have."""
    if mode not in range(len(MODE_NAMES)):
        raise GGUFShardError(f"mode {mode} is unknown")
    if mode == ORDERED and not kind.has_order:
        name = "raw bytes" if kind.ggml_type is None else kind.ggml_type.name
        raise GGUFShardError(f"mode ordered is not for {name}")


def encode(
    kind: ElementKind,
    mode: int,
    target: np.ndarray,
    base: np.ndarray | None,
    lengths: np.ndarray,
    *,
    symmetric: bool = False,
) -> list[np.ndarray]:
    """The streams of a group of pages, not yet compressed.

    Parameters
    ----------
    kind
        What the pages are made of.
    target, base
        uint8 [n_bytes], contiguous: the pages and their counterparts, one after the other. RAW
        needs no base.
    lengths
        Integers [n_pages], the bytes of each page: whole blocks, at most `MAX_PAGE_BYTES`.
    symmetric
        Whether `decode_reverse` must be able to go back (ORDERED only).

    Returns
    -------
    list of numpy.ndarray
        uint8 arrays of `stream_sizes`, good until this thread encodes again.
    """
    _check_mode(kind, mode)
    check_pages(kind, lengths, target)
    if mode == RAW:
        return split_planes(kind, target, scratch("planes", target.size))
    check_pages(kind, lengths, base)
    assert base is not None
    if mode == SPARSE:
        return _encode_sparse(target, base, lengths)
    difference, other = scratch("difference", target.size), scratch("planes", target.size)
    if mode == XOR:
        return split_planes(kind, np.bitwise_xor(target, base, out=difference), other)
    if symmetric or not kind.exponent_bits:
        return split_planes(kind, ordered_difference(kind, target, base, difference), other)
    steps = sorted_difference(kind, target, base, difference)
    n_pairs = count_pairs(kind, steps)
    pairs = take_pairs(kind, steps, scratch("pairs", n_pairs)) if n_pairs else None
    planes = split_planes(kind, steps, other)
    return planes if pairs is None else [*planes, pairs]


def stream_sizes(
    kind: ElementKind, mode: int, n_bytes: int, n_pages: int, n_items: int = 0
) -> list[int]:
    """Bytes of each stream of a group, before compression.

    Parameters
    ----------
    n_bytes, n_pages
        Content of the group.
    n_items
        Changed bytes, for SPARSE; pairs of small steps, for ORDERED. GGUFShardError if there cannot
        be so many.
    """
    _check_mode(kind, mode)
    if mode == SPARSE:
        if not 0 <= n_items <= n_bytes:
            raise GGUFShardError(f"{n_items} changed bytes in {n_bytes}")
        return [n_pages, n_pages, n_items, n_items, n_items]
    sizes = plane_sizes(kind, n_bytes)
    if n_items == 0:
        return sizes
    check_pairs(kind, n_bytes if mode == ORDERED and kind.exponent_bits else 0, n_items)
    return [*sizes, n_items]


def count_items(kind: ElementKind, mode: int, streams: Sequence[np.ndarray]) -> int:
    """What `stream_sizes` has to know of the streams that `encode` made."""
    if mode == SPARSE or (mode == ORDERED and len(streams) > len(kind.planes)):
        return streams[-1].size
    return 0


def decode(
    kind: ElementKind,
    mode: int,
    streams: Sequence[np.ndarray],
    base: np.ndarray | None,
    lengths: np.ndarray,
    *,
    symmetric: bool = False,
) -> np.ndarray:
    """The target's pages from the streams and the base's: uint8 [n_bytes].

    Parameters are those of `encode`. GGUFShardError if the streams make no sense.
    """
    _check_mode(kind, mode)
    if mode == RAW:
        check_pages(kind, lengths)
        return join_planes(kind, streams, recycled(int(lengths.sum())))
    check_pages(kind, lengths, base)
    assert base is not None
    if mode != ORDERED:
        return _apply_xor(kind, mode, streams, base, lengths)
    pages = recycled(base.size)
    if symmetric or not kind.exponent_bits:
        join_planes(kind, streams, pages)
        return add_ordered_difference(kind, base, pages, pages)
    has_pairs = len(streams) == len(kind.planes) + 1
    planes = streams[:-1] if has_pairs else streams
    steps = join_planes(kind, planes, scratch("steps", base.size))
    if has_pairs:
        put_pairs(kind, steps, streams[-1])
    return add_sorted_difference(kind, base, steps, pages)


def decode_reverse(
    kind: ElementKind,
    mode: int,
    streams: Sequence[np.ndarray],
    target: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:
    """The base's pages from the streams and the target's: uint8 [n_bytes].

    Modes are XOR, SPARSE, and ORDERED of a group that was encoded as symmetric. GGUFShardError if
    the streams make no sense.
    """
    _check_mode(kind, mode)
    check_pages(kind, lengths, target)
    if mode == RAW:
        raise GGUFShardError("mode raw does not lead back to the base")
    if mode != ORDERED:
        return _apply_xor(kind, mode, streams, target, lengths)
    pages = join_planes(kind, streams, recycled(target.size))
    return add_ordered_difference(kind, target, pages, pages, backwards=True)


def _apply_xor(kind: ElementKind, mode: int, streams: Sequence[np.ndarray],
               known: np.ndarray, lengths: np.ndarray) -> np.ndarray:  # fmt: skip
    """One side from the other, XOR or SPARSE."""
    if mode == SPARSE:
        return _decode_sparse(streams, known, lengths)
    other = join_planes(kind, streams, recycled(known.size))
    return np.bitwise_xor(other, known, out=other)


# ---- changed bytes one by one ----


@cached_njit()
def _list_edits_loop(target: np.ndarray, base: np.ndarray, lengths: np.ndarray,
                     counts: np.ndarray, gaps: np.ndarray, values: np.ndarray) -> None:  # fmt: skip
    edit, start = 0, 0
    for page in range(lengths.size):
        first, last = edit, start - 1
        for place in range(start, start + lengths[page]):
            if target[place] != base[place]:
                gaps[edit] = place - last - 1
                values[edit] = target[place] ^ base[place]
                last = place
                edit += 1
        counts[page] = edit - first
        start += lengths[page]


@cached_njit()
def _place_edits_loop(lengths: np.ndarray, counts: np.ndarray, gaps: np.ndarray,
                      values: np.ndarray, places: np.ndarray) -> int:  # fmt: skip
    """Where edits are; the page of the first that cannot be, or -1. Counts are as many as gaps."""
    edit, end = 0, 0
    for page in range(lengths.size):
        place = np.int64(end - 1)
        end += lengths[page]
        for _ in range(counts[page]):
            place += np.int64(gaps[edit]) + 1
            if place >= end or values[edit] == 0:
                return page
            places[edit] = place
            edit += 1
    return -1


def _encode_sparse(target: np.ndarray, base: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    n_edits = int(np.count_nonzero(target != base))
    counts, gaps = np.empty(lengths.size, np.uint16), np.empty(n_edits, np.uint16)
    values = np.empty(n_edits, np.uint8)
    _list_edits_loop(target, base, lengths, counts, gaps, values)
    return [half for u16 in (counts, gaps) for half in _halves(u16)] + [values]


@dataclass(frozen=True)
class Edits:
    """Changed bytes of pages that lie one after the other.

    Attributes
    ----------
    counts
        How many each page has, uint16 [n_pages].
    places
        Where they are, counted from the first byte of the first page: int64 [n_edits], ascending.
    values
        Their XOR with the base's bytes, uint8 [n_edits].
    """

    counts: np.ndarray
    places: np.ndarray
    values: np.ndarray


def decode_edits(streams: Sequence[np.ndarray], lengths: np.ndarray) -> Edits:
    """What a group in SPARSE says, with no need of the base.

    Parameters are those of `decode`. GGUFShardError if the streams make no sense.
    """
    n_edits = streams[-1].size if streams else 0
    check_sizes(streams, [lengths.size, lengths.size, n_edits, n_edits, n_edits])
    counts, gaps = _from_halves(*streams[:2]), _from_halves(*streams[2:4])
    if int(counts.sum(dtype=np.int64)) != n_edits:
        raise GGUFShardError(
            f"pages count {counts.sum(dtype=np.int64)} changed bytes, not {n_edits}"
        )
    places = np.empty(n_edits, np.int64)
    page = _place_edits_loop(lengths, counts, gaps, streams[4], places)
    if page >= 0:
        raise GGUFShardError(f"page {page} of its group has a change past its end or of nothing")
    return Edits(counts, places, streams[4])


def _decode_sparse(
    streams: Sequence[np.ndarray], known: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    edits = decode_edits(streams, lengths)
    content = known.copy()
    content[edits.places] ^= edits.values  # no place comes twice
    return content


def _halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high bytes of uint16 [n]."""
    return values.astype(np.uint8), (values >> 8).astype(np.uint8)


def _from_halves(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low | (high.astype(np.uint16) << 8)
