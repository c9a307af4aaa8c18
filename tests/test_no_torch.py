"""The fast path is light: it never imports torch, and needs nothing but itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from repository import ROOT

FIXTURE = ROOT / "fixtures" / "good" / "zip-training.pt"

# What a library user does, in a fresh interpreter; it prints which of the names in its second
# argument were imported.
WORK = """
import json, sys
from pathlib import Path
import shardkit

source, folder = Path(sys.argv[1]), Path(sys.argv[3])
checkpoint = shardkit.open(source)
assert len(checkpoint) > 4, list(checkpoint)
assert len(checkpoint["state_dict.0.weight"].read()) == 48
report = shardkit.convert(source, folder / "out", max_shard=1000)
assert shardkit.verify(folder / "out", source).same
print(json.dumps([name for name in sys.argv[2].split(",") if name in sys.modules]))
"""

# The command line, which prints the names of all that was imported as its last line.
COMMAND_LINE = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(list(sys.modules))))
from shardkit.cli import main
sys.exit(main())
"""


def python(
    *arguments: str | Path, interpreter: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    path = {"PYTHONPATH": str(ROOT)} if interpreter == sys.executable else {}
    return subprocess.run(
        [interpreter, *arguments], capture_output=True, text=True, env=environment | path
    )


def test_opening_converting_and_verifying_import_no_torch(tmp_path: Path) -> None:
    done = python("-c", WORK, FIXTURE, "torch", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_importing_shardkit_imports_almost_nothing() -> None:
    done = python(
        "-c",
        "import sys, shardkit; print(sorted(m for m in sys.modules if m.startswith('shardkit')))",
    )
    assert done.stdout == "['shardkit', 'shardkit.version']\n"


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["convert", "--help"], ["--version"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = python("-c", COMMAND_LINE, *arguments)
    assert done.returncode in (0, 2), done.stderr
    assert not set(json.loads(done.stdout.splitlines()[-1])) & {"torch", "numpy", "zstandard"}


@pytest.mark.parametrize("command", ["inspect", "convert", "verify", "place"])
def test_the_commands_import_no_torch(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: dict[str, list[str | Path]] = {
        "inspect": [FIXTURE],
        "convert": [FIXTURE, "-o", out, "--max-shard", "1000"],
        "verify": [ROOT / "fixtures" / "good" / "folder-safetensors"],
        "place": [FIXTURE, "--dtype", "bf16"],
    }
    done = python("-c", COMMAND_LINE, command, *arguments[command])
    assert done.returncode == 0, done.stderr
    assert "torch" not in json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("compress", "imported"),
    [((), True), (("--compress", "zstd"), False)],
    ids=["plain", "compressed"],
)
def test_the_reference_reader_is_imported_where_it_reads_what_is_written(
    compress: tuple[str, ...], imported: bool, tmp_path: Path
) -> None:
    done = python("-c", COMMAND_LINE, "convert", FIXTURE, "-o", tmp_path / "out", *compress)
    assert done.returncode == 0, done.stderr
    assert ("numpy" in json.loads(done.stdout.splitlines()[-1])) is imported


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has shardkit and nothing that it depends on."""
    room = tmp_path_factory.mktemp("bare")
    venv.create(room, with_pip=True)
    interpreter = room / ("Scripts" if os.name == "nt" else "bin") / "python"
    install(interpreter, "--no-deps", str(ROOT))
    return interpreter


def install(interpreter: Path, *arguments: str) -> None:
    done = python("-m", "pip", "install", "--quiet", *arguments, interpreter=interpreter)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip(f"PyPI cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.mark.network
def test_the_library_works_with_nothing_else_installed(bare: Path, tmp_path: Path) -> None:
    assert python("-c", "import torch", interpreter=bare).returncode == 1
    done = python(
        "-c", WORK, FIXTURE, "torch,numpy,zstandard,safetensors,click", tmp_path, interpreter=bare
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


@pytest.mark.network
def test_the_commands_work_with_click_alone(bare: Path, tmp_path: Path) -> None:
    install(bare, "click")
    out = tmp_path / "out"
    for command in (
        ("inspect", FIXTURE),
        ("convert", FIXTURE, "-o", out),
        ("verify", out, "--against", FIXTURE),
        ("place", FIXTURE),
    ):
        done = python("-m", "shardkit", *command, interpreter=bare)
        assert done.returncode == 0, done.stderr
