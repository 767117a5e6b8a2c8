"""What Numba has no name for: PTX instructions, with Python twins.

`ptx_op` makes an instruction of a plain Python function: the function's body is what the simulator
does, the PTX what a GPU does. Instructions of a whole warp meet in `warp_exchange`, which a
warp-capable simulator sets; without one they raise.

    32-bit words      xor3, rotate_right, divide, byte_permute, shuffle_xor, multiply_add_wide,
                      shift_left, shift_right
    float16           half2_to_floats, floats_to_half2, floats_to_bfloat2, half2_subtract,
                      half2_multiply
    tensor cores      mma_f16, mma_bf16: a 16 x 16 tile times a 16 x 8 tile, float32 sums

Loads and stores are in `atlas.ops.memory`. The instructions are those of NVIDIA's "Parallel Thread
Execution ISA".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.core import config

#: Set by a simulator that runs warps: `warp_exchange(mask, value)` returns every lane's value as a
#: dictionary once all lanes of the mask have come; `current_lane()` is the caller's lane.
warp_exchange: Callable[[int, Any], dict[int, Any]]
current_lane: Callable[[], int]


def _no_warps(*_: Any) -> Any:
    raise RuntimeError("this kernel uses warp operations: it needs a simulator that runs warps")


warp_exchange = current_lane = _no_warps

FULL_WARP = 0xFFFFFFFF
_MASK32 = 0xFFFFFFFF

_TYPES = {"r": types.uint32, "l": types.uint64, "f": types.float32, "h": types.uint16}


def ptx_op(
    asm: str, outputs: str, inputs: str, *, has_effect: bool = False
) -> Callable[[Any], Any]:
    """Decorator: in kernels, the function becomes an instruction.

    Parameters
    ----------
    asm
        PTX with `$0`, `$1`, ...: outputs first, then inputs.
    outputs, inputs
        A letter for each: r (uint32), l (uint64), f (float32), h (uint16). Several outputs make a
        tuple.
    has_effect
        Whether it does more than compute its outputs: it is then neither moved nor dropped.
    """

    def decorate(function: Any) -> Any:
        if config.ENABLE_CUDASIM:
            return function
        return _instruction(function, asm, outputs, inputs, has_effect)

    return decorate


def _instruction(twin: Any, asm: str, outputs: str, inputs: str, has_effect: bool) -> Any:
    """A device function that is one piece of inline PTX, with its twin's parameters."""
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    def llvm(letter: str) -> Any:
        return ir.FloatType() if letter == "f" else ir.IntType(_TYPES[letter].bitwidth)

    results = [_TYPES[letter] for letter in outputs]
    if len(results) > 1:
        result = types.Tuple(results)
        llvm_result = ir.LiteralStructType([llvm(letter) for letter in outputs])
    else:
        result = results[0] if results else types.none
        llvm_result = llvm(outputs) if results else ir.VoidType()
    constraints = [f"={letter}" for letter in outputs] + list(inputs)
    if has_effect:
        constraints.append("~{memory}")

    def emit(context, builder, sig, args):
        kind = ir.FunctionType(llvm_result, [llvm(letter) for letter in inputs])
        code = ir.InlineAsm(kind, asm, ",".join(constraints), side_effect=has_effect)
        value = builder.call(code, args)
        if not results:
            return context.get_dummy_value()
        if len(results) == 1:
            return value
        values = [builder.extract_value(value, i) for i in range(len(results))]
        return context.make_tuple(builder, sig.return_type, values)

    def instruction(typing_context, *arguments):
        return result(*(_TYPES[letter] for letter in inputs)), emit

    instruction.__name__ = instruction.__qualname__ = twin.__name__
    # Numba counts parameters, and takes no *arguments for what it is.
    parameters = [*inspect.signature(instruction).parameters.values()][:1]
    parameters += inspect.signature(twin).parameters.values()
    instruction.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(instruction)


# --- 32-bit words ---


@ptx_op("lop3.b32 $0, $1, $2, $3, 0x96;", "r", "rrr")
def xor3(a, b, c):
    """a ^ b ^ c."""
    return np.uint32(np.uint32(a) ^ np.uint32(b) ^ np.uint32(c))


@ptx_op("shf.r.wrap.b32 $0, $1, $1, $2;", "r", "rr")
def rotate_right(word, n_bits):
    """A word rotated right by 0 to 31 bits."""
    word, n_bits = int(word), int(n_bits) & 31
    return np.uint32((word >> n_bits | word << (32 - n_bits)) & _MASK32)


