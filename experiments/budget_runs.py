"""One sharded model run within several budgets: what it cost, and what theory says it had to.

With `N` shards read once per token in the same order, of which a policy finds the share `h` left by
the token before, `W` bytes of pages, a memory of `B_mem` and a link of `B_link` bytes a second:

    bytes per token  = W * (1 - h)
    tokens a second <= 1 / max(W / B_mem, W * (1 - h) / B_link)

`h` is 0 for LRU until everything fits, and the pinned share for `pin`: a cyclic scan has closed
forms (`atlas.eviction`). Belady's MIN, which knows the future, finds about C / N with C frames.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from atlas.errors import BudgetError
from atlas.eviction import CacheShape, expected_hit_ratio, plan_pool
from atlas.infer.generate import Generation, generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.limits import decode_limit, link_bandwidth, memory_bandwidth, weight_bytes_per_pass
from atlas.target import Target
from forge.sharded_model import ShardedModel
from forge.sizes import Size


@dataclass(frozen=True)
class Machine:
    """Bandwidths in bytes a second; memory is None where it is not measured (on a GPU)."""

    memory: float | None
    link: float | None


@dataclass(frozen=True)
class BudgetRun:
    """A greedy continuation within a budget.

    Attributes
    ----------
    policy
        "lru", "mru" or "pin".
    budget
        Share of the model's cached pages that may stay resident, 0..1.
    pool_bytes
        Size of the pool.
    tokens
        The continuation.
    tokens_per_second, bytes_per_token
        Of the decode passes.
    reuse, prefetch, demand
        Shares of the decode passes' accesses, 0..1.
    expected_reuse
        What the policy's closed form says `reuse` is.
    machine
        Bandwidths as measured beside this run.
    """

    policy: str
    budget: float
    pool_bytes: int
    tokens: tuple[int, ...]
    tokens_per_second: float
    bytes_per_token: float
    reuse: float
    prefetch: float
    demand: float
    expected_reuse: float
    machine: Machine


@dataclass(frozen=True)
class Theory:
    """The closed forms of one policy over budgets; every array has one element a pool size.

    Attributes
    ----------
    budget
        Share of the cached pages, 0..1.
    reuse
        Share of accesses that find their shard, 0..1.
    bytes_per_token
        What has to be moved.
    belady
        Share that Belady's MIN would find, 0..1.
    limit
        Most tokens a second.
    """

    budget: np.ndarray
    reuse: np.ndarray
    bytes_per_token: np.ndarray
    belady: np.ndarray
    limit: np.ndarray


@dataclass(frozen=True)
class ModelScan:
    """What a pass of a model reads: the shards to serve, and the bytes of those it scans."""

    shape: CacheShape
    weight_bytes: int
    prefetch_distance: int

    def limit(self, machine: Machine, reuse: float) -> float:
        """Most tokens a second where the share `reuse` of the weights is already resident."""
        moved = self.weight_bytes * (1 - reuse)
        return decode_limit(self.weight_bytes, moved, machine.memory, machine.link)

    def theory(self, policy: str, machine: Machine) -> Theory:
        """The closed forms at every pool size that works."""
        shape, rows = self.shape, []
        for n_frames in range(shape.smallest_pool, shape.n_shards + 1):
            try:
                plan = plan_pool(shape, n_frames, policy, self.prefetch_distance)
            except BudgetError:
                continue
            reuse = expected_hit_ratio(plan, shape)
            room = (n_frames - shape.n_high) / (shape.n_shards - shape.n_high)
            moved = self.weight_bytes * (1 - reuse)
            rows.append((room, reuse, moved, min(room, 1.0), self.limit(machine, reuse)))
        return Theory(*np.array(rows).T)


def decode_within(
    map_path: str | os.PathLike[str],
    target: Target,
    policy: str,
    budget: float,
    prompt: Sequence[int],
    n_tokens: int,
) -> tuple[BudgetRun, ModelScan]:
    """Continue a prompt greedily within a budget, from a cold pool.

    Parameters
    ----------
    map_path
        `core.sgmap`.
    target
        Where to run.
    policy
        What stays resident.
    budget
        Share of the cached pages, 0..1.
    prompt
        Token ids.
    n_tokens
        Tokens to generate, at least 2; the end of the text does not stop it, so that runs compare.

    Returns
    -------
    BudgetRun, ModelScan
        The run, and what theory needs to know of the model.

    Raises
    ------
    GGUFShardError
        If the model cannot be run within the budget, or a page does not hold.
    """
    context = len(prompt) + n_tokens
    with LlamaModel(
        ShardedModel(map_path), target, Size(fraction=budget), n_context=context, policy=policy
    ) as model:
        result = generate(model, prompt, n_tokens, Sampler(temperature=0))
        atlas = model.atlas
        machine = Machine(memory_bandwidth(target, atlas.cache), link_bandwidth(atlas))
        scan = ModelScan(
            atlas.shape,
            weight_bytes_per_pass(atlas.map, len(atlas.shards.schedule)),
            atlas.map.atlas.prefetch_distance,
        )
        pool_bytes = atlas.plan.n_frames * atlas.shard_bytes
        return _summary(
            result,
            atlas.plan.policy,
            budget,
            pool_bytes,
            expected_hit_ratio(atlas.plan, atlas.shape),
            machine,
        ), scan


def _summary(
    result: Generation, policy: str, budget: float, pool_bytes: int, expected: float,
    machine: Machine,
) -> BudgetRun:  # fmt: skip
    stats = result.decode_stats
    return BudgetRun(
        policy=policy,
        budget=budget,
        pool_bytes=pool_bytes,
        tokens=tuple(result.tokens),
        tokens_per_second=result.tokens_per_second,
        bytes_per_token=stats.bytes_moved / result.n_decode_passes,
        reuse=stats.reuse_hits / stats.accesses,
        prefetch=stats.prefetch_hits / stats.accesses,
        demand=stats.demand_misses / stats.accesses,
        expected_reuse=expected,
        machine=machine,
    )


def best_machine(runs: Sequence[BudgetRun]) -> Machine:
    """The best bandwidths seen beside any of the runs: one limit for all of them."""
    memory = [run.machine.memory for run in runs if run.machine.memory is not None]
    link = [run.machine.link for run in runs if run.machine.link is not None]
    return Machine(max(memory, default=None), max(link, default=None))


def table_rows(runs: Sequence[BudgetRun], scan: ModelScan) -> list[dict[str, Any]]:
    """Runs as flat rows: the run's numbers, `limit_tokens_per_second`, `fraction_of_limit`."""
    machine = best_machine(runs)
    rows = []
    for run in runs:
        limit = scan.limit(machine, run.reuse)
        row = asdict(run) | {
            "limit_tokens_per_second": limit,
            "fraction_of_limit": run.tokens_per_second / limit,
        }
        rows.append({key: value for key, value in row.items() if key not in ("tokens", "machine")})
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `table_rows` for people."""
    lines = [
        "policy  budget   pool MB  tokens/s     limit  % of limit  kB/token   reuse  prefetch  "
        "demand  expected reuse"
    ]
    for r in rows:
        lines.append(
            f"{r['policy']:6}{100 * r['budget']:6.0f} %{r['pool_bytes'] / 1e6:10.2f}"
            f"{r['tokens_per_second']:10.1f}{r['limit_tokens_per_second']:10.0f}"
            f"{100 * r['fraction_of_limit']:10.1f} %{r['bytes_per_token'] / 1e3:10.0f}"
            f"{100 * r['reuse']:6.1f} %{100 * r['prefetch']:8.1f} %{100 * r['demand']:6.1f} %"
            f"{100 * r['expected_reuse']:14.1f} %"
        )
    return "\n".join(lines)
