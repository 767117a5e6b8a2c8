"""Pages that are not what they should be: where a page lies, and how it is told.

A page holds if the CRC32 of its content equals both the tag behind the content and the table that
stands outside the page, and its magic is right: a page that is valid but stale or in the wrong
place differs from the table only. The layout of a page is that of `forge.pages`.
"""

from __future__ import annotations

import numpy as np

from atlas.ops.crc32 import content_crc32
from forge.jit import cached_njit
from forge.pages import CRC_OFFSET, MAGIC_OFFSET, MAGIC_WORD

#: Bits of an entry of `faults`; 0 is a page that holds.
TAG_FAULT = np.uint32(1)  # the content's CRC32 is not the page's tag
MAGIC_FAULT = np.uint32(2)  # the magic is wrong
TABLE_FAULT = np.uint32(4)  # the content's CRC32 is not the table's entry

CRC_WORD = CRC_OFFSET // 4
MAGIC_INDEX = MAGIC_OFFSET // 4


@cached_njit()
def page_at(number, slot, shard_shift):
    """The page in a slot: of the model for the number of a shard, of `frames` for a frame's."""
    return (np.int64(number) << shard_shift) + slot


@cached_njit()
def fault_bits(crc, tag, magic, expected):
    """What is wrong with a page whose content has CRC32 `crc`: an entry of `faults`."""
    bits = np.uint32(0)
    if crc != tag:
        bits |= TAG_FAULT
    if magic != MAGIC_WORD:
        bits |= MAGIC_FAULT
    if crc != expected:
        bits |= TABLE_FAULT
    return bits


@cached_njit()
def check_page(frames, start, expected):
    """The fault bits of the page at byte `start`."""
    words = frames.view(np.uint32)
    first = start // 4
    crc = content_crc32(frames, start)
    return fault_bits(crc, words[first + CRC_WORD], words[first + MAGIC_INDEX], expected)
