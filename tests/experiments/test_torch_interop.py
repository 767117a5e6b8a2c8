"""Sharing a tensor with PyTorch."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from atlas.target import CpuTarget
from experiments import torch_interop
from forge.errors import GGUFShardError


def test_pytorch_sees_the_same_memory(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert torch_interop.main(["--target", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "PyTorch sees the same memory" in out
    difference, largest = (
        float(part.split()[-1].rstrip(".")) for part in out.splitlines()[1].split(",")
    )
    assert difference <= 1e-5 * largest


def test_without_pytorch_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return found(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(GGUFShardError, match="PyTorch is not installed"):
        torch_interop.as_torch(np.zeros((1, 1), np.float32), CpuTarget())
    assert torch_interop.main(["--target", "cpu"]) == 1
    assert "PyTorch is not installed" in capsys.readouterr().err


def test_a_tensor_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert torch_interop.main(["--target", "cpu", "--tensor", "nonsense"]) == 1
    assert "tensor 'nonsense': the model has none of this name" in capsys.readouterr().err
