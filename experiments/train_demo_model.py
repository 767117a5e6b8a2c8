"""Train the demonstration model: a small llama on stories from `story_grammar`, as a GGUF file.

    python -m experiments.train_demo_model --output experiments/demo/demo-2M-f16.gguf --seed 1

The text is generated while training runs, and no story is meant to come twice. The tokenizer is
SentencePiece-style BPE learned from the same text. The network is written down in the names and
conventions of the file (rows are outputs, RoPE turns neighbouring pairs of dimensions, the output
matrix is not tied to the embedding), so saving it is a rounding to F16 and nothing else.

The same seed, number of steps, threads, PyTorch build and kind of processor give the same file;
elsewhere sums round differently. PyTorch is needed here only (`pip install torch`).

Sources: the llama architecture after H. Touvron et al. 2023 (arXiv:2302.13971) with grouped queries
(J. Ainslie et al. 2023, arXiv:2305.13245), tensor names and RoPE order as in llama.cpp; AdamW with
warm-up and a cosine (I. Loshchilov and F. Hutter, arXiv:1608.03983 and 1711.05101).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from tokenizers import models, pre_tokenizers, trainers
from tqdm import trange

from atlas.infer.bpe import SPACE_MARK
from atlas.infer.tokenizer import Tokenizer
from experiments.make_model import Preset, plan_tensors
from experiments.story_grammar import stories
from forge.errors import GGUFShardError

# 1.9 million weights: the F16 file stays below 4 MB. Widths are multiples of 32, so that the model
# can be quantised.
DEMO = Preset(n_embd=192, n_layer=5, n_ff=384, n_head=6, n_head_kv=2, n_vocab=768, n_ctx=512)

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
BOS, EOS = 1, 2
TOKENIZER_STORIES = 5000
PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn."""

    steps: int
    batch: int = 4  # rows of n_ctx tokens per step
    learning_rate: float = 3e-3
    final_share: float = 0.02  # of the learning rate, reached at the last step
    warmup: int = 100  # steps
    weight_decay: float = 0.1  # of matrices

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)


@dataclass(frozen=True)
class Vocabulary:
    """What the file says about tokens, by id."""

    tokens: list[str]
    scores: list[float]
    types: list[TokenType]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_metadata(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": self.tokens,
                "tokenizer.ggml.scores": self.scores,
                "tokenizer.ggml.token_type": self.types,
            }
        )


def train_vocabulary(n_vocab: int, texts: Iterator[str]) -> Vocabulary:
    """Learn a SentencePiece-style BPE vocabulary.

    Ids as in Llama's: special tokens, bytes, merged tokens in the order in which they were learned,
    single characters. A score is the negative rank, so merging the best score first repeats the
    merges in their order. A token is letters or punctuation, after a space or not; none has a space
    inside, so words can be encoded one by one.
    """
    n_reserved = len(SPECIAL_TOKENS) + 256
    bpe = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(f"{SPACE_MARK}?[A-Za-z]+|{SPACE_MARK}?[^A-Za-z{SPACE_MARK}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme="always", split=False),
            pre_tokenizers.Split(words, "isolated"),
        ]
    )
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=n_vocab - n_reserved, show_progress=False)
    )
    ids = bpe.get_vocab()
    learned = sorted(ids, key=lambda token: (len(token) == 1, ids[token]))
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    return Vocabulary(
        tokens=[*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned],
        scores=[0.0] * n_reserved + [-float(rank) for rank in range(len(learned))],
        types=types + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(learned),
    )


def rows_of_stories(tokenizer: Tokenizer, length: int, texts: Iterator[str]) -> Iterator[list[int]]:
    """Rows of `length` token ids: whole stories, each from BOS to EOS, the last one cut.

    Every row begins with a story, as every text does that the model will be asked to write.
    """

    @functools.cache
    def encode_word(word: str) -> list[int]:
        return tokenizer.encode(word, add_bos=False)

    while True:
        row: list[int] = []
        while len(row) < length:
            words = next(texts).split(" ")
            row += [BOS, *itertools.chain.from_iterable(map(encode_word, words)), EOS]
        yield row[:length]


