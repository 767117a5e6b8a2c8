"""Which mode codes a page in the fewest bytes: an estimate from a sample of it.

A plane of N bytes, of which value v occurs c(v) times, is taken to cost its order-0 entropy:

    N log2 N - sum of c(v) log2 c(v)   bits.

Zstandard needs more where zeros prevail: its literals take at least one bit each, a run of zeros
takes a match. With a share q of other bytes that is about 8.5 q (1-q)^5 bits a byte, measured on
random changes of all densities.

In a SPARSE page of N elements, e of them changed in r runs, the places cost about the entropy of a
Markov chain of two states, e h(r/e) + (N-e) h(r/(N-e)) where h is that of a yes or no, and the
values cost their own.

Pages that are coded together are mostly of one mind, so at first a few are asked: if they agree,
only those of the others that have changed more or less than all of them.
"""

from __future__ import annotations

import numpy as np

from delta.byte_planes import ElementKind, check_pages, difference_loop
from forge.jit import cached_njit

#: How a page is coded; see `delta.page_coding`.
RAW, XOR, ORDERED, SPARSE = range(4)
MODE_NAMES = ("raw", "xor", "ordered", "sparse")

#: Every so manieth element is looked at, or byte of a block: the first that does not divide the
#: block, so that all fields are met. They are odd, lest only even rows or columns be.
_SAMPLE_STEPS = (7, 11, 13)
_SMALL_ELEMENTS_STEP = 13  # of up to two bytes, of which a page has enough

#: Up to this share of changed elements SPARSE is the smallest whatever the values are, ...
_FEW_CHANGES = 1 / 32

#: ... and from this on it is not.
_MANY_CHANGES = 3 / 4

#: ORDERED is taken for this share of its estimate, which knows nothing of what sorting saves.
_ORDERED_COST = 0.95

#: And SPARSE for this, for what the Huffman codes of its streams lose.
_SPARSE_COST = 1.05

#: One page of so many is asked at first, where there are as many as can speak for all.
_PAGES_PER_VOTE, _FEWEST_VOTES = 8, 64

#: Of the others one byte of so many is looked at, to see whether they have changed as much.
_BITS_STEP = 31
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)

#: So small a share of pages may be given the mode of the others: mostly it loses little, and a
#: group of their own takes time and room.
STRAY_SHARE = 1 / 128

#: RAW needs no base: it stays unless another mode costs less than this share.
_WORTHWHILE_COST = 0.965


@cached_njit()
def _xor_loop(target: np.ndarray, base: np.ndarray, out: np.ndarray) -> int:
    """XOR of elements; how many are not zero."""
    changed = 0
    for i in range(out.size):
        out[i] = target[i] ^ base[i]
        changed += out[i] != 0
    return changed


@cached_njit()
def _count_loop(page: np.ndarray, sample: np.ndarray, counts: np.ndarray) -> None:
    """Count the sampled bytes of a page, `counts` [n_planes, 256]."""
    counts[:] = 0
    for i in range(sample.shape[0]):
        of_plane = counts[sample[i, 0]]
        for place in range(np.uint64(sample[i, 1]), np.uint64(page.size), np.uint64(sample[i, 2])):
            of_plane[np.uint64(page[place])] += np.uint16(1)


@cached_njit()
def _count_bits_loop(target: np.ndarray, base: np.ndarray, places: tuple[np.ndarray, np.ndarray],
                     bits_of: np.ndarray, bits: np.ndarray) -> None:  # fmt: skip
    """How many bits of each page have changed, of those looked at, int64 [n_pages]."""
    for page in range(bits.size):
        start = places[0][page]
        bits[page] = 0
        for place in range(start, start + places[1][page], _BITS_STEP):
            bits[page] += bits_of[target[place] ^ base[place]]


@cached_njit()
def _yes_no_bits(n_yes: float, n: float) -> float:
    """Bits that say which `n_yes` of `n` things are so."""
    if not 0 < n_yes < n:
        return 0.0
    share = n_yes / n
    return -n * (share * np.log2(share) + (1 - share) * np.log2(1 - share))


@cached_njit(fastmath={"reassoc"})
def _entropy_bits(counts: np.ndarray, n_log_n: np.ndarray) -> tuple[float, int]:
    """Bits of the bytes of which `counts` [256] occur, by the formula above, and their number."""
    n, saved = np.uint32(0), np.float32(0)
    for value in range(256):
        n += counts[value]
        saved += n_log_n[np.uint64(counts[value])]
    return n_log_n[n] - saved, int(n)


@cached_njit()
def _planes_bits(counts: np.ndarray, plane_bytes: np.ndarray, n_log_n: np.ndarray) -> float:
    """Bits of a page whose planes are compressed; `counts` [n_planes, 256] are its sample's."""
    bits = 0.0
    for plane in range(counts.shape[0]):
        of_sample, n = _entropy_bits(counts[plane], n_log_n)
        if n:
            others = 1 - counts[plane, 0] / n
            of_sample += n * 8.5 * others * (1 - others) ** 5
            bits += of_sample * plane_bytes[plane] / n
    return bits


@cached_njit()
def _sparse_bits(counts: np.ndarray, plane_bytes: np.ndarray, xor: np.ndarray, changed: int,
                 n_log_n: np.ndarray) -> float:  # fmt: skip
    """Bits of a page in SPARSE; `counts` [n_planes, 256] are of its elements' XOR."""
    runs = int(xor[0] != 0)
    for i in range(1, xor.size):
        runs += (xor[i] != 0) & (xor[i - 1] == 0)
    bits = _yes_no_bits(runs, changed) + _yes_no_bits(runs, xor.size - changed)
    values = np.zeros(256, np.uint16)
    changed_bytes = 0.0
    for plane in range(counts.shape[0]):
        n = 0
        for value in range(256):
            n += counts[plane, value]
            values[value] += counts[plane, value]
        share = (n - counts[plane, 0]) / max(n, 1)
        changed_bytes += min(changed, share * plane_bytes[plane])
    values[0] = 0
    of_sample, n_values = _entropy_bits(values, n_log_n)
    return bits + changed_bytes * of_sample / max(n_values, 1)


