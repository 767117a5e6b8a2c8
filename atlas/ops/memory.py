"""Loads and stores of up to 16 bytes, which Numba has no name for, with Python twins.

    load16, load16_once, store16     four words of an array, at an index that is a multiple of 4
    load..._at                       at an address: of pages, which lie apart, and of host memory
    copy16_async, wait_for_copies    from global to shared memory, past the registers
    shared_word                      a word of shared memory at a byte offset

"once" is past the L1 cache, for what is read once; "cached" may be kept there. Both are for memory
that nobody writes while the kernel runs.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numba import types
from numba.core import config

from atlas.ops.ptx import ptx_op


@ptx_op("cp.async.wait_all;", "", "", has_effect=True)
def wait_for_copies():
    """Wait for this thread's `copy16_async`; a barrier shows their words to the others."""


@ptx_op("ld.volatile.global.v4.u32 {$0, $1, $2, $3}, [$4];", "rrrr", "l", has_effect=True)
def load16_at(address):
    """Four words at an address, read anew: of host memory that is mapped for the device."""
    words = np.frombuffer((ctypes.c_uint32 * 4).from_address(int(address)), np.uint32).copy()
    return words[0], words[1], words[2], words[3]


@ptx_op("ld.global.nc.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$4];", "rrrr", "l")
def load16_once_at(address):
    """`load16_at` of memory that nobody writes while the kernel runs: loads may pass each other."""
    return load16_at(address)


@ptx_op("ld.global.nc.L1::no_allocate.v2.u32 {$0, $1}, [$2];", "rr", "l")
def load8_once_at(address):
    """Two words, likewise."""
    words = np.frombuffer((ctypes.c_uint32 * 2).from_address(int(address)), np.uint32).copy()
    return words[0], words[1]


@ptx_op("ld.global.nc.u16 $0, [$1];", "r", "l")
def load2_at(address):
    """A half word of memory that nobody writes, widened; by way of the L1 cache."""
    return np.uint32((ctypes.c_uint16 * 1).from_address(int(address))[0])


@ptx_op("ld.global.nc.v4.u32 {$0, $1, $2, $3}, [$4];", "rrrr", "l")
def load16_cached_at(address):
    """Four words of memory that nobody writes, by way of the L1 cache: others read them again."""
    return load16_at(address)


@ptx_op("ld.global.nc.v2.u32 {$0, $1}, [$2];", "rr", "l")
def load8_cached_at(address):
    """Two words, likewise."""
    words = np.frombuffer((ctypes.c_uint32 * 2).from_address(int(address)), np.uint32).copy()
    return words[0], words[1]


@ptx_op("ld.global.nc.u32 $0, [$1];", "r", "l")
def load4_cached_at(address):
    """A word, likewise."""
    return np.uint32(ctypes.c_uint32.from_address(int(address)).value)


if config.ENABLE_CUDASIM:

    def load16(array, index):
        """Four elements of a uint32 or float32 array in one load; `index`, a multiple of 4, counts
        from its start, whatever its dimensions."""
        flat, index = array.reshape(-1), int(index)
        return flat[index], flat[index + 1], flat[index + 2], flat[index + 3]

    load16_once = load16

    def copy16_async(shared, to, words, index):
        """Copy four words of a uint32 array in global memory to a shared one, past the registers;
        sm_80 and up. Both indices are multiples of 4; `wait_for_copies` says when it is done."""
        to, index = int(to), int(index)
        shared[to : to + 4] = words[index : index + 4]

    def store16(array, index, w0, w1, w2, w3):
        """Store four elements as `load16` loads them."""
        flat, index = array.reshape(-1), int(index)
        flat[index], flat[index + 1], flat[index + 2], flat[index + 3] = w0, w1, w2, w3

    def shared_word(words, begin, offset):
        """The word of a shared uint32 array that lies `offset` bytes, a multiple of 4, behind word
        `begin`: an offset that a mask has cut from a word needs no shift."""
        return words[int(begin) + (int(offset) >> 2)]

else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    _I32, _I64 = ir.IntType(32), ir.IntType(64)

    def _element(context, builder, kind, array, index):
        """Pointer to an element of an array."""
        wide = builder.zext(index, _I64) if index.type.width < 64 else index
        return builder.gep(context.make_array(kind)(context, builder, array).data, [wide])

    @intrinsic
    def load16(typing_context, array, index):
        def emit(context, builder, sig, args):
            at = _element(context, builder, sig.args[0], *args)
            kind = ir.VectorType(at.type.pointee, 4)
            four = builder.load(builder.bitcast(at, kind.as_pointer()))
            four.align = 16
            values = [builder.extract_element(four, _I32(i)) for i in range(4)]
            return context.make_tuple(builder, sig.return_type, values)

        return types.UniTuple(array.dtype, 4)(array, index), emit

    @intrinsic
    def copy16_async(typing_context, shared, to, words, index):
        def emit(context, builder, sig, args):
            target = _element(context, builder, sig.args[0], *args[:2])
            source = _element(context, builder, sig.args[2], *args[2:])
            in_shared = builder.addrspacecast(target, ir.PointerType(_I32, 3))
            kind = ir.FunctionType(ir.VoidType(), [_I32, _I64])
            asm = "cp.async.cg.shared.global [$0], [$1], 16;"
            code = ir.InlineAsm(kind, asm, "r,l,~{memory}", side_effect=True)
            address = builder.ptrtoint(source, _I64)
            builder.call(code, [builder.ptrtoint(in_shared, _I32), address])
            return context.get_dummy_value()

        return types.none(shared, to, words, index), emit

    @intrinsic
    def load16_once(typing_context, words, index):
        """`load16` of global memory that is read once and written by nobody: past the L1 cache."""

        def emit(context, builder, sig, args):
            at = _element(context, builder, sig.args[0], *args)
            kind = ir.FunctionType(ir.LiteralStructType([_I32] * 4), [_I64])
            asm = "ld.global.nc.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$4];"
            code = ir.InlineAsm(kind, asm, "=r,=r,=r,=r,l", side_effect=False)
            four = builder.call(code, [builder.ptrtoint(at, _I64)])
            values = [builder.extract_value(four, i) for i in range(4)]
            return context.make_tuple(builder, sig.return_type, values)

        return types.UniTuple(types.uint32, 4)(words, index), emit

    @intrinsic
    def store16(typing_context, array, index, w0, w1, w2, w3):
        def emit(context, builder, sig, args):
            at = _element(context, builder, sig.args[0], *args[:2])
            kind = ir.VectorType(at.type.pointee, 4)
            four = ir.Constant(kind, ir.Undefined)
            for i, word in enumerate(args[2:]):
                four = builder.insert_element(four, word, _I32(i))
            store = builder.store(four, builder.bitcast(at, kind.as_pointer()))
            store.align = 16
            return context.get_dummy_value()

        return types.none(array, index, *[array.dtype] * 4), emit

    @intrinsic
    def shared_word(typing_context, words, begin, offset):
        def emit(context, builder, sig, args):
            base = context.make_array(sig.args[0])(context, builder, args[0]).data
            in_shared = builder.addrspacecast(base, ir.PointerType(_I32, 3))
            first = builder.gep(
                in_shared, [context.cast(builder, args[1], sig.args[1], types.uint64)]
            )
            bytes_at = builder.bitcast(first, ir.PointerType(ir.IntType(8), 3))
            at = builder.gep(bytes_at, [builder.zext(args[2], _I64)])
            word = builder.load(builder.bitcast(at, ir.PointerType(_I32, 3)))
            word.align = 4
            return word

        return types.uint32(words, begin, types.uint32), emit
