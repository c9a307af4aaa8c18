"""What several files of the project must agree on: versions, targets of make, and pinned tools."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import shardkit
from repository import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_place_names_the_same_version() -> None:
    citation = text_of("CITATION.cff")
    assert f"\nversion: {shardkit.__version__}\n" in citation
    released = re.search(r'^date-released: "(\S+)"$', citation, re.MULTILINE)
    newest = re.search(r"^## (\S+) - (\S+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert newest
    assert released
    assert newest.groups() == (shardkit.__version__, released[1])


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_ci_calls_only_targets_that_the_makefile_has(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"^ *(?:- run: )?make (.*)$", text, re.MULTILINE)
    called = {word for line in lines for word in line.split() if re.fullmatch("[a-z-]+", word)}
    called.update(re.findall(r"target: ([a-z-]+) ", text))
    assert called
    assert called <= targets


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_commit(path: Path) -> None:
    uses = re.findall(r"uses: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert uses
    for use in uses:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", use), use


@pytest.mark.parametrize(
    ("tool", "pinned_in"), [("ruff", "constraints.txt"), ("typos", ".ci/tools.txt")]
)
def test_hooks_and_make_use_one_version_of_a_tool(tool: str, pinned_in: str) -> None:
    text = text_of(".pre-commit-config.yaml") + text_of(pinned_in)
    versions = re.findall(rf"\b{tool}==([\d.]+)", text)
    assert len(versions) >= 2
    assert len(set(versions)) == 1


def test_every_path_of_the_sdist_exists() -> None:
    paths = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [path for path in paths if not (ROOT / path).exists()] == []
