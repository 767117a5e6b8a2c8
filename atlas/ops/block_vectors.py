"""Blocks decoded sixteen values at a time: the inner loops of the CPU target.

Numba's own loops over packed quants do not vectorise, so the code of a run of blocks is emitted
as LLVM vector operations. They are the portable ones (widen, convert, multiply-add; no
processor's own), which LLVM turns into AVX2, AVX-512 or NEON.

A type is a function that decodes one block (or some plain elements) into float32 vectors; from it
come `dot_run`, which never leaves the registers, and `decode_run`, which stores. The formulas are
those of ggml's `ggml-quants.c`; `atlas.ops.block_values` holds them as scalars.

Hardware prefetchers stop at the end of a page and see a page's planes as unrelated streams, so
while a block is decoded its like in the next page is asked for. That is the next one in the pool,
which is the next one of the matrix but at the end of a shard.

The compiler picks the type by the literal `kind`, a `GGMLQuantizationType` as an integer, so only
types in use are compiled. `places` is `block_values.field_places(layout)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from forge.block_layouts import block_layout
from forge.pages import PAGE_BYTES

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_WIDTH = 16
_CACHE_LINE = 64
_ACCUMULATORS = 4  # independent sums: the next multiply-add need not wait for the last


class _Run(NamedTuple):
    """Values of a block from element `offset` on: scale * quants - minimum.

    `quants` are consecutive vectors, `scale` and `minimum` vectors with all lanes alike; None
    stands for 1 and for 0.
    """

    offset: int
    quants: Sequence[Any]
    scale: Any = None
    minimum: Any = None


class Emitter:
    """Vector operations in the words of the decoders below."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def pointer(self, address: Any) -> Any:
        return self.b.inttoptr(address, _I8.as_pointer())

    def load(self, pointer: Any, offset: int, element: Any, count: int | None = None) -> Any:
        """`count` elements (a scalar if None) at a byte offset; no alignment is assumed."""
        kind = element if count is None else ir.VectorType(element, count)
        place = self.b.gep(pointer, [_I64(offset)])
        return self.b.load(self.b.bitcast(place, kind.as_pointer()), align=1)

    def store(self, vector: Any, pointer: Any, offset: int) -> None:
        place = self.b.gep(pointer, [_I64(offset)])
        self.b.store(vector, self.b.bitcast(place, vector.type.as_pointer()), align=4)

    def constant(self, like: Any, value: int) -> Any:
        return ir.Constant(like.type, [value] * like.type.count)

    def low_bits(self, quants: Any, count: int) -> Any:
        return self.b.and_(quants, self.constant(quants, (1 << count) - 1))

    def shift_right(self, quants: Any, count: int) -> Any:
        return self.b.lshr(quants, self.constant(quants, count)) if count else quants

    def shift_left(self, quants: Any, count: int) -> Any:
        return self.b.shl(quants, self.constant(quants, count))

    def floats(self, quants: Any, bias: int = 0) -> Any:
        """Signed bytes, less `bias`, as float32."""
        count = quants.type.count
        if bias:
            quants = self.b.sub(quants, self.constant(quants, bias))
        wide = self.b.sext(quants, ir.VectorType(_I32, count))
        return self.b.sitofp(wide, ir.VectorType(_FLOAT, count))

    def half(self, pointer: Any, count: int = _WIDTH) -> Any:
        """The float16 at a pointer, as float32 in all lanes."""
        # Spread before converting: a lone half would be loaded into a register whose other
        # lanes make it wait for what was there before, the running sum as it happens.
        halves = self.splat(self.load(pointer, 0, _HALF), count)
        return self.b.fpext(halves, ir.VectorType(_FLOAT, count))

    def splat(self, scalar: Any, count: int) -> Any:
        kind = ir.VectorType(scalar.type, count)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, _I32(0))
        return self.shuffle(first, first, [0] * count)

    def shuffle(self, first: Any, second: Any, lanes: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))
        return self.b.shuffle_vector(first, second, mask)

    def lane(self, vector: Any, index: int) -> Any:
        """One lane of a vector, in all sixteen."""
        return self.shuffle(vector, vector, [index] * _WIDTH)

    def multiply_add(self, first: Any, second: Any, addend: Any) -> Any:
        # fmuladd, not fma: where the processor has no fused one, fma is a call per lane.
        name = f"llvm.fmuladd.v{first.type.count}f32"
        signature = ir.FunctionType(first.type, [first.type] * 3)
        function = cgutils.get_or_insert_function(self.b.module, signature, name)
        return self.b.call(function, [first, second, addend])

    def prefetch(self, address: Any, size: int) -> None:
        """Ask for `size` bytes at an address; any address will do."""
        pointer = _I8.as_pointer()
        function = self.b.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        )
        for offset in range(0, size, _CACHE_LINE):
            place = self.b.gep(self.pointer(address), [_I64(offset)])
            self.b.call(function, [place, _I32(0), _I32(3), _I32(1)])  # to read, keep, data

    def sum(self, vector: Any) -> Any:
        """Sum of the lanes, by halves."""
        count = vector.type.count
        while count > 1:
            count //= 2
            low = self.shuffle(vector, vector, range(count))
            high = self.shuffle(vector, vector, range(count, 2 * count))
            vector = self.b.fadd(low, high)
        return self.b.extract_element(vector, _I32(0))


