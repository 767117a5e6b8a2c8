"""GPU cases about whole models: tokens a second, resident and within a budget.

    gpu-decode      one token at a time, with everything resident
    gpu-streamed    the same within a budget; taking turns with it, the other way to bring shards,
                    and where the weights are F16 PyTorch's offload loop
                    (`experiments.torch_offload`)
    gpu-prefill     a prompt, with everything resident
    gpu-traffic, gpu-reuse, gpu-demand, gpu-launches
                    what a token of a decoding moved, found, waited for, and launched

Models are of real shapes with random weights (`experiments.synthetic_model`); every page is checked
on its way to the device. A decoding is right if its tokens are those of the resident model, those
of the resident model if they come twice (first launched kernel by kernel, then as a graph), a
prompt if the logits behind it are those that its tokens give one by one, and PyTorch if its logits
are near ours. The limit is `max(W / B_mem, (W - R) / B_link)` for a token with weights W, of which
R stay, and bandwidths measured beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from atlas.device_cache import DeviceCache
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.limits import decode_limit, weight_bytes_per_pass
from atlas.model_shards import EMBEDDING, OUTPUT
from atlas.stats import CacheStats
from experiments.bench import Case, Variant
from experiments.cases import OURS
from experiments.gpu_bench import GpuBench, close_to
from experiments.machine_limits import Best
from experiments.make_model import Preset
from experiments.synthetic_model import SyntheticModel
from experiments.torch_offload import NAME as PYTORCH
from experiments.torch_offload import TorchOffload
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.sizes import Size, parse_size

_FIRST_TOKEN = 259  # behind special and byte tokens
#: What 16-bit activations or operands may cost the worst logit, in root mean squares of all: ten
#: times what they cost PyTorch on a processor over 22 layers. Wrong logits are off by several.
_TOLERANCE = 0.03
_RESIDENT = Size(fraction=1.0)


@dataclass(frozen=True)
class ModelCase:
    """A model, and the budgets to run it within, beside all of it resident.

    Attributes
    ----------
    preset
        A name in `experiments.make_model.PRESETS`, or a shape of its own.
    """

    preset: str | Preset
    type_name: str
    budgets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        shape = self.preset if isinstance(self.preset, str) else "tiny"
        return f"{shape} {self.type_name}"


@dataclass(frozen=True)
class InferenceCases:
    """Parameters.

    Attributes
    ----------
    models
        By size.
    start_tokens
        Prompt of a decoding.
    resident_tokens, budget_tokens
        Tokens of one measured decoding.
    prompt_tokens
        Of the prompt that is measured.
    repeats
        Measurements of each variant, after one to warm up.
    pages_per_shard
        None to choose by size.
    """

    models: dict[str, tuple[ModelCase, ...]]
    start_tokens: int
    resident_tokens: int
    budget_tokens: int
    prompt_tokens: int
    repeats: int
    pages_per_shard: int | None = None


CASES = InferenceCases(
    models={
        "1b": tuple(ModelCase("1b", type_name) for type_name in ("F16", "Q8_0", "Q4_0")),
        "7b": (ModelCase("7b", "F16", ("2.8GB",)),),
        "13b": (ModelCase("13b", "F16", ("4.1GB",)),),
    },
    start_tokens=8,
    resident_tokens=32,
    budget_tokens=6,
    prompt_tokens=512,
    repeats=4,
)

_TINY = Preset(32, 1, 32, 2, 1, 260, 64)
REHEARSAL = InferenceCases(
    models={
        "1b": (ModelCase(_TINY, "Q4_0"),),
        "7b": (ModelCase(_TINY, "F16", ("60%",)),),
        "13b": (ModelCase(_TINY, "Q8_0"),),
    },
    start_tokens=2,
    resident_tokens=1,
    budget_tokens=1,
    prompt_tokens=2,
    repeats=1,
    pages_per_shard=1,
)


@dataclass
class Decoding:
    """A model behind a prompt, ready to continue it again and again from there.

    Attributes
    ----------
    start
        The prompt.
    prompt_logits
        float32 [n_vocab] behind it.
    seconds, stats, n_launches
        Of the last continuation.
    """

    model: LlamaModel
    start: Sequence[int]
    prompt_logits: np.ndarray = field(init=False)
    seconds: float = math.nan
    stats: CacheStats = field(default_factory=CacheStats)
    n_launches: int = 0

    def __post_init__(self) -> None:
        self._sampler = Sampler(temperature=0)
        logits = self.model.forward(self.start)
        self.prompt_logits = self.model.target.get(logits)
        self._first = self._sampler.choose(self.model.target, logits)

    def tokens(self, n: int) -> list[int]:
        """The next `n` tokens, greedily; every page that came is one that was checked.

        Raises
        ------
        CorruptPageError
            If a page failed its check.
        GGUFShardError
            If pages came unchecked.
        """
        model, before = self.model, self.model.atlas.stats.copy()
        launched = getattr(model.target, "n_launches", 0)
        model.position = len(self.start)
        found = [self._first]
        started = time.perf_counter()
        for _ in range(n):
            found.append(self._sampler.choose(model.target, model.forward([found[-1]])))
        self.seconds = time.perf_counter() - started
        self.n_launches = getattr(model.target, "n_launches", 0) - launched
        self.stats = model.atlas.stats.since(before)
        if self.stats.pages_checked * PAGE_BYTES < self.stats.bytes_moved:
            raise GGUFShardError(f"{self.stats.bytes_moved} bytes moved, not all of them checked")
        return found[1:]

    def speed(self, n: int) -> float:
        """Tokens a second, of the next `n`."""
        self.tokens(n)
        return n / self.seconds


class _Session:
    """One section: the parameters, the bench with fewer repeats, and the bandwidths."""

    def __init__(self, bench: GpuBench) -> None:
        self.cases = REHEARSAL if bench.is_rehearsal else CASES
        few = replace(bench.cases, repeats=self.cases.repeats)
        self.bench = replace(bench, cases=few)  # notes what is right in the same lists
        self.target, self.torch = bench.target, bench.torch
        self._memory, self._link = Best(bench.capacity.read), Best(bench.capacity.link)

    def limit(self, weight_bytes: float, moved_bytes: float) -> float:
        """Most tokens a second."""
        memory, link = 1e9 * self._memory(), 1e9 * self._link()
        return decode_limit(weight_bytes, moved_bytes, memory or None, link or None)

    @contextmanager
    def open(self, case: ModelCase, budget: Size, n_batch: int) -> Iterator[LlamaModel]:
        """The model within a budget."""
        cases = self.cases
        n_decoded = cases.start_tokens + max(cases.resident_tokens, cases.budget_tokens) + 1
        with LlamaModel(
            self.synthetic(case), self.target, budget,
            n_context=max(n_decoded, cases.prompt_tokens), n_batch=n_batch, policy="pin",
        ) as model:  # fmt: skip
            yield model

    def synthetic(self, case: ModelCase) -> SyntheticModel:
        """The model's pages."""
        return SyntheticModel(
            case.preset, case.type_name, seed=self.bench.seed,
            pages_per_shard=self.cases.pages_per_shard,
        )  # fmt: skip

    def prompt(self, n_tokens: int, n_vocab: int) -> list[int]:
        """Token ids behind BOS."""
        rng = np.random.default_rng(self.bench.seed)
        return [1, *rng.integers(_FIRST_TOKEN, n_vocab, n_tokens - 1).tolist()]


