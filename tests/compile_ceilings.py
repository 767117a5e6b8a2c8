"""Ceilings of the compile gate: what a kernel may take of an architecture.

`compile_ceilings.json` has a line for every kernel and architecture: the registers of a thread and
the bytes of shared memory and of code that it took when somebody last looked and wrote them down
(`--update`), and above them the versions of what compiled it. A kernel may stay below its ceiling;
how far it may pass it is its slack:

registers   up to the next multiple of 8. A multiprocessor hands out registers 256 to a warp (CUDA
            Occupancy Calculator, "register allocation unit size"), 8 to a thread, so that up to
            there as many warps fit as before.
shared      none: the source says how much it is.
code        5 %: the bytecode of Python's versions differs, and a few instructions with it.

Other versions of Numba, NVVM or nvJitLink choose and order instructions in another way. With them
the slack is 8 registers more and 25 % of the code: enough for a compiler's taste, too little for a
loop that it suddenly unrolls or values it no longer shares.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cubin import Resources

PATH = Path(__file__).with_suffix(".json")

_COMPARED = ("registers", "shared", "code")
_REGISTER_UNIT = 8
_CODE_SLACK, _FOREIGN_CODE_SLACK = 0.05, 0.25
_TOOLS = ("llvmlite", "numba", "numba-cuda", "nvidia-nvjitlink", "nvidia-nvvm")


@dataclass(frozen=True)
class Ceiling:
    """The most that a kernel may take: registers of a thread, bytes of shared memory and code."""

    registers: int
    shared: int
    code: int

    def with_slack(self, *, same_tools: bool) -> Ceiling:
        """The ceiling and its slack."""
        units = -(-self.registers // _REGISTER_UNIT) + (0 if same_tools else 1)
        code_slack = _CODE_SLACK if same_tools else _FOREIGN_CODE_SLACK
        return Ceiling(units * _REGISTER_UNIT, self.shared, self.code + int(self.code * code_slack))


@dataclass(frozen=True)
class Ceilings:
    """All ceilings by "operation.kernel architecture", and the versions that they come from."""

    tools: Mapping[str, str]
    of: Mapping[str, Ceiling]

    def complaints(self, found: Mapping[str, Resources | None]) -> list[str]:
        """A line for everything that is not as it was written down.

        Parameters
        ----------
        found
            What was compiled; None where it failed, which is complained of elsewhere.
        """
        same_tools = self.tools == tools()
        lines = []
        for name, resources in found.items():
            if name not in self.of:
                lines.append(f"{name}: no ceiling (--update writes it)")
            elif resources is not None:
                lines += _excesses(name, resources, self.of[name], same_tools=same_tools)
        return lines + [
            f"{name}: a ceiling without a kernel (--update drops it)"
            for name in self.of
            if name not in found
        ]

    def notes(self, found: Mapping[str, Resources | None]) -> list[str]:
        """Lines about what is allowed but should be known: other versions, room to spare."""
        others = [
            f"note: {tool} {ours}, ceilings are from {self.tools.get(tool)}: more slack"
            for tool, ours in tools().items()
            if self.tools.get(tool) != ours
        ]
        if others:
            return others
        lower = sum(
            resources is not None and name in self.of and _is_lower(resources, self.of[name])
            for name, resources in found.items()
        )
        return [f"note: {lower} take less than their ceilings (--update)"] if lower else []


def _excesses(name: str, found: Resources, ceiling: Ceiling, *, same_tools: bool) -> list[str]:
    allowed = ceiling.with_slack(same_tools=same_tools)
    lines = []
    for what in _COMPARED:
        value, most, most_allowed = (getattr(r, what) for r in (found, ceiling, allowed))
        if value > most_allowed:
            lines.append(
                f"{name}: {what} {value}, {value - most} above the ceiling of {most} "
                f"({most_allowed} with its slack)"
            )
    return lines


def _is_lower(found: Resources, ceiling: Ceiling) -> bool:
    pairs = [(getattr(found, what), getattr(ceiling, what)) for what in _COMPARED]
    return all(value <= most for value, most in pairs) and any(v < most for v, most in pairs)


def tools() -> dict[str, str]:
    """Versions of what makes the code of a kernel; "none" where a package is not installed."""
    versions = {}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def read(path: Path) -> Ceilings:
    """The ceilings of a file; none if there is no file."""
    if not path.exists():
        return Ceilings(tools(), {})
    content = json.loads(path.read_text(encoding="utf-8"))
    return Ceilings(
        content["tools"],
        {name: Ceiling(**ceiling) for name, ceiling in content["ceilings"].items()},
    )


def write(path: Path, found: Mapping[str, Resources]) -> None:
    """Make what was found the ceilings: sorted, a line each, so that changes can be reviewed."""
    lines = [
        f'  {json.dumps(name)}: {{"registers": {r.registers}, "shared": {r.shared}, '
        f'"code": {r.code}}}'
        for name, r in sorted(found.items())
    ]
    path.write_text(
        f'{{\n "tools": {json.dumps(tools(), sort_keys=True)},\n "ceilings": {{\n'
        + ",\n".join(lines)
        + "\n }\n}\n",
        encoding="utf-8",
    )
