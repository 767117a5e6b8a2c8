"""Slow, obvious twins of the operations: what every target is compared with."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

# ---- cache bookkeeping: checksums, the data pass of a swap, ticks and victims ----


def crc32_pages(pages: np.ndarray) -> np.ndarray:
    """CRC32 of the first 4088 bytes of each page, by zlib: uint8 [n, 4096] -> uint32 [n]."""
    return np.array([zlib.crc32(page[:4088].tobytes()) for page in pages], np.uint32)


def page_faults(
    frames: np.ndarray,
    frame_ids: Sequence[int],
    shard_ids: Sequence[int],
    pages_per_shard: int,
    page_crc32: np.ndarray,
) -> list[int]:
    """What is wrong with each page of the named frames: 1 tag, 2 magic, 4 table, summed.

    `frames` is uint8 [n_frames, pages_per_shard, 4096]; pages beyond the table are not looked at.
    """
    faults = []
    for frame, shard in zip(frame_ids, shard_ids, strict=True):
        for slot in range(pages_per_shard):
            page = shard * pages_per_shard + slot
            if page >= len(page_crc32):
                faults.append(0)
                continue
            data = frames[frame, slot].tobytes()
            crc = zlib.crc32(data[:4088])
            fault = 0
            if crc != int.from_bytes(data[4088:4092], "little"):
                fault += 1
            if data[4092:] != b"PGCR":
                fault += 2
            if crc != page_crc32[page]:
                fault += 4
            faults.append(fault)
    return faults


def victims(
    frame_shard: Sequence[int],
    ticks: Sequence[int],
    shard_rank: Sequence[int],
    held: Sequence[int],
    count: int,
    newest_first: bool,
) -> list[int]:
    """The first `count` frames that may be given up, in the order they go: by a full sort."""
    candidates = []
    for frame, shard in enumerate(frame_shard):
        if shard >= 0 and not held[frame] and shard_rank[shard] < 255:
            age = -ticks[frame] if newest_first else ticks[frame]
            candidates.append((shard_rank[shard], age, frame))
    return [frame for _, _, frame in sorted(candidates)[:count]]


class LruCache:
    """Which shards a cache of `capacity` holds, as an `OrderedDict` with the oldest first."""

    def __init__(self, capacity: int, newest_first: bool = False) -> None:
        self.capacity = capacity
        self.newest_first = newest_first
        self.resident: OrderedDict[int, None] = OrderedDict()

    def access(self, shard: int) -> bool:
        """Use a shard, evicting another where there is no room; whether it was resident."""
        if shard in self.resident:
            self.resident.move_to_end(shard)
            return True
        if len(self.resident) == self.capacity:
            self.resident.popitem(last=self.newest_first)
        self.resident[shard] = None
        return False


# ---- compute: products, norms, positions, activations, attention; all in float64 ----


def matvec(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[n_rows, n_cols] times [n_cols], row by row."""
    return np.array([np.sum(row.astype(np.float64) * x.astype(np.float64)) for row in weights])


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Each row of [n_tokens, n] over its root mean square, times [n]."""
    x = x.astype(np.float64)
    return np.array([row / np.sqrt(np.mean(row * row) + eps) * weight for row in x])


def rope(x: np.ndarray, position: int, frequencies: np.ndarray, interleaved: bool) -> np.ndarray:
    """Pairs of [n_tokens, n_head, head_dim] as complex numbers, turned."""
    out = x.astype(np.float64)
    n_pairs = len(frequencies)
    for t in range(x.shape[0]):
        for head in range(x.shape[1]):
            for i in range(n_pairs):
                first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + n_pairs)
                pair = complex(x[t, head, first], x[t, head, second])
                pair *= np.exp(1j * (position + t) * float(frequencies[i]))
                out[t, head, first], out[t, head, second] = pair.real, pair.imag
    return out


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up."""
    gate = gate.astype(np.float64)
    return gate / (1 + np.exp(-gate)) * up


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int) -> np.ndarray:
    """Causal softmax attention, [n_tokens, n_head, head_dim] over [n_context, n_head_kv, ...]."""
    n_tokens, n_head, head_dim = q.shape
    group = n_head // keys.shape[1]
    out = np.empty(q.shape)
    for t in range(n_tokens):
        seen = slice(0, position + t + 1)
        for head in range(n_head):
            scores = keys[seen, head // group].astype(np.float64) @ q[t, head] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ values[seen, head // group] / weights.sum()
    return out
