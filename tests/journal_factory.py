"""A folder with two files, and a change of both, for tests of what changes files in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.validation import gguf_factory as factory
from forge.journal import JournalWriter

#: Files of a sharded model: what is in them is all the same to a journal.
NAMES = ("core.gguf", "core.sgmap")


@dataclass(frozen=True)
class Change:
    """Sizes afterwards, and records of (file, offset, data)."""

    sizes: tuple[int, int]
    records: list[tuple[int, int, bytes]]

    def apply(self, contents: list[bytes]) -> list[bytes]:
        """What the files must hold afterwards."""
        changed = [
            bytearray(c[:n].ljust(n, b"\0")) for c, n in zip(contents, self.sizes, strict=True)
        ]
        for file, offset, data in self.records:
            changed[file][offset : offset + len(data)] = data
        return [bytes(content) for content in changed]

    def open(self, owner: Path) -> JournalWriter:
        n_bytes = sum(len(data) for _, _, data in self.records)
        return JournalWriter(owner, list(zip(NAMES, self.sizes, strict=True)), n_bytes)

    def write(self, owner: Path) -> None:
        """Record everything, and commit."""
        with self.open(owner) as writer:
            for record in self.records:
                writer.record(*record)
            writer.commit()


def set_contents(owner: Path, contents: list[bytes]) -> None:
    for name, content in zip(NAMES, contents, strict=True):
        owner.with_name(name).write_bytes(content)


def contents(owner: Path) -> list[bytes]:
    return [owner.with_name(name).read_bytes() for name in NAMES]


OLD = [factory.random_bytes(20_000, 1), factory.random_bytes(700, 2)]
#: Pages here and there, one that grows a file, the whole of the other, which shrinks.
CHANGE = Change(
    (23_000, 650),
    [
        (0, 8192, factory.random_bytes(4096, 3)),
        (0, 12288, factory.random_bytes(10, 4)),
        (0, 0, factory.random_bytes(100, 5)),
        (1, 0, factory.random_bytes(650, 6)),
        (0, 19_990, factory.random_bytes(1500, 7)),
    ],
)
NEW = CHANGE.apply(OLD)


def names(owner: Path) -> list[str]:
    return sorted(path.name for path in owner.parent.iterdir())
