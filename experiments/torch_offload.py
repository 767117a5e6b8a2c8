"""PyTorch as the peer within a budget: a decode loop that streams layers from pinned memory.

The model's parts are its layers and the output matrix, in that order. As many as the budget holds
stay on the device, spread evenly; the others are copied from pinned host memory on a stream of
their own, one copy each, into two slots that take turns: while a layer computes, the next one that
is not resident is on its way, at the end of a token the first ones of the next. That is what a
careful user writes by hand. Norms are on the device; embedding rows are looked up on the host.

One token goes through at a time: RMSNorm, rotated queries and keys (neighbouring dimensions make a
pair, as in GGUF files of llama models), attention over a cache of grouped keys and values, SwiGLU.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from atlas.errors import BudgetError
from atlas.eviction import spread
from atlas.pinned import MappedArray
from experiments.make_model import Preset
from experiments.synthetic_model import SyntheticModel, find_preset

NAME = "PyTorch, layers offloaded"

_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"
_N_SLOTS = 2
_ELEMENT_BYTES = 2


@dataclass
class _Part:
    """A layer, or the output matrix.

    Attributes
    ----------
    shapes
        Of its matrices by stem, in the order in which they lie in memory.
    weights
        All of them behind each other: on the device, or in pinned host memory.
    """

    shapes: dict[str, tuple[int, int]]
    weights: Any = None
    is_resident: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def matrices(self, weights: Any) -> dict[str, Any]:
        """Views of the matrices in memory laid out like `weights`."""
        found, start = {}, 0
        for stem, (rows, columns) in self.shapes.items():
            found[stem] = weights[start : start + rows * columns].view(rows, columns)
            start += rows * columns
        return found


@dataclass
class _Slot:
    """Device memory for the part that comes next; events say when it has come, and is used up."""

    memory: Any
    has_come: Any
    is_free: Any


class TorchOffload:
    """A llama model with 16-bit weights in PyTorch, within a budget of device memory.

    Parameters
    ----------
    torch
        The module.
    device
        "cuda", or "cpu", where everything is a copy from memory to memory.
    preset
        The model's shape.
    model
        Its weights, all matrices F16.
    n_context
        Positions to have room for.
    budget_bytes
        Device memory for parts, slots, norms, keys and values; None for all that is needed.
    dtype
        "float16", or "float32" to check this loop against others.

    Attributes
    ----------
    position
        Tokens seen.
    n_resident, n_parts
        Parts that stay, and all of them.
    weight_bytes, moved_bytes
        What every token reads, and what it moves.

    Raises
    ------
    BudgetError
        If not even the slots fit the budget.
    """

    def __init__(
        self,
        torch: Any,
        device: str,
        preset: str | Preset,
        model: SyntheticModel,
        *,
        n_context: int,
        budget_bytes: int | None = None,
        dtype: str = "float16",
    ) -> None:
        self._torch, self._device = torch, device
        self._shape = shape = find_preset(preset)
        self._model = model
        self._dtype = getattr(torch, dtype)
        self._parts = [_Part(_layer_shapes(shape)) for _ in range(shape.n_layer)]
        self._parts.append(_Part({_OUTPUT: (shape.n_vocab, shape.n_embd)}))
        self._head_dim = shape.n_embd // shape.n_head
        cache = (shape.n_layer, n_context, shape.n_head_kv, self._head_dim)
        self._keys, self._values = (self._zeros(cache) for _ in range(2))
        self._norm = torch.ones(shape.n_embd, device=device)  # a synthetic model's are all ones
        self._embedding = np.empty((shape.n_vocab, shape.n_embd), np.float16)
        model.copy_blocks(_EMBEDDING, self._embedding.reshape(-1).view(np.uint8))
        self._frequencies = shape.rope_freq_base ** (
            -torch.arange(0, self._head_dim, 2, device=device, dtype=torch.float32) / self._head_dim
        )
        self._pinned: list[MappedArray] = []
        self.position = 0
        fixed = 2 * self._keys.nbytes + self._norm.nbytes
        resident = self._choose_resident(budget_bytes, fixed)
        for number, part in enumerate(self._parts):
            part.is_resident = number in resident
            part.weights = self._load(number, part)
        self.n_parts, self.n_resident = len(self._parts), len(resident)
        self._streamed = [i for i, part in enumerate(self._parts) if not part.is_resident]
        self.weight_bytes = sum(map(self._bytes, self._parts))
        self.moved_bytes = sum(self._bytes(self._parts[i]) for i in self._streamed)
        self._make_slots()

    def synchronize(self) -> None:
        """Wait for everything that is under way, copies for the next token included."""
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def close(self) -> None:
        """Let go of all memory."""
        self.synchronize()
        self._coming.clear()
        self._slots.clear()
        self._parts.clear()
        self._pinned.clear()
        if self._device == "cuda":
            self._torch.cuda.empty_cache()

    def forward(self, token: int) -> Any:
        """Logits behind a token, float32 [n_vocab] on the device."""
        torch = self._torch
        with torch.inference_mode():
            x = torch.from_numpy(self._embedding[token]).to(self._device, torch.float32)
            rotation = self._rotation()
            for number in range(self._shape.n_layer):
                weights = self._weights(number)
                x = x + self._attend(number, weights, self._normalise(x), rotation)
                h = self._normalise(x)
                gate = torch.nn.functional.silu(weights["ffn_gate"] @ h)
                x = x + (weights["ffn_down"] @ (gate * (weights["ffn_up"] @ h))).float()
                self._finish(number)
            output = self._weights(self._shape.n_layer)
            logits = (output[_OUTPUT] @ self._normalise(x)).float()
            self._finish(self._shape.n_layer)
        self.position += 1
        return logits

    # One layer

    def _normalise(self, x: Any) -> Any:
        scale = self._torch.rsqrt(x.square().mean() + self._shape.rms_norm_eps)
        return (x * scale * self._norm).to(self._dtype)

    def _rotation(self) -> tuple[Any, Any]:
        angles = self.position * self._frequencies
        return angles.cos(), angles.sin()

    def _rotate(self, x: Any, rotation: tuple[Any, Any]) -> Any:
        """Heads [n, head_dim], each pair (2 i, 2 i + 1) turned."""
        cosine, sine = rotation
        even, odd = x[:, 0::2].float(), x[:, 1::2].float()
        turned = (even * cosine - odd * sine, even * sine + odd * cosine)
        return self._torch.stack(turned, -1).flatten(1).to(self._dtype)

    def _attend(
        self, number: int, weights: dict[str, Any], h: Any, rotation: tuple[Any, Any]
    ) -> Any:
        n_head, n_head_kv = self._shape.n_head, self._shape.n_head_kv
        q = self._rotate((weights["attn_q"] @ h).view(n_head, -1), rotation)
        end = self.position + 1
        keys, values = self._keys[number], self._values[number]
        keys[self.position] = self._rotate((weights["attn_k"] @ h).view(n_head_kv, -1), rotation)
        values[self.position] = (weights["attn_v"] @ h).view(n_head_kv, -1)
        q = q.view(n_head_kv, n_head // n_head_kv, -1)  # [n_head_kv, group, head_dim]
        scores = q @ keys[:end].permute(1, 2, 0) / self._head_dim**0.5
        shares = self._torch.softmax(scores.float(), -1).to(self._dtype)
        mixed = shares @ values[:end].transpose(0, 1)
        return (weights["attn_output"] @ mixed.reshape(-1)).float()

    # Where the weights are

    def _weights(self, number: int) -> dict[str, Any]:
        """The matrices of a part, once they have come."""
        part = self._parts[number]
        if part.is_resident:
            return part.matrices(part.weights)
        slot = self._coming[0]
        if self._device == "cuda":
            self._torch.cuda.current_stream().wait_event(slot.has_come)
        return part.matrices(slot.memory)

    def _finish(self, number: int) -> None:
        """A part has been computed with: its slot is free, for the next one but one."""
        if self._parts[number].is_resident:
            return
        slot = self._coming.popleft()
        if self._device == "cuda":
            slot.is_free.record()
        self._queue_copy()

    def _queue_copy(self) -> None:
        """Queue the copy of the part that comes next into the slot whose turn it is."""
        part = self._parts[self._streamed[self._n_queued % len(self._streamed)]]
        slot = self._slots[self._n_queued % len(self._slots)]
        with self._torch.cuda.stream(self._copying) if self._copying else nullcontext():
            if self._copying:
                self._copying.wait_event(slot.is_free)
            slot.memory[: part.size].copy_(part.weights, non_blocking=True)
            if self._copying:
                slot.has_come.record()
        self._coming.append(slot)
        self._n_queued += 1

    def _make_slots(self) -> None:
        is_cuda = self._device == "cuda"
        self._copying = self._torch.cuda.Stream() if is_cuda and self._streamed else None
        size = max((self._parts[i].size for i in self._streamed), default=0)
        self._slots = [
            _Slot(
                self._torch.empty(size, device=self._device, dtype=self._dtype),
                self._torch.cuda.Event() if is_cuda else None,
                self._torch.cuda.Event() if is_cuda else None,
            )
            for _ in range(_N_SLOTS if self._streamed else 0)
        ]
        self._coming: deque[_Slot] = deque()  # slots with what comes next, in order
        self._n_queued = 0
        for _ in self._slots:
            self._queue_copy()

    def _choose_resident(self, budget_bytes: int | None, fixed: int) -> set[int]:
        """Parts that stay: all, or as many as fit beside the slots."""
        sizes = [self._bytes(part) for part in self._parts]
        if budget_bytes is None or budget_bytes >= fixed + sum(sizes):
            return set(range(len(sizes)))
        smallest = fixed + _N_SLOTS * max(sizes)
        for n in range(len(sizes) - 1, -1, -1):
            chosen = set(spread(n, len(sizes)).tolist())
            if smallest + sum(sizes[i] for i in chosen) <= budget_bytes:
                return chosen
        raise BudgetError(f"budget {budget_bytes}: {smallest} bytes are needed", smallest)

    def _load(self, number: int, part: _Part) -> Any:
        """The weights of a part, where they belong."""
        torch = self._torch
        if self._device == "cuda" and not part.is_resident:
            # PyTorch's own allocator takes a power of two.
            pinned = MappedArray(part.size, np.dtype(np.float16))
            self._pinned.append(pinned)
            host = pinned.host
        else:
            host = np.empty(part.size, np.float16)
        start = 0
        for stem, (rows, columns) in part.shapes.items():
            name = stem if stem == _OUTPUT else f"blk.{number}.{stem}.weight"
            end = start + rows * columns
            self._model.copy_blocks(name, host[start:end].view(np.uint8))
            start = end
        weights = torch.from_numpy(host).to(self._dtype)
        return weights.to(self._device) if part.is_resident else weights

    def _bytes(self, part: _Part) -> int:
        return part.size * self._dtype.itemsize

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        return self._torch.zeros(shape, device=self._device, dtype=self._dtype)


def _layer_shapes(shape: Preset) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's matrices."""
    width, n_ff = shape.n_embd, shape.n_ff
    width_kv = width // shape.n_head * shape.n_head_kv
    return {
        "attn_q": (width, width), "attn_k": (width_kv, width), "attn_v": (width_kv, width),
        "attn_output": (width, width),
        "ffn_gate": (n_ff, width), "ffn_up": (n_ff, width), "ffn_down": (width, n_ff),
    }  # fmt: skip
