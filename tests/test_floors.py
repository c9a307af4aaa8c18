"""The packages of shardkit, from the ground up: which may import which, and where the outside world comes in.

A module imports only from packages that stand before its own, or from modules that stand before it in its own package, so that
no circle is possible. CONTRIBUTING shows both lists as the map of the project.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT as REPOSITORY

ROOT = REPOSITORY / "shardkit"

# One line per package, in order; its modules in the order in which they may import each other. A module in brackets is a package.
PACKAGES = """
@PACKAGES@
"""
LOAD = """
@LOAD@
"""

# What comes from outside the standard library or prints, and the only places that may know it: modules or packages.
ONLY_IN = {
    "torch": ("payloads.cast", "load"),
    "transformers": ("load.libraries",),
    "diffusers": ("load.libraries",),
    "huggingface_hub": ("load.libraries.model_folder",),
    "numpy": ("payloads.gather", "checkpoint.entries"),  # entries: TensorEntry.numpy, which is asked for by name
    "zstandard": ("codecs.zstd",),
    "safetensors": ("writing.reference_check",),
    "xxhash": ("payloads.digests",),
    "click": ("cli",),
    "tqdm": ("system.progress",),
    "importlib.metadata": ("sources.registry", "cli"),  # cli: the version
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "core", "base", "manager", "misc"}

HEIGHT = {room: (floor, place) for floor, line in enumerate(FLOORS) for place, room in enumerate(line.split())}


def module_name(path: Path) -> str:
    """'formats.torch_zip' for shardkit/formats/torch_zip.py, 'formats' for its package, '__init__' for shardkit's own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    """The entry of the table that *module* belongs to: its own, or that of the package around it."""
    while module not in HEIGHT and "." in module:
        module = module.rpartition(".")[0]
    return module


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of everything that is imported anywhere in *tree*, inside functions too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.ImportFrom():
                raise AssertionError(f"line {node.lineno}: relative import; write the whole name")


def own_module(name: str) -> str:
    """The module of shardkit that importing *name* ('shardkit.payloads.payload.Extent') loads."""
    inside = name.removeprefix("shardkit").removeprefix(".")
    while inside and inside not in MODULES:
        inside = inside.rpartition(".")[0]
    return inside or "__init__"


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_stands_on_a_floor(module: str) -> None:
    assert room_of(module) in HEIGHT, f"{module} is not in the table of floors"


def test_no_room_stands_in_the_table_twice() -> None:
    assert sum(len(line.split()) for line in FLOORS) == len(HEIGHT)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_below(module: str) -> None:
    here = room_of(module)
    for name in imported(tree_of(module)):
        if name.split(".")[0] == "shardkit":
            there = room_of(own_module(name))
            inside_one_package = there == here and "." in module + own_module(name)
            assert HEIGHT[there] < HEIGHT[here] or inside_one_package, f"{module} imports {name} from above"


@pytest.mark.parametrize("module", MODULES)
def test_the_outside_world_comes_in_where_the_table_says(module: str) -> None:
    for name in imported(tree_of(module)):
        if name.split(".")[0] == "shardkit":
            continue
        outside = next((known for known in ONLY_IN if f"{name}.".startswith(f"{known}.")), None)
        rooms = ONLY_IN[outside] if outside else ()
        allowed = any(f"{module}.".startswith(f"{room}.") for room in rooms)
        assert allowed or (outside is None and name.split(".")[0] in sys.stdlib_module_names), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] != "cli"])
def test_only_the_command_line_prints(module: str) -> None:
    calls = (node.func for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call))
    assert not [f.lineno for f in calls if isinstance(f, ast.Name) and f.id in ("print", "input")]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_name_that_says_something(module: str) -> None:
    assert not FORBIDDEN_NAMES & set(module.split("."))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_a_sentence(module: str) -> None:
    assert (ast.get_docstring(tree_of(module)) or "").strip(), f"{module} does not say what it is for"
