"""`gguf-shard run --target cuda`: the CPU target's tokens, and none behind a page that is bad.

Runs on a GPU or in the simulator.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from atlas.cli import main
from atlas.device_cache import DeviceCache
from atlas.infer.generate import generate
from atlas.infer.model import LlamaModel
from atlas.infer.sampling import Sampler
from atlas.infer.weights import execution_order
from atlas.target import CudaTarget
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES
from forge.sizes import Size
from tests import cache_factory as cache
from tests.llama_factory import LlamaShape, Types, opened, shard_llama, smallest_budget

pytestmark = pytest.mark.cuda

TINY = LlamaShape(n_layer=1, n_embd=32, n_ff=32, n_head=2, n_head_kv=1, n_vocab=40, seed=2)
EXPERTS = LlamaShape(**{**vars(TINY), "n_expert": 3, "n_expert_used": 2, "ggml_type": Types.Q8_0})
N_TOKENS = 3
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def map_path(tmp_path: Path) -> Path:
    """A model of its own for every test, which may break it; a page a shard."""
    return shard_llama(tmp_path, TINY)[1]


def run(map_path: Path, *further: str, target: str = "cuda") -> int:
    return main(
        ["run", str(map_path), "--prompt-ids", "1,7", "-n", str(N_TOKENS), "--temp", "0",
         "--policy", "lru", "--target", target, *further]
    )  # fmt: skip


def right_tokens(map_path: Path, capsys: Capture) -> list[str]:
    assert run(map_path, "-q", target="cpu") == 0
    tokens = capsys.readouterr().out.split()
    assert len(tokens) == N_TOKENS
    return tokens


def before_pass(patch: pytest.MonkeyPatch, number: int, act: Callable[[LlamaModel], None]) -> None:
    """Do something between two tokens."""
    go_on = LlamaModel._pass

    def pass_(model: LlamaModel, *arguments: object) -> None:
        if model.n_passes == number:
            act(model)
        go_on(model, *arguments)  # type: ignore[arg-type]

    patch.setattr(LlamaModel, "_pass", pass_)


def absent_shard(model: LlamaModel) -> int:
    """One that the next pass brings in."""
    table = model.target.get(model.atlas.cache.table)
    return next(s for s in model.atlas.shards.schedule if table[s] < 0)


def host_page(model: LlamaModel, page: int) -> np.ndarray:
    assert isinstance(model.atlas.shard_cache, DeviceCache)
    found = model.atlas.shard_cache.host.page(page)
    assert found is not None
    return found


class Damage:
    """Damages a page once, and remembers which."""

    def __init__(self, map_path: Path, kind: str) -> None:
        self.map_path = map_path
        self.kind = kind
        self.page = -1
        self.tensor: str | None = None

    def __call__(self, model: LlamaModel) -> None:
        self.page = absent_shard(model)
        self.tensor = model.atlas.map.tensor_of_page(self.page)
        if self.kind == "flipped in the file":
            cache.flip_bit(self.map_path, self.page)
        elif self.kind == "flipped":
            host_page(model, self.page)[4000] ^= 64
        elif self.kind == "another":
            host_page(model, self.page)[:] = host_page(model, model.atlas.shards.schedule[-1])
        else:
            edition = LlamaShape(**{**vars(TINY), "seed": 3})
            other = shard_llama(self.map_path.parent / "other", edition)[1]
            stale = np.frombuffer(cache.read_page(other, self.page), np.uint8)
            host_page(model, self.page)[:] = stale


@pytest.mark.parametrize(
    ("kind", "n_right"), [("flipped", 2), ("another", 1), ("stale", 1), ("flipped in the file", 2)]
)
def test_no_token_is_printed_behind_a_damaged_page(
    map_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, kind: str, n_right: int
) -> None:
    right, damage = right_tokens(map_path, capsys), Damage(map_path, kind)
    before_pass(monkeypatch, n_right, damage)
    memory = ["--host-memory", str(6 * PAGE_BYTES)] if kind == "flipped in the file" else []
    assert run(map_path, "--budget", "50%", *memory) == 1
    out, err = capsys.readouterr()
    assert out.split() == right[:n_right]
    assert len(err.splitlines()) == 1
    assert f"page {damage.page} (shard {damage.page}, {damage.tensor}): " in err


def test_scrubbing_finds_what_changes_on_the_device(
    map_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a full pool nothing is checked again but by scrubbing."""
    right = right_tokens(map_path, capsys)
    flipped: list[int] = []

    def flip(model: LlamaModel) -> None:
        flipped.append(model.atlas.shards.schedule[3])
        place = int(model.target.get(model.atlas.cache.table)[flipped[0]]) * PAGE_BYTES + 8
        byte = model.atlas.cache.frames[place : place + 1]
        model.target.write(byte, model.target.get(byte) ^ np.uint8(1))

    before_pass(monkeypatch, 1, flip)
    assert run(map_path, "--scrub", "100") == 1
    out, err = capsys.readouterr()
    assert out.split() == right[:1]
    assert len(err.splitlines()) == 1 and f"page {flipped[0]} " in err


