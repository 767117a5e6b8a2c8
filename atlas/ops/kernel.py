"""CUDA kernels that take their arguments as 64-bit words.

Each array among a kernel's arguments costs the host some microseconds at every launch, since Numba
looks at its type, and passes on seven numbers. So a kernel here takes numbers alone:

    array     address, then the length of each dimension (C-contiguous)
    scalar    one word, its low bits
    tuple     its elements, one after the other

They lie in the GPU's constant memory, where the driver puts what a launch is given: instructions
take them as operands, and a captured graph has its own. The author of a kernel sees none of this:

    @kernel(types.float32[::1], types.int64)
    def fill_kernel(out, first):
        ...

    fill_kernel.launch(target, n_blocks, n_threads, out, 7)
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba import cuda, types
from numba.core import config

from atlas.driver_queue import Grid
from atlas.target import Target

_WORD_MASK = (1 << 64) - 1


class Kernel:
    """A kernel and the types of its arguments; made by `kernel`.

    Attributes
    ----------
    name
        The name of its body.
    signature
        Numba types of the arguments.
    entry
        What is compiled: the body, behind the unpacking of its words.
    entry_types
        What it is compiled for: an int64 for each word, which Numba takes a Python integer for.
    min_capability
        The lowest compute capability that has its instructions.
    """

    def __init__(
        self,
        body: Any,
        signature: tuple[Any, ...],
        options: dict[str, Any],
        min_capability: tuple[int, int] = (0, 0),
    ) -> None:
        self.name: str = body.__name__
        self.signature = signature
        self.min_capability = min_capability
        self.entry_types = (types.int64,) * sum(map(_n_words, signature))
        entry = _entry(body, _unpacker(signature), len(self.entry_types))
        self.entry = cuda.jit(**_known(options))(entry)
        self._writers = [_writer(kind) for kind in signature]

    def launch(
        self, target: Target, blocks: Grid, threads: int, *arguments: Any, stream: Any = None
    ) -> None:
        """Run on a grid of `blocks` times `threads`, on the target's compute stream or another.

        Parameters
        ----------
        target
            The CUDA target.
        blocks, threads
            Blocks of the grid, in one dimension or two, and threads of a block.
        *arguments
            As the signature has them; arrays are C-contiguous device arrays, and are trusted.
        stream
            Where to queue it; None for `target.stream`.
        """
        words: list[int] = []
        for write, argument in zip(self._writers, arguments, strict=True):
            write(target, words, argument)
        where = target.stream if stream is None else stream
        target.launch(self, blocks, threads, where, words)


def kernel(
    *signature: Any, min_capability: tuple[int, int] = (0, 0), **options: Any
) -> Callable[[Any], Kernel]:
    """Decorator: a function of these Numba types becomes a `Kernel`.

    Parameters
    ----------
    *signature
        Types of the arguments: C-contiguous arrays, integers, float32, boolean, tuples of int64.
    min_capability
        The lowest compute capability it can be compiled for.
    **options
        Options of `numba.cuda.jit` (`launch_bounds`, `fastmath`).
    """
    return lambda body: Kernel(body, signature, options, min_capability)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the installed Numba knows: bounds come with numba-cuda, and are ignored by
    link-time optimisation unless they say how many blocks a multiprocessor is to hold."""
    if config.ENABLE_CUDASIM or importlib.util.find_spec("numba_cuda") is None:
        return {name: value for name, value in options.items() if name == "fastmath"}
    bounds = options.get("launch_bounds")
    return options | {"launch_bounds": (bounds, 1)} if isinstance(bounds, int) else options


def _entry(body: Any, unpack: Any, n_words: int) -> Any:
    words = "".join(f"w{i}, " for i in range(n_words))
    # Numba takes no `*words` from a kernel: the entry is written with as many as there are.
    named = {"body": cuda.jit(device=True)(body), "unpack": unpack}
    exec(f"def entry({words}): body(*unpack(({words})))", named)
    entry: Any = named["entry"]
    entry.__name__ = entry.__qualname__ = body.__name__
    return entry


# Packing, on the host


def _writer(kind: Any) -> Callable[[Target, list[int], Any], None]:
    """Appends an argument of this type to a list of words."""
    if isinstance(kind, types.Array):
        return _write_array
    if isinstance(kind, types.UniTuple):
        return lambda target, words, value: words.extend(int(v) & _WORD_MASK for v in value)
    if isinstance(kind, types.Float):
        return lambda target, words, value: words.append(
            struct.unpack("<I", struct.pack("<f", value))[0]
        )
    return lambda target, words, value: words.append(int(value) & _WORD_MASK)


