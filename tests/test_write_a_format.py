"""The page "Write a format" is true: what it shows is written, installed and run as a reader
would.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from repository import ROOT

PAGE = ROOT / "plugins" / "README.md"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, the file it is or the word behind the language, its text."""

    language: str
    label: str
    text: str


def blocks() -> Iterator[Block]:
    for match in re.finditer(
        r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        yield Block(match[1], match[2], match[3])


FILES = {block.label: block.text for block in blocks() if "/" in block.label}
STEPS = [block for block in blocks() if not block.label]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin of the page in it, as good as installed, where each step finds what
    the one before left.
    """
    room = tmp_path_factory.mktemp("room")
    for name, text in FILES.items():
        (room / name).parent.mkdir(exist_ok=True)
        (room / name).write_text(text, encoding="utf-8")
    install(room)
    return room


def install(room: Path) -> None:
    """What pip leaves in site-packages; and shardkit-npz, where it is installed, gives way, as the
    page asks for.
    """
    project = tomllib.loads(FILES["shardkit-npy-small/pyproject.toml"])["project"]
    site = room / "site"
    lines = [
        f"[{group}]\n{name} = {value}"
        for group, those in project["entry-points"].items()
        for name, value in those.items()
    ]
    for name, entry_points in ((project["name"], "\n".join(lines)), ("shardkit-npz", "")):
        info = site / f"{name.replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {project['version']}\n"
        )
        (info / "entry_points.txt").write_text(entry_points)
    for source in (room / "shardkit-npy-small").glob("shardkit_*.py"):
        shutil.copy(source, site)


def run(room: Path, command: list[str]) -> str:
    path = os.pathsep.join(
        [str(room / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        command, cwd=room, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def shell(line: str) -> list[str]:
    """A line of a console block, with `python` and `shardkit` those under test."""
    python = f'"{sys.executable}"'
    line = re.sub(r"^python ", f"{python} ", line)
    return ["/bin/sh", "-c", re.sub(r"^shardkit ", f"{python} -m shardkit ", line)]


@pytest.mark.skipif(os.name != "posix", reason="the page speaks to a POSIX shell")
def test_every_step_of_the_page_works(room: Path) -> None:
    for block in STEPS:
        if block.language == "python":
            run(room, [sys.executable, "-c", block.text])
        else:
            assert block.language == "console", f"nothing is known to run {block.language}"
            for line in block.text.splitlines():
                run(room, shell(line.removeprefix("$ ")))
    assert "npy-small (300, 40)" in run(room, [sys.executable, "-c", STEPS[1].text])


def test_the_page_has_its_blocks() -> None:
    assert {Path(name).name for name in FILES} == {
        "pyproject.toml",
        "shardkit_npy_small.py",
        "test_npy_small.py",
        "shardkit_gzip.py",
        "test_gzip.py",
    }
    assert len(STEPS) == 5


def test_the_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
