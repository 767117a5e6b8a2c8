"""What is measured, as data: parameters of every case for the presets S, M and L.

S takes seconds on two cores; M is the table of the README; L wants a machine with memory to spare.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "gguf-shard"
"""The variant that is this project's, wherever a case has peers."""


@dataclass(frozen=True)
class Goal:
    """A figure to reach: `at_least` times the peer's median, or in the case's own unit, or at most
    `at_most` in it."""

    case: str
    of_peer: float | None = None
    at_least: float | None = None
    at_most: float | None = None


GOALS = (
    Goal("decode", of_peer=0.8),
    Goal("shard", of_peer=0.5),
    Goal("verify", at_least=2.0),
    Goal("budget-rss-overhead", at_most=350.0),
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
