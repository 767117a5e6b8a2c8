"""How much of everything the validation suite tries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Numbers of trials.

    Attributes
    ----------
    flips
        Bit flips in each small artefact: that many, spread evenly; 0 for every bit of every byte.
    random_flips
        Bit flips at random places of a large model.
    every
        Of the k-th failures of system calls each `every`-th k is tried.
    kills
        Random moments at which each operation is killed.
    fuzz_seconds
        How long each fuzz target runs.
    throughput_bytes
        Size of the model whose handling is timed.
    repeats
        Measurements of each speed.
    """

    name: str
    flips: int
    random_flips: int
    every: int
    kills: int
    fuzz_seconds: float
    throughput_bytes: int
    repeats: int


QUICK = Effort("quick", flips=150, random_flips=20, every=7, kills=6, fuzz_seconds=3,
               throughput_bytes=32 << 20, repeats=3)  # fmt: skip
FULL = Effort("full", flips=0, random_flips=500, every=1, kills=100, fuzz_seconds=120,
              throughput_bytes=512 << 20, repeats=7)  # fmt: skip
