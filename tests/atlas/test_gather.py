"""The data pass of a swap: copy, check, publish."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from atlas.ops import gather as gather_module
from atlas.ops import swap_state as words
from atlas.ops import warp_page
from atlas.ops.gather import check_frames, gather, publish
from atlas.ops.lru import RANK_NORMAL
from atlas.ops.paged import PageCache
from atlas.target import CpuTarget, CudaTarget, Target
from forge.pages import tag_pages
from tests import naive

SHIFT = 1
SLOTS = 1 << SHIFT
N_PAGES = 11  # six shards, the last one half full
N_SHARDS = 6
N_FRAMES = 5
POISON = 0xDEADBEEF
FILL = 0xAA  # of frames that nothing was written to


def ids(target: Target, values: list[int]) -> Any:
    return target.put(np.array(values, np.int32))


def new_model(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shards as they lie in host memory, uint8 [N_SHARDS, SLOTS, 4096], and the pages' CRC32."""
    pages = np.random.default_rng(seed).integers(0, 256, (N_SHARDS * SLOTS, 4096), dtype=np.uint8)
    crcs = tag_pages(pages[:N_PAGES])
    return pages.reshape(N_SHARDS, SLOTS, 4096), crcs


# --- pages where they lie ---

FRAME_IDS = [4, 0, 2, 1]
SHARD_IDS = [5, 1, 0, 2]


def filled_frames() -> tuple[np.ndarray, np.ndarray]:
    """Frames that hold `SHARD_IDS` in `FRAME_IDS`, and the pages' CRC32."""
    model, crcs = new_model()
    frames = np.full((N_FRAMES, SLOTS, 4096), FILL, np.uint8)
    frames[FRAME_IDS] = model[SHARD_IDS]
    return frames, crcs


def check(target: Target, frames: np.ndarray, crcs: np.ndarray) -> list[int]:
    faults = target.full(len(FRAME_IDS) * SLOTS, POISON, np.uint32)
    check_frames(
        target, target.put(frames.reshape(-1)), ids(target, FRAME_IDS), ids(target, SHARD_IDS),
        SHIFT, N_PAGES, target.put(crcs), faults,
    )  # fmt: skip
    return [int(fault) for fault in target.get(faults)]


def test_sound_pages_hold(target: Target) -> None:
    assert check(target, *filled_frames()) == [0] * 8


def test_every_kind_of_fault_is_told_apart(target: Target) -> None:
    frames, crcs = filled_frames()
    frames[4, 0, 100] ^= 1  # content: differs from tag and table
    frames[4, 1] = 0  # beyond the last page: not looked at
    frames[0, 0, 4088] ^= 1  # tag
    frames[0, 1, 4095] ^= 1  # magic
    frames[2, 0] = frames[2, 1]  # a valid page in the wrong place
    frames[1, 1] = 0
    faults = check(target, frames, crcs)
    assert faults == naive.page_faults(frames, FRAME_IDS, SHARD_IDS, SLOTS, crcs)
    assert faults == [5, 0, 1, 2, 4, 0, 0, 7]


@pytest.mark.parametrize("offset", [0, 1, 4087, 4088, 4091, 4092, 4095])
def test_any_flipped_bit_is_found(target: Target, offset: int) -> None:
    frames, crcs = filled_frames()
    frames[2, 1, offset] ^= 0x80
    assert [i for i, fault in enumerate(check(target, frames, crcs)) if fault] == [5]


def test_a_shard_in_the_frame_of_another_is_found(target: Target) -> None:
    frames, crcs = filled_frames()
    frames[[0, 2]] = frames[[2, 0]]
    assert check(target, frames, crcs) == [0, 0, 4, 4, 4, 4, 0, 0]


def test_nothing_to_check(target: Target) -> None:
    frames = target.full(SLOTS * 4096, FILL, np.uint8)
    empty, faults = ids(target, []), target.empty(0, np.uint32)
    page_crc32 = target.full(N_PAGES, 0, np.uint32)
    check_frames(target, frames, empty, empty, SHIFT, N_PAGES, page_crc32, faults)
    assert (target.get(frames) == FILL).all()