def _decode_q8_0(e: Emitter, d: Any, qs: Any) -> Iterator[_Run]:
    scale = e.half(d)
    yield _Run(0, [e.floats(e.load(qs, offset, _I8, 16)) for offset in (0, 16)], scale)


def _decode_q4_0(e: Emitter, d: Any, qs: Any) -> Iterator[_Run]:
    scale = e.half(d)
    packed = e.load(qs, 0, _I8, 16)
    nibbles = (e.low_bits(packed, 4), e.shift_right(packed, 4))
    yield _Run(0, [e.floats(quants, 8) for quants in nibbles], scale)


def _decode_q5_0(e: Emitter, d: Any, qh: Any, qs: Any) -> Iterator[_Run]:
    scale = e.half(d)
    packed = e.load(qs, 0, _I8, 16)
    quants = []
    for half, low in enumerate((e.low_bits(packed, 4), e.shift_right(packed, 4))):
        fifth = e.b.bitcast(e.load(qh, 2 * half, _I16), ir.VectorType(ir.IntType(1), 16))
        quants.append(e.b.or_(low, e.shift_left(e.b.zext(fifth, low.type), 4)))
    yield _Run(0, [e.floats(vector, 16) for vector in quants], scale)


def _k_scales(e: Emitter, d: Any, dmin: Any, scales: Any) -> tuple[Any, Any]:
    """Scales and minima of the eight sub-blocks of a Q4_K or Q5_K block, <8 x float> each.

    Six bits each in twelve bytes: four bytes hold the low scales, four the low minima, with two
    bits of the high ones on top; the last four hold the low nibbles of the high ones.
    """
    first, second, nibbles = (e.load(scales, offset, _I8, 4) for offset in (0, 4, 8))
    planes = []
    for low, high in ((first, e.low_bits(nibbles, 4)), (second, e.shift_right(nibbles, 4))):
        top = e.shift_left(e.shift_right(low, 6), 4)
        planes.append(e.shuffle(e.low_bits(low, 6), e.b.or_(high, top), range(8)))
    return (
        e.b.fmul(e.floats(planes[0]), e.half(d, 8)),
        e.b.fmul(e.floats(planes[1]), e.half(dmin, 8)),
    )


