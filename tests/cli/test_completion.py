"""Completion in the shell: what click's protocol offers, and what real shells make of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from repository import ROOT
from shardkit.cli import completion, main
from shardkit.dtypes import parse_dtype


def offered(
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shell: str = "bash",
) -> list[tuple[str, str]]:
    """What click's protocol answers to a Tab at the end of *line*: kinds and words."""
    words = line.split(" ")
    monkeypatch.setenv("_SHARDKIT_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", line if shell != "fish" else " ".join(words[:-1]))
    monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
    assert main([]) == 0
    out = capsys.readouterr().out
    if shell == "zsh":
        lines = out.split("\n")
        return [(kind, word) for kind, word in zip(lines[::3], lines[1::3], strict=False)]
    return [
        (kind, word.split("\t")[0])
        for kind, _, word in (each.partition(",") for each in out.splitlines())
    ]


# What is typed before Tab, and words that must be among those offered.
COMPLETED = {
    "shardkit ": ["convert", "offload-prep", "inspect", "verify", "diff", "place", "formats"],
    "shardkit conv": ["convert"],
    "shardkit convert --": ["--max-shard", "--dtype", "--verbose", "--compress"],
    "shardkit convert x --dr": ["--dry-run"],
    "shardkit convert --format ": [
        "safetensors",
        "torch-zip",
        "torch-legacy",
        "torchscript",
        "accelerate-dat",
    ],
    "shardkit inspect --format torch": ["torch-zip", "torch-legacy", "torchscript"],
    "shardkit convert --compress ": ["zstd"],
    "shardkit convert --checksum ": ["xxh3", "sha256"],
    "shardkit verify x --ties ": ["keep-first", "copy"],
    "shardkit convert --dtype b": ["bf16", "bfloat16"],
    "shardkit convert --limit ten": ["tensors="],
    "shardkit place x --rates ": ["disk=", "copy=", "link=", "compute="],
    "shardkit place x --rates disk=1GB,": ["disk=1GB,copy=", "disk=1GB,link="],
}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("line", COMPLETED)
def test_a_word_is_completed(
    line: str, shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = offered(line, monkeypatch, capsys, shell)
    assert {word for _, word in found} >= set(COMPLETED[line])
    assert {kind for kind, _ in found} == {"plain"}
    last = line.rpartition(" ")[2]
    assert all(word.startswith(last) for _, word in found)


@pytest.mark.parametrize(
    "line",
    [
        "shardkit convert mod",
        "shardkit convert x -o ou",
        "shardkit offload-prep x --order or",
        "shardkit verify out --against ",
        "shardkit diff a b",
        "shardkit inspect s3://b",
    ],
)
def test_where_a_file_is_wanted_the_shell_completes_files(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = offered(line, monkeypatch, capsys)
    assert found == [("file", line.rpartition(" ")[2])]


def test_every_type_that_is_offered_is_one() -> None:
    import click

    context = click.Context(click.Command("convert"))
    offers = completion.types(context, click.Option(["--dtype"]), "")
    assert {parse_dtype(name).kind for name in offers} == {"float"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_SHARDKIT_COMPLETE", f"{shell}_source")
    assert main([]) == 0
    assert "_shardkit_completion" in capsys.readouterr().out


# Programs in which a shell reads the script as docs/cli.md says, and completes a line.
SHELLS = {
    "bash": """
eval "$(_SHARDKIT_COMPLETE=bash_source shardkit)"
COMP_WORDS=(shardkit convert --format torch-z); COMP_CWORD=3
_shardkit_completion shardkit
printf '%s\\n' "${COMPREPLY[@]}"
""",
    "zsh": """
autoload -Uz compinit && compinit -u -D
eval "$(_SHARDKIT_COMPLETE=zsh_source shardkit)"
(( $+functions[_shardkit_completion] )) && print torch-zip  # a widget, which runs in an interactive shell only
""",
    "fish": """
_SHARDKIT_COMPLETE=fish_source shardkit | source
complete -C 'shardkit convert --format torch-z'
""",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_real_shell_completes(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None or os.name != "posix":
        pytest.skip(f"needs {shell}")
    command = tmp_path / "shardkit"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m shardkit "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
    }
    arguments: Sequence[str] = (
        [program, "-f", "-c", SHELLS[shell]] if shell == "zsh" else [program, "-c", SHELLS[shell]]
    )
    done = subprocess.run(arguments, env=environment, text=True, capture_output=True, cwd=tmp_path)
    assert done.stdout.split()[:1] == ["torch-zip"], done.stderr
