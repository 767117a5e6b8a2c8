"""The one exception family that a command turns into a single line and exit code 1."""

from __future__ import annotations


class GGUFShardError(ValueError):
    """Bad input or damage, said in one line that names the file, the place and the reason."""
