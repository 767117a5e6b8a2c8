"""A small product of float32 rows held in registers: the inner loop of `matmul` on the CPU.

Sums of a tile of `tokens` times `rows` stay in vector registers while both operands stream past
once, so each load serves several multiply-adds. A tile of 3 by 4 needs 12 registers for sums and
4 for operands: all that AVX2 has. (See K. Goto, R. van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008.) A BLAS would do it as well, but with threads of its own, that fight
with Numba's for the processors between any two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from atlas.ops.block_vectors import Emitter

TILE_TOKENS, TILE_ROWS = 3, 4

_I64, _FLOAT = ir.IntType(64), ir.FloatType()
_WIDTH = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8


@intrinsic(prefer_literal=True)
def tile_product(
    typingctx: Any, tokens: Any, rows: Any, y: Any, y_stride: Any, x: Any, w: Any, n: Any
) -> Any:
    """y[t, r] = sum over c < n of x[t, c] * w[r, c], for a tile of literal size.

    Parameters
    ----------
    tokens, rows
        Literal integers.
    y, x, w
        uint64 addresses of float32 values.
    y_stride
        Elements from a token to the next in y. Rows of x and w are n apart.
    n
        Number of columns.
    """

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        e = Emitter(b)
        n_tokens, n_rows = (sig.args[k].literal_value for k in (0, 1))
        y_address, y_stride, x_address, w_address, n = args[2:]

        def element(address: Any, index: Any) -> Any:
            return e.pointer(b.add(address, b.mul(index, _I64(4))))

        def multiply_add(sums: list[Any], column: Any, width: int) -> None:
            x_values, w_values = (
                [
                    e.load(element(address, b.add(b.mul(n, _I64(k)), column)), 0, _FLOAT, width)
                    for k in range(count)
                ]
                for address, count in ((x_address, n_tokens), (w_address, n_rows))
            )
            for k, place in enumerate(sums):
                t, r = divmod(k, n_rows)
                b.store(e.multiply_add(x_values[t], w_values[r], b.load(place)), place)

        totals = [ir.Constant(_FLOAT, 0.0)] * (n_tokens * n_rows)
        done: Any = _I64(0)
        for width in (_WIDTH, 1):
            zero = ir.Constant(ir.VectorType(_FLOAT, width), None)
            sums = [cgutils.alloca_once_value(b, zero) for _ in totals]
            steps = b.sdiv(b.sub(n, done), _I64(width))
            with cgutils.for_range(b, steps, intp=_I64) as loop:
                multiply_add(sums, b.add(done, b.mul(loop.index, _I64(width))), width)
            done = b.add(done, b.mul(steps, _I64(width)))
            totals = [
                b.fadd(total, e.sum(b.load(place)))
                for total, place in zip(totals, sums, strict=True)
            ]
        for k, total in enumerate(totals):
            t, r = divmod(k, n_rows)
            place = element(y_address, b.add(b.mul(y_stride, _I64(t)), _I64(r)))
            b.store(total, b.bitcast(place, _FLOAT.as_pointer()), align=4)
        return context.get_dummy_value()

    addresses = (types.uint64, types.int64, types.uint64, types.uint64, types.int64)
    return types.none(tokens, rows, *addresses), codegen