@cached_njit()
def _cheapest(raw: float, xor: float, ordered: float, sparse: float) -> int:
    """The mode, given the bits that each takes."""
    best, bits = XOR, xor
    if _ORDERED_COST * ordered < xor:
        best, bits = ORDERED, ordered
    if _SPARSE_COST * sparse < bits:
        best, bits = SPARSE, _SPARSE_COST * sparse
    return best if bits < _WORTHWHILE_COST * raw else RAW


@cached_njit()
def _choose_loop(pages: tuple[np.ndarray, ...], elements: tuple[np.ndarray, ...],
                 places: tuple[np.ndarray, np.ndarray], which: np.ndarray, has_order: bool,
                 magnitude_mask: int, sample: np.ndarray, plane_shares: np.ndarray,
                 n_log_n: np.ndarray, modes: np.ndarray) -> None:  # fmt: skip
    """Modes of the pages `which`. `pages` and `elements` are target, base, and room for a page, as
    bytes and as elements; `places` are where pages begin, and their lengths."""
    counts = np.empty((plane_shares.size, 256), np.uint16)
    for page in which:
        start, length = places[0][page], places[1][page]
        first, n = start // elements[0].itemsize, length // elements[0].itemsize
        target, base = elements[0][first : first + n], elements[1][first : first + n]
        changed = _xor_loop(target, base, elements[2][:n])
        modes[page] = SPARSE
        if changed > _FEW_CHANGES * n:
            plane_bytes = plane_shares * length
            _count_loop(pages[2][:length], sample, counts)
            xor = _planes_bits(counts, plane_bytes, n_log_n)
            sparse = np.inf
            if changed < _MANY_CHANGES * n:
                sparse = _sparse_bits(counts, plane_bytes, elements[2][:n], changed, n_log_n)
            _count_loop(pages[0][start : start + length], sample, counts)
            raw = _planes_bits(counts, plane_bytes, n_log_n)
            ordered = np.inf
            if has_order:
                difference_loop(target, base, elements[2][:n], magnitude_mask)
                _count_loop(pages[2][:length], sample, counts)
                ordered = _planes_bits(counts, plane_bytes, n_log_n)
            modes[page] = _cheapest(raw, xor, ordered, sparse)


def _sample(kind: ElementKind) -> np.ndarray:
    """Where pages are looked at: int64 rows of plane, first place, and distance to the next."""
    step = next(step for step in _SAMPLE_STEPS if kind.block_bytes % step)
    if kind.has_order:
        if kind.block_bytes <= 2:
            step = _SMALL_ELEMENTS_STEP
        firsts = np.arange(kind.block_bytes)
    else:
        firsts = np.arange(0, step * kind.block_bytes, step)
    plane_of = np.empty(kind.block_bytes, np.int64)
    for plane, (offset, size) in enumerate(kind.planes):
        plane_of[offset : offset + size] = plane
    distances = np.full(firsts.size, step * kind.block_bytes)
    return np.stack([plane_of[firsts % kind.block_bytes], firsts, distances], axis=1)


def choose_modes(
    kind: ElementKind, target: np.ndarray, base: np.ndarray, lengths: np.ndarray,
    ask_all: bool = True,
) -> np.ndarray:  # fmt: skip
    """The mode that codes each page in the fewest bytes, as far as a sample tells.

    Parameters
    ----------
    kind, target, base, lengths
        Pages and their counterparts as for `delta.page_coding.encode`.
    ask_all
        Ask each page, even if those that are asked at first agree.

    Returns
    -------
    numpy.ndarray
        uint8 [n_pages]; SPARSE for pages that are unchanged.
    """
    check_pages(kind, lengths, target, base)
    page = np.empty(int(lengths.max(initial=0)), np.uint8)
    pages = target, base, page
    elements = tuple(kind.words(content) if kind.has_order else content for content in pages)
    plane_shares = np.array([size / kind.block_bytes for _, size in kind.planes])
    counts = np.arange(page.size + 1, dtype=np.float32)
    n_log_n = counts * np.log2(np.maximum(counts, 1))
    modes = np.empty(lengths.size, np.uint8)
    places = np.cumsum(lengths) - lengths, lengths

    def ask(which: np.ndarray) -> None:
        _choose_loop(
            pages, elements, places, which, kind.has_order,
            elements[2].dtype.type(kind.magnitude_mask), _sample(kind), plane_shares, n_log_n,
            modes,
        )  # fmt: skip

    voters = np.arange(_PAGES_PER_VOTE // 2, lengths.size, _PAGES_PER_VOTE)
    ask(voters)
    most = int(np.bincount(modes[voters], minlength=1).argmax())
    agree = voters[modes[voters] == most]
    others = np.setdiff1d(np.arange(lengths.size), voters, assume_unique=True)
    are_few = voters.size < _FEWEST_VOTES
    if ask_all or are_few or most == SPARSE or voters.size - agree.size > STRAY_SHARE * voters.size:
        ask(others)
    else:
        modes[others] = most
        bits = np.empty(lengths.size, np.int64)
        _count_bits_loop(target, base, places, _BITS, bits)
        least, largest = int(bits[agree].min()), int(bits[agree].max())
        margin = (largest - least) // 2
        ask(others[(bits[others] < least - margin) | (bits[others] > largest + margin)])
    return modes