def test_checks_beside_each_other() -> None:
    """The prefetcher checks on a thread of its own while another swap checks."""
    frames, crcs = filled_frames()
    target = CpuTarget()
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(check(target, frames, crcs)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[0] * 8] * 4


def test_wrong_arrays_are_refused(target: Target) -> None:
    frames = target.full(SLOTS * 4096, 0, np.uint8)
    one, two = ids(target, [0]), ids(target, [0, 1])
    crcs = target.full(N_PAGES, 0, np.uint32)
    faults = target.full(SLOTS, 0, np.uint32)
    with pytest.raises(ValueError, match="no whole number of frames"):
        check_frames(target, frames[:4096], one, one, SHIFT, N_PAGES, crcs, faults)
    with pytest.raises(ValueError, match="shard_ids has shape"):
        check_frames(target, frames, one, two, SHIFT, N_PAGES, crcs, faults)
    with pytest.raises(ValueError, match="page_crc32 has shape"):
        check_frames(target, frames, one, one, SHIFT, N_PAGES + 1, crcs, faults)
    with pytest.raises(ValueError, match="faults has shape"):
        check_frames(target, frames, two, two, SHIFT, N_PAGES, crcs, faults)


# --- pools of the host's ---


class Tables:
    """Six shards in four frames: shard 1 in frame 0, 4 in frame 2; frames 1 and 3 are free."""

    def __init__(self) -> None:
        self.target = CpuTarget()
        self.table = ids(self.target, [-1, 0, -1, -1, 2, -1])
        self.frame_shard = ids(self.target, [1, -1, 4, -1])
        self.ticks = np.array([10, 11, 12, 13], np.int64)

    def publish(self, victims: list[int], frame_ids: list[int], shard_ids: list[int]) -> None:
        publish(
            self.target, self.table, self.frame_shard, self.ticks, ids(self.target, victims),
            ids(self.target, frame_ids), ids(self.target, shard_ids), 99,
        )  # fmt: skip

    def state(self) -> tuple[list[int], list[int], list[int]]:
        return self.table.tolist(), self.frame_shard.tolist(), self.ticks.tolist()


def test_publish_releases_and_enters() -> None:
    tables = Tables()
    tables.publish([0], [3, 1], [5, 0])
    assert tables.state() == ([1, -1, -1, -1, 2, 3], [-1, 0, 4, 5], [10, 99, 12, 99])


def test_publish_may_fill_the_frame_it_releases() -> None:
    tables = Tables()
    tables.publish([0, 2], [2], [1])
    assert tables.state() == ([-1, 2, -1, -1, -1, -1], [-1, -1, 1, -1], [10, 11, 99, 13])


def test_publish_leaves_a_shard_that_has_moved() -> None:
    tables = Tables()
    tables.publish([], [3], [1])
    tables.publish([0], [], [])
    assert tables.state() == ([-1, 3, -1, -1, 2, -1], [-1, -1, 4, 1], [10, 11, 12, 99])


def test_publish_of_a_free_victim_or_of_nothing_changes_nothing() -> None:
    tables = Tables()
    before = tables.state()
    tables.publish([1], [], [])
    tables.publish([], [], [])
    assert tables.state() == before


def test_publish_refuses_what_it_is_not_for() -> None:
    two, one = np.zeros(2, np.int32), np.zeros(1, np.int32)
    with pytest.raises(TypeError, match="ticks has dtype int32"):
        publish(CpuTarget(), two, two, two, one, one, one, 0)


def test_publish_is_not_for_the_device(cuda_target: CudaTarget) -> None:
    two, one = np.zeros(2, np.int32), np.zeros(1, np.int32)
    with pytest.raises(TypeError, match="not for target cuda"):
        publish(cuda_target, two, two, np.zeros(2, np.int64), one, one, one, 0)


# --- gather ---