def load_torch() -> Any:
    """PyTorch, or one line that says how to get it."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise GGUFShardError(
            "training needs PyTorch (pip install torch); a finished model is in experiments/demo"
        ) from None


def initial_weights(preset: Preset) -> dict[str, Any]:
    """Random float32 tensors by GGUF name; embedding rows small, so that they can still turn."""
    torch = load_torch()
    weights = {}
    f16 = GGMLQuantizationType.F16
    for plan in plan_tensors(preset, f16, f16):
        if plan.std is None:
            tensor = torch.ones(plan.shape)
        else:
            std = 0.02 if plan.name == "token_embd.weight" else 0.5 * plan.std
            tensor = std * torch.randn(plan.shape)
        weights[plan.name] = tensor.requires_grad_()
    return weights


def logits(weights: Mapping[str, Any], preset: Preset, ids: Any) -> Any:
    """Scores of the next token after each token: ids [batch, n] -> float32 [batch, n, n_vocab]."""
    torch = load_torch()
    functional = torch.nn.functional
    batch, n = ids.shape
    head_dim = preset.n_embd // preset.n_head
    frequencies = preset.rope_freq_base ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(n), frequencies)
    cos, sin = angles.cos(), angles.sin()  # [n, head_dim / 2]

    def norm(x: Any, name: str) -> Any:
        return functional.rms_norm(x, (preset.n_embd,), weights[name], preset.rms_norm_eps)

    def heads(x: Any, name: str, n_head: int) -> Any:
        projected = functional.linear(x, weights[name])
        return projected.view(batch, n, n_head, head_dim).transpose(1, 2)  # [batch, head, n, dim]

    def rope(x: Any) -> Any:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    x = weights["token_embd.weight"][ids]
    for layer in range(preset.n_layer):
        block = f"blk.{layer}"
        h = norm(x, f"{block}.attn_norm.weight")
        mixed = functional.scaled_dot_product_attention(
            rope(heads(h, f"{block}.attn_q.weight", preset.n_head)),
            rope(heads(h, f"{block}.attn_k.weight", preset.n_head_kv)),
            heads(h, f"{block}.attn_v.weight", preset.n_head_kv),
            is_causal=True,
            enable_gqa=True,
        )
        mixed = mixed.transpose(1, 2).reshape(batch, n, preset.n_embd)
        x = x + functional.linear(mixed, weights[f"{block}.attn_output.weight"])
        h = norm(x, f"{block}.ffn_norm.weight")
        gate = functional.silu(functional.linear(h, weights[f"{block}.ffn_gate.weight"]))
        up = functional.linear(h, weights[f"{block}.ffn_up.weight"])
        x = x + functional.linear(gate * up, weights[f"{block}.ffn_down.weight"])
    return functional.linear(norm(x, "output_norm.weight"), weights["output.weight"])


def train(
    preset: Preset,
    rows: Iterator[Sequence[int]],
    schedule: Schedule,
    minutes: float,
    progress: bool,
) -> tuple[dict[str, Any], float]:
    """Weights, and the mean loss (nats per token) of the last hundred steps.

    When `minutes` are over, training ends where it is, but not before the first step.
    """
    torch = load_torch()
    weights = initial_weights(preset)
    matrices = [tensor for tensor in weights.values() if tensor.ndim == 2]
    vectors = [tensor for tensor in weights.values() if tensor.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    end = time.monotonic() + 60 * minutes
    losses: list[float] = []
    bar = trange(schedule.steps, desc="training", unit="step", disable=not progress)
    for step in bar:
        if step > 0 and time.monotonic() > end:
            print(f"stopped after {step} of {schedule.steps} steps: time is up", file=sys.stderr)
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        batch = torch.tensor(list(itertools.islice(rows, schedule.batch)))
        scores = logits(weights, preset, batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return weights, float(np.mean(losses[-100:]))


def rounded(tensor: Any) -> np.ndarray:
    """The tensor as the file holds it: matrices F16, norms F32."""
    array: np.ndarray = tensor.detach().numpy()
    return array.astype(np.float16) if array.ndim == 2 else array


def continue_greedily(
    arrays: Mapping[str, np.ndarray], preset: Preset, tokenizer: Tokenizer, prompt: str
) -> str:
    """The prompt and what the rounded weights write after it, up to EOS or the context's end."""
    torch = load_torch()
    weights = {name: torch.tensor(array.astype(np.float32)) for name, array in arrays.items()}
    ids = tokenizer.encode(prompt)
    with torch.no_grad():
        while ids[-1] != EOS and len(ids) < preset.n_ctx:
            ids.append(int(logits(weights, preset, torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids)


def write_gguf(
    path: Path, preset: Preset, vocabulary: Vocabulary, arrays: Mapping[str, np.ndarray]
) -> None:
    """Write the model; the file takes its name when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = GGUFWriter(temporary, "llama")
    writer.add_name("gguf-shard-demo")
    writer.add_description("Tells short stories; made by experiments/train_demo_model.py")
    writer.add_license("mit")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_context_length(preset.n_ctx)
    writer.add_embedding_length(preset.n_embd)
    writer.add_block_count(preset.n_layer)
    writer.add_feed_forward_length(preset.n_ff)
    writer.add_head_count(preset.n_head)
    writer.add_head_count_kv(preset.n_head_kv)
    writer.add_rope_dimension_count(preset.n_embd // preset.n_head)
    writer.add_rope_freq_base(preset.rope_freq_base)
    writer.add_layer_norm_rms_eps(preset.rms_norm_eps)
    writer.add_vocab_size(preset.n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    try:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_demo_model(
    path: Path,
    schedule: Schedule,
    *,
    minutes: float,
    seed: int,
    threads: int,
    force: bool,
    progress: bool,
) -> None:
    """Learn a vocabulary, train, write the file, and print the loss and a sample.

    Raises
    ------
    GGUFShardError
        PyTorch is not installed, `path` is in no folder, or exists without `force`.
    """
    torch = load_torch()
    # better known now than after the training
    if not path.parent.is_dir():
        raise GGUFShardError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not force:
        raise GGUFShardError(f"{path}: exists (--force replaces it)")
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    vocabulary = train_vocabulary(DEMO.n_vocab, itertools.islice(stories(seed), TOKENIZER_STORIES))
    tokenizer = vocabulary.tokenizer()
    rows = rows_of_stories(tokenizer, DEMO.n_ctx + 1, stories(seed))
    start = time.monotonic()
    weights, loss = train(DEMO, rows, schedule, minutes, progress)
    arrays = {name: rounded(tensor) for name, tensor in weights.items()}
    write_gguf(path, DEMO, vocabulary, arrays)
    n_weights = sum(array.size for array in arrays.values())
    print(
        f"{path}: {n_weights:,} parameters, {path.stat().st_size:,} bytes, "
        f"{(time.monotonic() - start) / 60:.1f} minutes, loss {loss:.4f} nats per token"
    )
    print(continue_greedily(arrays, DEMO, tokenizer, PROMPT))


def _at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `minimum`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return integer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.train_demo_model",
        description="Train the demonstration model on generated stories and write it as GGUF.",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.gguf")
    parser.add_argument("--steps", type=_at_least(1), default=2000, metavar="N")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="stop early after this time"
    )
    parser.add_argument("--seed", type=_at_least(0), default=1, metavar="S")
    parser.add_argument("--threads", type=_at_least(1), default=1, metavar="N")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 1 after a failure told in one line, 2 (exit) on bad usage."""
    args = _parser().parse_args(argv)
    try:
        make_demo_model(
            args.output,
            Schedule(args.steps),
            minutes=args.minutes,
            seed=args.seed,
            threads=args.threads,
            force=args.force,
            progress=sys.stderr.isatty(),
        )
    except (GGUFShardError, OSError) as error:
        print(f"train_demo_model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train_demo_model: interrupted, nothing written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