def inference(bench: GpuBench, size: str) -> list[dict[str, Any]]:
    """All cases about the models of a size: a key of `InferenceCases.models`."""
    session = _Session(bench)
    rows = []
    for case in session.cases.models[size]:
        resident, expected = _resident_rows(session, case)
        rows += resident
        for budget in case.budgets:
            rows += _budget_rows(session, case, budget, expected)
    return rows


def _resident_rows(session: _Session, case: ModelCase) -> tuple[list[dict[str, Any]], list[int]]:
    """Decoding and prompt with everything resident; the tokens that runs within a budget must
    give."""
    n = session.cases.resident_tokens
    with session.open(case, _RESIDENT, session.cases.prompt_tokens) as model:
        start = session.prompt(session.cases.start_tokens, model.n_vocab)
        decoding = Decoding(model, start)
        expected = decoding.tokens(max(n, session.cases.budget_tokens))
        params = {"model": case.name, "budget": "resident"}
        variants = [_decode_variant(session, decoding, n, expected)]
        rows = session.bench.measure(Case("gpu-decode", "tokens/s", params), variants)
        launches = Variant(OURS, lambda: decoding.n_launches / n, lambda: decoding.n_launches > 0)
        rows += session.bench.measure(
            Case("gpu-launches", "kernels/token", params, "lower"), [launches]
        )
        rows += _prefill_rows(session, case, model)
    return rows, expected


