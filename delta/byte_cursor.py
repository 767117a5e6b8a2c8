"""Numbers and strings in a patch: LEB128 integers, and reads that never pass the end.

Patches come from strangers: every count is held against the bytes that remain before anything of
that size is allocated, and whatever does not fit is refused in one line that names file, offset and
field.
"""

from __future__ import annotations

from forge.errors import GGUFShardError

_MAX_INTEGER_BYTES = 9  # 63 bits


def integer(value: int) -> bytes:
    """LEB128 of a number that is not negative: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed(value: int) -> bytes:
    """LEB128 of a number of either sign, zigzag-coded."""
    return integer(value << 1 if value >= 0 else (-value << 1) - 1)


def text(value: str) -> bytes:
    """A string behind its length; bytes that are not UTF-8 are kept as surrogate escapes say."""
    data = value.encode("utf-8", "surrogateescape")
    return integer(len(data)) + data


class ByteCursor:
    """Reads from bytes, front to back.

    Parameters
    ----------
    data
        The bytes.
    name
        What errors call the file.
    origin
        Where in the file they begin, for errors.
    """

    def __init__(self, data: bytes | memoryview, name: object, origin: int = 0) -> None:
        self.data = memoryview(data)
        self.name = name
        self.origin = origin
        self.offset = 0

    @property
    def remaining(self) -> int:
        return len(self.data) - self.offset

    def fail(self, field: str, reason: str) -> GGUFShardError:
        """The error about a field that has just been read."""
        return GGUFShardError(f"{self.name}: offset {self.origin + self.offset}: {field}: {reason}")

    def view(self, n_bytes: int, field: str) -> memoryview:
        """The next bytes, where they lie."""
        if not 0 <= n_bytes <= self.remaining:
            raise self.fail(field, f"needs {n_bytes} bytes, {self.remaining} remain")
        data = self.data[self.offset : self.offset + n_bytes]
        self.offset += n_bytes
        return data

    def take(self, n_bytes: int, field: str) -> bytes:
        """The next bytes."""
        return bytes(self.view(n_bytes, field))

    def integer(self, field: str, most: int | None = None) -> int:
        """A number, at most `most`."""
        value = 0
        for i in range(_MAX_INTEGER_BYTES):
            byte = self.take(1, field)[0]
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                break
        else:
            raise self.fail(field, f"is longer than {_MAX_INTEGER_BYTES} bytes")
        if most is not None and value > most:
            raise self.fail(field, f"{value} is more than {most}")
        return value

    def signed(self, field: str) -> int:
        """A number of either sign."""
        value = self.integer(field)
        return value >> 1 if value & 1 == 0 else -((value + 1) >> 1)

    def count(self, field: str, smallest: int = 1, most: int | None = None) -> int:
        """How many items of at least `smallest` bytes each follow; at most `most`."""
        fit = self.remaining // smallest
        return self.integer(field, fit if most is None else min(fit, most))

    def text(self, field: str, longest: int) -> str:
        """A string of at most `longest` bytes."""
        length = self.integer(f"{field} length", longest)
        return self.take(length, field).decode("utf-8", "surrogateescape")

    def end(self, field: str) -> None:
        """GGUFShardError if anything is left."""
        if self.remaining:
            raise self.fail(field, f"{self.remaining} bytes too many")