class Pool:
    """A pool on a GPU in front of host memory; shard 0 is resident in frame 3, shard 1 in 1."""

    def __init__(self, target: CudaTarget) -> None:
        self.target = target
        model, self.crcs = new_model()
        self.memory = target.mapped(model.size, np.uint8)
        self.host = self.memory.host.reshape(model.shape)
        self.host[...] = model
        contents = np.full((N_FRAMES, SLOTS, 4096), FILL, np.uint8)
        contents[[3, 1]] = model[[0, 1]]
        frames = target.put(contents.reshape(-1))
        table = ids(target, [3, 1, -1, -1, -1, -1])
        self.cache = PageCache(frames, table, SHIFT, frames.view(np.uint32))
        self.page_crc32 = target.put(self.crcs)
        self.fault = target.mapped(words.N_FAULT, np.uint32)
        self.fault.host[:] = 0
        self.swap = words.new_swap_state(
            target, N_FRAMES, np.full(N_SHARDS, RANK_NORMAL, np.uint8),
            target.full(N_SHARDS, 0, np.uint64), self.fault,
        )  # fmt: skip

    def record(
        self, number: int, incoming: list[int], frames: list[int], outgoing: list[int]
    ) -> None:
        """Write what a select would have, as record `number`."""
        first = number % words.N_RECORDS * words.MAX_INCOMING
        addresses = [self.memory.address + shard * SLOTS * 4096 for shard in incoming]
        for array, values in (
            (self.swap.incoming, incoming),
            (self.swap.frames, frames),
            (self.swap.outgoing, outgoing),
            (self.swap.sources, addresses),
        ):
            part = array[first : first + len(values)]
            self.target.write(part, np.array(values, array.dtype))
        counts = self.counts()
        counts[number % words.N_RECORDS, [words.N_IN, words.N_OUT]] = len(incoming), len(outgoing)
        self.target.write(self.swap.counts, counts.reshape(-1))

    def gather(self, blocks: int = 2, are_there: bool = False) -> None:
        gather(
            self.target, self.swap, self.cache, self.page_crc32, N_PAGES, blocks,
            are_there=are_there,
        )  # fmt: skip
        self.target.synchronize()

    def put(self, frame: int, slot: int, page: np.ndarray) -> None:
        """Write a page of a frame, uint8 [4096]."""
        start = (frame * SLOTS + slot) * 4096
        self.target.write(self.cache.frames[start : start + 4096], page)

    def counts(self) -> np.ndarray:
        return self.target.get(self.swap.counts).reshape(words.N_RECORDS, words.N_COUNTS)

    def contents(self) -> np.ndarray:
        return self.target.get(self.cache.frames).reshape(N_FRAMES, SLOTS, 4096)

    def table(self) -> list[int]:
        return self.target.get(self.cache.table).tolist()

    def gathered(self) -> int:
        return int(self.target.get(self.swap.state)[words.GATHERED])

    def pages_in(self) -> int:
        return int(self.target.get(self.swap.state)[words.PAGES_IN])

    def assert_gathers_as_told(
        self, number: int, swap: tuple[list[int], list[int], list[int]], blocks: int
    ) -> None:
        """Write a record, gather it, and compare with the oracle."""
        before = self.pages_in()
        frames, table, bad = naive.gather(self.contents(), self.table(), self.host, swap, self.crcs)
        assert bad == []
        self.record(number, *swap)
        self.gather(blocks)
        assert self.table() == table
        np.testing.assert_array_equal(self.contents(), frames)
        assert self.gathered() == number + 1
        moved = sum(min(SLOTS, N_PAGES - shard * SLOTS) for shard in swap[0])
        assert self.pages_in() == before + moved
        assert self.fault.host.tolist() == [0] * words.N_FAULT
        assert not self.counts()[:, words.BLOCKS_DONE].any()


@pytest.fixture
def pool(cuda_target: CudaTarget) -> Pool:
    return Pool(cuda_target)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("threads", [32, 64])
def test_a_record_comes_true(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, blocks: int, threads: int
) -> None:
    monkeypatch.setattr(gather_module, "PAGE_THREADS", threads)
    pool.assert_gathers_as_told(0, ([4, 2, 5], [0, 4, 2], [1]), blocks)


