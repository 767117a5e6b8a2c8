"""The cases about whole models on a tiny one."""

from __future__ import annotations

import numpy as np
import pytest

from atlas.errors import CorruptPageError
from atlas.infer.model import LlamaModel
from atlas.target import CpuTarget, CudaTarget, Target
from experiments.cases import GPU_REHEARSAL
from experiments.gpu_bench import GpuBench
from experiments.gpu_inference import REHEARSAL, Decoding, inference
from experiments.synthetic_model import SyntheticModel
from forge.sizes import Size

CASE = REHEARSAL.models["7b"][0]
START = [1, 259]


def open_model(target: Target, fraction: float) -> LlamaModel:
    model = SyntheticModel(CASE.preset, CASE.type_name, pages_per_shard=1)
    return LlamaModel(model, target, Size(fraction=fraction), n_context=8, policy="pin")


@pytest.mark.cuda
@pytest.mark.parametrize("size", ["1b", "7b"])
def test_every_case_is_right_in_a_rehearsal(cuda_target: CudaTarget, size: str) -> None:
    bench = GpuBench(cuda_target, GPU_REHEARSAL, is_rehearsal=True)
    assert inference(bench, size) == []
    assert bench.wrong == []
    cases = {line.partition(":")[0] for line in bench.right}
    streamed = {"gpu-streamed", "gpu-traffic", "gpu-reuse", "gpu-demand"} if size != "1b" else set()
    assert cases == {"gpu-decode", "gpu-launches", "gpu-prefill", *streamed}
    if bench.torch is not None and size != "1b":
        assert any("PyTorch" in line for line in bench.right)


def test_a_decoding_can_be_repeated_and_says_what_it_moved() -> None:
    with open_model(CpuTarget(), 1.0) as resident, open_model(CpuTarget(), 0.5) as half:
        all_there, streamed = Decoding(resident, START), Decoding(half, START)
        tokens = all_there.tokens(4)
        assert all_there.tokens(3) == tokens[:3]
        assert streamed.tokens(4) == streamed.tokens(4) == tokens
        np.testing.assert_array_equal(all_there.prompt_logits, streamed.prompt_logits)
        assert all_there.stats.bytes_moved == 0
        assert streamed.stats.bytes_moved > 0 and streamed.stats.accesses > 0
        assert streamed.speed(1) > 0


def test_a_page_that_does_not_hold_ends_a_decoding() -> None:
    with open_model(CpuTarget(), 0.5) as half:
        decoding = Decoding(half, START)
        decoding.tokens(1)
        half.atlas.model.page_crc32[:] ^= 1
        with pytest.raises(CorruptPageError):
            decoding.tokens(1)
