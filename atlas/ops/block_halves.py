"""Sixteen values of a quantisation block as eight words of 16-bit floats: what tensor cores take.

A type is a pair of device functions. `load` fetches the raw words and does not look at them, so
that a kernel can compute while they are on their way; `decode` makes of them float16 (of BF16 the
same bfloat16), two to a word. The formulas are those of ggml's `ggml-quants.c`;
`atlas.ops.block_values` holds them for single values.

    load(base, places, slot, part) -> raw        decode(raw, part) -> 8 words

`base` is the address of a page, `places` where the fields lie (see
`block_values`), `part` says which sixteen values of the block in `slot`. Raw zeros become zeros.

Quants become float16 without a conversion: a byte b under the exponent of 1024 is the float16
1024 + b, and under that of 2^23 the float32 2^23 + b. `d * q` is rounded once, as the product of
two float16; values with a further scale or minimum are computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from numba import cuda

from atlas.ops.memory import load2_at, load4_cached_at, load16_cached_at
from atlas.ops.ptx import (
    byte_permute,
    floats_to_half2,
    half2_multiply,
    half2_subtract,
    half2_to_floats,
)

VALUES = 16  # that are loaded and decoded at a time

_1024S = np.uint32(0x64646464)  # high bytes of the float16 1024
_TWO_TO_23 = np.uint32(0x4B000000)
_LOW_NIBBLES = np.uint32(0x0F0F0F0F)
_FIFTH_BITS = np.uint32(0x10101010)
_THREE = np.uint32(3)


class HalfDecoder(NamedTuple):
    """How a type becomes 16-bit floats.

    Attributes
    ----------
    load, decode
        Device functions, see above.
    """

    load: Any
    decode: Any


# --- fields of a block ---


@cuda.jit(device=True)
def _offset(places, field, slot):
    """Byte offset of a block's field in its page."""
    return np.uint32(
        np.uint32(places[2 * field]) + np.uint32(slot * np.uint32(places[2 * field + 1]))
    )


@cuda.jit(device=True)
def _half_word(base, offset):
    return load2_at(np.uint64(base + np.uint64(offset)))


@cuda.jit(device=True)
def _four_words(base, offset):
    """Sixteen bytes of a page from any offset: one load if they lie on a multiple of 16."""
    if offset & np.uint32(15) == np.uint32(0):
        return load16_cached_at(np.uint64(base + np.uint64(offset)))
    # Fields of structs lie anywhere. The fifth word belongs to the same page: content ends before.
    at = np.uint64(base + np.uint64(offset & np.uint32(0xFFFFFFFC)))
    w0, w1 = load4_cached_at(at), load4_cached_at(np.uint64(at + np.uint64(4)))
    w2, w3 = (
        load4_cached_at(np.uint64(at + np.uint64(8))),
        load4_cached_at(np.uint64(at + np.uint64(12))),
    )
    w4 = load4_cached_at(np.uint64(at + np.uint64(16)))
    selector = np.uint32(
        np.uint32(0x3210) + np.uint32(np.uint32(0x1111) * np.uint32(offset & np.uint32(3)))
    )
    return (
        byte_permute(w0, w1, selector),
        byte_permute(w1, w2, selector),
        byte_permute(w2, w3, selector),
        byte_permute(w3, w4, selector),
    )


# --- quants to floats ---


@cuda.jit(device=True)
def _scaled(quants, bias, scale):
    """(quants - bias) * scale: four bytes to two words of float16.

    `bias` is the word of two float16 1024 + bias, `scale` a float16.
    """
    scales = np.uint32(scale | np.uint32(scale << np.uint32(16)))
    low = half2_subtract(byte_permute(quants, _1024S, np.uint32(0x4140)), bias)
    high = half2_subtract(byte_permute(quants, _1024S, np.uint32(0x4342)), bias)
    return half2_multiply(low, scales), half2_multiply(high, scales)


@cuda.jit(device=True)
def _four_scaled(q0, q1, q2, q3, bias, scale):
    w0, w1 = _scaled(q0, bias, scale)
    w2, w3 = _scaled(q1, bias, scale)
    w4, w5 = _scaled(q2, bias, scale)
    w6, w7 = _scaled(q3, bias, scale)
    return w0, w1, w2, w3, w4, w5, w6, w7


