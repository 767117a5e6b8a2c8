"""CPU cases about inference: decoding, prompts, and runs within a budget."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atlas.infer.config import LlamaConfig
from atlas.infer.generate import Generation, generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.infer.weights import execution_order
from atlas.limits import memory_bandwidth, weight_bytes_per_pass
from atlas.model_shards import EMBEDDING, OUTPUT, ModelShards
from atlas.target import CpuTarget
from experiments.bench import Case, Variant, measure, record
from experiments.cases import OURS
from experiments.cpu_session import Session
from experiments.llama_peer import LlamaPeer
from experiments.machine_limits import Best, product_flops
from forge.errors import GGUFShardError
from forge.sgmap import TensorEntry
from forge.sharded_model import ShardedModel
from forge.sizes import Size, parse_size

_CHECKED_TOKENS = 4
_BUDGET_REPEATS = 3

# A process started from a large one counts the large one's memory as its own peak, until it has
# more itself: Linux carries `ru_maxrss` through exec. So a small process stands between.
_LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def _prompt(n_tokens: int, n_vocab: int, seed: int) -> list[int]:
    """Token ids behind BOS, none of them a special or byte token."""
    rng = np.random.default_rng(seed)
    return [1, *rng.integers(259, n_vocab, n_tokens - 1).tolist()]


@contextmanager
def _open(session: Session, model: Path, fraction: float, n_context: int) -> Iterator[LlamaModel]:
    target = CpuTarget(session.threads)
    with LlamaModel(
        ShardedModel(session.sharded(model)), target, Size(fraction=fraction),
        n_context=n_context, policy="pin",
    ) as opened:  # fmt: skip
        yield opened


@contextmanager
def _peer(session: Session, model: Path, n_context: int) -> Iterator[LlamaPeer | None]:
    if session.llama_python is None:
        yield None
        return
    with LlamaPeer(
        session.llama_python, model, threads=session.threads, n_context=n_context
    ) as peer:
        yield peer


@dataclass(frozen=True)
class _Race:
    """A prompt and its continuation, timed on both sides.

    Attributes
    ----------
    name, params
        Of the case.
    n_prompt, n_tokens
        Tokens in and out.
    figure
        From seconds of the prompt and of the decoding to tokens a second.
    capacity, limit_by
        Measures what sets the limit, in bytes or operations a second; its name.
    our_cost, peer_cost
        Bytes or operations a token, of an opened model; None if the peer's is not known.
    """

    name: str
    params: dict[str, Any]
    n_prompt: int
    n_tokens: int
    figure: Callable[[float, float], float]
    capacity: Callable[[LlamaModel], float]
    limit_by: str
    our_cost: Callable[[LlamaModel], float]
    peer_cost: Callable[[LlamaModel], float] | None


def decode(session: Session) -> list[dict[str, Any]]:
    """Decoding with everything resident, for each model."""
    n = session.cases.decode_tokens
    race = _Race(
        "decode", {}, 8, n, lambda _, decode_seconds: (n - 1) / decode_seconds,
        _memory, "memory", _paged_bytes, _matrix_bytes,
    )  # fmt: skip
    return [row for model in session.models() for row in _run_race(session, model, race)]


def prefill(session: Session) -> list[dict[str, Any]]:
    """A prompt, with everything resident."""
    n = session.cases.prompt_tokens

    def operations(model: LlamaModel) -> float:
        # The output matrix is multiplied with the last token only.
        return 2 * sum(
            float(np.prod(t.shape)) / (n if t.name in (EMBEDDING, OUTPUT) else 1)
            for t in _matrices(model)
        )

    race = _Race(
        "prefill", {"prompt_tokens": n}, n, 1, lambda prompt_seconds, _: n / prompt_seconds,
        lambda _: product_flops(), "float32 products", operations, None,
    )  # fmt: skip
    return _run_race(session, session.first_model(), race)


def _run_race(session: Session, model: Path, race: _Race) -> list[dict[str, Any]]:
    context = race.n_prompt + max(race.n_tokens, _CHECKED_TOKENS)
    with _open(session, model, 1.0, context) as ours, _peer(session, model, context) as peer:
        prompt = _prompt(race.n_prompt, ours.n_vocab, session.seed)

        def our_figure() -> float:
            result = _continue(ours, prompt, race.n_tokens)
            return race.figure(result.prompt_seconds, result.decode_seconds)

        def is_right() -> bool:
            """Half a pool, where pages come and go, must give the same tokens."""
            with _open(session, model, 0.5, context) as half:
                expected = _continue(half, prompt, _CHECKED_TOKENS).tokens
            return _continue(ours, prompt, _CHECKED_TOKENS).tokens == expected

        capacity, our_cost = Best(partial(race.capacity, ours)), race.our_cost(ours)
        variants = [
            Variant(OURS, our_figure, is_right, lambda: capacity() / our_cost, race.limit_by)
        ]
        if peer is not None:

            def peer_figure() -> float:
                answer = peer.run(prompt, race.n_tokens)
                return race.figure(answer["prompt_seconds"], answer["decode_seconds"])

            def has_answered() -> bool:
                return len(peer.run(prompt, race.n_tokens)["tokens"]) == race.n_tokens

            rival = Variant("llama.cpp", peer_figure, has_answered)
            if race.peer_cost is not None:
                peer_cost = race.peer_cost(ours)
                rival = replace(rival, limit=lambda: capacity() / peer_cost, limit_by=race.limit_by)
            variants.append(rival)
        params = {"model": session.name(model), **race.params, "threads": session.threads}
        return measure(
            Case(race.name, "tokens/s", params), variants,
            repeats=session.cases.repeats, seed=session.seed,
        )  # fmt: skip


def _continue(model: LlamaModel, prompt: list[int], n_tokens: int) -> Generation:
    model.position = 0
    return generate(model, prompt, n_tokens, Sampler(temperature=0))


def _memory(model: LlamaModel) -> float:
    bandwidth = memory_bandwidth(model.target, model.atlas.cache)
    assert bandwidth is not None  # only a GPU's is unknown
    return bandwidth


def _paged_bytes(model: LlamaModel) -> int:
    """What a token reads of pages."""
    return weight_bytes_per_pass(model.atlas.map, len(model.atlas.shards.schedule))


def _matrix_bytes(model: LlamaModel) -> int:
    """What a token reads where nothing fills blocks up to pages."""
    return sum(t.slice_bytes * len(t.slices) for t in _matrices(model))


def _matrices(model: LlamaModel) -> list[TensorEntry]:
    """Matrices that every token is multiplied with."""
    tensors = model.atlas.shards.tensors
    looked_up = {EMBEDDING} if OUTPUT in tensors else set()
    return [t for t in tensors.values() if len(t.shape) > 1 and t.name not in looked_up]


class _BudgetChild:
    """`gguf-shard run` within the budget in a process of its own, under one policy."""

    def __init__(self, session: Session, policy: str) -> None:
        cases = session.cases
        map_path = session.sharded(session.first_model())
        ids = ",".join(map(str, _prompt(8, 500, session.seed)))
        self.command = [
            sys.executable, "-c", _LAUNCHER, sys.executable, "-m", "atlas.cli", "run",
            str(map_path), "--prompt-ids", ids, "-n", str(cases.budget_tokens), "--temp", "0",
            "--ignore-eos", "--budget", cases.budget, "--policy", policy, "--json",
            "--target", "cpu", "--threads", str(session.threads),
        ]  # fmt: skip
        self.policy = policy
        self.facts: dict[str, Any] = {}
        self.peak_rss = 0

    def run(self) -> float:
        """Run it once; tokens a second. What it took is in `facts` and `peak_rss` then."""
        done = subprocess.run(self.command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise GGUFShardError(f"budget run: {done.stderr.strip()}")
        facts, peak_rss = done.stdout.splitlines()
        self.facts, self.peak_rss = json.loads(facts), int(peak_rss)
        return float(self.facts["tokens_per_second"])

    def limit(self) -> float:
        """What the last run says of the most tokens a second."""
        return float(self.facts["limit_tokens_per_second"])

    def tokens(self) -> list[int]:
        """The tokens of one run."""
        self.run()
        tokens: list[int] = self.facts["tokens"]
        return tokens


def budget(session: Session) -> list[dict[str, Any]]:
    """Runs within a budget: speed, memory, traffic and hits under `lru` and `pin`."""
    allowed = parse_size(session.cases.budget).n_bytes
    assert allowed is not None
    model = session.first_model()
    children = [_BudgetChild(session, policy) for policy in ("lru", "pin")]
    tokens = [child.tokens() for child in children]
    variants = []
    for child in children:
        ok = tokens[0] == tokens[1] and child.facts["device_bytes_peak"] <= allowed
        variants.append(
            Variant(child.policy, child.run, partial(bool, ok), child.limit, "memory, link")
        )
    params = {"model": session.name(model), "budget": session.cases.budget}
    repeats = min(_BUDGET_REPEATS, session.cases.repeats)
    rows = measure(
        Case("budget", "tokens/s", params), variants, repeats=repeats, warmup=0, seed=session.seed
    )
    scanned = _scanned_bytes(session.sharded(model))
    for child in children:
        for case, value, limit, limit_by in _counted(child, allowed, scanned, params):
            variant = Variant(child.policy, partial(float, value), _holds, limit, limit_by)
            rows.append(record(case, variant, seed=session.seed))
    return rows


def _holds() -> bool:
    """A count needs no check beside that of the run it comes from."""
    return True


def _scanned_bytes(map_path: Path) -> int:
    """Bytes of pages that every token reads."""
    with ShardedModel(map_path) as model:
        config = LlamaConfig.from_metadata(model.source_header().metadata)
        shards = ModelShards(model.map, execution_order(model.map, config))
        return weight_bytes_per_pass(model.map, len(shards.schedule))


def _counted(
    child: _BudgetChild, allowed: int, scanned: int, params: dict[str, Any]
) -> Iterator[tuple[Case, float, float | None, str]]:
    """What the last run of a child took and moved, each beside what it should be."""
    facts = child.facts
    hits = facts["reuse_hits"]
    accesses = hits + facts["prefetch_hits"] + facts["demand_misses"]
    expected = facts["expected_reuse_ratio"]
    peak, budget_mb = facts["device_bytes_peak"] / 1e6, allowed / 1e6
    yield Case("budget-device", "MB", params, "lower"), peak, budget_mb, "budget"
    overhead = child.peak_rss / 1e6 - budget_mb
    yield Case("budget-rss-overhead", "MB", params, "lower"), overhead, None, ""
    moved, least = facts["bytes_per_token"] / 1e6, scanned * (1 - expected) / 1e6
    yield Case("budget-traffic", "MB/token", params, "lower"), moved, least, "closed form"
    share = 100 * hits / accesses
    yield Case("budget-reuse", "% of accesses", params), share, 100 * expected, "closed form"
