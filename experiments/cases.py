"""What is measured, as data: parameters of every case for the presets S, M and L.

S takes seconds on two cores; M is the table of the README; L wants a machine with memory to spare.
A GPU has one session of some minutes, and its rehearsal in the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "gguf-shard"
"""The variant that is this project's, wherever a case has peers."""


@dataclass(frozen=True)
class Goal:
    """A figure to reach: a share of the limit or of the peer's median, or in the case's own unit at
    least or at most so much. `type` picks rows whose params have that type."""

    case: str
    of_limit: float | None = None
    of_peer: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    type: str | None = None


GOALS = (
    Goal("decode", of_peer=0.8),
    Goal("shard", of_peer=0.5),
    Goal("verify", at_least=2.0),
    Goal("budget-rss-overhead", at_most=350.0),
    Goal("gpu-crc32", of_limit=0.75),
    Goal("gpu-matvec", of_limit=0.75, type="F16"),
    Goal("gpu-matvec", of_limit=0.75, type="Q8_0"),
    Goal("gpu-matvec", of_limit=0.6, type="Q4_0"),
    Goal("gpu-matmul", of_peer=0.35),
    Goal("gpu-gather", of_limit=0.92),
    Goal("gpu-gather", of_peer=0.97),  # the peer is the same without the check
    Goal("gpu-select-publish", at_most=30.0),
    Goal("gpu-streamed", of_limit=0.9),
    Goal("gpu-streamed", of_peer=1.3),
)


@dataclass(frozen=True)
class CpuCases:
    """Parameters of `experiments.exp_cpu`.

    Attributes
    ----------
    model
        A preset of `experiments.make_model`.
    types
        Types of the matrices: decoding is measured for each, everything else for the first.
    decode_tokens, prompt_tokens
        Tokens of a decoding and of a prompt.
    budget
        Device memory of the budget runs.
    budget_tokens
        Tokens of a budget run.
    crc_bytes
        Pages to checksum, in bytes.
    swap_shards
        Shards of one swap.
    repeats
        Measurements of each variant, after one to warm up.
    """

    model: str
    types: tuple[str, ...]
    decode_tokens: int
    prompt_tokens: int
    budget: str
    budget_tokens: int
    crc_bytes: int
    swap_shards: tuple[int, ...]
    repeats: int


CPU = {
    "S": CpuCases("160m", ("Q8_0",), 16, 64, "100MB", 8, 32 << 20, (1, 4), 3),
    "M": CpuCases("1b", ("Q8_0", "Q4_0"), 32, 64, "400MB", 16, 256 << 20, (1, 4), 7),
    "L": CpuCases("7b", ("Q8_0", "Q4_0"), 32, 64, "2.8GB", 16, 256 << 20, (1, 4), 7),
}


@dataclass(frozen=True)
class GpuCases:
    """Parameters of `experiments.gpu_session`.

    Attributes
    ----------
    memory_bytes
        Of the copies that set the limits; far more than any cache holds.
    launches
        Kernels queued in a row.
    crc_bytes
        Pages to checksum, in bytes.
    types
        Types of the matrices.
    matrices
        Rows and columns.
    prompt_tokens
        Tokens of a matrix product.
    dense
        Rows, columns and depth of the dense product that limits others.
    shard_shift
        log2 of the pages per shard.
    repeats
        Measurements of each variant, after one to warm up.
    """

    memory_bytes: int
    launches: int
    crc_bytes: int
    types: tuple[str, ...]
    matrices: tuple[tuple[int, int], ...]
    prompt_tokens: tuple[int, ...]
    dense: int
    shard_shift: int
    repeats: int


# The feed-forward and output matrices of Llama 2 7B, the first of 13B.
GPU = GpuCases(
    memory_bytes=1 << 30,
    launches=500,
    crc_bytes=1 << 30,
    types=("F16", "BF16", "Q8_0", "Q4_0"),
    matrices=((11008, 4096), (4096, 11008), (32000, 4096), (13824, 5120)),
    prompt_tokens=(512, 2048),
    dense=8192,
    shard_shift=9,
    repeats=20,
)
GPU_REHEARSAL = GpuCases(
    memory_bytes=8 << 10,
    launches=2,
    crc_bytes=5 << 12,
    types=("F16", "BF16", "Q8_0", "Q4_0"),
    matrices=((160, 96),),
    prompt_tokens=(3,),
    dense=8,
    shard_shift=0,
    repeats=1,
)
