"""`gguf-shard run`: text out of a sharded model, and what it cost."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from atlas.infer.config import LlamaConfig
from atlas.infer.generate import Generation, generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.infer.tokenizer import TextStream, Tokenizer
from atlas.limits import decode_limit, link_bandwidth, memory_bandwidth
from atlas.target import select_target
from forge.command import print_json
from forge.errors import GGUFShardError
from forge.sharded_model import ShardedModel
from forge.sizes import format_bytes


def _prompt(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    if args.prompt_ids is not None:
        return list(args.prompt_ids)
    if tokenizer is None:
        raise GGUFShardError(f"{args.map}: the model has no tokenizer; give --prompt-ids")
    prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise GGUFShardError("prompt: has no tokens")
    return prompt


def _tokenizer(model: ShardedModel, metadata: dict[str, Any]) -> Tokenizer | None:
    if "tokenizer.ggml.model" not in metadata:
        return None
    try:
        return Tokenizer.from_metadata(metadata)
    except GGUFShardError as error:
        raise GGUFShardError(f"{model.map.source[0].name}: {error}") from None


class _Writer:
    """Writes text to stdout as its tokens come; their numbers where nobody can spell them."""

    def __init__(self, stream: TextStream | None, quiet: bool) -> None:
        self._stream = stream
        self._quiet = quiet
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def token(self, token: int) -> None:
        self._write(f"{token} " if self._stream is None else self._stream.push(token))

    def end(self) -> None:
        if self._stream is not None:
            self._write(self._stream.flush())
        if not self._quiet:
            print(flush=True)

    def break_line(self) -> None:
        """Give an error that ends the text a line of its own."""
        if self._pieces and not self._quiet:
            print(flush=True)

    def _write(self, text: str) -> None:
        self._pieces.append(text)
        if not self._quiet:
            sys.stdout.write(text)
            sys.stdout.flush()


def _facts(
    model: LlamaModel, prompt: list[int], result: Generation, text: str | None
) -> dict[str, Any]:
    atlas = model.atlas
    decode, prompt_phase = result.decode_stats, result.prompt_stats
    # Steady state is what decoding shows; a prompt's passes carry many tokens each.
    passes = result.n_decode_passes
    phase, seconds = (
        (decode, result.decode_seconds) if passes else (prompt_phase, result.prompt_seconds)
    )
    n_tokens = passes or len(prompt)
    shard_bytes = atlas.shard_bytes
    device_bytes_peak = model.target.peak_bytes  # measuring bandwidths takes memory of its own
    memory = memory_bandwidth(model.target, atlas.cache)
    link = link_bandwidth(atlas)
    limit = float("inf")
    if passes:
        read, moved = decode.accesses * shard_bytes / passes, decode.bytes_moved / passes
        limit = decode_limit(read, moved, memory, link)

    def timed(value: float) -> float | None:
        return value if model.target.has_clock else None

    return {
        "prompt_tokens": prompt,
        "tokens": result.tokens,
        "text": text,
        "tokens_per_second": timed(result.tokens_per_second),
        "prompt_tokens_per_second": timed(len(prompt) / result.prompt_seconds),
        "time_to_first_token_s": timed(result.first_token_seconds),
        "target": model.target.name,
        "policy": atlas.plan.policy,
        "budget_bytes": atlas.budget_bytes,
        "device_bytes_peak": device_bytes_peak,
        "reuse_hits": prompt_phase.reuse_hits + decode.reuse_hits,
        "prefetch_hits": prompt_phase.prefetch_hits + decode.prefetch_hits,
        "demand_misses": prompt_phase.demand_misses + decode.demand_misses,
        "bytes_per_token": phase.bytes_moved / n_tokens,
        "bytes_filled": atlas.stats.bytes_filled,
        "link_gb_per_s": timed(phase.bytes_moved / seconds / 1e9 if seconds else 0.0),
        "link_bandwidth_gb_per_s": link / 1e9 if link is not None else None,
        "memory_bandwidth_gb_per_s": memory / 1e9 if memory is not None else None,
        # Null where nothing was decoded, or nothing known bounds it: JSON has no infinity.
        "limit_tokens_per_second": limit if np.isfinite(limit) else None,
        "fraction_of_limit": result.tokens_per_second / limit if np.isfinite(limit) else None,
        "expected_reuse_ratio": atlas.expected_reuse_ratio,
        "frames": atlas.plan.n_frames,
        # Null where there are no graphs, on the CPU target.
        "is_replayed": None if model.decode_graph is None else not model.decode_graph.reason,
        "pages_checked": atlas.stats.pages_checked,
    }


def _summary(facts: dict[str, Any]) -> str:
    accesses = facts["reuse_hits"] + facts["prefetch_hits"] + facts["demand_misses"]
    shares = [
        f"{100 * facts[key] / max(accesses, 1):.1f} % {label}"
        for key, label in (
            ("reuse_hits", "reuse hits"),
            ("prefetch_hits", "prefetch hits"),
            ("demand_misses", "demand misses"),
        )
    ]
    memory, link = facts["memory_bandwidth_gb_per_s"], facts["link_bandwidth_gb_per_s"]
    memory_text = "memory not measured" if memory is None else f"memory {memory:.1f} GB/s"
    link_text = "not measured" if link is None else f"{link:.2f}"
    limit_text = "limit unknown"
    if facts["limit_tokens_per_second"] is not None:
        limit_text = (
            f"limit {facts['limit_tokens_per_second']:.2f} tokens/s, "
            f"reached {100 * facts['fraction_of_limit']:.0f} %"
        )
    expected = facts["expected_reuse_ratio"]
    theory = "" if expected is None else f" (once warm {100 * expected:.1f} % reuse expected)"
    speed_text = f"{len(facts['tokens'])} tokens; in the simulator time means nothing"
    link_used = "not measured"
    if facts["tokens_per_second"] is not None:
        speed_text = (
            f"{facts['tokens_per_second']:.2f} tokens/s ({len(facts['tokens'])} tokens), "
            f"prompt {facts['prompt_tokens_per_second']:.1f} tokens/s, "
            f"first token after {facts['time_to_first_token_s']:.2f} s"
        )
        link_used = f"{facts['link_gb_per_s']:.2f}"
    return "\n".join(
        (
            speed_text,
            f"target {facts['target']}, policy {facts['policy']}, "
            f"budget {format_bytes(facts['budget_bytes'])}, "
            f"peak {format_bytes(facts['device_bytes_peak'])}",
            f"{', '.join(shares)}{theory}, "
            f"{format_bytes(facts['bytes_per_token'])} moved per token, "
            f"{facts['pages_checked']} pages checked",
            f"link {link_used} of {link_text} GB/s, {memory_text}: {limit_text}",
        )
    )


def _stop_tokens(args: argparse.Namespace, tokenizer: Tokenizer | None) -> Collection[int]:
    return () if args.ignore_eos or tokenizer is None else tokenizer.eos_ids


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    if args.logits_out is not None:
        _check_writable(Path(args.logits_out))
    sampler = Sampler(args.temp, args.top_k, args.top_p, args.seed)
    target = select_target(args.target, args.threads)
    with ShardedModel(args.map) as opened:
        metadata = opened.source_header().metadata
        tokenizer = _tokenizer(opened, metadata)
        config = LlamaConfig.from_metadata(metadata)
        del metadata  # a large vocabulary's strings need not stay beside the tokenizer
        prompt = _prompt(args, tokenizer)
        n_context = args.context or len(prompt) + args.n_tokens
        with LlamaModel(
            opened, target, args.budget, config=config, n_context=n_context, n_batch=args.batch,
            policy=args.policy, prefetch_distance=args.prefetch_distance,
            host_memory=args.host_memory, scrub_pages=args.scrub,
        ) as model:  # fmt: skip
            quiet = args.json
            writer = _Writer(tokenizer.stream() if tokenizer else None, quiet)
            try:
                result = generate(
                    model, prompt, args.n_tokens, sampler,
                    stop=_stop_tokens(args, tokenizer), on_token=writer.token,
                )  # fmt: skip
            except BaseException:
                writer.break_line()
                raise
            writer.end()
            if args.logits_out is not None:
                _save_logits(args.logits_out, result.prompt_logits)
            if args.json or not args.quiet:
                facts = _facts(model, prompt, result, writer.text if tokenizer else None)
    if args.json:
        print_json(facts)
    elif not args.quiet:
        print(_summary(facts), file=sys.stderr)
        if n_context > config.n_context:
            print(
                f"a context of {n_context} is beyond the {config.n_context} positions the model "
                "was made for",
                file=sys.stderr,
            )
    return 0


def _check_writable(path: Path) -> None:
    """Say before the work, not behind it, that its result cannot be stored."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise GGUFShardError(f"{path}: cannot be written")


def _save_logits(path: str, logits: np.ndarray) -> None:
    with open(Path(path), "wb") as file:
        np.save(file, logits)