def test_an_interrupt_ends_it_cleanly(
    map_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, targets = right_tokens(map_path, capsys), []

    def interrupt(model: LlamaModel) -> None:
        targets.append(model.target)
        raise KeyboardInterrupt

    before_pass(monkeypatch, 2, interrupt)
    assert run(map_path, "--budget", "50%") == 1
    out, err = capsys.readouterr()
    assert (out.split(), err) == (right[:2], "interrupted\n")
    assert not targets[0].guards


def test_json_says_the_same_things_as_for_the_cpu(map_path: Path, capsys: Capture) -> None:
    facts = []
    for target in ("cpu", "cuda"):
        assert run(map_path, "--budget", "50%", "--json", target=target) == 0
        facts.append(json.loads(capsys.readouterr().out))
    on_cpu, on_device = facts
    assert on_device.keys() == on_cpu.keys()
    for name in ("prompt_tokens", "tokens", "text", "policy", "bytes_per_token"):
        assert on_device[name] == on_cpu[name], name
    assert on_device["target"] == CudaTarget.name
    assert on_device["device_bytes_peak"] <= on_device["budget_bytes"]
    counts = ("reuse_hits", "prefetch_hits", "demand_misses")
    n_ahead = sum(on_device[name] - on_cpu[name] for name in counts)
    assert 0 <= n_ahead <= 2  # of a next pass: a device counts them when it asks for them


@pytest.mark.parametrize("policy", ["lru", "pin"])
@pytest.mark.parametrize("budget", ["100%", "60%"])
def test_fit_foretells_the_plan(map_path: Path, capsys: Capture, budget: str, policy: str) -> None:
    arguments = ["fit", str(map_path), "--budget", budget, "--policy", policy, "-c", "8", "--json"]
    assert main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    with opened(map_path, budget, CudaTarget(), n_context=8, policy=policy) as model:
        atlas = model.atlas
        assert facts["target"] == "cuda"
        assert (facts["frames"], facts["budget_bytes"]) == (atlas.plan.n_frames, atlas.budget_bytes)
        names = execution_order(atlas.map, model.config)
        bands = [band for name in names for band in atlas.bands(atlas.matrix(name))]
        for band in bands:
            atlas.acquire(band)
        before = atlas.stats.copy()
        for band in 2 * bands:
            atlas.acquire(band)
        spent = atlas.stats.since(before)
    assert facts["expected_reuse_ratio"] == pytest.approx(spent.reuse_hits / spent.accesses)
    assert facts["bytes_per_token"] == pytest.approx(spent.bytes_moved / 2)


# The model itself


@pytest.mark.parametrize("shape", [TINY, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(("policy", "extra"), [("lru", 0), ("pin", 5000), ("mru", 9000)])
def test_smallest_budgets(tmp_path: Path, shape: LlamaShape, policy: str, extra: int) -> None:
    _, map_path = shard_llama(tmp_path, shape)
    options = {"n_context": 8, "n_batch": 2, "policy": policy}
    with opened(map_path, **options) as model:
        expected = generate(model, [1, 2], 2, Sampler(temperature=0)).tokens
    target = CudaTarget()
    budget = smallest_budget(map_path, target=target, **options) + extra
    with opened(map_path, Size(n_bytes=budget), target, scrub_pages=3, **options) as model:
        found = generate(model, [1, 2], 2, Sampler(temperature=0)).tokens
        assert found == expected
        cache.assert_at_rest(model.atlas)
        assert target.peak_bytes <= model.atlas.budget_bytes == budget


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_going_back_and_on(map_path: Path, budget: float) -> None:
    """Through a graph where everything is resident, and with kernels one by one."""
    with opened(map_path, n_context=5) as model:
        expected = np.array(model.forward([1, 2, 3]))
    with opened(map_path, Size(fraction=budget), CudaTarget(), n_context=5) as model:
        for token in (1, 9, 9, 9):
            model.forward([token])
        is_replayed = model.decode_graph is not None and model.decode_graph.reason == ""
        assert is_replayed == (budget == 1.0)
        model.position = 1
        for token in (2, 3):
            logits = model.target.get(model.forward([token]))
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
        model.forward([4, 5])
        with pytest.raises(GGUFShardError, match="context of 5 is full"):
            model.forward([6])


def test_it_goes_on_rightly_behind_faults(map_path: Path) -> None:
    with opened(map_path, n_context=8) as model:
        expected = np.array(model.forward([1, 2, 3]))
    with opened(map_path, Size(fraction=0.5), CudaTarget(), n_context=8, policy="lru") as model:
        model.forward([1, 2])
        for _ in range(2):
            page = host_page(model, absent_shard(model))
            page[17] ^= 4
            with pytest.raises(GGUFShardError, match="page "):
                model.target.get(model.forward([3]))
            page[17] ^= 4
            model.position = 2
        found = model.target.get(model.forward([3]))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        cache.assert_at_rest(model.atlas)