def _k_nibbles(e: Emitter, qs: Any, sub: int, half: int) -> Any:
    """Sixteen quants of sub-block `sub`: two sub-blocks share 32 bytes, low nibbles first."""
    packed = e.load(qs, sub // 2 * 32 + half, _I8, 16)
    return e.shift_right(packed, 4) if sub % 2 else e.low_bits(packed, 4)


def _decode_q4_k(e: Emitter, d: Any, dmin: Any, scales: Any, qs: Any) -> Iterator[_Run]:
    scale, minimum = _k_scales(e, d, dmin, scales)
    for sub in range(8):
        quants = [e.floats(_k_nibbles(e, qs, sub, half)) for half in (0, 16)]
        yield _Run(sub * 32, quants, e.lane(scale, sub), e.lane(minimum, sub))


def _decode_q5_k(e: Emitter, d: Any, dmin: Any, scales: Any, qh: Any, qs: Any) -> Iterator[_Run]:
    scale, minimum = _k_scales(e, d, dmin, scales)
    for sub in range(8):
        quants = []
        for half in (0, 16):
            fifth = e.low_bits(e.shift_right(e.load(qh, half, _I8, 16), sub), 1)
            quants.append(e.b.or_(_k_nibbles(e, qs, sub, half), e.shift_left(fifth, 4)))
        yield _Run(
            sub * 32, [e.floats(q) for q in quants], e.lane(scale, sub), e.lane(minimum, sub)
        )


def _decode_q6_k(e: Emitter, qs: Any, qh: Any, scales: Any, d: Any) -> Iterator[_Run]:
    scale = e.b.fmul(e.floats(e.load(scales, 0, _I8, 16)), e.half(d))
    for group in range(16):
        # A half of the block (128 values) is four runs of 32: the low nibbles of 64 bytes,
        # then the high ones; each run has its own two bits of the 32 bytes of `qh`.
        half, run, part = group // 8, group % 8 // 2, group % 2 * 16
        packed = e.load(qs, half * 64 + run % 2 * 32 + part, _I8, 16)
        low = e.shift_right(packed, 4) if run >= 2 else e.low_bits(packed, 4)
        high = e.shift_right(e.load(qh, half * 32 + part, _I8, 16), 2 * run)
        quants = e.b.or_(low, e.shift_left(e.low_bits(high, 2), 4))
        yield _Run(group * 16, [e.floats(quants, 32)], e.lane(scale, group))


def _load_f32(e: Emitter, pointer: Any, count: int) -> Any:
    return e.load(pointer, 0, _FLOAT, count)


def _load_f16(e: Emitter, pointer: Any, count: int) -> Any:
    return e.b.fpext(e.load(pointer, 0, _HALF, count), ir.VectorType(_FLOAT, count))


def _load_bf16(e: Emitter, pointer: Any, count: int) -> Any:
    bits = e.b.zext(e.load(pointer, 0, _I16, count), ir.VectorType(_I32, count))
    return e.b.bitcast(e.shift_left(bits, 16), ir.VectorType(_FLOAT, count))


_Q = GGMLQuantizationType
#: Block types: the fields of one block, in the order of its struct, to groups of values.
_DECODERS: dict[_Q, Callable[..., Iterator[_Run]]] = {
    _Q.Q4_0: _decode_q4_0,
    _Q.Q5_0: _decode_q5_0,
    _Q.Q8_0: _decode_q8_0,
    _Q.Q4_K: _decode_q4_k,
    _Q.Q5_K: _decode_q5_k,
    _Q.Q6_K: _decode_q6_k,
}
#: Plain element types: a pointer to the elements and their number to a vector.
_LOADERS: dict[_Q, Callable[[Emitter, Any, int], Any]] = {
    _Q.F32: _load_f32,
    _Q.F16: _load_f16,
    _Q.BF16: _load_bf16,
}


def _emit_runs(
    b: ir.IRBuilder, kind: int, args: Sequence[Any], consume: Callable[..., None]
) -> None:
    """Walk consecutive blocks; `consume(emitter, run, pointer, number)` gets each run of values.

    `pointer` is where the run's float32 counterpart lies: the vector x, or the output. `number`
    counts runs, so that a consumer can spread them over accumulators.
    """
    page, places, slot, values, count = args
    e = Emitter(b)
    qtype = _Q(kind)
    layout = block_layout(qtype)

    def field_pointers(block: Any) -> Iterator[Any]:
        for f in range(len(layout.fields)):
            offset, stride = (b.extract_value(places, 2 * f + k) for k in (0, 1))
            yield e.pointer(b.add(page, b.add(offset, b.mul(b.add(slot, block), stride))))

    def value_pointer(element: Any) -> Any:
        return e.pointer(b.add(values, b.mul(element, _I64(4))))

    if qtype in _DECODERS:
        with cgutils.for_range(b, count, intp=_I64) as loop:
            struct = b.mul(b.add(slot, loop.index), _I64(layout.bytes))
            e.prefetch(b.add(b.add(page, struct), _I64(PAGE_BYTES)), layout.bytes)
            start = value_pointer(b.mul(loop.index, _I64(layout.elements)))
            for number, run in enumerate(_DECODERS[qtype](e, *field_pointers(loop.index))):
                consume(e, run, b.gep(start, [_I64(4 * run.offset)]), number)
        return

    # Plain elements: vectors in fours, then vectors, then one element at a time.
    done: Any = _I64(0)
    for width, unroll in ((_WIDTH, _ACCUMULATORS), (_WIDTH, 1), (1, 1)):
        step = _I64(width * unroll)
        steps = b.sdiv(b.sub(count, done), step)
        with cgutils.for_range(b, steps, intp=_I64) as loop:
            for number in range(unroll):
                element = b.add(b.add(done, b.mul(loop.index, step)), _I64(number * width))
                vector = _LOADERS[qtype](e, next(field_pointers(element)), width)
                consume(e, _Run(0, [vector]), value_pointer(element), number)
        done = b.add(done, b.mul(steps, step))


def _signature(result: Any, kind: Any, places: Any) -> Any:
    return result(kind, types.uint64, places, types.int64, types.uint64, types.int64)


@intrinsic(prefer_literal=True)
def dot_run(
    typingctx: Any, kind: Any, page: Any, places: Any, slot: Any, x: Any, count: Any
) -> Any:
    """Dot product of consecutive blocks of one page with a float32 vector.

    Parameters
    ----------
    kind
        Literal integer of the type.
    page
        uint64 address of the page.
    places
        int64 tuple of the fields' places.
    slot, count
        First block and number of blocks (plain types: of elements).
    x
        uint64 address of the float32 values that meet the first block.

    Returns
    -------
    float32
    """

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        wide, single = ir.VectorType(_FLOAT, _WIDTH), ir.VectorType(_FLOAT, 1)
        sums = [
            cgutils.alloca_once_value(b, ir.Constant(kind, None))
            for kind in [wide] * _ACCUMULATORS + [single]
        ]

        def accumulate(e: Emitter, run: _Run, pointer: Any, number: int) -> None:
            width = run.quants[0].type.count
            x_values = [
                e.load(pointer, 4 * width * k, _FLOAT, width) for k in range(len(run.quants))
            ]
            place = sums[number % _ACCUMULATORS if width > 1 else _ACCUMULATORS]
            total = b.load(place)
            if run.scale is not None and run.minimum is None:
                # The scale once for all vectors of the run.
                inner = b.fmul(run.quants[0], x_values[0])
                for quants, x_part in zip(run.quants[1:], x_values[1:], strict=True):
                    inner = e.multiply_add(quants, x_part, inner)
                total = e.multiply_add(inner, run.scale, total)
            else:
                for quants, x_part in zip(run.quants, x_values, strict=True):
                    if run.minimum is not None:
                        quants = e.multiply_add(quants, run.scale, b.fneg(run.minimum))
                    total = e.multiply_add(quants, x_part, total)
            b.store(total, place)

        _emit_runs(b, sig.args[0].literal_value, args[1:], accumulate)
        e = Emitter(b)
        totals = [b.load(place) for place in sums]
        vector = b.fadd(b.fadd(totals[0], totals[1]), b.fadd(totals[2], totals[3]))
        return b.fadd(e.sum(vector), e.sum(totals[_ACCUMULATORS]))

    return _signature(types.float32, kind, places), codegen


@intrinsic(prefer_literal=True)
def decode_run(
    typingctx: Any, kind: Any, page: Any, places: Any, slot: Any, out: Any, count: Any
) -> Any:
    """Store the values of consecutive blocks of one page as float32 at address `out`.

    The other parameters are those of `dot_run`.
    """

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        def store(e: Emitter, run: _Run, pointer: Any, number: int) -> None:
            for k, decoded in enumerate(run.quants):
                width = decoded.type.count
                if run.scale is not None:
                    decoded = b.fmul(run.scale, decoded)
                if run.minimum is not None:
                    decoded = b.fsub(decoded, run.minimum)
                e.store(decoded, pointer, 4 * width * k)

        _emit_runs(b, sig.args[0].literal_value, args[1:], store)
        return context.get_dummy_value()

    return _signature(types.none, kind, places), codegen
