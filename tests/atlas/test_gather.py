"""The data pass of a swap on every target: copy, check, publish."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from atlas.ops.gather import check_frames, gather_pages, publish
from atlas.target import CpuTarget, Target
from forge.pages import tag_pages
from tests import naive

SHIFT = 1
SLOTS = 1 << SHIFT
N_PAGES = 7  # four shards, the last one half full
N_FRAMES = 5
POISON = 0xDEADBEEF
FRAME_IDS = [4, 0, 2, 1]
SHARD_IDS = [3, 1, 0, 2]


@dataclass
class Swap:
    """Four shards of a model and, shard by shard, what should be brought into the frames."""

    page_crc32: np.ndarray
    staging: np.ndarray  # uint8 [m, SLOTS, 4096]

    @classmethod
    def sound(cls) -> Swap:
        model = np.random.default_rng(0).integers(0, 256, (4 * SLOTS, 4096), dtype=np.uint8)
        crcs = tag_pages(model[:N_PAGES])
        return cls(crcs, model.reshape(4, SLOTS, 4096)[SHARD_IDS].copy())

    def expected(self) -> tuple[np.ndarray, list[int]]:
        """Frames and faults after a gather into frames of 0xAA bytes."""
        frames = np.full((N_FRAMES, SLOTS, 4096), 0xAA, np.uint8)
        for i, frame in enumerate(FRAME_IDS):
            for slot in range(SLOTS):
                if SHARD_IDS[i] * SLOTS + slot < N_PAGES:
                    frames[frame, slot] = self.staging[i, slot]
        return frames, naive.page_faults(frames, FRAME_IDS, SHARD_IDS, SLOTS, self.page_crc32)

    def gather(self, target: Target) -> tuple[np.ndarray, list[int]]:
        frames = target.full(N_FRAMES * SLOTS * 4096, 0xAA, np.uint8)
        faults = target.full(len(FRAME_IDS) * SLOTS, POISON, np.uint32)
        gather_pages(
            target, frames, ids(target, FRAME_IDS), target.put(self.staging.reshape(-1)),
            ids(target, SHARD_IDS), SHIFT, N_PAGES, target.put(self.page_crc32), faults,
        )  # fmt: skip
        return target.get(frames).reshape(N_FRAMES, SLOTS, 4096), target.get(faults).tolist()

    def check(self, target: Target, frames: np.ndarray) -> list[int]:
        faults = target.full(len(FRAME_IDS) * SLOTS, POISON, np.uint32)
        check_frames(
            target, target.put(frames.reshape(-1)), ids(target, FRAME_IDS), ids(target, SHARD_IDS),
            SHIFT, N_PAGES, target.put(self.page_crc32), faults,
        )  # fmt: skip
        return [int(fault) for fault in target.get(faults)]


def ids(target: Target, values: list[int]) -> Any:
    return target.put(np.array(values, np.int32))


def test_sound_shards_arrive_and_hold(target: Target) -> None:
    swap = Swap.sound()
    frames, faults = swap.gather(target)
    expected_frames, expected_faults = swap.expected()
    np.testing.assert_array_equal(frames, expected_frames)
    assert faults == expected_faults == [0] * 8
    assert swap.check(target, frames) == expected_faults


def test_every_kind_of_fault_is_told_apart(target: Target) -> None:
    swap = Swap.sound()
    swap.staging[0, 0, 100] ^= 1  # content: differs from tag and table
    swap.staging[0, 1] = 0  # beyond the last page: not looked at
    swap.staging[1, 0, 4088] ^= 1  # tag
    swap.staging[1, 1, 4095] ^= 1  # magic
    swap.staging[2, 0] = swap.staging[2, 1]  # a valid page in the wrong place
    swap.staging[3, 1] = 0
    frames, faults = swap.gather(target)
    expected_frames, expected_faults = swap.expected()
    assert faults == expected_faults == [5, 0, 1, 2, 4, 0, 0, 7]
    np.testing.assert_array_equal(frames, expected_frames)
    assert swap.check(target, frames) == expected_faults


@pytest.mark.parametrize("offset", [0, 1, 4087, 4088, 4091, 4092, 4095])
def test_any_flipped_bit_is_found(target: Target, offset: int) -> None:
    swap = Swap.sound()
    swap.staging[2, 1, offset] ^= 0x80
    faults = swap.gather(target)[1]
    assert [i for i, fault in enumerate(faults) if fault] == [5]


def test_a_shard_in_the_frame_of_another_is_found(target: Target) -> None:
    swap = Swap.sound()
    frames = swap.expected()[0]
    frames[[0, 2]] = frames[[2, 0]]
    assert swap.check(target, frames) == [0, 0, 4, 4, 4, 4, 0, 0]


def test_nothing_to_check(target: Target) -> None:
    frames = target.full(SLOTS * 4096, 0xAA, np.uint8)
    empty, faults = ids(target, []), target.empty(0, np.uint32)
    page_crc32 = target.full(N_PAGES, 0, np.uint32)
    check_frames(target, frames, empty, empty, SHIFT, N_PAGES, page_crc32, faults)
    staging = target.empty(0, np.uint8)
    gather_pages(target, frames, empty, staging, empty, SHIFT, N_PAGES, page_crc32, faults)
    assert (target.get(frames) == 0xAA).all()


def test_checks_beside_each_other() -> None:
    """The prefetcher checks on a thread of its own while another swap checks."""
    swap = Swap.sound()
    target = CpuTarget()
    frames = swap.expected()[0]
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(swap.check(target, frames)))
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
    with pytest.raises(ValueError, match="staging has shape"):
        gather_pages(target, frames, one, frames[:4096], one, SHIFT, N_PAGES, crcs, faults)
    with pytest.raises(TypeError, match="ticks has dtype int32"):
        publish(target, two, two, two, one, one, one, 0)


class Tables:
    """Six shards in four frames: shard 1 in frame 0, 4 in frame 2; frames 1 and 3 are free."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.table = ids(target, [-1, 0, -1, -1, 2, -1])
        self.frame_shard = ids(target, [1, -1, 4, -1])
        self.ticks = target.put(np.array([10, 11, 12, 13], np.int64))

    def publish(self, victims: list[int], frame_ids: list[int], shard_ids: list[int]) -> None:
        publish(
            self.target, self.table, self.frame_shard, self.ticks, ids(self.target, victims),
            ids(self.target, frame_ids), ids(self.target, shard_ids), 99,
        )  # fmt: skip

    def state(self) -> tuple[list[int], list[int], list[int]]:
        arrays = (self.table, self.frame_shard, self.ticks)
        table, frame_shard, ticks = (self.target.get(array).tolist() for array in arrays)
        return table, frame_shard, ticks


def test_publish_releases_and_enters(target: Target) -> None:
    tables = Tables(target)
    tables.publish([0], [3, 1], [5, 0])
    assert tables.state() == ([1, -1, -1, -1, 2, 3], [-1, 0, 4, 5], [10, 99, 12, 99])


def test_publish_may_fill_the_frame_it_releases(target: Target) -> None:
    tables = Tables(target)
    tables.publish([0, 2], [2], [1])
    assert tables.state() == ([-1, 2, -1, -1, -1, -1], [-1, -1, 1, -1], [10, 11, 99, 13])


def test_publish_leaves_a_shard_that_has_moved(target: Target) -> None:
    tables = Tables(target)
    tables.publish([], [3], [1])
    tables.publish([0], [], [])
    assert tables.state() == ([-1, 3, -1, -1, 2, -1], [-1, -1, 4, 1], [10, 11, 12, 99])


def test_publish_of_a_free_victim_or_of_nothing_changes_nothing(target: Target) -> None:
    tables = Tables(target)
    before = tables.state()
    tables.publish([1], [], [])
    tables.publish([], [], [])
    assert tables.state() == before
