"""`gguf-shard fit`: what to expect of a model within a budget, by arithmetic alone."""

from __future__ import annotations

import argparse
from typing import Any

from atlas.budget import plan_budget
from atlas.eviction import CacheShape, PoolPlan, expected_hit_ratio
from atlas.infer.config import LlamaConfig
from atlas.infer.model import DEFAULT_BATCH, reserved_bytes
from atlas.infer.weights import execution_order
from atlas.limits import decode_limit
from atlas.model_shards import ModelShards
from forge.command import print_json
from forge.pages import PAGE_BYTES
from forge.sharded_model import ShardedModel
from forge.sizes import format_bytes


def _shards_per_token(shape: CacheShape, config: LlamaConfig) -> tuple[float, float]:
    """Scheduled shards, and those of the experts that a token is sent to."""
    share = config.n_expert_used / config.n_expert if config.n_expert else 0.0
    return shape.n_scheduled, share * shape.n_unscheduled


def _expected_moved(plan: PoolPlan, shape: CacheShape, config: LlamaConfig) -> float:
    """Shards that a token moves; experts as if the router used them evenly."""
    scheduled, of_experts = _shards_per_token(shape, config)
    moved = scheduled * (1 - expected_hit_ratio(plan, shape))
    if not shape.n_unscheduled:
        return moved
    if plan.policy == "pin":
        left = plan.n_frames - shape.n_high - plan.n_pinned - plan.reserve
    else:
        left = plan.n_frames - shape.n_high - shape.n_scheduled - plan.reserve
        moved = scheduled if left < 0 else 0.0
    resident = min(max(left, 0) / shape.n_unscheduled, 1.0)
    return moved + of_experts * (1 - resident)


def _facts(args: argparse.Namespace, model: ShardedModel) -> dict[str, Any]:
    config = LlamaConfig.from_metadata(model.source_header().metadata)
    shards = ModelShards(model.map, execution_order(model.map, config))
    shape = shards.shape()
    n_context = args.context or config.n_context
    reserved = reserved_bytes(model.map, config, n_context, min(DEFAULT_BATCH, n_context))
    plan, budget_bytes = plan_budget(
        model.map, shape, args.budget, policy=args.policy, prefetch_distance=None,
        reserved_bytes=reserved, on_device=args.target == "cuda",
    )  # fmt: skip
    shard_bytes = model.map.pages_per_shard * PAGE_BYTES
    read = sum(_shards_per_token(shape, config)) * shard_bytes
    moved = _expected_moved(plan, shape, config) * shard_bytes
    memory, link = args.memory * 1e9, args.link * 1e9
    native = decode_limit(read, 0, memory, link)
    limit = decode_limit(read, moved, memory, link)
    return {
        "target": args.target,
        "policy": plan.policy,
        "budget_bytes": budget_bytes,
        "reserved_bytes": reserved,
        "context": n_context,
        "frames": plan.n_frames,
        "resident_fraction": plan.n_frames / shape.n_shards,
        "expected_reuse_ratio": 1 - moved / read,
        "best_reuse_ratio": min((plan.n_frames - shape.n_high) / shape.n_scheduled, 1.0)
        if not shape.n_unscheduled
        else None,
        "bytes_per_token": moved,
        "memory_gb_per_s": args.memory,
        "link_gb_per_s": args.link,
        "limit_tokens_per_second": limit,
        "native_limit_tokens_per_second": native,
        "fraction_of_native": limit / native,
    }


def _text(facts: dict[str, Any]) -> str:
    best = facts["best_reuse_ratio"]
    belady = "" if best is None else f", Belady's bound {100 * best:.1f} %"
    return "\n".join(
        (
            f"budget {format_bytes(facts['budget_bytes'])}: "
            f"{format_bytes(facts['reserved_bytes'])} for activations and a context of "
            f"{facts['context']}, {facts['frames']} frames hold "
            f"{100 * facts['resident_fraction']:.1f} % of the cached pages",
            f"policy {facts['policy']}: {100 * facts['expected_reuse_ratio']:.1f} % reuse{belady}, "
            f"{format_bytes(facts['bytes_per_token'])} moved per token",
            f"with a link of {facts['link_gb_per_s']:g} GB/s and a memory of "
            f"{facts['memory_gb_per_s']:g} GB/s: at most "
            f"{facts['limit_tokens_per_second']:.2f} tokens/s, "
            f"{100 * facts['fraction_of_native']:.1f} % of the native limit of "
            f"{facts['native_limit_tokens_per_second']:.1f}",
        )
    )


def fit(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    with ShardedModel(args.map) as model:
        facts = _facts(args, model)
    if args.json:
        print_json(facts)
    elif not args.quiet:
        print(_text(facts))
    return 0
