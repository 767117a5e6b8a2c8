"""`gguf-shard run`: what it prints, how it ends, what it costs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import config

from atlas import run_command
from atlas.cli import main
from atlas.ops.paged import PageCache
from atlas.target import Target
from experiments.make_model import PRESETS, write_model
from forge.core_file import page_offset
from forge.sgmap import core_path
from forge.sgmap_reader import load_map
from forge.shard import shard_model
from tests.llama_factory import LlamaShape, Types, shard_llama
from tests.naive_llama import NaiveLlama

pytestmark = pytest.mark.skipif(bool(config.DISABLE_JIT), reason="takes minutes without a compiler")

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "experiments" / "demo" / "demo-2M-f16.gguf"
IDS = "1,5,9,70,3"
PROMPT = [1, 5, 9, 70, 3]
SHAPE = LlamaShape(n_vocab=300, tokenizer=True)

DESIGNED_KEYS = {
    "prompt_tokens", "tokens", "text", "tokens_per_second", "prompt_tokens_per_second",
    "time_to_first_token_s", "target", "policy", "budget_bytes", "device_bytes_peak", "reuse_hits",
    "prefetch_hits", "demand_misses", "bytes_per_token", "link_gb_per_s",
    "limit_tokens_per_second", "fraction_of_limit", "pages_checked",
}  # fmt: skip
FURTHER_KEYS = {
    "bytes_filled", "link_bandwidth_gb_per_s", "memory_bandwidth_gb_per_s", "expected_reuse_ratio",
    "frames", "is_replayed",
}  # fmt: skip


def run(*arguments: str | Path) -> int:
    """The command in this process, on the CPU."""
    return main(["run", *map(str, arguments), "--target", "cpu"])


def command(*arguments: str | Path) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "atlas.cli", "run", *map(str, arguments), "--target", "cpu"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def spawn(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=120
    )


def one_line(text: str) -> str:
    assert text.endswith("\n") and text.count("\n") == 1, text
    assert "Traceback" not in text
    return text[:-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[NaiveLlama, Path]:
    """A random model with a tokenizer of bytes and words."""
    path, map_path = shard_llama(tmp_path_factory.mktemp("tiny"), SHAPE)
    return NaiveLlama(path), map_path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model, whose text reads as sentences."""
    return shard_model(DEMO, tmp_path_factory.mktemp("demo"))


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """The map of a tiny model with something changed."""

    def make(**changes: Any) -> Path:
        return shard_llama(tmp_path / "variant", replace(SHAPE, **changes))[1]

    return make


Capture = pytest.CaptureFixture[str]