@cuda.jit(device=True)
def _quant(quants, i, bias):
    """Byte i of a word, less `bias`, as float32."""
    wide = byte_permute(quants, _TWO_TO_23, np.uint32(np.uint32(0x7440) | np.uint32(i)))
    return np.float32(wide.view(np.float32) - np.float32(np.float32(8388608.0) + bias))


@cuda.jit(device=True)
def _shifted(quants, bias, scale, minimum):
    """(quants - bias) * scale - minimum, all float32: four bytes to two words of float16."""
    v0 = np.float32(np.float32(_quant(quants, 0, bias) * scale) - minimum)
    v1 = np.float32(np.float32(_quant(quants, 1, bias) * scale) - minimum)
    v2 = np.float32(np.float32(_quant(quants, 2, bias) * scale) - minimum)
    v3 = np.float32(np.float32(_quant(quants, 3, bias) * scale) - minimum)
    return floats_to_half2(v0, v1), floats_to_half2(v2, v3)


@cuda.jit(device=True)
def _four_shifted(q0, q1, q2, q3, bias, scale, minimum):
    w0, w1 = _shifted(q0, bias, scale, minimum)
    w2, w3 = _shifted(q1, bias, scale, minimum)
    w4, w5 = _shifted(q2, bias, scale, minimum)
    w6, w7 = _shifted(q3, bias, scale, minimum)
    return w0, w1, w2, w3, w4, w5, w6, w7


@cuda.jit(device=True)
def _nibbles(packed, is_high):
    return np.uint32((packed >> np.uint32(is_high << np.uint32(2))) & _LOW_NIBBLES)


# --- blocks of 32: d * (q - bias) ---


@cuda.jit(device=True)
def _load_q8_0(base, places, slot, part):
    offset = np.uint32(_offset(places, 1, slot) + np.uint32(part << np.uint32(4)))
    w0, w1, w2, w3 = _four_words(base, offset)
    return w0, w1, w2, w3, _half_word(base, _offset(places, 0, slot))


@cuda.jit(device=True)
def _decode_q8_0(raw, part):
    w0, w1, w2, w3, d = raw
    flip = np.uint32(0x80808080)  # from -128..127 to 0..255
    bias = np.uint32(0x64806480)
    return _four_scaled(w0 ^ flip, w1 ^ flip, w2 ^ flip, w3 ^ flip, bias, d)


@cuda.jit(device=True)
def _load_q4_0(base, places, slot, part):
    # The low nibbles are values 0 to 15, the high ones 16 to 31.
    w0, w1, w2, w3 = _four_words(base, _offset(places, 1, slot))
    return w0, w1, w2, w3, _half_word(base, _offset(places, 0, slot))


@cuda.jit(device=True)
def _decode_q4_0(raw, part):
    w0, w1, w2, w3, d = raw
    return _four_scaled(
        _nibbles(w0, part), _nibbles(w1, part), _nibbles(w2, part), _nibbles(w3, part),
        np.uint32(0x64086408), d,
    )  # fmt: skip


@cuda.jit(device=True)
def _load_q5_0(base, places, slot, part):
    w0, w1, w2, w3 = _four_words(base, _offset(places, 2, slot))
    fifth = _half_word(base, np.uint32(_offset(places, 1, slot) + np.uint32(part << np.uint32(1))))
    return w0, w1, w2, w3, fifth, _half_word(base, _offset(places, 0, slot))


@cuda.jit(device=True)
def _with_fifth(packed, part, bits, j):
    """Nibbles with bits 4 j to 4 j + 3 of `bits` on top."""
    four = np.uint32((bits >> np.uint32(4 * j)) & np.uint32(15))
    # Copies of the four bits, seven apart, have bit i at the foot of byte i.
    spread = np.uint32(np.uint32(four * np.uint32(0x02040810)) & _FIFTH_BITS)
    return np.uint32(_nibbles(packed, part) | spread)


