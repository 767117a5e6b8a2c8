"""One pass over the pages of `core.gguf`: check each, digest each shard.

`shard` runs it on what it has just written, before the new file takes its place; `verify` runs it
on what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash

from forge.core_file import CoreFile, page_buffer
from forge.crc32 import crc32_pages
from forge.pages import CRC_OFFSET, MAGIC_OFFSET, MAGIC_WORD, PAGE_BYTES, page_fault
from forge.pipeline import in_order

_BATCH_PAGES = 1024

#: From pages, uint8 [n, 4096], and the table's entries, uint32 [n], to indices of what is faulty.
PageCheck = Callable[[np.ndarray, np.ndarray], np.ndarray]


def faulty_pages(pages: np.ndarray, page_crc32: np.ndarray) -> np.ndarray:
    """Indices of pages whose content, tag, magic or table entry disagree.

    Parameters
    ----------
    pages
        uint8 [n, 4096].
    page_crc32
        uint32 [n], the table's entries.
    """
    words = pages.view("<u4")
    computed = crc32_pages(pages)
    bad = computed != words[:, CRC_OFFSET // 4]
    bad |= words[:, MAGIC_OFFSET // 4] != MAGIC_WORD
    bad |= computed != page_crc32
    return np.flatnonzero(bad)


def check_pages(pages: np.ndarray, page_crc32: np.ndarray) -> tuple[int, str] | None:
    """Index and fault of the first page that does not hold; None if all do."""
    bad = faulty_pages(pages, page_crc32)
    if not bad.size:
        return None
    first = int(bad[0])
    return first, page_fault(pages[first], int(page_crc32[first])) or "does not hold"


def scan_shards(
    core: CoreFile,
    pages_per_shard: int,
    page_crc32: np.ndarray,
    report: Callable[[int, str], None],
    advance: Callable[[int], None] = lambda n_bytes: None,
    threads: int = 2,
    find_faulty: PageCheck = faulty_pages,
) -> list[str]:
    """Check every page of an open `core.gguf`.

    Parameters
    ----------
    core, pages_per_shard
        The file and the length of its shards.
    page_crc32
        uint32 [n_pages], the table.
    report
        Called with page and reason for every page that does not hold.
    advance
        Called with the bytes done, for progress bars.
    threads
        Batches in flight at once.
    find_faulty
        Finds the pages that do not hold; called by several threads at once.

    Returns
    -------
    list[str]
        xxh3-64 of each shard as it is now, hexadecimal.
    """
    batch = max(_BATCH_PAGES, pages_per_shard)

    def scan(first: int) -> tuple[int, int, list[tuple[int, str]], list[str]]:
        n = min(batch, core.n_pages - first)
        pages = page_buffer(first, n)
        core.read_pages(first, pages)
        expected = page_crc32[first : first + n]
        faults = [
            (first + int(i), page_fault(pages[i], int(expected[i])) or "does not hold")
            for i in find_faulty(pages, expected)
        ]
        digests = [
            xxhash.xxh3_64_hexdigest(pages[i : i + pages_per_shard])
            for i in range(0, n, pages_per_shard)
        ]
        return first, n, faults, digests

    def starts() -> Iterator[int]:
        yield from range(0, core.n_pages, batch)

    digests: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for _, n, faults, of_batch in in_order(pool, scan, starts(), 2 * threads):
            digests += of_batch
            for page, reason in faults:
                report(page, reason)
            advance(n * PAGE_BYTES)
    return digests
