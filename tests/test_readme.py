"""Every fenced block of the README runs and prints what the README says, but for blocks that say `no-test` on their fence.

A `console` block is a session: after `$ ` a command, below it what the command prints (stdout and stderr), where `...`
stands for anything. A command that prints nothing in the README may print anything. A `python` block is a program.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from repository import ROOT

README = ROOT / "README.md"
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)

# What the README calls its files, and the fixtures that stand for them.
FILES = {
    "big.bin": "good/zip-module-nested.pt",
    "model.pt": "good/zip-training.pt",
    "model.safetensors": "good/safetensors-tied.safetensors",
    "llama": "good/folder-safetensors",
}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, what is in it, and the line that it begins on."""

    language: str
    body: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        if "no-test" not in marks:
            yield Block(language, match["body"], text.count("\n", 0, match.start()) + 1)


def sessions(body: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what is printed below it."""
    for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed.strip()


def matches(expected: str, printed: str) -> bool:
    pattern = ".*".join(re.escape(piece) for piece in expected.split("..."))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


BLOCKS = list(blocks(README.read_text(encoding="utf-8"))) if README.exists() else []


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder with the files that the README talks about."""
    for name, fixture in FILES.items():
        copy = shutil.copytree if (ROOT / "fixtures" / fixture).is_dir() else shutil.copy
        copy(ROOT / "fixtures" / fixture, tmp_path / name)
    return tmp_path


def run(command: list[str] | str, room: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=room,
        env=os.environ | {"PATH": path},
        shell=isinstance(command, str),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_readme_has_blocks_to_run() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line-{block.line}")
def test_a_block_of_the_readme_does_what_it_says(block: Block, room: Path) -> None:
    if block.language == "python":
        for library in re.findall(r"^import (\w+)$", block.body, re.MULTILINE):
            pytest.importorskip(library)
        done = run([sys.executable, "-c", block.body], room)
        assert done.returncode == 0, done.stdout
        return
    assert block.language == "console", f"line {block.line}: a {block.language!r} block cannot be run; fence it as no-test"
    for command, expected in sessions(block.body):
        done = run(command, room)
        fine = (0, 1) if command.startswith("shardkit diff ") else (0,)  # 1 is how diff says that there are differences
        assert done.returncode in fine, f"{command}\n{done.stdout}"
        assert not expected or matches(expected, done.stdout), f"{command} printed:\n{done.stdout}"