@cuda.jit(device=True)
def _decode_q5_0(raw, part):
    w0, w1, w2, w3, bits, d = raw
    return _four_scaled(
        _with_fifth(w0, part, bits, 0), _with_fifth(w1, part, bits, 1),
        _with_fifth(w2, part, bits, 2), _with_fifth(w3, part, bits, 3),
        np.uint32(0x64106410), d,
    )  # fmt: skip


# --- blocks of 256 ---


@cuda.jit(device=True)
def _load_k_scales(base, places, slot):
    """d, dmin and the twelve bytes of the sub-blocks' scales and minima."""
    at = np.uint64(base + np.uint64(_offset(places, 2, slot)))
    return (
        _half_word(base, _offset(places, 0, slot)),
        _half_word(base, _offset(places, 1, slot)),
        load4_cached_at(at),
        load4_cached_at(np.uint64(at + np.uint64(4))),
        load4_cached_at(np.uint64(at + np.uint64(8))),
    )


@cuda.jit(device=True)
def _k_scale_and_minimum(d, dmin, s0, s1, s2, sub):
    """Six bits each: of sub-blocks 0 to 3 in the bytes of s0 and s1; of 4 to 7 four bits in those
    of s2 and two on top of the others."""
    shift = np.uint32(np.uint32(sub & np.uint32(3)) << np.uint32(3))
    scale, minimum = np.uint32(s0 >> shift), np.uint32(s1 >> shift)
    if sub < np.uint32(4):
        scale, minimum = np.uint32(scale & np.uint32(63)), np.uint32(minimum & np.uint32(63))
    else:
        low = np.uint32(s2 >> shift)
        scale = np.uint32(
            (low & np.uint32(15)) | np.uint32((scale >> np.uint32(2)) & np.uint32(48))
        )
        minimum = np.uint32(
            np.uint32((low >> np.uint32(4)) & np.uint32(15))
            | np.uint32((minimum >> np.uint32(2)) & np.uint32(48))
        )
    d, dmin = half2_to_floats(np.uint32(d | (dmin << np.uint32(16))))
    return np.float32(d * np.float32(scale)), np.float32(dmin * np.float32(minimum))


@cuda.jit(device=True)
def _with_top(packed, is_high, bits, shift, mask):
    """Nibbles, each with the bits of `mask` on top, from its byte of `bits`."""
    mask = np.uint32(mask * np.uint32(0x01010101))
    top = np.uint32(np.uint32(np.uint32(bits >> shift) & mask) << np.uint32(4))
    return np.uint32(_nibbles(packed, is_high) | top)


@cuda.jit(device=True)
def _k_nibbles_offset(places, field, slot, part):
    """Two sub-blocks share 32 bytes, low nibbles first."""
    within = np.uint32(np.uint32(part >> np.uint32(2)) << np.uint32(5))
    half = np.uint32(np.uint32(part & np.uint32(1)) << np.uint32(4))
    return np.uint32(_offset(places, field, slot) + within + half)


@cuda.jit(device=True)
def _load_q4_k(base, places, slot, part):
    w0, w1, w2, w3 = _four_words(base, _k_nibbles_offset(places, 3, slot, part))
    d, dmin, s0, s1, s2 = _load_k_scales(base, places, slot)
    return w0, w1, w2, w3, d, dmin, s0, s1, s2


@cuda.jit(device=True)
def _decode_q4_k(raw, part):
    w0, w1, w2, w3, d, dmin, s0, s1, s2 = raw
    sub = np.uint32(part >> np.uint32(1))
    scale, minimum = _k_scale_and_minimum(d, dmin, s0, s1, s2, sub)
    odd = np.uint32(sub & np.uint32(1))
    return _four_shifted(
        _nibbles(w0, odd), _nibbles(w1, odd), _nibbles(w2, odd), _nibbles(w3, odd),
        np.float32(0), scale, minimum,
    )  # fmt: skip


