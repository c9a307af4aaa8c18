"""Bad input: nothing but a ShardkitError comes out, soon, in bounded memory; nothing is run, and no
output is left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import shardkit
from repository import ROOT
from shardkit.cli import main
from shardkit.errors import NoRoom, ShardkitError

HOSTILE = sorted((ROOT / "fixtures" / "hostile").iterdir())
GOOD_FILES = sorted(path for path in (ROOT / "fixtures" / "good").iterdir() if path.is_file())
INDEXES = sorted((ROOT / "fixtures" / "good").glob("*/*.index.json"))
SMALL = [*(path for path in GOOD_FILES if path.stat().st_size < 50_000), *INDEXES]
SECONDS = 30
MEMORY = 1 << 30
READ_AT_MOST = 1 << 28

# One small file of each format, to be cut short after each of its bytes.
CUT = [
    "pickle-oldest-rebuild.pt",
    "zip-deflated.pt",
    "zip-zip64.pt",
    "legacy-protocol-4.pt",
    "safetensors-unaligned.safetensors",
    "torchscript-frozen.pt",
    "compressed-safetensors.safetensors.zst",
]

# The command line under a watchdog: a limit of memory and of processor time, so that a bomb ends as
# a failed test.
WATCHED = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
from shardkit.cli import main
sys.exit(main())
"""


def read(path: Path) -> None:
    """Open *path* and read what it holds, as any command would."""
    for entry in shardkit.open(path).tensors:
        if entry.nbytes <= READ_AT_MOST:
            entry.read()


def command_line(*arguments: str | Path, room: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WATCHED, *arguments]
    # SECONDS are of the processor, which a busy machine gives later.
    return subprocess.run(
        command, cwd=room, env=environment, capture_output=True, text=True, timeout=9 * SECONDS
    )


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.name)
def test_a_hostile_file_is_refused_with_a_sentence(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardkitError) as refusal:
        shardkit.convert(path, tmp_path / "out", max_shard="1MB")
    sentence = str(refusal.value)
    assert path.name in sentence or isinstance(refusal.value, NoRoom)  # that one names the disk
    assert sentence.isprintable()
    assert len(sentence) < 1000
    assert refusal.value.hint, "it does not say what to do"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of a process to set")
@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.name)
def test_the_command_line_refuses_it_in_bounded_time_and_memory(path: Path, tmp_path: Path) -> None:
    done = command_line("convert", path, "-o", "out", room=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert path.name in done.stderr or "free" in done.stderr
    assert "Traceback" not in done.stderr
    sentence, advice = done.stderr.splitlines()
    assert sentence.startswith("shardkit: ")
    assert advice.startswith("hint: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes and devices")
@pytest.mark.parametrize(
    ("shard", "kind"), [("pipe", "a pipe"), ("zero", "a device"), ("random", "a device")]
)
def test_a_shard_that_is_no_file_is_not_waited_for(shard: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    for device in ("zero", "random"):
        (folder / device).symlink_to(f"/dev/{device}")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"weight": shard}})
    )
    done = command_line("convert", folder, "-o", "out", room=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{shard}: is {kind}, and only files and folders can be read" in done.stderr
    assert os.listdir(tmp_path) == ["model"]


NAMES = [
    "../../outside",
    "/outside",
    "a/b/../..",
    "model-00001-of-00002",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe",
    "a\nb",
    "CON",
    " ",
    ".",
]


def test_names_of_tensors_name_no_files_and_are_printed_without_their_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.chdir(room)
    for elements, file in ((2, "in.safetensors"), (3, "other.safetensors")):
        save_file({name: torch.full((elements,), float(at)) for at, name in enumerate(NAMES)}, file)
    for command in [
        ("inspect", "in.safetensors", "--all"),
        ("convert", "in.safetensors", "-o", "out", "--max-shard", "200", "--dry-run"),
        ("convert", "in.safetensors", "-o", "out", "--max-shard", "200"),
        ("verify", "out", "--against", "in.safetensors"),
        ("verify", "out", "--against", "other.safetensors"),
        ("diff", "in.safetensors", "other.safetensors"),
        ("place", "in.safetensors", "--max-memory", "cpu=30"),
        ("convert", "in.safetensors", "--include", "\x1b*", "--rename", "1=\x1b", "-o", "renamed"),
    ]:
        assert main(list(command)) in (0, 1)
        printed = capsys.readouterr()
        assert (printed.out + printed.err).strip()
        assert (printed.out + printed.err).replace("\n", "").isprintable(), command
    assert os.listdir(tmp_path) == ["room"]
    shards = [name for name in os.listdir("out") if name != "model.safetensors.index.json"]
    assert len(shards) > 4
    assert all(re.fullmatch(r"model-000\d\d-of-000\d\d\.safetensors", name) for name in shards)
    assert set(shardkit.open("out")) == set(NAMES)


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_short_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes((ROOT / "fixtures" / "good" / name).read_bytes())
    for nbytes in reversed(range(path.stat().st_size)):
        os.truncate(path, nbytes)
        with pytest.raises(ShardkitError):
            read(path)


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.name)
def test_flipped_bytes_are_refused_or_read(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    room = shutil.copytree(path.parent, tmp_path / "room") if path in INDEXES else tmp_path
    place = st.integers(0, len(content) - 1)

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.dictionaries(place, st.integers(1, 255), min_size=1, max_size=4))
    def flip(changes: dict[int, int]) -> None:
        flipped = bytearray(content)
        for at, bits in changes.items():
            flipped[at] ^= bits
        (room / path.name).write_bytes(flipped)
        with suppress(ShardkitError):
            read(room / path.name)

    flip()
