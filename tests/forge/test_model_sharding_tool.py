"""The command: what it prints and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.validation import gguf_factory as factory
from forge import model_sharding_tool as tool
from forge.command import run_command
from forge.sgmap_reader import load_map
from forge.verify import verify_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "forge/model_sharding_tool.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, from the project's root and without the package installed."""
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def main(*arguments: str | Path) -> int:
    """The same in this process."""
    return tool.main([str(argument) for argument in arguments])


def one_line(text: str) -> str:
    assert text.endswith("\n") and text.count("\n") == 1, text
    return text[:-1]


# ---- in a process of its own ----


def test_from_the_projects_root(model: Path, tmp_path: Path) -> None:
    """Cut, check and restore with the script alone."""
    out = tmp_path / "out"
    shard = run("shard", model, "-o", out, "--json")
    assert (shard.returncode, shard.stderr) == (0, "")
    assert json.loads(one_line(shard.stdout))["pages"] == load_map(out / "core.sgmap").n_pages
    verify = run("verify", out / "core.sgmap", "--against", model)
    assert (verify.returncode, verify.stderr) == (0, "")
    assert one_line(verify.stdout) == f"{out / 'core.sgmap'}: 12 pages hold"
    restore = run("restore", out / "core.sgmap", "-o", out / "back.gguf")
    assert (restore.returncode, restore.stderr) == (0, "")
    assert (out / "back.gguf").read_bytes() == model.read_bytes()


def test_writes_into_the_working_folder(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / SCRIPT, "shard", "../model.gguf"], cwd=folder, timeout=60
    )
    assert done.returncode == 0
    assert sorted(p.name for p in folder.iterdir()) == ["core.gguf", "core.sgmap"]


def test_foreseeable_trouble_is_one_line_without_traceback(model: Path, tmp_path: Path) -> None:
    short = factory.write(tmp_path / "short.gguf", model.read_bytes()[:1000])
    for arguments, reason in [
        (("shard", tmp_path / "none.gguf"), "none.gguf: No such file or directory"),
        (("shard", short, "-o", tmp_path / "out"), "short.gguf: offset "),
        (("verify", tmp_path / "none.sgmap"), "none.sgmap: No such file or directory"),
    ]:
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in one_line(done.stderr)


def test_wrong_usage_ends_with_2(model: Path) -> None:
    done = run("shard", model, "--layout", "diagonal")
    assert (done.returncode, done.stdout) == (2, "")
    assert "invalid choice: 'diagonal'" in done.stderr and "Traceback" not in done.stderr


# A suite that runs in the background hands down an ignored SIGINT: the script takes it back.
SLOW_WRITES = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv.pop(1))
from forge import model_sharding_tool
pwrite = os.pwrite
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(0.3)
    return pwrite(*arguments)