@ptx_op("div.u32 $0, $1, $2;", "r", "rr")
def divide(a, b):
    """a // b, without the branch for b = 0 that Numba makes of `//`."""
    return np.uint32(int(a) // int(b))


@ptx_op("prmt.b32 $0, $1, $2, $3;", "r", "rrr")
def byte_permute(low, high, selector):
    """Four of the eight bytes of `high:low`: nibble i of `selector` names byte i of the result;
    with the nibble's top bit, its sign replicated."""
    eight = int(low) | int(high) << 32
    word = 0
    for i in range(4):
        nibble = int(selector) >> 4 * i & 15
        byte = eight >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        word |= byte << 8 * i
    return np.uint32(word)


@ptx_op("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "r", "rr", has_effect=True)
def shuffle_xor(word, lane_bits):
    """The word of the lane whose number differs in `lane_bits`; by a whole warp. (Numba's own
    shuffles refuse unsigned words.)"""
    mine = current_lane()
    return warp_exchange(FULL_WARP, np.uint32(word))[mine ^ int(lane_bits)]


@ptx_op("shl.b32 $0, $1, $2;", "r", "rr")
def shift_left(word, n_bits):
    """A word shifted left. (Of two words Numba makes 64 bits.)"""
    return np.uint32(int(word) << int(n_bits) & _MASK32)


@ptx_op("shr.u32 $0, $1, $2;", "r", "rr")
def shift_right(word, n_bits):
    """A word shifted right."""
    return np.uint32(int(word) >> int(n_bits))


@ptx_op("mad.wide.u32 $0, $1, $2, $3;", "l", "rrl")
def multiply_add_wide(a, b, c):
    """a * b + c for 32-bit factors: how far an address is from another."""
    return np.uint64(int(a) * int(b) + int(c))


# --- float16 and bfloat16, two to a word, the first in the low half ---


@ptx_op("{.reg .f16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}", "ff", "r")
def half2_to_floats(word):
    """Two float16 as float32."""
    first, second = np.array([word], np.uint32).view(np.float16).astype(np.float32)
    return first, second


@ptx_op("{.reg .f16 a, b; cvt.rn.f16.f32 a, $1; cvt.rn.f16.f32 b, $2; mov.b32 $0, {a, b};}",
        "r", "ff")  # fmt: skip
def floats_to_half2(first, second):
    """Two float32 rounded to float16."""
    with np.errstate(over="ignore"):
        return np.array([first, second], np.float32).astype(np.float16).view(np.uint32)[0]


@ptx_op("cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff")  # sm_80 and up
def floats_to_bfloat2(first, second):
    """Two float32 rounded to bfloat16."""
    bits = np.array([first, second], np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.uint32(rounded[0] | rounded[1] << np.uint64(16))


@ptx_op("sub.rn.f16x2 $0, $1, $2;", "r", "rr")
def half2_subtract(first, second):
    """Difference of two pairs of float16."""
    return _half_pair(np.subtract, first, second)


@ptx_op("mul.rn.f16x2 $0, $1, $2;", "r", "rr")
def half2_multiply(first, second):
    """Product of two pairs of float16."""
    return _half_pair(np.multiply, first, second)


def _half_pair(operation, first, second):
    pairs = np.array([first, second], np.uint32).view(np.float16).reshape(2, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        return operation(pairs[0], pairs[1]).view(np.uint32)[0]


# --- tensor cores ---


def _multiply_tiles(a, b, c, values):
    """`mma.sync.m16n8k16` by the fragments' layout in the PTX ISA: lane 4 g + t holds of A the rows
    g and g + 8, columns 2 t, 2 t + 1 and those 8 further; of B the same rows (its columns' k) of
    column g; of C columns 2 t and 2 t + 1 of rows g and g + 8."""
    lanes = warp_exchange(FULL_WARP, (*a, *b))
    g, t = current_lane() >> 2, current_lane() & 3

    def along_k(group, first, second):
        """Two words of each of four lanes, which are the sixteen values of a row or column."""
        return values([lanes[4 * group + i][word] for word in (first, second) for i in range(4)])

    rows = np.array([along_k(g, 0, 2), along_k(g, 1, 3)])
    columns = np.array([along_k(2 * t, 4, 5), along_k(2 * t + 1, 4, 5)])
    product = (rows @ columns.T).reshape(4)
    return tuple(np.float32(p + x) for p, x in zip(product, c, strict=True))


def _halves(words):
    return np.array(words, np.uint32).view(np.float16).astype(np.float64)


def _bfloats(words):
    high = np.array(words, np.uint32).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return high.view(np.float32).astype(np.float64)


_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)


@ptx_op(_MMA.format("f16"), "ffff", "rrrrrrffff", has_effect=True)
def mma_f16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """A B + C for float16 tiles of 16 x 16 and 16 x 8, by a whole warp; sm_80 and up."""
    return _multiply_tiles((a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3), _halves)


@ptx_op(_MMA.format("bf16"), "ffff", "rrrrrrffff", has_effect=True)
def mma_bf16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """The same for bfloat16."""
    return _multiply_tiles((a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3), _bfloats)
