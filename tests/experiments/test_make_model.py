"""Random-weight models: what is in the file, how the weights are spread, how the writer behaves."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from experiments import make_model, random_blocks
from experiments.make_model import MIN_VOCAB, PRESETS, SPACE, TYPE_NAMES, vocabulary, write_model
from forge.errors import GGUFShardError

TINY = PRESETS["tiny"]
TINY_MOE = replace(TINY, n_expert=4, n_expert_used=2)


def read_tensors(path: Path) -> dict[str, ReaderTensor]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def weights(tensor: ReaderTensor) -> np.ndarray:
    """Dequantised values in NumPy order (rows first), float32."""
    values: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
    return values.reshape([int(n) for n in reversed(tensor.shape)])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("type_name", TYPE_NAMES)
def test_shapes_types_and_metadata(tmp_path: Path, type_name: str) -> None:
    path = write_model(tmp_path / "m.gguf", "tiny", type_name, output_q6k=False)
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == {"F16": 1, "Q8_0": 7, "Q4_0": 2}[type_name]
    assert fields["llama.embedding_length"] == 128
    assert fields["llama.block_count"] == 4
    assert fields["llama.feed_forward_length"] == 352
    assert fields["llama.attention.head_count"] == 4
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 32
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["llama.context_length"] == 256
    assert fields["llama.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == 512

    # GGUF lists the fastest dimension, the columns, first.
    expected = {"token_embd": [128, 512], "output_norm": [128], "output": [128, 512]}
    for layer in range(4):
        expected |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": [128],
                "attn_q": [128, 128],
                "attn_k": [128, 64],
                "attn_v": [128, 64],
                "attn_output": [128, 128],
                "ffn_norm": [128],
                "ffn_gate": [128, 352],
                "ffn_up": [128, 352],
                "ffn_down": [352, 128],
            }.items()
        }
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes == {f"{name}.weight": shape for name, shape in expected.items()}
    for tensor in reader.tensors:
        is_norm = len(tensor.shape) == 1
        assert tensor.tensor_type.name == ("F32" if is_norm else type_name)
        if is_norm:
            assert np.all(tensor.data == 1)
    last = reader.tensors[-1]
    assert path.stat().st_size == -(-(last.data_offset + last.n_bytes) // 32) * 32


def test_mixture_of_experts_tensors(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", TINY_MOE, "Q4_0", layers=1)
    reader = GGUFReader(path)
    assert reader.fields["llama.expert_count"].contents() == 4
    assert reader.fields["llama.expert_used_count"].contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "blk.0.ffn_gate.weight" not in tensors
    shapes = {
        "ffn_gate_inp": ([128, 4], "F32"),
        "ffn_gate_exps": ([128, 352, 4], "Q4_0"),
        "ffn_up_exps": ([128, 352, 4], "Q4_0"),
        "ffn_down_exps": ([352, 128, 4], "Q4_0"),
    }
    for name, (shape, type_name) in shapes.items():
        tensor = tensors[f"blk.0.{name}.weight"]
        assert (tensor.shape.tolist(), tensor.tensor_type.name) == (shape, type_name)


def test_q4_0_stores_the_output_as_q6_k_unless_told_otherwise(tmp_path: Path) -> None:
    shape = replace(TINY, n_embd=256, n_layer=1)

    def output_type(name: str, type_name: str, output_q6k: bool | None) -> str:
        path = write_model(tmp_path / name, shape, type_name, output_q6k=output_q6k)
        return read_tensors(path)["output.weight"].tensor_type.name

    assert output_type("a.gguf", "Q4_0", None) == "Q6_K"
    assert output_type("b.gguf", "Q4_0", False) == "Q4_0"
    assert output_type("c.gguf", "Q8_0", None) == "Q8_0"
    assert output_type("d.gguf", "Q8_0", True) == "Q6_K"


def test_columns_that_do_not_fill_blocks_fall_back(tmp_path: Path) -> None:
    ragged = replace(TINY, n_ff=172)
    tensors = read_tensors(write_model(tmp_path / "m.gguf", ragged, "Q4_0", layers=1))
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"
    assert tensors["output.weight"].tensor_type.name == "Q8_0"  # 128 columns are half a Q6_K block


def test_same_seed_same_bytes_other_seed_other_weights(tmp_path: Path) -> None:
    first = write_model(tmp_path / "a.gguf", "tiny", "Q8_0", seed=3)
    again = write_model(tmp_path / "b.gguf", "tiny", "Q8_0", seed=3)
    other = write_model(tmp_path / "c.gguf", "tiny", "Q8_0", seed=4)
    assert digest(first) == digest(again) != digest(other)


@pytest.mark.parametrize("type_name", TYPE_NAMES)
def test_no_two_rows_or_pages_are_alike(tmp_path: Path, type_name: str) -> None:
    # More than one chunk per tensor, so that a repeated chunk would be seen as well.
    path = write_model(tmp_path / "m.gguf", "tiny", type_name, layers=1, vocab=20_000)
    tensors = read_tensors(path)
    assert tensors["token_embd.weight"].n_bytes > random_blocks.CHUNK_BYTES
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    rows = [row.tobytes() for tensor in matrices for row in tensor.data]
    assert len(set(rows)) == len(rows) > 20_000
    data = path.read_bytes()[tensors["token_embd.weight"].data_offset :]
    pages = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    assert len(set(pages)) == len(pages)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "F16", "Q6_K"])
def test_weights_have_the_expected_deviation(tmp_path: Path, type_name: str) -> None:
    shape = replace(TINY, n_embd=256, n_layer=2)
    matrix_type = "Q4_0" if type_name == "Q6_K" else type_name
    tensors = read_tensors(write_model(tmp_path / "m.gguf", shape, matrix_type))
    expected = {
        "output": 1 / np.sqrt(256),
        "token_embd": 1.0,
        "blk.0.attn_q": 1 / np.sqrt(256),
        "blk.1.attn_output": 1 / np.sqrt(256 * 2 * 2),
        "blk.1.ffn_down": 1 / np.sqrt(352 * 2 * 2),
    }
    assert type_name in {tensors[f"{name}.weight"].tensor_type.name for name in expected}
    for name, std in expected.items():
        values = weights(tensors[f"{name}.weight"])
        assert values.std() == pytest.approx(std, rel=0.02)
        assert abs(values.mean()) < 0.03 * std


def test_q8_0_quants_stay_in_the_range_of_the_quantiser(tmp_path: Path) -> None:
    tensors = read_tensors(write_model(tmp_path / "m.gguf", "tiny", "Q8_0", layers=1))
    blocks = tensors["token_embd.weight"].data.reshape(-1, 34)
    quants = blocks[:, 2:].view(np.int8)
    assert (quants.min(), quants.max()) == (-127, 127)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16)
    assert scales.min() > 0
    assert np.unique(scales).size > 100  # a kernel that takes a neighbour's scale is found out


def rms_norm(x: np.ndarray) -> np.ndarray:
    normed: np.ndarray = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + TINY.rms_norm_eps)
    return normed


def rotate(x: np.ndarray) -> np.ndarray:
    """RoPE on adjacent pairs, x [position, head, dimension]."""
    n_position, _, n_dim = x.shape
    frequency = TINY.rope_freq_base ** (-np.arange(0, n_dim, 2) / n_dim)
    turn = np.exp(1j * np.arange(n_position)[:, None] * frequency)[:, None, :]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    normalised: np.ndarray = e / e.sum(axis=-1, keepdims=True)
    return normalised


def attention(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """Causal attention with grouped queries, x [position, n_embd]."""
    n_position, n_head, n_head_kv = len(x), TINY.n_head, TINY.n_head_kv
    q = rotate((x @ w["attn_q"].T).reshape(n_position, n_head, -1))
    k = rotate((x @ w["attn_k"].T).reshape(n_position, n_head_kv, -1))
    v = (x @ w["attn_v"].T).reshape(n_position, n_head_kv, -1)
    k, v = (np.repeat(kv, n_head // n_head_kv, axis=1) for kv in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
    scores[:, np.triu(np.ones((n_position, n_position), bool), 1)] = -np.inf
    mixed = np.einsum("hij,jhd->ihd", softmax(scores), v).reshape(n_position, -1)
    output: np.ndarray = mixed @ w["attn_output"].T
    return output


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    g = x @ gate.T
    output: np.ndarray = (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T
    return output


def feed_forward(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    if "ffn_gate_inp" not in w:
        return swiglu(x, w["ffn_gate"], w["ffn_up"], w["ffn_down"])
    out = np.zeros_like(x)
    for position, logits in enumerate(x @ w["ffn_gate_inp"].T):
        chosen = np.argsort(logits)[-TINY_MOE.n_expert_used :]
        for share, expert in zip(softmax(logits[chosen]), chosen, strict=True):
            parts = [w[f"ffn_{part}_exps"][expert] for part in ("gate", "up", "down")]
            out[position] += share * swiglu(x[position], *parts)
    return out


@pytest.mark.parametrize("shape", [TINY, TINY_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("type_name", TYPE_NAMES)
def test_activations_keep_their_size_through_the_layers(
    tmp_path: Path, shape: make_model.Preset, type_name: str
) -> None:
    n_layer = 24
    path = write_model(tmp_path / "m.gguf", shape, type_name, layers=n_layer)
    w = {name.removesuffix(".weight"): weights(t) for name, t in read_tensors(path).items()}
    x = w["token_embd"][[1, 300, 301, 5, 300, 77]].astype(np.float64)
    for layer in range(n_layer):
        prefix = f"blk.{layer}."
        block = {name.removeprefix(prefix): v for name, v in w.items() if name.startswith(prefix)}
        x = x + attention(rms_norm(x), block)
        x = x + feed_forward(rms_norm(x), block)
        assert 0.7 < np.sqrt(np.mean(x**2)) < 2
    logits = rms_norm(x) @ w["output"].T
    assert 0.7 < logits.std() < 1.5
    assert np.unique(logits.argmax(axis=-1)).size > 1  # the model listens to its input


@pytest.mark.parametrize("n_vocab", [MIN_VOCAB, 512, 4096, 32000, 128256])
def test_vocabulary(n_vocab: int) -> None:
    pieces, scores, types = vocabulary(n_vocab)
    assert len(pieces) == len(scores) == len(types) == n_vocab
    assert len(set(pieces)) == n_vocab
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert [int(kind) for kind in types[:3]] == [2, 3, 3]  # unknown, control, control
    assert pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert {int(kind) for kind in types[3:259]} == {6}
    assert pieces[259] == SPACE
    assert {int(kind) for kind in types[259:]} == {1}
    assert sorted(scores[259:], reverse=True) == scores[259:]


def test_vocabulary_words_can_be_built_from_pairs() -> None:
    pieces, scores, _ = vocabulary(32000)
    score = dict(zip(pieces, scores, strict=True))
    for piece in pieces[259:]:
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        parents = [pair for pair in splits if pair[0] in score and pair[1] in score]
        assert len(piece) == 1 or any(
            score[piece] < min(score[left], score[right]) for left, right in parents
        )


def test_presets_have_the_published_sizes() -> None:
    def billions(name: str) -> float:
        f16 = GGMLQuantizationType.F16
        plans = make_model.plan_tensors(PRESETS[name], f16, f16)
        return sum(int(np.prod(plan.shape)) for plan in plans) / 1e9

    assert billions("7b") == pytest.approx(6.738, abs=1e-3)
    assert billions("13b") == pytest.approx(13.016, abs=1e-3)
    assert billions("30b") == pytest.approx(32.529, abs=1e-3)
    assert billions("70b") == pytest.approx(68.977, abs=1e-3)
    assert billions("mixtral") == pytest.approx(46.703, abs=1e-3)
    assert billions("1b") == pytest.approx(1.100 - 2 * (32000 - 4096) * 2048 / 1e9, abs=1e-3)


def test_peak_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak resident set is read from /proc")
    path = tmp_path / "m.gguf"
    script = (
        "import pathlib, sys\n"
        "from experiments.make_model import write_model\n"
        "write_model(sys.argv[1], '160m', 'F16')\n"
        "print(pathlib.Path('/proc/self/status').read_text())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(make_model.__file__).parents[1],
    )
    peak_kib = next(int(line.split()[1]) for line in run.stdout.splitlines() if "VmHWM" in line)
    assert path.stat().st_size > 260e6
    assert peak_kib * 1024 < 200e6


def test_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(GGUFShardError, match=r"m\.gguf: exists"):
        write_model(path, "tiny", "F16")
    assert path.read_bytes() == b"precious"
    write_model(path, "tiny", "F16", force=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_nothing_is_left_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> np.ndarray:
        assert [entry.suffix for entry in tmp_path.iterdir()] == [".tmp"]
        raise KeyboardInterrupt

    monkeypatch.setattr(random_blocks, "_random_blocks", interrupt)
    command = ["--preset", "tiny", "--type", "Q8_0", "-o", str(tmp_path / "m.gguf")]
    assert make_model.main(command) == 1
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2000, 1000, 1000))
    with pytest.raises(GGUFShardError, match=r"m\.gguf: needs 0\.00 GB, the disk has"):
        write_model(tmp_path / "m.gguf", "tiny", "F16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("preset", "type_name", "options", "message"),
    [
        ("8b", "F16", {}, "preset '8b'"),
        ("tiny", "Q5_0", {}, "type 'Q5_0'"),
        ("tiny", "F16", {"layers": 0}, "layers 0"),
        ("tiny", "F16", {"vocab": MIN_VOCAB - 1}, "vocabulary 259"),
        ("tiny", "F16", {"seed": -1}, "seed -1"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, preset: str, type_name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GGUFShardError, match=message):
        write_model(tmp_path / "m.gguf", preset, type_name, **options)
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    command = ["--preset", "tiny", "--type", "Q4_0", "--layers", "2", "--seed", "7"]
    command += ["--vocab", "300", "--no-output-q6k", "-o", str(path)]
    assert make_model.main(command) == 0
    assert str(path) in capsys.readouterr().out
    twin = write_model(
        tmp_path / "n.gguf", "tiny", "Q4_0", layers=2, seed=7, vocab=300, output_q6k=False
    )
    assert digest(path) == digest(twin)

    assert make_model.main(command) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "exists" in error
    assert make_model.main([*command, "--force"]) == 0


def test_command_names_a_missing_folder_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = os.path.join(tmp_path, "missing", "m.gguf")
    assert make_model.main(["--preset", "tiny", "--type", "F16", "-o", target]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "missing" in error


@pytest.mark.parametrize("extra", [["--layers", "0"], ["--vocab", "12"], ["--preset", "9b"], ["x"]])
def test_usage_errors_exit_2(tmp_path: Path, extra: list[str]) -> None:
    command = ["--preset", "tiny", "--type", "F16", "-o", str(tmp_path / "m.gguf"), *extra]
    with pytest.raises(SystemExit) as stop:
        make_model.main(command)
    assert stop.value.code == 2
    assert list(tmp_path.iterdir()) == []
