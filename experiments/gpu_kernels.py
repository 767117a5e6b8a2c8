"""GPU cases about single operations: checksums, mat-vecs and matrix products on pages."""

from __future__ import annotations

import functools
import time
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants

from atlas.ops.crc32 import crc32_pages
from atlas.ops.matmul import matmul
from atlas.ops.matmul_tensor import fits_tensor_cores
from atlas.ops.matvec import matvec
from atlas.ops.paged import PageCache, PagedMatrix
from atlas.ops.round_tokens import GROUP, words_of_group
from experiments.bench import Case, Variant
from experiments.cases import OURS
from experiments.gpu_bench import COPY, GpuBench, close_to
from experiments.machine_limits import Best
from experiments.random_blocks import random_chunks
from experiments.torch_peer import NAME as PYTORCH
from experiments.torch_peer import TorchPeer
from forge.block_layouts import block_layout
from forge.crc32 import CONTENT_BYTES
from forge.pages import PAGE_BYTES, pack_blocks

_ZLIB_PAGES = 1 << 14
_CHECKED_ROWS = 256  # in each of three places

#: What rounding may cost the worst of a million elements, in root mean squares of all: sums in
#: float32; operands, and with PyTorch results, of 11 and of 8 bits. About twice what it costs.
_FLOAT32_TOLERANCE = 1e-4
_OPERAND_TOLERANCE = {"F16": 1e-2, "BF16": 8e-2}


def crc32(bench: GpuBench) -> list[dict[str, Any]]:
    """Checksums of pages in device memory; zlib on one thread of the host is the peer."""
    target = bench.target
    n_bytes = bench.cases.crc_bytes
    host = bench.random_words(n_bytes // 4).view(np.uint8).reshape(-1, PAGE_BYTES)
    pages, out = target.put(host), target.full(len(host), 0, np.uint32)

    few = host[:_ZLIB_PAGES]  # zlib is as fast with a part of them

    def measured() -> float:
        seconds = bench.stopwatch.seconds(lambda: crc32_pages(target, pages, out))
        return n_bytes / seconds / 1e9

    def measured_zlib() -> float:
        started = time.perf_counter()
        _zlib_checksums(few)
        return few.nbytes / (time.perf_counter() - started) / 1e9

    def is_right() -> bool:
        crc32_pages(target, pages, out)
        return bool(np.array_equal(target.get(out), _zlib_checksums(host)))

    return bench.measure(
        Case("gpu-crc32", "GB/s", {"MiB": n_bytes >> 20}),
        [
            Variant(OURS, measured, is_right, bench.copy_limit, COPY),
            Variant("zlib, one thread", measured_zlib, lambda: True),
        ],
    )


def _zlib_checksums(pages: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(page[:CONTENT_BYTES]) for page in pages], np.uint32)