@cuda.jit(device=True)
def _load_q5_k(base, places, slot, part):
    w0, w1, w2, w3 = _four_words(base, _k_nibbles_offset(places, 4, slot, part))
    half = np.uint32(np.uint32(part & np.uint32(1)) << np.uint32(4))
    h0, h1, h2, h3 = _four_words(base, np.uint32(_offset(places, 3, slot) + half))
    d, dmin, s0, s1, s2 = _load_k_scales(base, places, slot)
    return w0, w1, w2, w3, h0, h1, h2, h3, d, dmin, s0, s1, s2


@cuda.jit(device=True)
def _decode_q5_k(raw, part):
    w0, w1, w2, w3, h0, h1, h2, h3, d, dmin, s0, s1, s2 = raw
    sub = np.uint32(part >> np.uint32(1))
    scale, minimum = _k_scale_and_minimum(d, dmin, s0, s1, s2, sub)
    odd = np.uint32(sub & np.uint32(1))
    return _four_shifted(
        _with_top(w0, odd, h0, sub, np.uint32(1)), _with_top(w1, odd, h1, sub, np.uint32(1)),
        _with_top(w2, odd, h2, sub, np.uint32(1)), _with_top(w3, odd, h3, sub, np.uint32(1)),
        np.float32(0), scale, minimum,
    )  # fmt: skip


@cuda.jit(device=True)
def _load_q6_k(base, places, slot, part):
    # A half of the block is four runs of 32 values: the low nibbles of 64 bytes, then the high
    # ones; each run has its own two bits of the 32 bytes of `qh`.
    half, run = np.uint32(part >> np.uint32(3)), np.uint32(np.uint32(part >> np.uint32(1)) & _THREE)
    within = np.uint32(np.uint32(part & np.uint32(1)) << np.uint32(4))
    low = np.uint32(
        np.uint32(half << np.uint32(6))
        + np.uint32(np.uint32(run & np.uint32(1)) << np.uint32(5))
        + within
    )
    w0, w1, w2, w3 = _four_words(base, np.uint32(_offset(places, 0, slot) + low))
    high = np.uint32(np.uint32(half << np.uint32(5)) + within)
    h0, h1, h2, h3 = _four_words(base, np.uint32(_offset(places, 1, slot) + high))
    pair = np.uint32(_offset(places, 2, slot) + np.uint32(part & np.uint32(14)))
    scales, d = _half_word(base, pair), _half_word(base, _offset(places, 3, slot))
    return w0, w1, w2, w3, h0, h1, h2, h3, scales, d


@cuda.jit(device=True)
def _decode_q6_k(raw, part):
    w0, w1, w2, w3, h0, h1, h2, h3, scales, d = raw
    run = np.uint32(np.uint32(part >> np.uint32(1)) & _THREE)
    is_high, shift = np.uint32(run >> np.uint32(1)), np.uint32(run << np.uint32(1))
    byte = np.uint32(scales >> np.uint32(np.uint32(part & np.uint32(1)) << np.uint32(3)))
    scale = np.float32(np.uint8(byte & np.uint32(255)).view(np.int8))
    d, _ = half2_to_floats(d)
    return _four_shifted(
        _with_top(w0, is_high, h0, shift, _THREE), _with_top(w1, is_high, h1, shift, _THREE),
        _with_top(w2, is_high, h2, shift, _THREE), _with_top(w3, is_high, h3, shift, _THREE),
        np.float32(32), np.float32(d * scale), np.float32(0),
    )  # fmt: skip


@cuda.jit(device=True)
def _as_it_is(raw, part):
    return raw


#: For plain elements of 16 bits, which others load.
plain_decoder = HalfDecoder(None, _as_it_is)

_Q = GGMLQuantizationType
HALF_DECODERS = {
    _Q.Q8_0: HalfDecoder(_load_q8_0, _decode_q8_0),
    _Q.Q4_0: HalfDecoder(_load_q4_0, _decode_q4_0),
    _Q.Q5_0: HalfDecoder(_load_q5_0, _decode_q5_0),
    _Q.Q4_K: HalfDecoder(_load_q4_k, _decode_q4_k),
    _Q.Q5_K: HalfDecoder(_load_q5_k, _decode_q5_k),
    _Q.Q6_K: HalfDecoder(_load_q6_k, _decode_q6_k),
}
