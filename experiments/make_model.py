"""Random-weight GGUF models of real llama shapes, for tests and benchmarks without a download.

    python -m experiments.make_model --preset 1b --type Q8_0 -o 1b-q8_0.gguf

The text such a model writes is noise; its shapes, types, sizes and tokenizer metadata are those of
a real file, and its activations stay finite through any number of layers: a weight has standard
deviation 1/sqrt(fan_in), so that a normalised input gives outputs of about unit variance, and the
two projections that end a residual branch are scaled by a further 1/sqrt(2 * n_layer) (A. Radford
et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3). An embedding row
is looked up, not summed, so its standard deviation is 1. Norm weights are 1.

The bytes come from `experiments.random_blocks` in chunks, so the memory needed does not grow with
the model. The file appears under its name only when it is complete. It is not forced to disk:
anybody can make it again from its seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from tqdm import tqdm

from experiments.random_blocks import F16, F32, Q4_0, Q6_K, Q8_0, chunks_of_ones, random_chunks
from forge.errors import GGUFShardError

SPACE = "\u2581"  # SentencePiece writes a space as LOWER ONE EIGHTH BLOCK
SPECIAL_PIECES = ("<unk>", "<s>", "</s>")
MIN_VOCAB = len(SPECIAL_PIECES) + 256 + 1  # byte tokens and the space: any text can be encoded


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of a llama-architecture model, named as in GGUF metadata and llama.cpp."""

    n_embd: int
    n_layer: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int
    rope_freq_base: float = 10000.0
    rms_norm_eps: float = 1e-5
    n_expert: int = 0
    n_expert_used: int = 0


PRESETS = {
    # For tests: small enough for pure NumPy, with grouped queries and an odd number of blocks.
    "tiny": Preset(128, 4, 352, 4, 2, 512, 256),
    # Width and depth of GPT-2 small (Radford et al. 2019), feed-forward 8/3 wide as in LLaMA.
    "160m": Preset(768, 12, 2048, 12, 12, 32000, 2048, rms_norm_eps=1e-6),
    # TinyLlama 1.1B (P. Zhang et al. 2024, arXiv:2401.02385) with a vocabulary of 4,096 instead of
    # 32,000, so that Q8_0 is about 1.05 GB.
    "1b": Preset(2048, 22, 5632, 32, 4, 4096, 2048),
    # Llama 2 7B, 13B, 70B (H. Touvron et al. 2023, arXiv:2307.09288; config.json of the releases).
    "7b": Preset(4096, 32, 11008, 32, 32, 32000, 4096),
    "13b": Preset(5120, 40, 13824, 40, 40, 32000, 4096),
    "70b": Preset(8192, 80, 28672, 64, 8, 32000, 4096),
    # LLaMA 33B, published as "30B" (H. Touvron et al. 2023, arXiv:2302.13971, table 2).
    "30b": Preset(6656, 60, 17920, 52, 52, 32000, 2048, rms_norm_eps=1e-6),
    # Mixtral 8x7B (A. Jiang et al. 2024, arXiv:2401.04088, table 1).
    "mixtral": Preset(
        4096, 32, 14336, 32, 8, 32000, 32768, rope_freq_base=1e6, n_expert=8, n_expert_used=2
    ),
}

FILE_TYPES = {
    F16: LlamaFileType.MOSTLY_F16,
    Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Q4_0: LlamaFileType.MOSTLY_Q4_0,
}
TYPE_NAMES = tuple(ggml_type.name for ggml_type in FILE_TYPES)

# What a tensor gets when its columns do not fill whole blocks, as llama.cpp's quantiser chooses.
FALLBACK = {Q6_K: Q8_0, Q8_0: F16, Q4_0: F16}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to write: shape in NumPy order, `std` None for a tensor of ones."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    std: float | None

    @property
    def n_blocks(self) -> int:
        return math.prod(self.shape) // GGML_QUANT_SIZES[self.ggml_type][0]

    @property
    def n_bytes(self) -> int:
        return self.n_blocks * GGML_QUANT_SIZES[self.ggml_type][1]

    def chunks(self, seed: int) -> Iterator[np.ndarray]:
        """The tensor's data in order, in small arrays."""
        if self.std is None:
            return chunks_of_ones(self.n_blocks)
        return random_chunks(self.name, self.n_blocks, self.ggml_type, self.std, seed)


