"""Slow, obvious twins of the operations: what every target is compared with."""

from __future__ import annotations

import math
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


def gather(
    frames: np.ndarray,
    table: Sequence[int],
    host: np.ndarray,
    swap: tuple[Sequence[int], Sequence[int], Sequence[int]],
    page_crc32: np.ndarray,
) -> tuple[np.ndarray, list[int], list[tuple[int, int, int]]]:
    """A swap of shards into frames: the frames and the table afterwards, and what did not hold.

    `host` is uint8 [n_shards, pages_per_shard, 4096], `swap` lists incoming shards, their frames,
    and outgoing shards. What did not hold is (page, fault as above, CRC32 found); if there is any,
    the table stays.
    """
    incoming, places, outgoing = swap
    frames, after, bad = frames.copy(), list(table), []
    pages_per_shard = frames.shape[1]
    for shard, frame in zip(incoming, places, strict=True):
        n = min(pages_per_shard, len(page_crc32) - shard * pages_per_shard)
        frames[frame, :n] = host[shard, :n]
        faults = page_faults(frames, [frame], [shard], pages_per_shard, page_crc32)
        for slot in range(n):
            if faults[slot]:
                crc = zlib.crc32(frames[frame, slot, :4088].tobytes())
                bad.append((shard * pages_per_shard + slot, faults[slot], crc))
    if not bad:
        for shard in outgoing:
            after[shard] = -1
        for shard, frame in zip(incoming, places, strict=True):
            after[shard] = frame
    return frames, after, bad


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


# ---- planning a swap ----


class SwapPlanner:
    """What selects plan, one after the other: a dictionary of frames and a list of free ones."""

    def __init__(self, n_frames: int, shard_rank: Sequence[int], address: Sequence[int]) -> None:
        self.shard_rank = shard_rank
        self.address = address
        self.frame_of: dict[int, int] = {}
        self.last_wanted = [0] * n_frames
        self.free = list(range(n_frames))
        self.tick = 0
        self.hits, self.misses = [0, 0, 0], [0, 0, 0]
        self.without_room: int | None = None
        self.incoming: list[tuple[int, int, int]] = []
        self.outgoing: list[int] = []

    def select(
        self, wanted: Sequence[int], lag: int, n_kept_free: int, newest_first: bool, kind: int
    ) -> bool:
        """Plan one swap, `incoming` as (shard, frame, address); whether anything was done."""
        missing = [shard for shard in wanted if shard not in self.frame_of]
        if self.without_room is None and len(missing) > len(self.free):
            self.without_room = missing[len(self.free)]
        if self.without_room is not None:
            return False
        self.hits[kind] += len(wanted) - len(missing)
        self.misses[kind] += len(missing)
        self.incoming = []
        for shard in missing:
            self.frame_of[shard] = self.free.pop(0)
            self.incoming.append((shard, self.frame_of[shard], self.address[shard]))
        for shard in wanted:
            self.last_wanted[self.frame_of[shard]] = self.tick

        candidates = []
        for shard, frame in self.frame_of.items():
            tick = self.last_wanted[frame]
            if self.shard_rank[shard] < 255 and tick < self.tick - lag:
                order = -tick if newest_first else tick
                candidates.append((self.shard_rank[shard], order, frame, shard))
        n_victims = max(n_kept_free - len(self.free), 0)
        self.outgoing = [shard for _, _, _, shard in sorted(candidates)[:n_victims]]
        for shard in self.outgoing:
            self.free.append(self.frame_of.pop(shard))
        self.tick += 1
        return True

    def replan(self, published: Sequence[int]) -> None:
        """Go on from what is published: the frame of each shard, or -1."""
        self.frame_of = {shard: frame for shard, frame in enumerate(published) if frame >= 0}
        taken = set(self.frame_of.values())
        self.free = [frame for frame in range(len(self.last_wanted)) if frame not in taken]
        self.without_room = None


# ---- compute: products, norms, positions, activations, attention; all in float64 ----