@dataclass
class Weights:
    """A random matrix in pages on the device.

    Attributes
    ----------
    blocks
        The same on the host, in the blocks of GGUF: uint8 [n_rows, bytes of a row].
    """

    cache: PageCache
    matrix: PagedMatrix
    blocks: np.ndarray

    @property
    def params(self) -> dict[str, Any]:
        """For rows."""
        matrix = self.matrix
        return {"type": matrix.ggml_type.name, "matrix": f"{matrix.n_rows} x {matrix.n_cols}"}

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows in float32, by the gguf package."""
        return quants.dequantize(self.blocks[begin:end], self.matrix.ggml_type)

    def checked_rows(self) -> list[tuple[int, int]]:
        """Ranges of rows at both ends and in the middle."""
        n_rows = self.matrix.n_rows
        n = min(_CHECKED_ROWS, n_rows)
        return [(begin, begin + n) for begin in (0, (n_rows - n) // 2, n_rows - n)]


def make_weights(bench: GpuBench, type_name: str, n_rows: int, n_cols: int) -> Weights:
    """Random weights of deviation 1/sqrt(n_cols) in a shuffle of frames."""
    layout = block_layout(GGMLQuantizationType[type_name])
    n_blocks = n_rows * n_cols // layout.elements
    # bfloat16 is the upper half of float32.
    drawn = GGMLQuantizationType.F32 if type_name == "BF16" else layout.ggml_type
    chunks = [
        np.right_shift(chunk.view(np.uint32), 16).astype(np.uint16)
        if type_name == "BF16"
        else chunk
        for chunk in random_chunks(type_name, n_blocks, drawn, n_cols**-0.5, bench.seed)
    ]
    blocks = np.concatenate([chunk.reshape(-1).view(np.uint8) for chunk in chunks])
    shift = bench.cases.shard_shift
    n_pages = layout.pages_for(n_blocks)
    n_shards = -(-n_pages >> shift)
    pages = np.zeros((n_shards << shift, PAGE_BYTES), np.uint8)
    pack_blocks(blocks, layout, pages[:n_pages])
    table = np.random.default_rng(bench.seed).permutation(n_shards).astype(np.int32)
    frames = np.empty_like(pages)
    frames.reshape(n_shards, -1)[table] = pages.reshape(n_shards, -1)
    pool = bench.target.put(frames.reshape(-1))
    cache = PageCache(pool, bench.target.put(table), shift, pool.view(np.uint32))
    return Weights(
        cache, PagedMatrix("weights", n_rows, n_cols, 0, layout), blocks.reshape(n_rows, -1)
    )


def mat_vec(bench: GpuBench) -> list[dict[str, Any]]:
    """One token through one matrix: every weight is read once. PyTorch takes 16-bit types."""
    rows = []
    for n_rows, n_cols in bench.cases.matrices:
        for type_name in bench.cases.types:
            weights = make_weights(bench, type_name, n_rows, n_cols)
            variants = [_mat_vec_variant(bench, weights)]
            if bench.torch is not None and type_name in _OPERAND_TOLERANCE:
                x = _activations(bench, 1, n_cols)
                peer = _torch_variant(bench, weights, x, weights.blocks.nbytes / 1e9)
                variants.append(replace(peer, limit=bench.copy_limit, limit_by=COPY))
            rows += bench.measure(Case("gpu-matvec", "GB/s", weights.params), variants)
    return rows


def _mat_vec_variant(bench: GpuBench, weights: Weights) -> Variant:
    target, matrix = bench.target, weights.matrix
    host_x = _activations(bench, 1, matrix.n_cols)[0]
    x, y = target.put(host_x), target.full(matrix.n_rows, np.nan, np.float32)

    def run() -> None:
        matvec(target, y, weights.cache, matrix, x)

    def is_right() -> bool:
        run()
        found = target.get(y)
        return all(
            close_to(found[begin:end], weights.rows(begin, end) @ host_x, _FLOAT32_TOLERANCE)
            for begin, end in weights.checked_rows()
        )

    def measured() -> float:
        return weights.blocks.nbytes / bench.stopwatch.seconds(run) / 1e9

    return Variant(OURS, measured, is_right, bench.copy_limit, COPY)


def mat_mul(bench: GpuBench) -> list[dict[str, Any]]:
    """A prompt through one matrix. PyTorch has it dense, in 16 bits; how fast it is with large
    square matrices is the limit."""
    rows = []
    limit = None
    if bench.torch is not None:
        limit = Best(functools.partial(_dense_tflops, bench.torch, bench.cases.dense))
    for type_name in bench.cases.types:
        n_rows, n_cols = bench.cases.matrices[0]
        weights = make_weights(bench, type_name, n_rows, n_cols)
        for n_tokens in bench.cases.prompt_tokens:
            x = _activations(bench, n_tokens, n_cols)
            variants = [_mat_mul_variant(bench, weights, x)]
            if bench.torch is not None:
                work = 2e-12 * n_tokens * n_rows * n_cols
                variants.append(_torch_variant(bench, weights, x, work))
            variants = [replace(v, limit=limit, limit_by="large dense product") for v in variants]
            params = weights.params | {"tokens": n_tokens}
            rows += bench.measure(Case("gpu-matmul", "TFLOP/s", params), variants)
    return rows


def _dense_tflops(torch: TorchPeer, n: int) -> float:
    return torch.dense_flops(n) / 1e12


def _mat_mul_variant(bench: GpuBench, weights: Weights, host_x: np.ndarray) -> Variant:
    target, matrix = bench.target, weights.matrix
    x = target.put(host_x)
    y = target.full((len(host_x), matrix.n_rows), np.nan, np.float32)
    n_groups = -(-len(host_x) // GROUP)
    scratch = target.full(n_groups * words_of_group(matrix.n_cols), np.nan, np.float32)
    tolerance = _OPERAND_TOLERANCE["BF16" if matrix.ggml_type.name == "BF16" else "F16"]

    def run() -> None:
        matmul(target, y, weights.cache, matrix, x, 0, matrix.n_rows, scratch)

    def is_right() -> bool:
        if target.has_tensor_cores and not fits_tensor_cores(target, matrix, scratch):
            return False  # another product than the one that is meant
        run()
        found = target.get(y)
        return all(
            close_to(found[:, begin:end], host_x @ weights.rows(begin, end).T, tolerance)
            for begin, end in weights.checked_rows()
        )

    def measured() -> float:
        work = 2e-12 * len(host_x) * matrix.n_rows * matrix.n_cols
        return work / bench.stopwatch.seconds(run)

    return Variant(OURS, measured, is_right)


def _torch_variant(bench: GpuBench, weights: Weights, x: np.ndarray, work: float) -> Variant:
    """PyTorch's product with the same weights, as a dense 16-bit matrix; `work` in the case's unit
    times seconds."""
    torch = bench.torch
    assert torch is not None
    type_name = "BF16" if weights.matrix.ggml_type.name == "BF16" else "F16"
    dense = torch.array(weights.rows(0, weights.matrix.n_rows), type_name)
    operand = torch.array(x, type_name)

    def is_right() -> bool:
        found = torch.get(torch.product(operand, dense))
        return all(
            close_to(found[:, begin:end], x @ weights.rows(begin, end).T,
                     _OPERAND_TOLERANCE[type_name])
            for begin, end in weights.checked_rows()
        )  # fmt: skip

    def measured() -> float:
        return work / torch.seconds(lambda: torch.product(operand, dense))

    return Variant(PYTORCH, measured, is_right)


def _activations(bench: GpuBench, n_tokens: int, n_cols: int) -> np.ndarray:
    rng = np.random.default_rng([bench.seed, n_tokens])
    return rng.standard_normal((n_tokens, n_cols), dtype=np.float32)