def test_nothing_comes_in(pool: Pool) -> None:
    pool.assert_gathers_as_told(0, ([], [], []), 2)
    pool.assert_gathers_as_told(1, ([], [], [1, 0]), 2)


def test_what_lies_beyond_the_last_page_is_not_read(pool: Pool) -> None:
    pool.host[5, 1] = 0
    pool.assert_gathers_as_told(0, ([5], [2], []), 1)
    assert (pool.contents()[2, 1] == FILL).all()


def test_a_shard_that_goes_and_comes_stays(pool: Pool) -> None:
    pool.assert_gathers_as_told(0, ([1, 3], [0, 2], [0, 1]), 1)


def test_records_follow_each_other_around_the_ring(pool: Pool) -> None:
    n = words.N_RECORDS + 2
    for number in range(n):
        shard, gone = 2 + number % 3, 2 + (number - 1) % 3
        pool.assert_gathers_as_told(
            number, ([shard], [(0, 2, 4)[number % 3]], [gone] if number else []), 1
        )
    assert pool.gathered() == n


def test_gathers_run_one_after_the_other(pool: Pool) -> None:
    """Queued before the first has run, on a stream of its own."""
    pool.record(0, [2], [0], [])
    pool.record(1, [3], [2], [0])
    pool.record(2, [4], [3], [2])
    stream = type(pool.target)().stream
    for _ in range(3):
        gather(pool.target, pool.swap, pool.cache, pool.page_crc32, N_PAGES, 1, stream)
    pool.target.synchronize()
    assert pool.table() == [-1, 1, -1, 2, 3, -1]
    np.testing.assert_array_equal(pool.contents()[[2, 3]], pool.host[[3, 4]])


def flip_bit(where: range) -> Callable[[Pool], None]:
    def damage(pool: Pool) -> None:
        rng = np.random.default_rng(where.start)
        pool.host[4, rng.integers(SLOTS), rng.choice(where)] ^= 1 << rng.integers(8)

    return damage


def swap_pages(pool: Pool) -> None:
    """Another page of the same shard, valid in its own place."""
    pool.host[4, 0] = pool.host[4, 1]


def serve_another_shard(pool: Pool) -> None:
    pool.host[4, :] = pool.host[2, :]


def serve_stale_page(pool: Pool) -> None:
    """Another version of the page, valid in itself."""
    pool.host[4, 1, 1000] ^= 255
    tag_pages(pool.host[4, 1:])


def lose_page(pool: Pool) -> None:
    pool.host[4, 1] = 0