def matvec(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[n_rows, n_cols] times [n_cols], row by row."""
    return np.array([np.sum(row.astype(np.float64) * x.astype(np.float64)) for row in weights])


def tensor_core_bound(weights: np.ndarray, x: np.ndarray, is_bfloat: bool) -> np.ndarray:
    """The most that `weights` [n_rows, n_cols] times `x` [n_cols] may be off on tensor cores.

    Each weight and each value is rounded to float16, of which 2^-25 is half the smallest; x is
    rounded after a scale that takes its largest above 2^14. Or it is rounded to bfloat16, and
    bfloat16 weights are not. Sums lose two bits more than float32 has with each 16 products.
    """
    weights, x = np.abs(weights.astype(np.float64)), np.abs(x.astype(np.float64))
    products = matvec(weights, x)
    sums = weights.shape[1] / 16 * 2.0**-22 * products
    if is_bfloat:
        return 2.0**-8 * products + sums
    subnormal = 2.0**-25 * np.sum(x) + 2.0**-25 / 2.0**14 * x.max() * np.sum(weights, axis=1)
    return (2 * 2.0**-11 + 2.0**-22) * products + subnormal + sums


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


# ---- choosing tokens ----


def draw(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, uniform: float
) -> tuple[int, float]:
    """Sort, cut, cut, walk: the token, and how near to another choice `uniform` was: the smallest
    distance of a decisive sum from its bound, as a share of all weight."""
    ranked = sorted((-float(v), i) for i, v in enumerate(logits))[: top_k or None]
    best = -ranked[0][0]
    weights = [(math.exp((-v - best) / temperature), i) for v, i in ranked]
    total = sum(w for w, _ in weights)
    kept: list[tuple[float, int]] = []
    margin, reached = 1.0, 0.0
    for weight, i in weights:
        kept.append((weight, i))
        reached += weight
        margin = min(margin, abs(reached / total - top_p)) if top_p < 1 else margin
        if reached >= top_p * total:
            break
    level = uniform * sum(w for w, _ in kept)
    reached, token = 0.0, None
    for weight, i in kept:
        reached += weight
        margin = min(margin, abs(reached - level) / total)
        if token is None and reached > level:
            token = i
    assert token is not None
    return token, margin


# ---- patches: planes of bytes, ordered differences, changed bytes ----


def split_planes(
    content: bytes, block_bytes: int, planes: Sequence[tuple[int, int]]
) -> list[bytes]:
    """For each (offset, size) the bytes that lie there in a block, of all blocks in turn."""
    blocks = [content[i : i + block_bytes] for i in range(0, len(content), block_bytes)]
    return [b"".join(block[at : at + size] for block in blocks) for at, size in planes]


def in_order(bits: int, width: int, is_float: bool) -> int:
    """A pattern of `width` bits as an integer that rises with the number it stands for."""
    sign, magnitude = divmod(bits, 1 << (width - 1))
    if is_float:
        return -1 - magnitude if sign else magnitude
    return magnitude - (sign << (width - 1))


def ordered_difference(target: bytes, base: bytes, size: int, is_float: bool) -> list[int]:
    """Steps from elements of `size` bytes to others, modulo their width: 0 -1 1 -2 as 0 1 2 3."""
    steps = []
    for i in range(0, len(target), size):
        there, here = (int.from_bytes(x[i : i + size], "little") for x in (target, base))
        step = in_order(there, 8 * size, is_float) - in_order(here, 8 * size, is_float)
        step %= 1 << (8 * size)
        if step >> (8 * size - 1):
            step -= 1 << (8 * size)
        steps.append(2 * step if step >= 0 else -2 * step - 1)
    return steps


def by_exponent(base: bytes, size: int, exponent_bits: int) -> list[int]:
    """Numbers of the elements of `size` bytes, those with small exponents first."""
    patterns = [int.from_bytes(base[i : i + size], "little") for i in range(0, len(base), size)]
    exponents = [
        pattern >> (8 * size - 1 - exponent_bits) & (1 << exponent_bits) - 1 for pattern in patterns
    ]
    return sorted(range(len(patterns)), key=lambda i: exponents[i])


def small_steps(steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same steps with the low bits of the last ones taken out, and those in pairs.

    The last ones are as many blocks of 65,536, counted from the end, as have at most one in 256
    that is 16 or more; all but one if they are odd in number.
    """
    begin = len(steps)
    while begin:
        block = steps[max(begin - 65536, 0) : begin]
        if sum(step > 15 for step in block) > len(block) / 256:
            break
        begin -= len(block)
    n = (len(steps) - begin) // 2
    kept, first, second = (
        steps[: len(steps) - 2 * n],
        steps[len(steps) - 2 * n :][:n],
        steps[len(steps) - n :],
    )
    pairs = [low % 16 + 16 * (high % 16) for low, high in zip(first, second, strict=True)]
    return [*kept, *(step // 16 for step in [*first, *second])], pairs


def changed_bytes(target: bytes, base: bytes, lengths: Sequence[int]) -> list[list[int]]:
    """What a sparse group lists: changes of each page, and distance and XOR of each change."""
    counts, gaps, values = [], [], []
    start = 0
    for length in lengths:
        places = [i for i in range(length) if target[start + i] != base[start + i]]
        counts.append(len(places))
        gaps += [place - before - 1 for before, place in zip([-1, *places], places, strict=False)]
        values += [target[start + i] ^ base[start + i] for i in places]
        start += length
    return [counts, gaps, values]