os.pwrite = slow
sys.exit(model_sharding_tool.main())
"""


def test_an_interrupt_half_way_leaves_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITES, str(ROOT), "shard", str(model), "-o", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout is not None and running.stderr is not None
    with running:
        assert running.stdout.readline() == "writing\n"
        assert sorted(p.name for p in out.iterdir()) == [
            "core.gguf.sgnew",
            "core.sgmap.sgnew",
        ]
        time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 1
        assert one_line(running.stderr.read()) == "interrupted"
    assert list(out.iterdir()) == []


def test_a_reader_that_leaves_ends_it_quietly(sharded: Path) -> None:
    """As in `... info core.sgmap | head -1`: no traceback, and the code of SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        done = subprocess.run(
            [sys.executable, SCRIPT, "info", str(sharded), "--json"],
            cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


# ---- in this process ----


def test_shard_says_what_it_wrote(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--layout", "row_major", "--policy", "pin", "--prefetch-distance", "2"]
    assert main("shard", model, "-o", out, *options, "--pages-per-shard", "4") == 0
    m = load_map(out / "core.sgmap")
    assert one_line(capsys.readouterr().out) == (
        f"{out / 'core.sgmap'}: {m.n_pages} pages in {m.n_shards} shards of 4 from 14.22 kB"
    )
    assert m.pages_per_shard == 4
    assert (m.atlas.memory_layout, m.atlas.cache_policy, m.atlas.prefetch_distance) == (
        "row_major", "pin", 2,
    )  # fmt: skip
    again = ["shard", model, "-o", out, "--force", "--pages-per-shard", "auto"]
    assert main(*again, "--json") == 0
    assert json.loads(one_line(capsys.readouterr().out)) == {
        "map": str(out / "core.sgmap"), "core": str(out / "core.gguf"), "pages": 12, "shards": 12,
        "pages_per_shard": 1, "source_bytes": model.stat().st_size,
        "sha256": [source.sha256 for source in m.source],
    }  # fmt: skip
    assert main(*again, "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_restore_says_what_it_wrote(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "back.gguf"
    assert main("restore", sharded, "-o", target) == 0
    assert one_line(capsys.readouterr().out) == f"{target}: restored, SHA-256 as in the map"
    assert main("restore", sharded, "-o", target) == 1
    assert one_line(capsys.readouterr().err) == f"{target}: exists already (--force replaces it)"
    assert main("restore", sharded, "-o", target, "--force", "--json") == 0
    facts = json.loads(one_line(capsys.readouterr().out))
    assert facts == {"files": [str(target)], "sha256_matches": True}
    assert main("restore", sharded, "-o", target, "--force", "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_verify_names_the_damage(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("verify", sharded, "-q") == 0
    assert capsys.readouterr() == ("", "")
    core = bytearray(sharded.with_name("core.gguf").read_bytes())
    core[100], core[4096 * 3 + 5] = core[100] ^ 1, core[4096 * 3 + 5] ^ 1
    sharded.with_name("core.gguf").write_bytes(core)
    assert main("verify", sharded) == 1
    out, err = capsys.readouterr()
    header, page = err.splitlines()
    assert out == ""
    assert f"{sharded.with_name('core.gguf')}: header: byte 100 is " in header
    assert page.startswith(f"{sharded}: page 2 (shard 2, blk.0.attn_q.weight): content has CRC32")
    assert main("verify", sharded, "--json") == 1
    facts = json.loads(one_line(capsys.readouterr().out))
    assert (facts["ok"], facts["pages"]) == (False, 12)
    assert [fault["page"] for fault in facts["bad"]] == [None, 2]
    assert facts["bad"][1].keys() == {"page", "shard", "tensor", "reason"}


def test_info_of_both_kinds(model: Path, sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("info", model) == 0
    assert "6 tensors" in capsys.readouterr().out
    for path, kind in ((model, "gguf"), (sharded, "sgmap")):
        assert main("info", path, "--json") == 0
        assert json.loads(one_line(capsys.readouterr().out))["kind"] == kind


def test_existing_output_and_folders_are_named(
    sharded: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, reason in [
        (("shard", model, "-o", tmp_path), "core.sgmap: exists already (--force replaces it)"),
        (("shard", tmp_path, "-o", tmp_path), f"{tmp_path}: Is a directory"),
        (("shard", model, "-o", model), f"{model}: File exists"),
        (("restore", sharded, "-o", tmp_path), f"{tmp_path}: is a folder"),
        (
            ("restore", sharded, "-o", tmp_path / "x/y"),
            "x/y.sgnew: No such file or directory",
        ),
        (("restore", sharded, "-o", sharded, "--force"), "is the sharded model itself"),
        (("info", tmp_path), f"{tmp_path}: Is a directory"),
    ]:
        assert main(*arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and reason in one_line(err)
    assert verify_model(sharded, against=model).ok


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--pages-per-shard", "3"], "pages per shard 3: not a power of two up to 256"),
        (["--pages-per-shard", "many"], "'many' is not a number"),
        (["--prefetch-distance", "-1"], "prefetch distance -1: not in 0..65536"),
        (["--policy", "guess"], "invalid choice: 'guess'"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_wrong_options(
    options: list[str], reason: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main("shard", model, *options)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError(5, "Input/output error", "file"), "file: Input/output error"),
        (OSError("strange"), "strange"),
        (OSError(), "OSError"),
    ],
)
def test_other_trouble_is_one_line_too(
    error: BaseException, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    assert run_command(SimpleNamespace(run=fail)) == 1  # type: ignore[arg-type]
    assert one_line(capsys.readouterr().err) == message


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    model = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    model.write_bytes(factory.small_model())
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfe"))
    for arguments in (("shard", model, "-o", out), ("info", out / "core.sgmap")):
        done = subprocess.run(
            [sys.executable, SCRIPT, *arguments], cwd=ROOT, capture_output=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\\udcf" in done.stdout


@pytest.mark.parametrize("name", ["a\n\x1b[2J.gguf", "a\u202e.gguf"])
def test_names_cannot_command_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert tool.main(["info", str(tmp_path / name)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err[:-1].isprintable() and "No such file" in err