DAMAGES = {
    "content": flip_bit(range(0, 2000)),
    "end of content": flip_bit(range(4080, 4088)),
    "tag": flip_bit(range(4088, 4092)),
    "magic": flip_bit(range(4092, 4096)),
    "swapped": swap_pages,
    "misplaced": serve_another_shard,
    "stale": serve_stale_page,
    "lost": lose_page,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_bad_page_publishes_nothing(pool: Pool, damage: str, blocks: int) -> None:
    swap = [2, 4, 5], [0, 2, 4], [1]
    sound = pool.host.copy()
    DAMAGES[damage](pool)
    contents, table = pool.contents(), pool.table()
    bad = naive.gather(contents, table, pool.host, swap, pool.crcs)[2]
    assert bad
    pool.record(0, *swap)
    pool.gather(blocks)

    kind, *found = pool.fault.host.tolist()
    assert kind == words.FAULT_PAGE
    assert tuple(found) in bad
    assert pool.target.get(pool.swap.failed)[0] != 0
    pool.host[...] = sound  # too late
    pool.gather(blocks)
    assert pool.table() == table
    np.testing.assert_array_equal(pool.contents()[[1, 3]], contents[[1, 3]])
    assert pool.gathered() == pool.pages_in() == 0
    assert pool.fault.host.tolist() == [kind, *found]
    assert not pool.counts()[:, words.BLOCKS_DONE].any()


def test_pages_that_are_there_are_checked_where_they_lie(pool: Pool) -> None:
    for shard, frame in ((4, 2), (5, 0)):
        for slot in range(SLOTS):
            pool.put(frame, slot, pool.host[shard, slot])
    contents = pool.contents()
    pool.host[...] = FILL
    pool.record(0, [4, 5], [2, 0], [1])
    pool.gather(are_there=True)
    assert pool.fault.host[words.FAULT_KIND] == 0
    assert pool.table() == [3, -1, -1, -1, 2, 0]
    assert pool.gathered() == 1
    np.testing.assert_array_equal(pool.contents(), contents)


def test_a_page_that_came_damaged_is_read_from_host_memory(pool: Pool) -> None:
    for slot in range(1, SLOTS):
        pool.put(2, slot, pool.host[4, slot])
    pool.put(2, 0, pool.host[4, 0] ^ 1)
    pool.record(0, [4], [2], [])
    pool.gather(are_there=True)
    assert pool.fault.host[words.FAULT_KIND] == 0
    assert pool.table()[4] == 2
    np.testing.assert_array_equal(pool.contents()[2], pool.host[4])


def test_a_page_that_is_damaged_in_host_memory_too_publishes_nothing(pool: Pool) -> None:
    pool.host[4, 0, 0] ^= 1
    for slot in range(SLOTS):
        pool.put(2, slot, pool.host[4, slot])
    pool.record(0, [4], [2], [1])
    pool.gather(are_there=True)
    assert pool.fault.host[: words.FAULT_NUMBER + 1].tolist() == [words.FAULT_PAGE, 4 * SLOTS]
    assert pool.table() == [3, 1, -1, -1, -1, -1]
    assert pool.gathered() == 0


def test_goes_on_once_the_fault_is_cleared(pool: Pool) -> None:
    pool.host[4, 0, 0] ^= 1
    pool.record(0, [4], [2], [])
    pool.gather()
    words.replan(pool.target, pool.swap, pool.cache.table)
    pool.host[4, 0, 0] ^= 1
    pool.assert_gathers_as_told(0, ([4], [2], []), 2)


def test_nothing_is_done_after_a_fault_of_a_select(pool: Pool) -> None:
    pool.record(0, [4], [2], [0])
    pool.fault.host[:] = words.FAULT_ROOM, 3, 0, 0
    pool.target.write(pool.swap.failed, np.ones(1, np.int32))
    contents, table = pool.contents(), pool.table()
    pool.host[4, 0, 0] ^= 1
    pool.gather()
    assert pool.table() == table
    np.testing.assert_array_equal(pool.contents(), contents)
    assert pool.gathered() == 0
    assert pool.fault.host.tolist() == [words.FAULT_ROOM, 3, 0, 0]


def test_a_bit_that_flips_on_the_way_is_read_again(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pool.target.name != "cuda-simulator":
        pytest.skip("only the simulator's loads can be made to fail")
    sound_load, bad_address = warp_page.load16_once_at, pool.memory.address + 4 * SLOTS * 4096

    def failing_load(address: int) -> tuple[Any, ...]:
        four = sound_load(address)
        return (four[0] ^ np.uint32(4), *four[1:]) if int(address) == bad_address else four

    monkeypatch.setattr(warp_page, "load16_once_at", failing_load)
    pool.assert_gathers_as_told(0, ([4, 5], [2, 0], [1]), 1)


def test_gather_refuses_what_it_cannot_do(pool: Pool) -> None:
    arguments = pool.swap, pool.cache, pool.page_crc32
    with pytest.raises(TypeError, match="gather needs a CUDA target, not cpu"):
        gather(CpuTarget(), *arguments, N_PAGES, 1)
    with pytest.raises(ValueError, match="gather: 0 blocks"):
        gather(pool.target, *arguments, N_PAGES, 0)
    with pytest.raises(ValueError, match="page_crc32 has shape"):
        gather(pool.target, *arguments, N_PAGES + 1, 1)