def _budget_rows(
    session: _Session, case: ModelCase, budget: str, expected: list[int]
) -> list[dict[str, Any]]:
    """Decoding within a budget, beside the other way to bring shards, and PyTorch within the
    same."""
    n = session.cases.budget_tokens
    params = {"model": case.name, "budget": budget}
    with session.open(case, parse_size(budget), session.cases.start_tokens) as model:
        start = session.prompt(session.cases.start_tokens, model.n_vocab)
        decoding = Decoding(model, start)
        variants = [_decode_variant(session, decoding, n, expected)]
        with _peer(session, case, model.atlas.budget_bytes, model.kv_cache.n_context) as peer:
            if peer is not None:
                variants.append(_peer_variant(session, peer, decoding, n))
            variants.append(_other_way_variant(decoding, n, expected))
            rows = session.bench.measure(Case("gpu-streamed", "tokens/s", params), variants)
        decoding.tokens(n)  # the last continuation has gone the other way
        for counted, variant in _counted(session, decoding, n, params):
            rows += session.bench.measure(counted, [variant])
    return rows


def _decode_variant(session: _Session, decoding: Decoding, n: int, expected: list[int]) -> Variant:
    def is_right() -> bool:
        return decoding.tokens(n) == expected[:n]

    weights, moved = _weight_bytes(decoding.model), _least_moved(decoding.model)
    return Variant(
        OURS, lambda: decoding.speed(n), is_right, lambda: session.limit(weights, moved),
        "memory, link",
    )  # fmt: skip


def _other_way_variant(decoding: Decoding, n: int, expected: list[int]) -> Variant:
    """The same, but shards come the way they would not: read by the kernel that checks them instead
    of copied for it, or the other way round."""
    cache = decoding.model.atlas.shard_cache
    assert isinstance(cache, DeviceCache)
    queue, target = cache.queue, decoding.model.target
    are_copied = queue.are_copied

    @contextmanager
    def other_way() -> Iterator[None]:
        target.synchronize()
        queue.copy_shards(not are_copied)
        try:
            yield
        finally:
            target.synchronize()
            queue.copy_shards(are_copied)

    def measured() -> float:
        with other_way():
            return decoding.speed(n)

    def is_right() -> bool:
        with other_way():
            return decoding.tokens(n) == expected[:n]

    return Variant(f"{OURS}, {'read by a kernel' if are_copied else 'copied'}", measured, is_right)


def _weight_bytes(model: LlamaModel) -> int:
    """What a token reads of pages."""
    return weight_bytes_per_pass(model.atlas.map, len(model.atlas.shards.schedule))


def _least_moved(model: LlamaModel) -> float:
    """What a token must move: what the plan does not keep."""
    reuse = model.atlas.expected_reuse_ratio
    return _weight_bytes(model) * (1 - (reuse or 0.0))


