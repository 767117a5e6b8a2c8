"""Bytes of equal meaning side by side: elements and quantisation blocks cut in planes.

A compressor sees little in `low high low high ...`, much in `high high high ...`. So byte j of
every element of a plain type makes plane j, and each field of a quantisation block makes one,
its floating-point scales one a byte (`ElementKind`).

A small update of a weight is a small step on the scale of its bit patterns, taken in the order of
the numbers they stand for. Patterns are sign and magnitude, so negative ones have their magnitude
bits inverted first; read as signed integers, the patterns of all finite numbers then rise with the
number, -0 and +0 are neighbours, and NaNs lie beyond the infinities. The map is its own inverse.
`ordered_difference` subtracts on that scale, modulo 2^width, and *zigzags* the result: 0, -1, 1,
-2, 2, ... become 0, 1, 2, 3, 4, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf import GGMLQuantizationType

from forge.block_layouts import block_layout
from forge.errors import GGUFShardError
from forge.jit import cached_njit

#: Plain types: (bytes an element, bits of the exponent; none for integers).
_PLAIN_TYPES: dict[str, tuple[int, int]] = {
    "F16": (2, 5), "BF16": (2, 8), "F32": (4, 8), "F64": (8, 11),
    "I8": (1, 0), "I16": (2, 0), "I32": (4, 0), "I64": (8, 0),
}  # fmt: skip

#: Fields that are floating-point numbers: the bytes of one behave differently.
_SCALE_FIELDS = ("d", "m", "dmin")

MAX_PAGE_BYTES = 65535  # what a u16 counts


@dataclass(frozen=True)
class ElementKind:
    """How the bytes of a run are cut.

    Attributes
    ----------
    ggml_type
        None for raw bytes.
    block_bytes
        Bytes of an element of a plain type, of a block of a quantised one.
    planes
        (offset, bytes) in a block of what goes to each stream.
    has_order
        Whether elements are numbers of a plain type, which can be subtracted.
    exponent_bits
        Width of the exponent below the sign bit; 0 where there is none.
    """

    ggml_type: GGMLQuantizationType | None
    block_bytes: int
    planes: tuple[tuple[int, int], ...]
    has_order: bool = False
    exponent_bits: int = 0

    @property
    def exponent_shift(self) -> int:
        """Bits of the mantissa."""
        return 8 * self.block_bytes - 1 - self.exponent_bits

    @property
    def magnitude_mask(self) -> int:
        """The bits that are inverted below a set sign; 0 for integers, which need no map."""
        return (1 << (8 * self.block_bytes - 1)) - 1 if self.exponent_bits else 0

    @property
    def masks(self) -> tuple[np.signedinteger, np.signedinteger]:
        """What `add_difference_loop` needs: the magnitude mask, and all bits but the sign."""
        word = np.dtype(f"i{self.block_bytes}").type
        return word(self.magnitude_mask), word(np.iinfo(word).max)

    def words(self, content: np.ndarray) -> np.ndarray:
        """uint8 [n_bytes] of a plain type as signed integers [n_elements], without a copy."""
        return content.view(f"i{self.block_bytes}")


@cache
def element_kind(ggml_type: GGMLQuantizationType | None) -> ElementKind:
    """The kind of a ggml type; of raw bytes for None.

    Types whose struct is not known to `forge.block_layouts` are a single stream.
    """
    if ggml_type is None:
        return ElementKind(None, 1, ((0, 1),))
    if ggml_type.name in _PLAIN_TYPES:
        size, exponent_bits = _PLAIN_TYPES[ggml_type.name]
        planes = [(byte, 1) for byte in range(size)]
        return ElementKind(ggml_type, size, tuple(planes), True, exponent_bits)
    layout = block_layout(ggml_type)
    planes = []
    for field in layout.fields:
        if field.name in _SCALE_FIELDS:
            planes += [(field.struct_offset + byte, 1) for byte in range(field.bytes)]
        else:
            planes.append((field.struct_offset, field.bytes))
    return ElementKind(ggml_type, layout.bytes, tuple(planes))


def check_pages(kind: ElementKind, lengths: np.ndarray, *contents: np.ndarray | None) -> None:
    """ValueError unless `contents`, uint8 [n_bytes], are pages of the given lengths, contiguous."""
    if lengths.dtype.kind != "i":
        raise ValueError(f"lengths of pages are {lengths.dtype}")
    if lengths.size and not 0 <= lengths.min() <= lengths.max() <= MAX_PAGE_BYTES:
        raise ValueError(f"pages have {lengths.min()} to {lengths.max()} bytes")
    if np.any(lengths % kind.block_bytes):
        raise ValueError(f"pages are not whole blocks of {kind.block_bytes} bytes")
    expected = np.uint8, (int(lengths.sum()),), True
    for content in contents:
        if content is None:
            raise ValueError("pages of the base are needed")
        if (content.dtype, content.shape, content.flags.c_contiguous) != expected:
            raise ValueError(f"pages are {content.dtype} {content.shape}, not uint8 {expected[1]}")


# ---- planes ----


@cached_njit()
def _split_words_loop(words: np.ndarray, planes: np.ndarray) -> None:
    for byte in range(planes.shape[0]):
        shift = np.uint64(8 * byte)
        for i in range(words.size):
            planes[byte, i] = np.uint8((np.uint64(words[i]) >> shift) & np.uint64(0xFF))


@cached_njit()
def _join_word_plane_loop(plane: np.ndarray, words: np.ndarray, byte: int) -> None:
    word = words.dtype.type  # unsigned, so that the same comes out with the compiler off
    shift = word(8 * byte)
    if byte == 0:
        for i in range(words.size):
            words[i] = word(plane[i])
    else:
        for i in range(words.size):
            words[i] |= word(word(plane[i]) << shift)


@cached_njit()
def _copy_pieces_loop(source: np.ndarray, out: np.ndarray, size: int, first: tuple[int, int],
                      stride: tuple[int, int]) -> None:  # fmt: skip
    """Copy pieces of `size` bytes; where the first is and how far apart, in (source, out)."""
    # Unsigned, so that no index is looked at for counting from the end.
    from_first, to_first = np.uint64(first[0]), np.uint64(first[1])
    from_stride, to_stride = np.uint64(stride[0]), np.uint64(stride[1])
    for piece in range(np.uint64(min(source.size // stride[0], out.size // stride[1]))):
        here, there = from_first + piece * from_stride, to_first + piece * to_stride
        if size == 1:
            out[there] = source[here]
        else:
            for i in range(np.uint64(size)):
                out[there + i] = source[here + i]


def plane_sizes(kind: ElementKind, n_bytes: int) -> list[int]:
    """Bytes of each plane of `n_bytes` of content, a whole number of blocks."""
    return [n_bytes // kind.block_bytes * size for _, size in kind.planes]


def split_planes(kind: ElementKind, content: np.ndarray, out: np.ndarray) -> list[np.ndarray]:
    """Cut content in planes.

    Parameters
    ----------
    kind
        What the content is made of.
    content
        uint8 [n_bytes], contiguous, whole blocks.
    out
        uint8 [n_bytes]: where the planes come to lie, one after the other.

    Returns
    -------
    list of numpy.ndarray
        uint8 arrays of `plane_sizes`, parts of `out`.
    """
    if kind.has_order:
        words = kind.words(content)
        _split_words_loop(words, out.reshape(kind.block_bytes, words.size))
    planes = np.split(out, np.cumsum(plane_sizes(kind, content.size))[:-1])
    if not kind.has_order:
        for plane, (offset, size) in zip(planes, kind.planes, strict=True):
            _copy_pieces_loop(content, plane, size, (offset, 0), (kind.block_bytes, size))
    return planes


def join_planes(kind: ElementKind, planes: Sequence[np.ndarray], content: np.ndarray) -> np.ndarray:
    """The inverse of `split_planes`, in `content`, uint8 [n_bytes], whose bytes are their sizes
    together; GGUFShardError if one of them is wrong."""
    check_sizes(planes, plane_sizes(kind, content.size))
    if kind.has_order:
        for byte, plane in enumerate(planes):
            _join_word_plane_loop(plane, content.view(f"u{kind.block_bytes}"), byte)
    else:
        for plane, (offset, size) in zip(planes, kind.planes, strict=True):
            _copy_pieces_loop(plane, content, size, (0, offset), (size, kind.block_bytes))
    return content


def check_sizes(streams: Sequence[np.ndarray], expected: Sequence[int]) -> None:
    """GGUFShardError unless the streams have the expected numbers of bytes."""
    found = [stream.size for stream in streams]
    if found != list(expected):
        raise GGUFShardError(f"streams have {found} bytes, not {list(expected)}")


# ---- differences of ordered elements ----


@cached_njit()
def difference_loop(target: np.ndarray, base: np.ndarray, out: np.ndarray,
                    magnitude_mask: int) -> None:  # fmt: skip
    """Zigzagged steps between signed elements; `magnitude_mask` is their kind's, of their width."""
    # Every value is narrowed to the element's width: that is the modulus, and it vectorises.
    word = out.dtype.type
    for i in range(out.size):
        here, there = target[i], base[i]
        if here < 0:
            here = word(here ^ magnitude_mask)
        if there < 0:
            there = word(there ^ magnitude_mask)
        step = word(here - there)
        doubled = word(step << 1)
        out[i] = word(~doubled) if step < 0 else doubled