def _write_array(target: Target, words: list[int], array: Any) -> None:
    # Once for each array: a select has eighteen.
    known = getattr(array, "_kernel_words", None)
    if known is None:
        known = array._kernel_words = (target.address(array), *array.shape)
    words.extend(known)


def _n_words(kind: Any) -> int:
    if isinstance(kind, types.Array):
        return 1 + int(kind.ndim)
    return len(kind) if isinstance(kind, types.UniTuple) else 1


# Unpacking, on the device or in the simulator


def _unpacker(signature: tuple[Any, ...]) -> Any:
    """A device function from the words to the tuple of arguments."""
    return _interpreted(signature) if config.ENABLE_CUDASIM else _compiled(signature)


def _interpreted(signature: tuple[Any, ...]) -> Callable[[tuple[int, ...]], tuple[Any, ...]]:
    from numba.np import numpy_support

    readers = [
        (_n_words(kind), numpy_support.as_dtype(getattr(kind, "dtype", kind)), kind)
        for kind in signature
    ]

    last: tuple[tuple[int, ...], tuple[Any, ...]] = ((), ())

    def unpack(words: tuple[int, ...]) -> tuple[Any, ...]:
        nonlocal last
        if words != last[0]:  # all threads of a launch ask for the same
            last = words, tuple(read(words))
        return last[1]

    def read(words: tuple[int, ...]) -> Iterator[Any]:
        packed, at = np.array(words, np.uint64), 0
        for count, dtype, kind in readers:
            mine = packed[at : at + count]
            at += count
            if isinstance(kind, types.Array):
                yield array_at(int(mine[0]), mine[1:].tolist(), dtype)
            elif isinstance(kind, types.UniTuple):
                yield tuple(mine.view(np.int64))
            else:
                yield mine.view(np.uint8)[: dtype.itemsize].view(dtype)[0]

    return unpack


def array_at(address: int, shape: list[int], dtype: Any) -> np.ndarray:
    """The memory at an address of this process as an array."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes == 0:
        return np.empty(shape, dtype)
    memory = (ctypes.c_uint8 * n_bytes).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


def _compiled(signature: tuple[Any, ...]) -> Any:
    from numba.cuda.extending import intrinsic

    @intrinsic
    def unpack(typing_context, words):
        def emit(context, builder, sig, args):
            each = iter(range(len(words)))

            def next_word():
                return builder.extract_value(args[0], next(each))

            return context.make_tuple(
                builder, sig.return_type,
                [_emit_argument(context, builder, kind, next_word) for kind in signature],
            )  # fmt: skip

        return types.Tuple(signature)(words), emit

    return unpack


def _emit_argument(context: Any, builder: Any, kind: Any, next_word: Callable[[], Any]) -> Any:
    """LLVM code that makes an argument of its words."""
    if isinstance(kind, types.Array):
        return _emit_array(context, builder, kind, next_word)
    if isinstance(kind, types.UniTuple):
        return context.make_tuple(builder, kind, [next_word() for _ in range(len(kind))])
    value, target_type = next_word(), context.get_value_type(kind)
    if isinstance(kind, types.Float):
        return builder.bitcast(builder.trunc(value, context.get_value_type(types.uint32)),
                               target_type)  # fmt: skip
    return value if target_type == value.type else builder.trunc(value, target_type)


def _emit_array(context: Any, builder: Any, kind: Any, next_word: Callable[[], Any]) -> Any:
    array = context.make_array(kind)(context, builder)
    pointer_type = array.data.type
    # By way of global memory's address space, so that loads need not find out where they point.
    address = builder.inttoptr(next_word(), pointer_type.pointee.as_pointer(1))
    shape = [next_word() for _ in range(kind.ndim)]
    item_bytes = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides = [shape[0].type(item_bytes)]
    for length in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], length))
    array.data = builder.addrspacecast(address, pointer_type)
    array.shape = _packed(builder, shape)
    array.strides = _packed(builder, strides)
    array.itemsize = shape[0].type(item_bytes)
    array.nitems = shape[0] if len(shape) == 1 else _product(builder, shape)
    array.meminfo = array.meminfo.type(None)
    array.parent = array.parent.type(None)
    return array._getvalue()


def _packed(builder: Any, values: list[Any]) -> Any:
    from llvmlite import ir

    packed = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        packed = builder.insert_value(packed, value, i)
    return packed


def _product(builder: Any, values: list[Any]) -> Any:
    product = values[0]
    for value in values[1:]:
        product = builder.mul(product, value)
    return product