def _counted(
    session: _Session, decoding: Decoding, n: int, params: dict[str, Any]
) -> Iterator[tuple[Case, Variant]]:
    """What the tokens of the last continuation moved and found, as rows of their own."""
    stats, least = decoding.stats, _least_moved(decoding.model)
    reuse = decoding.model.atlas.expected_reuse_ratio
    shares = "% of accesses"
    for case, figure, limit in (
        (Case("gpu-traffic", "GB/token", params, "lower"),
         stats.bytes_moved / n / 1e9, least / 1e9),
        (Case("gpu-reuse", shares, params), 100 * stats.reuse_hits / stats.accesses,
         None if reuse is None else 100 * reuse),
        (Case("gpu-demand", shares, params, "lower"),
         100 * stats.demand_misses / stats.accesses, None),
        (Case("gpu-launches", "kernels/token", params, "lower"), decoding.n_launches / n, None),
    ):  # fmt: skip
        by = "" if limit is None else "closed form"
        yield case, Variant(OURS, partial(float, figure), lambda: stats.accesses > 0, limit, by)


def _prefill_rows(session: _Session, case: ModelCase, model: LlamaModel) -> list[dict[str, Any]]:
    """A prompt in one batch. How fast PyTorch is with large square matrices is the limit."""
    n = session.cases.prompt_tokens
    prompt = session.prompt(n, model.n_vocab)

    def run() -> np.ndarray:
        model.position = 0
        return model.target.get(model.forward(prompt))

    def measured() -> float:
        started = time.perf_counter()
        run()
        return n / (time.perf_counter() - started)

    def is_right() -> bool:
        at_once = run()
        model.position = 0
        for token in prompt:
            logits = model.forward([token])
        return close_to(at_once, model.target.get(logits), _TOLERANCE)

    limit = None if session.torch is None else _prefill_limit(session, model, n)
    return session.bench.measure(
        Case("gpu-prefill", "tokens/s", {"model": case.name, "tokens": n}),
        [Variant(OURS, measured, is_right, limit, "large dense product" if limit else "")],
    )


def _prefill_limit(session: _Session, model: LlamaModel, n: int) -> Callable[[], float]:
    torch, dense = session.torch, session.bench.cases.dense
    assert torch is not None
    # The output matrix is multiplied with the last token only.
    operations = 2 * sum(
        math.prod(t.shape) / (n if t.name == OUTPUT else 1)
        for t in model.atlas.shards.tensors.values()
        if len(t.shape) > 1 and t.name != EMBEDDING
    )
    return Best(lambda: torch.dense_flops(dense) / operations)


@contextmanager
def _peer(
    session: _Session, case: ModelCase, budget_bytes: int, n_context: int
) -> Iterator[TorchOffload | None]:
    """PyTorch with the same weights within the same budget; None where it cannot take part."""
    if session.torch is None or case.type_name != "F16":
        yield None
        return
    import torch  # which is there, since the session has found it

    device = "cpu" if session.bench.is_rehearsal else "cuda"
    peer = TorchOffload(
        torch, device, case.preset, session.synthetic(case), n_context=n_context,
        budget_bytes=budget_bytes,
    )  # fmt: skip
    try:
        yield peer
    finally:
        peer.close()


def _peer_variant(session: _Session, peer: TorchOffload, decoding: Decoding, n: int) -> Variant:
    start = decoding.start

    def is_right() -> bool:
        peer.position = 0
        for token in start:
            logits = peer.forward(token)
        return close_to(logits.cpu().numpy(), decoding.prompt_logits, _TOLERANCE)

    def measured() -> float:
        peer.position = len(start)
        token = int(decoding.prompt_logits.argmax())
        started = time.perf_counter()
        for _ in range(n):
            token = int(peer.forward(token).argmax())
        peer.synchronize()  # the first copies had been made before, and those of the next have not
        return n / (time.perf_counter() - started)

    return Variant(
        PYTORCH, measured, is_right,
        lambda: session.limit(peer.weight_bytes, peer.moved_bytes), "memory, link",
    )  # fmt: skip
