"""Swaps of a GPU's cache, queued: the host says what is wanted, kernels do it in stream order.

    planning stream    select: which of the wanted shards are missing, and what makes room
    copying stream     copies by the copy engine, if shards are to come so (`atlas.copy_queue`)
    moving stream      gather: copy, check, publish; behind the compute that used what makes room
    compute stream     behind the gather that brought the last shard it needs

Shards that lie in host memory for good need no more of the host. For others (`atlas.host_tier`) it
waits for the record of the select, and reads what is missing from the file. Copies want the record,
too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numba import config

from atlas.copy_queue import CopyQueue
from atlas.host_store import FileStore
from atlas.host_tier import HostTier
from atlas.ops.gather import gather
from atlas.ops.paged import PageCache
from atlas.ops.scrub import N_CURSOR, scrub
from atlas.ops.select import select
from atlas.ops.swap_state import (
    FAULT_CRC,
    FAULT_KIND,
    FAULT_NUMBER,
    FAULT_PAGE,
    FAULT_SCRUB,
    GATHERED,
    LOG_BYTES,
    MAX_INCOMING,
    N_FAULT,
    N_RECORDS,
    TICK,
    Record,
    new_swap_state,
    read_record,
    replan,
)
from atlas.target import CudaTarget
from forge.errors import GGUFShardError
from forge.pages import PAGE_BYTES

#: Blocks of a gather. Each has sixteen pages on the way: two blocks have what a bus of 64 GB/s with
#: 2 us of latency holds. An H100 reads 3 to 5 % more with sixteen than with eight, and with 32 no
#: more; the other processors of a card are left to compute.
GATHER_BLOCKS = 1 if config.ENABLE_CUDASIM else 16
#: And if copies have brought the pages, which device memory gives much faster.
CHECK_BLOCKS = 1 if config.ENABLE_CUDASIM else 32
_N_EVENTS = 64  # gathers to put compute behind; behind a later one than needed if it is longer ago
_N_SPARE = 4  # events beyond. A loan's may be recorded anew even so: it then comes back later
#: Whether shards are copied unless `SwapQueue.copy_shards` says so. Beside an H100 7B within 2.8 GB
#: gave 3.4 and 4.2 tokens/s in two runs with copies, and 4.0 to 4.2 in three without.
ARE_COPIED = False
_N_LISTS = 1 << 16
_LIST_NUMBERS = 1 << 12  # of lists that do not count upwards, together
LIST_BYTES = 4 * _LIST_NUMBERS


class SwapQueue:
    """Selects and gathers on their streams.

    Parameters
    ----------
    target
        The GPU.
    store
        The file.
    pages
        Frames and table, the latter all -1.
    host
        The tier that shards come from.
    ranks
        uint8 [n_shards], the order in which shards are given up.
    newest_first
        Direction of the policy.

    Attributes
    ----------
    state
        What the kernels work on (`atlas.ops.swap_state`).
    tick
        Selects queued so far.
    is_settled
        bool [n_shards]: those that are on the device, and that no select gives up. Where they lie
        in host memory is of no interest.
    """

    def __init__(
        self,
        target: CudaTarget,
        store: FileStore,
        pages: PageCache,
        host: HostTier,
        ranks: np.ndarray,
        newest_first: bool,
    ) -> None:
        n_shards = len(ranks)
        self.target = target
        self.store = store
        self.pages = pages
        self.host = host
        self.newest_first = newest_first
        self.tick = 0
        self.is_settled = np.zeros(n_shards, np.bool_)
        self._page_crc32 = target.put(store.model.page_crc32)
        self._numbers = target.put(np.arange(n_shards, dtype=np.int32))
        self._fault = target.mapped(N_FAULT, np.uint32)
        self._fault.host[:] = 0
        self._host_address = target.put(np.zeros(n_shards, np.uint64))
        n_frames = max(pages.frames.size // store.shard_bytes, 1)
        self.state = new_swap_state(target, n_frames, ranks, self._host_address, self._fault)
        self._cursor = target.full(N_CURSOR, 0, np.int64)
        self._planning, self._moving = target.new_stream(), target.new_stream()
        self._log = target.mapped(LOG_BYTES // 4, np.int32)
        self._copies: CopyQueue | None = None
        self.copy_shards(ARE_COPIED)
        # To make an event takes longer than all else that is done with it.
        self._planned, self._used, self._copied = (target.event() for _ in range(3))
        self._events = cycle([target.event() for _ in range(_N_EVENTS + _N_SPARE)])
        self._gathered: deque[tuple[int, Any]] = deque(maxlen=_N_EVENTS)  # the latest gathers
        self._waited = -1  # compute is behind the gather of this tick
        self._loans: deque[tuple[Any, list[int]]] = deque()
        self._lists: dict[tuple[int, ...], Any] = {}
        self._listed = target.empty(_LIST_NUMBERS, np.int32)
        self._n_listed = 0

    def copy_shards(self, are_copied: bool) -> None:
        """Choose how shards come: copied by the engine, or read by the kernel that checks them.
        Nothing may be under way.

        Raises
        ------
        GGUFShardError
            If there is a fault, of which whoever fetches the next result has to be told; until then
            it is not known what copies have fallen upon.
        """
        if self.has_fault:
            raise GGUFShardError("a page has failed its check, which nobody has been told yet")
        self._copies = None
        if are_copied:
            self._copies = CopyQueue(self.target, self.pages, self.store.shard_bytes)
            self._copies.reset(self.target.fetch(self.pages.table))

    @property
    def are_copied(self) -> bool:
        """Whether shards are copied."""
        return self._copies is not None

    def publish_addresses(self) -> None:
        """Tell the kernels which shards lie in host memory for good."""
        self.target.write(self._host_address, self.host.addresses)

    def expect(self, page_crc32: np.ndarray) -> None:
        """Let pages have other CRCs from now on, uint32 [n_pages]; nothing may be under way."""
        self.target.write(self._page_crc32, page_crc32)

    @property
    def has_fault(self) -> bool:
        """Whether `take_fault` would return an error."""
        return bool(self._fault.host[FAULT_KIND])

    def compute_so_far(self) -> Any:
        """All compute that has been launched until now, or until the last call of this: there is
        one event."""
        self._used.record(self.target.stream)
        return self._used

    def queue(self, shards: Sequence[int], kind: int, lag: int, n_kept_free: int, used: Any) -> int:
        """Queue one select and its gather.

        Parameters
        ----------
        shards
            What is wanted, at most `MAX_INCOMING`.
        kind
            What it is counted as (`atlas.ops.select`).
        lag
            Whatever was wanted by the `lag` selects before this one is not given up.
        n_kept_free
            Frames that are to be free behind it.
        used
            The compute that must be over before anything is given up.

        Returns
        -------
        int
            The tick of the select, for `put_compute_behind`.
        """
        tick = self.tick
        self.tick += 1
        if len(self._gathered) >= N_RECORDS:
            self._gathered[-N_RECORDS][1].wait(self._planning)  # its record is overwritten
        select(
            self.target, self.state, self._list(shards), lag, n_kept_free, self.newest_first, kind,
            self._planning,
        )  # fmt: skip
        lent = self._help(shards, tick)
        self._planned.record(self._planning)
        self._planned.wait(self._moving)
        used.wait(self._moving)
        gather(
            self.target, self.state, self.pages, self._page_crc32, self.store.n_pages,
            CHECK_BLOCKS if self.are_copied else GATHER_BLOCKS, self._moving, self.are_copied,
        )  # fmt: skip
        gathered = next(self._events)
        gathered.record(self._moving)
        self._gathered.append((tick, gathered))
        if lent:
            self._loans.append((gathered, lent))
        return tick

    def put_compute_behind(self, tick: int) -> None:
        """Let what is launched from now on wait for the gather of a tick."""
        if tick > self._waited:
            self._waited = self._put_behind(self.target.stream, tick)

    def _put_behind(self, stream: Any, tick: int) -> int:
        """Let a stream wait for the gather of a tick, or a later one, and say which."""
        for gathered_tick, event in self._gathered:
            if gathered_tick >= tick:
                event.wait(stream)
                return gathered_tick
        return tick

    def scrub(self, n_pages: int) -> None:
        """Queue a check of the next `n_pages` pages of the pool, between gathers."""
        scrub(
            self.target, self.state, self.pages, self._page_crc32, self.store.n_pages, n_pages,
            self._cursor, GATHER_BLOCKS, self._moving,
        )  # fmt: skip

    def take_fault(self) -> GGUFShardError | None:
        """What a swap has found, as an error, once; None if all is well. Behind a fault all that is
        queued does nothing until `recover`."""
        if not self.has_fault:
            return None
        words = (FAULT_KIND, FAULT_NUMBER, FAULT_CRC)
        kind, number, crc32 = (int(self._fault.host[word]) for word in words)
        self.target.synchronize()
        self._fault.host[:] = 0
        if kind == FAULT_PAGE:
            return self.store.corrupt_page(number, self._found(number))
        if kind == FAULT_SCRUB:
            return self.store.corrupt_page(number, self._take_out(number, crc32))
        return GGUFShardError(f"the pool has no room for shard {number} beside those in use")

    def recover(self) -> None:
        """Plan anew from what is published; nothing may be under way."""
        table = self._published()
        replan(self.target, self.state, self.pages.table)
        self.tick = int(self.target.fetch(self.state.state)[TICK])
        self._waited = self.tick - 1
        self.is_settled &= table >= 0
        self._gathered.clear()
        while self._loans:
            self.host.take_back(self._loans.popleft()[1])

    def _published(self) -> np.ndarray:
        """The table, with nothing under way and without shards that copies have fallen upon."""
        table = self.target.fetch(self.pages.table)
        if self._copies is not None:
            table[self._is_overwritten(table)] = -1
            self.target.write(self.pages.table, table)
            self._copies.reset(table)
        return table

    def _is_overwritten(self, table: np.ndarray) -> np.ndarray:
        """bool [n_shards]: those that are published, but that copies have fallen upon."""
        if self._copies is None:
            return np.zeros(len(table), np.bool_)
        gathered = int(self.target.fetch(self.state.state)[GATHERED])
        return self._copies.overwritten(table, gathered)

    def _help(self, shards: Sequence[int], tick: int) -> list[int]:
        """Do the host's part of a swap, if it has one, before its gather; returns the shards that
        are lent for it."""
        wanted = list(shards)
        is_at_hand = self.is_settled[wanted] | (self.host.addresses[wanted] != 0)
        if self._copies is None and is_at_hand.all():
            return []
        while len(self._loans) > 1:
            event, lent = self._loans.popleft()
            event.synchronize()
            self.host.take_back(lent)
        record = self._await_record(tick)
        if record is None:
            return []
        sources = self.host.addresses[record.incoming]
        lent = [s for s in record.incoming if not self.host.addresses[s]]
        if lent:
            sources[sources == 0] = self.host.lend(lent)
        try:
            self._bring(record, sources, bool(lent))
        except BaseException:
            self.target.synchronize()
            self.host.take_back(lent)
            raise
        return lent

    def _bring(self, record: Record, sources: np.ndarray, are_new: bool) -> None:
        """Tell the device where shards lie, uint64 [n], if it does not know; and queue copies."""
        if are_new:
            first = record.tick % N_RECORDS * MAX_INCOMING
            place = self.state.sources[first : first + len(sources)]
            place.copy_to_device(sources, stream=self._planning)
            self._planning.synchronize()
        if self._copies is not None:
            self._copies.copy(record, sources.tolist(), self._put_behind)
            self._copied.record(self._copies.stream)
            self._copied.wait(self._moving)

    def _await_record(self, tick: int) -> Record | None:
        """What the select of a tick, the latest, has decided; None if it does nothing."""
        log = self.target.address(self.state.state)
        self.target.copy(self._log.address, log, LOG_BYTES, self._planning)
        self._planning.synchronize()
        return read_record(self._log.host, tick)

    def _list(self, shards: Sequence[int]) -> Any:
        """A device array of shard numbers; lists recur in every pass, and most count upwards."""
        key = tuple(shards)
        if key not in self._lists:
            if len(self._lists) == _N_LISTS:
                self._lists.clear()
            first, n = key[0], len(key)
            counts_upwards = key == tuple(range(first, first + n))
            numbers = self._numbers[first : first + n] if counts_upwards else self._write_list(key)
            self._lists[key] = numbers
        return self._lists[key]

    def _write_list(self, shards: Sequence[int]) -> Any:
        if self._n_listed + len(shards) > _LIST_NUMBERS:
            self.target.synchronize()  # selects that are queued still want the old ones
            self._lists.clear()
            self._n_listed = 0
        place = self._listed[self._n_listed : self._n_listed + len(shards)]
        self.target.write(place, np.array(shards, np.int32))
        self._n_listed += len(shards)
        return place

    def _take_out(self, page: int, crc32: int) -> np.ndarray | int:
        """A resident page that does not hold, or the CRC32 it had if it has been copied upon since;
        its shard is taken out of the table, and brought in again when it is wanted."""
        shard, slot = divmod(page, self.store.shard_pages)
        table = self.target.fetch(self.pages.table)
        is_there = not self._is_overwritten(table)[shard]
        start = (int(table[shard]) * self.store.shard_pages + slot) * PAGE_BYTES
        content = self.target.fetch(self.pages.frames[start : start + PAGE_BYTES])
        table[shard] = -1
        self.target.write(self.pages.table, table)
        return content if is_there else crc32

    def _found(self, page: int) -> np.ndarray:
        """A page that did not hold, as it is in host memory or, if it has gone from there, in the
        file."""
        there = self.host.page(page)
        if there is not None:
            return there.copy()
        shard, slot = divmod(page, self.store.shard_pages)
        buffer = np.zeros(self.store.shard_bytes, np.uint8)
        self.store.read_shard(shard, buffer)
        return buffer.reshape(-1, PAGE_BYTES)[slot]