def write_model(
    path: str | os.PathLike[str],
    preset: str | Preset,
    type: str,
    *,
    layers: int | None = None,
    seed: int = 0,
    vocab: int | None = None,
    output_q6k: bool | None = None,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write a llama-architecture GGUF file with random weights.

    The same arguments give the same bytes.

    Parameters
    ----------
    path
        File to write. Its folder must exist.
    preset
        A name in `PRESETS`, or a `Preset` of one's own.
    type
        Type of the matrices: "F16", "Q8_0" or "Q4_0". Norms and router gates are F32; a matrix
        whose columns do not fill whole blocks gets the type that llama.cpp would give it.
    layers, vocab
        Replace the preset's number of layers and of tokens (at least `MIN_VOCAB`).
    seed
        Non-negative seed of the weights.
    output_q6k
        Store `output.weight` as Q6_K. By default only with Q4_0, as in real Q4_0 files.
    force
        Replace an existing file.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    Path
        The finished file.

    Raises
    ------
    GGUFShardError
        An unknown preset or type, a size out of range, an existing file, or too little disk space.
    OSError
        The file cannot be written. Nothing is left of it.
    """
    path = Path(path)
    shape = _resolve_preset(preset, layers, vocab)
    if type not in TYPE_NAMES:
        raise GGUFShardError(f"type {type!r}: not one of {', '.join(TYPE_NAMES)}")
    if seed < 0:
        raise GGUFShardError(f"seed {seed}: must not be negative")
    matrix_type = GGMLQuantizationType[type]
    if output_q6k is None:
        output_q6k = matrix_type == Q4_0
    plans = plan_tensors(shape, matrix_type, Q6_K if output_q6k else matrix_type)
    _check_destination(path, sum(plan.n_bytes for plan in plans), force)
    name = preset if isinstance(preset, str) else "custom"
    with _complete_or_absent(path) as temporary:
        write_header(temporary, f"random {name} {type}", shape, FILE_TYPES[matrix_type], plans)
        _append_tensors(temporary, plans, seed, progress)
    return path


def plan_tensors(
    preset: Preset, matrix_type: GGMLQuantizationType, output_type: GGMLQuantizationType
) -> list[TensorPlan]:
    """Tensors of a llama model in file order, with the names and shapes of llama.cpp."""
    plans: list[TensorPlan] = []
    width, n_ff, n_expert = preset.n_embd, preset.n_ff, preset.n_expert
    width_kv = width // preset.n_head * preset.n_head_kv

    def add_norm(name: str) -> None:
        plans.append(TensorPlan(f"{name}.weight", (width,), F32, None))

    def add_matrix(
        name: str, *shape: int, gain: float = 1.0, ggml_type: GGMLQuantizationType = matrix_type
    ) -> None:
        while shape[-1] % GGML_QUANT_SIZES[ggml_type][0]:
            ggml_type = FALLBACK[ggml_type]
        plans.append(TensorPlan(f"{name}.weight", shape, ggml_type, gain / math.sqrt(shape[-1])))

    residual_gain = 1 / math.sqrt(2 * preset.n_layer)
    add_matrix("token_embd", preset.n_vocab, width, gain=math.sqrt(width))
    for layer in range(preset.n_layer):
        block = f"blk.{layer}"
        add_norm(f"{block}.attn_norm")
        add_matrix(f"{block}.attn_q", width, width)
        add_matrix(f"{block}.attn_k", width_kv, width)
        add_matrix(f"{block}.attn_v", width_kv, width)
        add_matrix(f"{block}.attn_output", width, width, gain=residual_gain)
        add_norm(f"{block}.ffn_norm")
        experts, suffix = ((n_expert,), "_exps") if n_expert else ((), "")
        if n_expert:
            add_matrix(f"{block}.ffn_gate_inp", n_expert, width, ggml_type=F32)
        add_matrix(f"{block}.ffn_gate{suffix}", *experts, n_ff, width)
        add_matrix(f"{block}.ffn_up{suffix}", *experts, n_ff, width)
        add_matrix(f"{block}.ffn_down{suffix}", *experts, width, n_ff, gain=residual_gain)
    add_norm("output_norm")
    add_matrix("output", preset.n_vocab, width, ggml_type=output_type)
    return plans


def vocabulary(n_vocab: int) -> tuple[list[str], list[float], list[TokenType]]:
    """Pieces, scores and types of a SentencePiece-style vocabulary with `n_vocab` tokens.

    After the special and byte tokens come the space, the visible ASCII characters, and words of
    one, two, ... syllables, each also with the space before it. Scores fall with the token id, and
    a word follows its own beginning, so it can be built by merging pairs.
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = itertools.chain([SPACE], map(chr, range(0x21, 0x7F)), _words())
    normal = list(itertools.islice(pieces, n_vocab - len(SPECIAL_PIECES) - len(bytes_)))
    reserved = [*SPECIAL_PIECES, *bytes_]
    scores = [0.0] * len(reserved) + [float(-rank) for rank in range(len(normal))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * len(bytes_) + [TokenType.NORMAL] * len(normal)
    return reserved + normal, scores, types


def _words() -> Iterator[str]:
    """Endless distinct words, shortest first, each followed by its form after a space."""
    syllables = [consonant + vowel for consonant in "tnsrdlmhkpbgfvwcyzj" for vowel in "aeiou"]
    for n_syllables in itertools.count(1):
        for parts in itertools.product(syllables, repeat=n_syllables):
            word = "".join(parts)
            yield word
            yield SPACE + word


def _resolve_preset(preset: str | Preset, layers: int | None, vocab: int | None) -> Preset:
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise GGUFShardError(f"preset {preset!r}: not one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if layers is not None:
        preset = replace(preset, n_layer=layers)
    if vocab is not None:
        preset = replace(preset, n_vocab=vocab)
    if preset.n_layer < 1:
        raise GGUFShardError(f"layers {preset.n_layer}: at least 1 is needed")
    if preset.n_vocab < MIN_VOCAB:
        raise GGUFShardError(f"vocabulary {preset.n_vocab}: at least {MIN_VOCAB} tokens are needed")
    return preset


def _check_destination(path: Path, n_bytes: int, force: bool) -> None:
    if path.is_dir():
        raise GGUFShardError(f"{path}: is a folder")
    if path.exists() and not force:
        raise GGUFShardError(f"{path}: exists (--force replaces it)")
    free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise GGUFShardError(
            f"{path}: needs {n_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"
        )


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name on success and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_header(
    path: Path, name: str, preset: Preset, file_type: LlamaFileType, plans: Sequence[TensorPlan]
) -> None:
    """Write everything before the tensor data: header, key-values, tensor infos."""
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)  # GGML_QNT_VERSION of ggml.h
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
    if preset.n_expert:
        writer.add_expert_count(preset.n_expert)
        writer.add_expert_used_count(preset.n_expert_used)
    _add_tokenizer(writer, preset.n_vocab)
    for plan in plans:
        writer.add_tensor_info(
            plan.name, plan.shape, np.dtype(np.float32), plan.n_bytes, raw_dtype=plan.ggml_type
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_tokenizer(writer: GGUFWriter, n_vocab: int) -> None:
    pieces, scores, types = vocabulary(n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(SPECIAL_PIECES.index("<unk>"))
    writer.add_bos_token_id(SPECIAL_PIECES.index("<s>"))
    writer.add_eos_token_id(SPECIAL_PIECES.index("</s>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def _append_tensors(path: Path, plans: Sequence[TensorPlan], seed: int, progress: bool) -> None:
    """Stream the tensor data after the header, each tensor on an aligned offset."""
    alignment = 32  # GGUF's default, which the header does not change
    n_bytes = sum(plan.n_bytes for plan in plans)
    bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc=path.stem, disable=not progress)
    with bar, open(path, "ab") as file:
        for plan in plans:
            file.write(bytes(-file.tell() % alignment))
            for chunk in plan.chunks(seed):
                file.write(chunk.data)
                bar.update(chunk.nbytes)
        file.write(bytes(-file.tell() % alignment))


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
        prog="python -m experiments.make_model",
        description="Write a GGUF model of a real llama shape with random weights.",
    )
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--type", choices=TYPE_NAMES, required=True, help="type of the matrices")
    parser.add_argument("--layers", type=_at_least(1), metavar="N", help="instead of the preset's")
    parser.add_argument(
        "--vocab", type=_at_least(MIN_VOCAB), metavar="N", help="tokens, instead of the preset's"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="S")
    parser.add_argument(
        "--output-q6k",
        action=argparse.BooleanOptionalAction,
        help="store output.weight as Q6_K (default: with Q4_0 only, as in real files)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.gguf")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 1 after a failure told in one line, 2 (exit) on bad usage."""
    args = _parser().parse_args(argv)
    start = time.perf_counter()
    try:
        path = write_model(
            args.output,
            args.preset,
            args.type,
            layers=args.layers,
            seed=args.seed,
            vocab=args.vocab,
            output_q6k=args.output_q6k,
            force=args.force,
            progress=sys.stderr.isatty(),
        )
    except (GGUFShardError, OSError) as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_model: interrupted, nothing written", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    megabytes = path.stat().st_size / 1e6
    print(f"{path}: {megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.0f} MB/s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