@cached_njit()
def add_difference_loop(known: np.ndarray, zigzag: np.ndarray, out: np.ndarray,
                         masks: tuple[int, int], backwards: bool) -> None:  # fmt: skip
    word = out.dtype.type
    magnitude_mask, positive_mask = masks
    for i in range(out.size):
        here, step = known[i], word(word(zigzag[i] >> 1) & positive_mask)
        if here < 0:
            here = word(here ^ magnitude_mask)
        if zigzag[i] & 1:
            step = word(~step)
        here = word(here - step) if backwards else word(here + step)
        out[i] = word(here ^ magnitude_mask) if here < 0 else here


def ordered_difference(
    kind: ElementKind, target: np.ndarray, base: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """Steps from `base` to `target`, zigzagged, in `out`: uint8 [n_bytes], like both."""
    words = kind.words(out)
    magnitude_mask = words.dtype.type(kind.magnitude_mask)
    difference_loop(kind.words(target), kind.words(base), words, magnitude_mask)
    return out


def add_ordered_difference(
    kind: ElementKind, known: np.ndarray, difference: np.ndarray, out: np.ndarray,
    backwards: bool = False,
) -> np.ndarray:  # fmt: skip
    """The target from the base, or backwards the base from the target, in `out`: uint8 [n_bytes],
    which may be the difference itself."""
    known, difference, words = (kind.words(x) for x in (known, difference, out))
    add_difference_loop(known, difference, words, kind.masks, backwards)
    return out
