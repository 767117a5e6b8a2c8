"""Protections that are taken away: each is where the list says, and the suite turns red.

`GGUF_SHARD_MUTATIONS=all` tries every one, which takes minutes; else those that are quick.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.validation.mutated_import import changed_text
from experiments.validation.mutations import MUTATIONS, Mutation, main, who_notices

_QUICK = ("base of a patch", "digest of a journal", "fsync before a rename")
TRIED = [m for m in MUTATIONS
         if m.name in _QUICK or os.environ.get("GGUF_SHARD_MUTATIONS") == "all"]  # fmt: skip


def _name(mutation: Mutation) -> str:
    return mutation.name.replace(" ", "-")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=_name)
def test_each_protection_is_where_the_list_says(mutation: Mutation) -> None:
    spec = importlib.util.find_spec(mutation.module)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    changed = changed_text(text, mutation.module, *mutation.changes)
    compile(changed, spec.origin, "exec")
    assert changed != text
    for part in mutation.parts:
        assert importlib.util.find_spec(f"experiments.validation.{part}") is not None


def test_names_are_told_apart() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", TRIED, ids=_name)
def test_the_suite_turns_red(mutation: Mutation) -> None:
    assert who_notices(mutation) is not None


def test_the_suite_stays_green_where_nothing_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = next(m for m in MUTATIONS if m.name == "digest of a journal")
    assert who_notices(replace(mutation, new=mutation.old)) is None


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MUTATIONS)
    assert main(["--only", "no such thing"]) == 1
    assert capsys.readouterr().err.startswith("'no such thing' is none of: ")
