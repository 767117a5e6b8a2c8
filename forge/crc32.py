"""CRC32 of page contents on the CPU: carry-less multiplication, with a portable twin.

The checksum is zlib's CRC32 (polynomial 0x04C11DB7, reflected, all-ones in and out) over the 4088
content bytes of a page. Where the processor multiplies without carries (x86 `pclmulqdq`), four
128-bit accumulators are folded over the page as in V. Gopal et al., "Fast CRC Computation for
Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009); what remains, and every page on
other processors, goes through sixteen 256-entry tables ("slicing by 16", M. Kounavis and F. Berry,
2005). With the compiler off (`NUMBA_DISABLE_JIT=1`) zlib does the work.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba import carray, types
from numba.core import config
from numba.extending import intrinsic

from forge.jit import cached_njit

CONTENT_BYTES = 4088
CONTENT_WORDS = CONTENT_BYTES // 8
POLYNOMIAL = 0x104C11DB7
REFLECTED_POLYNOMIAL = 0xEDB88320

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_V2 = ir.VectorType(_I64, 2)
_LANES = 4  # accumulators of 16 bytes: enough to hide the multiplier's latency
_FOLDED_BLOCKS = CONTENT_BYTES // (16 * _LANES)
_TAIL_BLOCKS = (CONTENT_BYTES - _FOLDED_BLOCKS * 16 * _LANES) // 16


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


@intrinsic
def _fold_content(typingctx: Any, content: Any, remainder: Any) -> Any:
    """Fold all but the last 8 content bytes at address `content` into 16 at `remainder`."""

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        name = "llvm.x86.pclmulqdq"
        multiply = b.module.globals.get(name) or ir.Function(
            b.module, ir.FunctionType(_V2, [_V2, _V2, _I8]), name
        )
        source = b.inttoptr(args[0], _V2.as_pointer())

        def load(index: Any) -> Any:
            return b.load(b.gep(source, [index]), align=8)

        def fold(accumulator: Any, operands: Any, data: Any) -> Any:
            low = b.call(multiply, [accumulator, operands, _I8(0x00)])
            high = b.call(multiply, [accumulator, operands, _I8(0x11)])
            return b.xor(b.xor(low, high), data)

        far = ir.Constant(_V2, list(_fold_operands(128 * _LANES)))
        near = ir.Constant(_V2, list(_fold_operands(128)))
        first = [load(_I64(lane)) for lane in range(_LANES)]
        first[0] = b.xor(first[0], ir.Constant(_V2, [0xFFFFFFFF, 0]))

        entry, loop = b.basic_block, b.append_basic_block("fold")
        done = b.append_basic_block("folded")
        b.branch(loop)
        b.position_at_end(loop)
        block = b.phi(_I64)
        block.add_incoming(_I64(1), entry)
        lanes = [b.phi(_V2) for _ in range(_LANES)]
        folded = [
            fold(phi, far, load(b.add(b.mul(block, _I64(_LANES)), _I64(lane))))
            for lane, phi in enumerate(lanes)
        ]
        following = b.add(block, _I64(1))
        block.add_incoming(following, loop)
        for phi, start, value in zip(lanes, first, folded, strict=True):
            phi.add_incoming(start, entry)
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_unsigned("<", following, _I64(_FOLDED_BLOCKS)), loop, done)

        b.position_at_end(done)
        total = folded[0]
        for lane in range(1, _LANES):
            total = fold(total, near, folded[lane])
        for tail in range(_TAIL_BLOCKS):
            total = fold(total, near, load(_I64(_FOLDED_BLOCKS * _LANES + tail)))
        b.store(total, b.inttoptr(args[1], _V2.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.none(types.uint64, types.uint64), codegen


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
def _crc32_folded(address: np.uint64) -> np.uint32:
    words = carray(as_pointer(address), CONTENT_WORDS)
    remainder = np.empty(2, np.uint64)
    _fold_content(address, np.uint64(remainder.ctypes.data))
    crc = _advance8(remainder[0])
    crc = _advance8(remainder[1] ^ np.uint64(crc))
    return np.uint32(~_advance8(words[CONTENT_WORDS - 1] ^ np.uint64(crc)))


def has_carryless_multiply() -> bool:
    """Whether this processor has `pclmulqdq`."""
    return bool(llvm.get_host_cpu_features().get("pclmul", False))


#: `crc32_content(address: uint64) -> uint32`, callable from compiled code: the CRC32 of the 4088
#: bytes at an 8-byte aligned address.
crc32_content = _crc32_folded if has_carryless_multiply() else _crc32_sliced


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
