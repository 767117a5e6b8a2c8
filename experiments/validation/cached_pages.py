"""The cache: pages that come and go beside each other, and pages that are not what they should be.

    swaps beside compute    the demonstration model decodes on a small budget while other threads
                            swap, verify, scrub and read tensors: the tokens of a full pool
    in the file, open       a page of `core.gguf` is changed between two tokens
    in memory               a page is changed in the frame it lies in, and found by scrubbing
    in a swap               the same where the swap reads from: the file, or a GPU's host memory

A right answer in spite of a fault counts only if the page is not read again.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from atlas.device_cache import DeviceCache
from atlas.errors import CorruptPageError
from atlas.infer.model import LlamaModel
from atlas.manager import Atlas
from atlas.shard_cache import ShardCache
from atlas.target import Target, cuda_is_usable, select_target
from experiments.validation import gguf_factory as factory
from experiments.validation.demo_runs import Demo, Demos, answer, is_quick, opened
from experiments.validation.probe import Missed, Outcome, Probe, Unavailable, require
from experiments.validation.scene import Scene
from forge.core_file import page_offset
from forge.errors import GGUFShardError
from forge.pages import CRC_OFFSET, MAGIC_OFFSET, PAGE_BYTES
from forge.shard import ShardOptions, shard_model
from forge.verify import verify_model

SECTION = "integrity"
_TIMEOUT = 120.0  # seconds until a thread that does not end counts as a deadlock
_SHARD_PAGES = 8

_LARGE_SHARD_PAGES = 64  # reading ahead has a thread of its own
_CONFIGURATIONS = (
    (_SHARD_PAGES, "lru", 0.4),
    (_LARGE_SHARD_PAGES, "lru", 0.6),
    (_LARGE_SHARD_PAGES, "pin", 0.8),
    (_SHARD_PAGES, "mru", 0.2),
    (_LARGE_SHARD_PAGES, "mru", 0.6),
    (_SHARD_PAGES, "pin", 0.4),
    (_LARGE_SHARD_PAGES, "lru", 1.0),
    (1, "lru", 0.4),
)
_EMBEDDING, _NORM = "token_embd.weight", "blk.1.ffn_norm.weight"
_MATRICES = ("blk.0.attn_q.weight", "blk.2.ffn_down.weight", "output.weight")


def probes(scene: Scene) -> Iterator[Probe]:
    """Every probe of the cache."""
    demos = Demos(scene)
    for per_shard, policy, budget in _CONFIGURATIONS[:: 2 if is_quick(scene) else 1]:
        place = f"{policy}, {budget:.0%}, shards of {per_shard}"
        yield _probe("none: swaps beside compute", "run", place, _swap_beside_compute, demos,
                     per_shard, policy, budget)  # fmt: skip
    of_file, of_frames = (*_MATRICES, _EMBEDDING, _NORM), (*_MATRICES, _NORM)
    for number, fault in enumerate(_PAGE_FAULTS):
        for tensor in _some(of_file, number, 2 if is_quick(scene) else len(of_file)):
            yield _probe(fault, "core.gguf", f"open, {tensor}", _change_open_file, demos,
                         fault, tensor)  # fmt: skip
        for tensor in _some(of_frames, number, 2 if is_quick(scene) else len(of_frames)):
            yield _probe(fault, "frames", f"resident, {tensor}", _change_frame, demos, fault,
                         tensor)  # fmt: skip
        for name in ("cpu", "cuda"):
            yield _probe(fault, "frames", f"{name}, in a swap", _change_before_swap, scene, fault,
                         name)  # fmt: skip


def _some(names: Sequence[str], first: int, count: int) -> list[str]:
    """So many of them, others for every `first`."""
    return [names[(first * count + i) % len(names)] for i in range(count)]


def _probe(
    fault: str, artefact: str, place: str, work: Callable[..., Outcome], *args: object
) -> Probe:
    return Probe(SECTION, fault, artefact, place, functools.partial(work, *args))


# ---- swaps beside compute ----


def _swap_beside_compute(demos: Demos, per_shard: int, policy: str, budget: float) -> Outcome:
    known = demos.of(per_shard)
    with opened(known.map_path, policy, budget, prefetch_distance=8) as model:
        atlas = model.atlas
        work = {
            "swap": _swaps(atlas, random.Random(demos.scene.seed)),
            "verify": lambda: require(verify_model(known.map_path).ok, "verify finds damage"),
            "scrub": lambda: atlas.scrub(16),
            "tensor": _reading(atlas, _MATRICES[1]),
        }
        with _beside(work) as counts:
            for _ in range(3):
                require(answer(model, known.prompt) == known.tokens, "other tokens")
        require(min(counts.values()) > 0, f"somebody has done nothing: {counts}")
        require(answer(model, known.prompt) == known.tokens, "other tokens afterwards")
        _require_frames_of_file(atlas)
    return Outcome.HARMLESS


def _swaps(atlas: Atlas, draw: random.Random) -> Callable[[], None]:
    def swap() -> None:
        wanted = draw.sample(atlas.shards.schedule, draw.randint(1, 3))
        try:
            atlas.atomic_swap(wanted)
        except GGUFShardError as error:  # more than there is room for beside the band in use
            require("shards to bring in at once" in str(error), str(error))

    return swap


def _reading(atlas: Atlas, tensor: str) -> Callable[[], None]:
    expected = np.array(atlas.tensor(tensor))

    def read() -> None:
        require(np.array_equal(atlas.tensor(tensor), expected), f"{tensor}: other values")
        row = atlas.rows(atlas.matrix(tensor), [7])[0]
        require(np.array_equal(row, expected[7]), f"{tensor}: another row")

    return read


@contextmanager
def _beside(work: dict[str, Callable[[], None]]) -> Iterator[dict[str, int]]:
    """Do everything again and again, on a thread each, while this is entered; counts how often.

    Raises
    ------
    Missed
        If something goes wrong on a thread, or one does not end.
    """
    counts = dict.fromkeys(work, 0)
    errors: list[str] = []
    stop = threading.Event()

    def repeat(name: str) -> None:
        try:
            while not (stop.is_set() and counts[name]):
                work[name]()
                counts[name] += 1
        except Exception as error:
            errors.append(f"{name}: {error}")

    threads = [threading.Thread(target=repeat, args=(name,), daemon=True) for name in work]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join(_TIMEOUT)
    if errors or any(thread.is_alive() for thread in threads):
        raise Missed(errors[0] if errors else "a thread does not end: deadlock")


def _require_frames_of_file(atlas: Atlas) -> None:
    """Every resident shard is what the file holds of it."""
    table, frames = atlas.target.get(atlas.cache.table), atlas.target.get(atlas.cache.frames)
    for shard in np.flatnonzero(table >= 0).tolist():
        first = shard * atlas.map.pages_per_shard
        count = min(atlas.map.pages_per_shard, atlas.map.n_pages - first)
        expected = atlas.model.read_checked(first, count).reshape(-1)
        found = frames[table[shard] * atlas.shard_bytes :][: expected.size]
        require(np.array_equal(found, expected), f"shard {shard}: its frame is not what it was")


# ---- pages that are not what they should be ----

#: What is done to a page: from it, another page of the model, and the same page of an older
#: version, all uint8 [4096].
PageFault = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _changed(*places: tuple[int, int]) -> PageFault:
    """Some bytes of it: (place, XOR)."""

    def change(page: np.ndarray, other: np.ndarray, older: np.ndarray) -> np.ndarray:
        page = page.copy()
        for place, mask in places:
            page[place] ^= mask
        return page

    return change


_PAGE_FAULTS: dict[str, PageFault] = {
    "bit flip": _changed((1233, 0x40)),
    "tag changed": _changed((CRC_OFFSET + 1, 0x10)),
    "magic changed": _changed((MAGIC_OFFSET, 0x01)),
    "page zeroed": lambda page, other, older: np.zeros_like(page),
    "page of another place": lambda page, other, older: other,
    "page of an older version": lambda page, other, older: older,
    "torn write": lambda page, other, older: np.concatenate([older[:512], page[512:]]),
}


def read_page(map_path: Path, page: int) -> np.ndarray:
    """A page as it is in the file, uint8 [4096]."""
    with open(map_path.with_suffix(".gguf"), "rb") as core:
        core.seek(page_offset(page))
        return np.frombuffer(core.read(PAGE_BYTES), np.uint8)


def write_page(map_path: Path, page: int, content: np.ndarray) -> None:
    """Overwrite a page in the file, under its readers."""
    with open(map_path.with_suffix(".gguf"), "r+b") as core:
        core.seek(page_offset(page))
        core.write(content.tobytes())


def _damaged(fault: str, map_path: Path, older: Path, page: int, other: int) -> np.ndarray:
    pages = (read_page(map_path, page), read_page(map_path, other), read_page(older, page))
    return _PAGE_FAULTS[fault](*pages)


def _page_of(atlas: Atlas, tensor: str, row: int = 0) -> int:
    matrix = atlas.matrix(tensor)
    return matrix.pages_of_rows(row, row + 1)[0]


def _require_named(error: CorruptPageError, atlas: Atlas, page: int) -> None:
    tensor, shard = atlas.map.tensor_of_page(page), page // atlas.map.pages_per_shard
    found = (error.page, error.shard, error.tensor)
    require(found == (page, shard, tensor), f"names {found}, not {(page, shard, tensor)}")
    text = str(error)
    is_told = f"page {page} (shard {shard}, {tensor})" in text and "\n" not in text
    require(is_told, f"does not say where: {text!r}")


def _answer_through_fault(
    model: LlamaModel, known: Demo, page: int, damage: Callable[[], None]
) -> bool:
    """Answer with a fault made behind the second token; whether the page was refused.

    Raises
    ------
    Missed
        If a wrong token was handed out, or the error names another page.
    """
    told: list[int] = []

    def hear(token: int) -> None:
        told.append(token)
        if len(told) == 2:
            damage()

    try:
        answer(model, known.prompt, hear)
    except CorruptPageError as error:
        _require_named(error, model.atlas, page)
        require(told == known.tokens[: len(told)], f"tokens {told} before the error")
        return True
    require(told == known.tokens, f"tokens {told}, not {known.tokens}")
    return False


def _change_open_file(demos: Demos, fault: str, tensor: str) -> Outcome:
    known = demos.of(_LARGE_SHARD_PAGES)
    with demos.scene.copies(known.map_path) as folder:
        map_path = folder / known.map_path.name
        with opened(map_path, "lru", 0.6) as model:
            # An embedding is read for the tokens that come: here for the third.
            row = known.tokens[2] if tensor == _EMBEDDING else 0
            page = _page_of(model.atlas, tensor, row)
            right = read_page(map_path, page)
            wrong = _damaged(fault, map_path, known.older, page, page + 2)
            told = _answer_through_fault(
                model, known, page, lambda: write_page(map_path, page, wrong)
            )
            # Norms stay for good. Of all others every pass reads every page again.
            require(told != (tensor == _NORM), "a page was read and not refused")
            write_page(map_path, page, right)
            require(answer(model, known.prompt) == known.tokens, "other tokens once it is mended")
    return Outcome.DETECTED if told else Outcome.HARMLESS


def _change_frame(demos: Demos, fault: str, tensor: str) -> Outcome:
    known = demos.of(_SHARD_PAGES)
    with opened(known.map_path, "pin", 1.0, scrub_pages=1 << 20) as model:
        page = _page_of(model.atlas, tensor)
        wrong = _damaged(fault, known.map_path, known.older, page, page + 2)
        pool = _pool_of(model.atlas)
        shard, slot = divmod(page, _SHARD_PAGES)

        def put(content: np.ndarray) -> None:
            pool.frame(pool.frame_of(shard)).reshape(-1, PAGE_BYTES)[slot] = content

        told = _answer_through_fault(model, known, page, lambda: put(wrong))
        require(told, "scrubbing has not found it")
        # It is given up, unless it is in use or needed for good, and read again.
        if pool.frame_of(shard) >= 0:
            put(read_page(known.map_path, page))
        require(answer(model, known.prompt) == known.tokens, "other tokens once it is mended")
    return Outcome.DETECTED


def _pool_of(atlas: Atlas) -> Any:
    cache = atlas.shard_cache
    assert isinstance(cache, ShardCache)
    return cache.pool


# ---- swaps ----


def _dense(seed: int) -> bytes:
    """Two dozen pages of a dense model."""
    types = GGMLQuantizationType
    return factory.gguf(
        [
            factory.tensor("token_embd.weight", types.Q8_0, (32, 130), seed),
            factory.tensor("blk.0.attn_norm.weight", types.F32, (32,), seed + 1),
            factory.tensor("blk.0.attn_q.weight", types.F32, (96, 50), seed + 2),
            factory.tensor("blk.0.ffn_down.weight", types.Q8_0, (96, 390), seed + 3),
            factory.tensor("output.weight", types.Q6_K, (256, 100), seed + 4),
        ]
    )


def _change_before_swap(scene: Scene, fault: str, name: str) -> Outcome:
    if name == "cuda" and not cuda_is_usable():
        raise Unavailable("no CUDA device, and no simulator that runs warps")
    with scene.copies() as folder:
        maps = []
        for seed in (scene.seed, scene.seed + 50):
            (folder / f"{seed}").mkdir()
            source = factory.write(folder / f"{seed}" / "model.gguf", _dense(seed))
            maps.append(shard_model(source, folder / f"{seed}", ShardOptions(pages_per_shard=1)))
        target = select_target(name)
        options = {"policy": "lru", "prefetch_distance": 0}
        with Atlas.open(maps[0], "30%", target, **options) as atlas:
            return _swap_with_a_bad_page(atlas, target, maps[0], maps[1], fault)


def _swap_with_a_bad_page(
    atlas: Atlas, target: Target, map_path: Path, older: Path, fault: str
) -> Outcome:
    shards = atlas.shards.schedule
    atlas.atomic_swap(shards[:4])
    before = target.get(atlas.cache.table)
    bad = shards[7]
    put = _source_of_swaps(atlas, map_path, bad)
    right = read_page(map_path, bad)
    put(_damaged(fault, map_path, older, bad, shards[9]))
    try:
        atlas.atomic_swap([shards[5], bad, shards[6]])
    except CorruptPageError as error:
        _require_named(error, atlas, bad)
        require(error.expected == int(atlas.model.page_crc32[bad]), "another CRC was expected")
    else:
        raise Missed("a page that does not hold is resident")
    resident = [set(np.flatnonzero(t >= 0)) for t in (before, target.get(atlas.cache.table))]
    require(resident[0] == resident[1], "a swap that failed has changed what is resident")
    put(right)
    atlas.atomic_swap([shards[5], bad, shards[6]])
    require(target.get(atlas.cache.table)[bad] >= 0, "a swap of what holds is not resident")
    _require_frames_of_file(atlas)
    return Outcome.DETECTED


def _source_of_swaps(atlas: Atlas, map_path: Path, page: int) -> Callable[[np.ndarray], None]:
    """What replaces a page where swaps read it."""
    cache = atlas.shard_cache
    if not isinstance(cache, DeviceCache):
        return lambda content: write_page(map_path, page, content)
    found = cache.host.page(page)
    require(found is not None, f"page {page} is not in host memory")
    assert found is not None
    return lambda content: np.copyto(found, content)
