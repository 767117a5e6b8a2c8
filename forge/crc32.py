"""CRC32 of page contents on the CPU: carry-less multiplication, with a portable twin.

The checksum is zlib's CRC32 (polynomial 0x04C11DB7, reflected, all-ones in and out) over the 4088
content bytes of a page. Where the processor multiplies without carries (x86 `pclmulqdq`, and
`vpclmulqdq` two or four times at once), four accumulators are folded over the page as in V. Gopal
et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009);
what remains, and every page on other processors, goes through sixteen 256-entry tables ("slicing by
16", M. Kounavis and F. Berry, 2005). With the compiler off (`NUMBA_DISABLE_JIT=1`) zlib does the
work.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils, codegen, config
from numba.extending import intrinsic

from forge.jit import cached_njit

CONTENT_BYTES = 4088
CONTENT_WORDS = CONTENT_BYTES // 8
POLYNOMIAL = 0x104C11DB7
REFLECTED_POLYNOMIAL = 0xEDB88320

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_WORD_BYTES, _STEP_BYTES = 8, 16
_FOLDED_BYTES = CONTENT_BYTES - _WORD_BYTES
_ACCUMULATORS = 4  # enough to hide the multiplier's latency
#: The next page is fetched meanwhile: processors do not look past the end of a page by themselves.
_AHEAD_BYTES, _LINE_BYTES = 4096, 64


def _slicing_tables() -> np.ndarray:
    """Tables [16, 256]: row k advances one byte by k further zero bytes."""
    tables = np.zeros((16, 256), np.uint32)
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (REFLECTED_POLYNOMIAL if crc & 1 else 0)
        tables[0, byte] = crc
    for k in range(1, 16):
        before = tables[k - 1]
        tables[k] = (before >> np.uint32(8)) ^ tables[0][before & np.uint32(255)]
    return tables


TABLES = _slicing_tables()


def _power_of_x(exponent: int) -> int:
    """x^exponent mod P, bit-reflected and shifted by one: an operand for `pclmulqdq`."""
    remainder = 1
    for _ in range(exponent):
        remainder <<= 1
        if remainder >> 32:
            remainder ^= POLYNOMIAL
    return int(f"{remainder:032b}"[::-1], 2) << 1


def _fold_operands(bits: int) -> tuple[int, int]:
    """What moves the low and the high half of a 128-bit accumulator `bits` bits ahead."""
    return _power_of_x(bits + 32), _power_of_x(bits - 32)


class _Folding:
    """Emits the folding of a page with vectors of `bits`: 128, or several 128-bit lanes at once."""

    def __init__(self, builder: Any, content: Any, bits: int) -> None:
        self._builder = builder
        self._content = content
        self._lanes = bits // 128

    def fold_all(self) -> Any:
        """All but the last 8 bytes of the content, folded into one vector of 128 bits."""
        b, n_bytes = self._builder, self._lanes * _STEP_BYTES
        block_bytes = _ACCUMULATORS * n_bytes
        n_blocks = _FOLDED_BYTES // block_bytes
        first = [self._load(_I64(i * n_bytes), self._lanes) for i in range(_ACCUMULATORS)]
        ones = ir.Constant(first[0].type, [0xFFFFFFFF] + [0] * (2 * self._lanes - 1))
        first[0] = b.xor(first[0], ones)

        entry, loop = b.basic_block, b.append_basic_block("fold")
        done = b.append_basic_block("folded")
        b.branch(loop)
        b.position_at_end(loop)
        offset = b.phi(_I64)
        offset.add_incoming(_I64(block_bytes), entry)
        sums = [b.phi(first[0].type) for _ in first]
        folded = [
            self._fold(
                total, block_bytes, self._load(b.add(offset, _I64(i * n_bytes)), self._lanes)
            )
            for i, total in enumerate(sums)
        ]
        for line in range(0, block_bytes, _LINE_BYTES):
            self._prefetch(b.add(offset, _I64(_AHEAD_BYTES + line)))
        following = b.add(offset, _I64(block_bytes))
        offset.add_incoming(following, loop)
        for total, start, value in zip(sums, first, folded, strict=True):
            total.add_incoming(start, entry)
            total.add_incoming(value, loop)
        b.cbranch(b.icmp_unsigned("<", following, _I64(n_blocks * block_bytes)), loop, done)

        b.position_at_end(done)
        total = folded[0]
        for other in folded[1:]:
            total = self._fold(total, n_bytes, other)
        at = n_blocks * block_bytes
        while at + n_bytes <= _FOLDED_BYTES:
            total = self._fold(total, n_bytes, self._load(_I64(at), self._lanes))
            at += n_bytes
        return self._fold_lanes(total, at)

    def _fold_lanes(self, total: Any, at: int) -> Any:
        """The lanes of a vector, and what is left of the content from byte `at` on."""
        lanes = [self._lane(total, lane) for lane in range(self._lanes)]
        rest = [self._load(_I64(offset), 1) for offset in range(at, _FOLDED_BYTES, _STEP_BYTES)]
        total = lanes[0]
        for data in lanes[1:] + rest:
            total = self._fold(total, _STEP_BYTES, data)
        return total

    def _load(self, offset: Any, lanes: int) -> Any:
        b = self._builder
        pointer = ir.VectorType(_I64, 2 * lanes).as_pointer()
        return b.load(b.inttoptr(b.add(self._content, offset), pointer), align=_WORD_BYTES)

    def _prefetch(self, offset: Any) -> None:
        b, pointer = self._builder, _I8.as_pointer()
        name = "llvm.prefetch.p0"
        prefetch = b.module.globals.get(name) or ir.Function(
            b.module, ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32]), name
        )
        to_read, keep, data = _I32(0), _I32(3), _I32(1)
        place = b.inttoptr(b.add(self._content, offset), pointer)
        b.call(prefetch, [place, to_read, keep, data])

    def _lane(self, vector: Any, lane: int) -> Any:
        places = ir.Constant(ir.VectorType(_I32, 2), [2 * lane, 2 * lane + 1])
        return self._builder.shuffle_vector(vector, vector, places)

    def _fold(self, total: Any, n_bytes: int, data: Any) -> Any:
        """The lanes of `total` moved `n_bytes` ahead, onto `data`."""
        b = self._builder
        lanes = total.type.count // 2
        operands = ir.Constant(total.type, [*_fold_operands(8 * n_bytes)] * lanes)
        name = "llvm.x86.pclmulqdq" + (f".{128 * lanes}" if lanes > 1 else "")
        multiply = b.module.globals.get(name) or ir.Function(
            b.module, ir.FunctionType(total.type, [total.type, total.type, _I8]), name
        )
        low = b.call(multiply, [total, operands, _I8(0x00)])
        high = b.call(multiply, [total, operands, _I8(0x11)])
        return b.xor(b.xor(low, high), data)


@intrinsic(prefer_literal=True)
def _fold_content(typingctx: Any, content: Any, bits: Any) -> Any:
    """Two uint64: what all but the last 8 content bytes at an address fold into, with vectors of so
    many bits (a literal)."""

    def generate(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        total = _Folding(b, args[0], bits.literal_value).fold_all()
        halves = [b.extract_element(total, _I32(i)) for i in range(2)]
        return cgutils.pack_array(b, halves)

    return types.UniTuple(types.uint64, 2)(types.uint64, bits), generate


@intrinsic
def as_pointer(typingctx: Any, address: Any) -> Any:
    """An integer address as a pointer that `carray` takes."""

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        return b.inttoptr(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(types.uint64)(types.uint64), codegen


@cached_njit()
def _advance8(word: np.uint64) -> np.uint32:
    """The register after the eight bytes of `word`, into which it was already xored."""
    byte = np.uint64(255)
    crc = np.uint32(0)
    for k in range(8):
        crc ^= TABLES[7 - k, (word >> np.uint64(8 * k)) & byte]
    return crc


@cached_njit()
def _crc32_sliced(address: np.uint64) -> np.uint32:
    words = carray(as_pointer(address), CONTENT_WORDS)
    byte = np.uint64(255)
    crc = np.uint32(0xFFFFFFFF)
    for i in range(0, CONTENT_WORDS - 1, 2):
        first, second = words[i] ^ np.uint64(crc), words[i + 1]
        crc = np.uint32(0)
        for k in range(8):
            crc ^= TABLES[15 - k, (first >> np.uint64(8 * k)) & byte]
            crc ^= TABLES[7 - k, (second >> np.uint64(8 * k)) & byte]
    return np.uint32(~_advance8(words[CONTENT_WORDS - 1] ^ np.uint64(crc)))


@cached_njit()
def _finish(folded: tuple[np.uint64, np.uint64], address: np.uint64) -> np.uint32:
    """The CRC32 of a page, of which all but the last 8 bytes have been folded."""
    words = carray(as_pointer(address), CONTENT_WORDS)
    crc = _advance8(folded[0])
    crc = _advance8(folded[1] ^ np.uint64(crc))
    return np.uint32(~_advance8(words[CONTENT_WORDS - 1] ^ np.uint64(crc)))


@cached_njit()
def _crc32_by_128(address: np.uint64) -> np.uint32:
    return _finish(_fold_content(address, 128), address)


@cached_njit()
def _crc32_by_256(address: np.uint64) -> np.uint32:
    return _finish(_fold_content(address, 256), address)


@cached_njit()
def _crc32_by_512(address: np.uint64) -> np.uint32:
    return _finish(_fold_content(address, 512), address)


#: Ways to a CRC32 and the processor's features that they need, the fastest first.
_WAYS: tuple[tuple[Any, frozenset[str]], ...] = (
    (_crc32_by_512, frozenset({"vpclmulqdq", "avx512f"})),
    (_crc32_by_256, frozenset({"vpclmulqdq", "avx2"})),
    (_crc32_by_128, frozenset({"pclmul"})),
    (_crc32_sliced, frozenset()),
)


def _features() -> frozenset[str]:
    """The processor's features that the compiler uses, by LLVM's names."""
    said = config.CPU_FEATURES
    named = (codegen.get_host_cpu_features() if said is None else said).split(",")
    return frozenset(feature[1:] for feature in named if feature.startswith("+"))


def possible_ways(features: Iterable[str] | None = None) -> list[Any]:
    """What `crc32_content` can be on a processor, the fastest first.

    Parameters
    ----------
    features
        The processor's, by LLVM's names; this one's if None.
    """
    found = _features() if features is None else frozenset(features)
    return [way for way, needed in _WAYS if needed <= found]


#: `crc32_content(address: uint64) -> uint32`, callable from compiled code: the CRC32 of the 4088
#: bytes at an 8-byte aligned address.
crc32_content = possible_ways()[0]


@cached_njit()
def _crc32_pages_loop(pages: np.ndarray, out: np.ndarray) -> None:
    for i in range(pages.shape[0]):
        out[i] = crc32_content(np.uint64(pages[i].ctypes.data))


def crc32_pages(pages: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """CRC32 of the content of each page.

    Parameters
    ----------
    pages
        uint8 [n_pages, 4096], contiguous.
    out
        uint32 [n_pages] to fill; a new array if None.

    Returns
    -------
    numpy.ndarray
        uint32 [n_pages], `zlib.crc32(page[:4088])` of each.
    """
    if pages.dtype != np.uint8 or pages.ndim != 2 or not pages.flags.c_contiguous:
        raise TypeError("pages must be a contiguous uint8 array [n_pages, 4096]")
    if out is None:
        out = np.empty(len(pages), np.uint32)
    if config.DISABLE_JIT:
        out[:] = [zlib.crc32(page[:CONTENT_BYTES]) for page in pages]
    else:
        _crc32_pages_loop(pages, out)
    return out