def facts(capsys: Capture, *arguments: str | Path) -> dict[str, Any]:
    """The object that `--json` prints, alone on stdout."""
    assert run(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(one_line(out), parse_constant=pytest.fail)
    return found


# ---- what it prints ----


def test_json(tiny: tuple[NaiveLlama, Path], capsys: Capture) -> None:
    naive, map_path = tiny
    found = facts(
        capsys, map_path, "--prompt-ids", IDS, "-n", "6", "--temp", "0", "--budget", "60%",
        "--policy", "pin", "--ignore-eos",
    )  # fmt: skip
    assert found.keys() == DESIGNED_KEYS | FURTHER_KEYS
    assert found["prompt_tokens"] == PROMPT
    assert found["tokens"] == naive.greedy(PROMPT, 6)
    assert (found["target"], found["policy"]) == ("cpu", "pin")
    assert found["is_replayed"] is None
    assert found["device_bytes_peak"] <= found["budget_bytes"]
    accesses = found["reuse_hits"] + found["prefetch_hits"] + found["demand_misses"]
    assert 0 < found["reuse_hits"] < accesses
    assert found["pages_checked"] * 4096 >= found["bytes_filled"] > 0
    for key in (
        "tokens_per_second", "prompt_tokens_per_second", "time_to_first_token_s", "bytes_per_token",
        "link_gb_per_s", "limit_tokens_per_second", "fraction_of_limit", "link_bandwidth_gb_per_s",
        "memory_bandwidth_gb_per_s", "frames",
    ):  # fmt: skip
        assert found[key] > 0, key
    assert 0 < found["expected_reuse_ratio"] < 1
    assert found["fraction_of_limit"] == pytest.approx(
        found["tokens_per_second"] / found["limit_tokens_per_second"]
    )


def test_the_peak_is_that_of_the_run_and_not_of_measuring_its_limit(
    tiny: tuple[NaiveLlama, Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(target: Target, cache: PageCache) -> float:
        target.empty(100_000_000, np.uint8)
        return 1e9

    monkeypatch.setattr(run_command, "memory_bandwidth", measure)
    found = facts(capsys, tiny[1], "--prompt-ids", IDS, "-n", "2", "--budget", "60%")
    assert found["memory_bandwidth_gb_per_s"] == 1
    assert found["device_bytes_peak"] <= found["budget_bytes"] < 100_000_000


def test_text_on_stdout_and_a_summary_on_stderr(demo: Path, capsys: Capture) -> None:
    arguments = (demo, "-p", "Once upon a time", "-n", "12", "--temp", "0", "--budget", "70%")
    found = facts(capsys, *arguments)
    assert len(found["tokens"]) == 12 and found["text"].strip().isprintable()
    assert run(*arguments) == 0
    out, err = capsys.readouterr()
    assert out == found["text"] + "\n"
    for pattern in (
        r"[\d.]+ tokens/s \(12 tokens\), prompt [\d.]+ tokens/s, first token after [\d.]+ s",
        r"target cpu, policy \w+, budget [\d.]+ MB, peak [\d.]+ MB",
        r"% reuse hits, [\d.]+ % prefetch hits, [\d.]+ % demand misses \(once warm [\d.]+ % reuse",
        r"moved per token, \d+ pages checked",
        r"link [\d.]+ of [\d.]+ GB/s, memory [\d.]+ GB/s: limit [\d.]+ tokens/s, reached \d+ %",
    ):
        assert re.search(pattern, err), pattern
    assert run(*arguments, "-q") == 0
    assert capsys.readouterr() == (found["text"] + "\n", "")


def test_no_limit_is_known_where_memory_is_not_measured(
    tiny: tuple[NaiveLlama, Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything resident: nothing crosses the link, so only memory could bound the speed."""
    monkeypatch.setattr(run_command, "memory_bandwidth", lambda *_: None)
    arguments = (tiny[1], "--prompt-ids", IDS, "-n", "3", "--temp", "0", "--ignore-eos")
    found = facts(capsys, *arguments)
    assert found["memory_bandwidth_gb_per_s"] is None
    assert (found["limit_tokens_per_second"], found["fraction_of_limit"]) == (None, None)
    assert run(*arguments) == 0
    assert "memory not measured: limit unknown" in capsys.readouterr().err


def test_one_token_needs_no_decode_pass(tiny: tuple[NaiveLlama, Path], capsys: Capture) -> None:
    found = facts(capsys, tiny[1], "--prompt-ids", IDS, "-n", "1", "--temp", "0")
    assert found["tokens"] == tiny[0].greedy(PROMPT, 1)
    assert found["tokens_per_second"] == 0.0


def test_the_same_tokens_at_every_budget_and_policy(demo: Path, capsys: Capture) -> None:
    def tokens(*more: str) -> list[int]:
        found = facts(capsys, demo, "-p", "A fox", "-n", "8", "--temp", "0", *more)
        result: list[int] = found["tokens"]
        return result

    want = tokens()
    for budget in ("60%", "30%", "3MB"):
        for policy in ("lru", "pin"):
            assert tokens("--budget", budget, "--policy", policy) == want
    assert tokens("--batch", "1", "--prefetch-distance", "0", "--budget", "50%") == want


def test_logits_out(tiny: tuple[NaiveLlama, Path], tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "logits.npy"
    assert run(tiny[1], "--prompt-ids", IDS, "-n", "2", "-q", "--logits-out", path) == 0
    logits = np.load(path)
    assert (logits.shape, logits.dtype) == ((300,), np.float32)
    np.testing.assert_allclose(logits, tiny[0].logits(PROMPT)[-1], atol=1e-5)
    missing = tmp_path / "none" / "logits.npy"
    assert run(tiny[1], "--prompt-ids", IDS, "-n", "1", "-q", "--logits-out", missing) == 1
    assert one_line(capsys.readouterr().err).endswith("logits.npy: cannot be written")


def test_the_seed_decides(tiny: tuple[NaiveLlama, Path], capsys: Capture) -> None:
    def tokens(seed: str) -> list[int]:
        found = facts(
            capsys, tiny[1], "--prompt-ids", IDS, "-n", "12", "--temp", "1.5", "--top-k", "0",
            "--top-p", "1", "--seed", seed, "--ignore-eos",
        )  # fmt: skip
        result: list[int] = found["tokens"]
        return result

    assert tokens("3") == tokens("3") != tokens("4")


def test_top_k_of_one_is_greedy(tiny: tuple[NaiveLlama, Path], capsys: Capture) -> None:
    found = facts(capsys, tiny[1], "--prompt-ids", IDS, "-n", "5", "--top-k", "1", "--ignore-eos")
    assert found["tokens"] == tiny[0].greedy(PROMPT, 5)


def test_stops_at_the_end_of_text(
    tiny: tuple[NaiveLlama, Path], variant: Callable[..., Path], capsys: Capture
) -> None:
    want = tiny[0].greedy(PROMPT, 6)
    end = want[2]
    map_path = variant(metadata={"tokenizer.ggml.eos_token_id": end})
    arguments = (map_path, "--prompt-ids", IDS, "-n", "6", "--temp", "0")
    assert facts(capsys, *arguments)["tokens"] == want[: want.index(end) + 1]
    assert facts(capsys, *arguments, "--ignore-eos")["tokens"] == want


def test_without_a_tokenizer_only_ids_work(variant: Callable[..., Path], capsys: Capture) -> None:
    map_path = variant(tokenizer=False)
    found = facts(capsys, map_path, "--prompt-ids", IDS, "-n", "3", "--temp", "0")
    assert len(found["tokens"]) == 3 and found["text"] is None
    assert run(map_path, "--prompt-ids", IDS, "-n", "3", "--temp", "0") == 0
    assert capsys.readouterr().out.split() == [str(token) for token in found["tokens"]]
    assert run(map_path, "-p", "text") == 1
    message = "core.sgmap: the model has no tokenizer; give --prompt-ids"
    assert one_line(capsys.readouterr().err).endswith(message)


# ---- how it ends ----


def fails(capsys: Capture, *arguments: str | Path) -> str:
    """The one line of a run that prints nothing and fails."""
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return one_line(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-c", "4"), "context of 4 is full: 0 positions are taken, 5 more wanted"),
        (("--threads", "4096"), "threads: 4096 is not within 1.."),
    ],
)
def test_bad_values(
    tiny: tuple[NaiveLlama, Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        monkeypatch.setenv(variable, os.environ.get(variable, "2"))
    assert message in fails(capsys, tiny[1], "--prompt-ids", IDS, *arguments)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--budget", "abc", "size 'abc': not a number with GB, GiB"),
        ("--budget", "0", "size '0': not a size of memory"),
        ("--budget", "-1", "size '-1': not a number"),
        ("--budget", "200%", "size '200%': not within 0..100 %"),
        ("--budget", "", "size '': not a number"),
        ("--budget", "5XB", "size '5XB': not a number"),
        ("--temp", "-1", "'-1' is not a number within 0.."),
        ("--temp", "nan", "'nan' is not a number within 0.."),
        ("--top-p", "0", "'0' is not a number within 0..1"),
        ("--top-k", "-1", "'-1' is not a whole number of at least 0"),
        ("--seed", "x", "'x' is not a whole number of at least 0"),
    ],
)
def test_values_that_are_none_are_wrong_usage(
    tiny: tuple[NaiveLlama, Path], capsys: Capture, option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tiny[1]), "--prompt-ids", IDS, f"{option}={value}"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_full_context_ends_the_text(tiny: tuple[NaiveLlama, Path], capsys: Capture) -> None:
    arguments = (tiny[1], "--prompt-ids", IDS, "-n", "20", "--temp", "0", "--ignore-eos")
    found = facts(capsys, *arguments, "-c", str(len(PROMPT) + 3))
    # The last token's own position would be the first one outside.
    assert found["tokens"] == tiny[0].greedy(PROMPT, 4)


def test_one_token_is_decoded_by_no_pass(tiny: tuple[NaiveLlama, Path], capsys: Capture) -> None:
    found = facts(capsys, tiny[1], "--prompt-ids", IDS, "-n", "1", "--budget", "60%")
    assert found["limit_tokens_per_second"] is None and found["fraction_of_limit"] is None
    assert found["tokens_per_second"] == 0


def test_a_context_beyond_the_models_is_noted(
    tiny: tuple[NaiveLlama, Path], capsys: Capture
) -> None:
    assert run(tiny[1], "--prompt-ids", IDS, "-n", "1", "-c", "5000") == 0
    assert "a context of 5000 is beyond the" in capsys.readouterr().err


@pytest.mark.parametrize("ids", ["1,300", "1,-1", "4294967296"])
def test_tokens_out_of_the_vocabulary(
    tiny: tuple[NaiveLlama, Path], capsys: Capture, ids: str
) -> None:
    line = fails(capsys, tiny[1], "--prompt-ids", ids)
    assert line == f"token {ids.split(',')[-1]}: not within 0..299"


def test_an_empty_prompt(variant: Callable[..., Path], capsys: Capture) -> None:
    map_path = variant(metadata={"tokenizer.ggml.add_space_prefix": 0,
                                 "tokenizer.ggml.add_bos_token": 0})  # fmt: skip
    assert fails(capsys, map_path, "-p", "") == "prompt: has no tokens"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"general.architecture": "mamba"}}, "'mamba' cannot be run, only 'llama'"),
        ({"types": {"blk.1.ffn_up.weight": Types.IQ4_NL}}, "type IQ4_NL cannot be computed with"),
        ({"shapes": {"blk.1.ffn_up.weight": None}}, "'blk.1.ffn_up.weight': the model has none"),
        ({"shapes": {"blk.0.attn_v.weight": (31, 64)}}, "has (31, 64) rows and columns, not (32,"),
        ({"metadata": {"llama.block_count": None}}, "llama.block_count: is missing"),
        ({"metadata": {"tokenizer.ggml.scores": None}}, "model.gguf: tokenizer.ggml.scores: miss"),
        ({"metadata": {"tokenizer.ggml.tokens": None}}, "model.gguf: tokenizer.ggml.tokens: miss"),
        ({"metadata": {"tokenizer.ggml.model": "t5"}}, "tokenizer.ggml.model: 't5' is not support"),
    ],
)
def test_models_that_cannot_run(
    variant: Callable[..., Path], capsys: Capture, changes: Mapping[str, Any], message: str
) -> None:
    assert message in fails(capsys, variant(**changes), "-p", "text")


def test_maps_that_are_none(variant: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    missing = tmp_path / "none.sgmap"
    assert fails(capsys, missing, "-p", "x") == f"{missing}: No such file or directory"
    map_path = variant()
    text = map_path.read_text()
    map_path.write_text(text[: len(text) // 2])
    assert fails(capsys, map_path, "-p", "x").startswith(f"{map_path}: ")
    map_path.write_text(text)
    core_path(map_path).write_bytes(core_path(map_path).read_bytes()[:-4096])
    assert "core.gguf" in fails(capsys, map_path, "-p", "x")


def test_a_page_damaged_before_the_run(variant: Callable[..., Path], capsys: Capture) -> None:
    map_path = variant()
    page = flip_bit(map_path, "blk.1.attn_q.weight")
    line = fails(capsys, map_path, "--prompt-ids", IDS)
    assert f"page {page} (shard {page}, blk.1.attn_q.weight): " in line


def test_budget_too_small(tiny: tuple[NaiveLlama, Path], capsys: Capture) -> None:
    """The message names the smallest that works: that works, and one byte less does not."""
    arguments = (tiny[1], "--prompt-ids", IDS, "-n", "3", "--temp", "0", "--ignore-eos")
    line = fails(capsys, *arguments, "--budget", "1000")
    match = re.search(r"too small, the smallest that works is (\d+) bytes \([\d.]+ \w+\)", line)
    assert match
    assert match[0] in fails(capsys, *arguments, "--budget", "1%")
    smallest = int(match[1])
    assert f"is {smallest} bytes" in fails(capsys, *arguments, "--budget", str(smallest - 1))
    found = facts(capsys, *arguments, "--budget", str(smallest))
    assert found["device_bytes_peak"] <= found["budget_bytes"] == smallest
    assert found["tokens"] == tiny[0].greedy(PROMPT, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "x", "--frobnicate"), "unrecognized arguments: --frobnicate"),
        (("-p", "x", "--prompt-ids", "1"), "not allowed with argument"),
        ((), "one of the arguments -p/--prompt --prompt-ids is required"),
        (("--prompt-ids", "1,x"), "'1,x' is not a list of numbers"),
        (("--prompt-ids", ""), "'' is not a list of numbers"),
        (("-p", "x", "-n", "0"), "'0' is not a whole number of at least 1"),
        (("-p", "x", "--threads", "-1"), "'-1' is not a whole number of at least 1"),
        (("-p", "x", "--policy", "fifo"), "invalid choice: 'fifo'"),
        (("-p", "x", "--prefetch-distance", "-1"), "'-1' is not a whole number of at least 0"),
    ],
)
def test_wrong_usage(capsys: Capture, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run("core.sgmap", *arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


# ---- in a process of its own ----


def flip_bit(map_path: Path, tensor: str) -> int:
    """Flip a bit in the first page of a tensor; returns the page's number."""
    page = next(t for t in load_map(map_path).tensors if t.name == tensor).slices[0].first_page
    with open(core_path(map_path), "r+b") as file:
        file.seek(page_offset(page) + 99)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return page


def test_as_a_command(demo: Path, capsys: Capture) -> None:
    arguments = (demo, "-p", "Once upon a time", "-n", "6", "--temp", "0")
    want = facts(capsys, *arguments)["text"]
    done = spawn(*arguments, "--threads", "1")
    assert (done.returncode, done.stdout) == (0, want + "\n")
    assert len(done.stderr.splitlines()) == 4


def test_as_a_command_that_fails(tmp_path: Path) -> None:
    done = spawn(tmp_path / "none.sgmap", "-p", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr).endswith("none.sgmap: No such file or directory")


def test_damage_during_a_run(demo: Path, tmp_path: Path, capsys: Capture) -> None:
    """Text comes while it is made; after the damage come one line and nothing else."""
    arguments = ("-p", "Once upon a time", "-n", "480", "--temp", "0", "--ignore-eos")
    want = facts(capsys, demo, *arguments)["text"]
    map_path = shard_model(DEMO, tmp_path / "damaged")
    tensor = "blk.1.ffn_up.weight"
    with subprocess.Popen(
        command(map_path, *arguments, "--budget", "30%", "--policy", "lru"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        start = process.stdout.read(8)
        page = flip_bit(map_path, tensor)
        text, err = start + process.stdout.read(), process.stderr.read()
    assert process.returncode == 1 and text.endswith("\n")  # the error stands on a line of its own
    text = text[:-1]
    assert len(start) == 8 and len(text) < len(want) and want.startswith(text)
    shard = page // load_map(map_path).pages_per_shard
    assert f"page {page} (shard {shard}, {tensor}): " in one_line(err)


def test_a_reader_that_leaves_ends_it_quietly(demo: Path) -> None:
    with subprocess.Popen(
        command(demo, "-p", "Once upon a time", "-n", "480", "--ignore-eos"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(4)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


_MEASURED = """
import sys
from atlas.cli import main
code = main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
peak = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
print(int(peak) * 1024, file=sys.stderr)
sys.exit(code)
"""


def test_the_budget_is_kept_by_the_whole_process(tmp_path: Path) -> None:
    """Device memory within the budget; the peak resident set within 350 MB more."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs the peak resident set from /proc")
    preset = replace(
        PRESETS["tiny"], n_embd=1024, n_layer=6, n_ff=2816, n_head=16, n_head_kv=4, n_vocab=4096
    )
    model = write_model(tmp_path / "80mb.gguf", preset, "Q8_0")
    assert 60e6 < model.stat().st_size < 100e6
    map_path = shard_model(model, tmp_path)
    budget = 30_000_000
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, "run", map_path, "--prompt-ids", "1,5,9", "-n", "3",
         "--budget", str(budget), "--policy", "pin", "--target", "cpu", "--json"],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0.8 * budget < found["device_bytes_peak"] <= found["budget_bytes"] == budget
    assert int(one_line(done.stderr)) <= budget + 350_000_000
