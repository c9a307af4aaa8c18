"""The packages of shardkit, from the ground up: which may import which, and where the outside world
comes in.

A module imports only from packages that stand before its own, or from modules that stand before it
in its own package, so that no circle is possible. CONTRIBUTING shows both lists as the map of the
project.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from repository import ROOT as REPOSITORY

ROOT = REPOSITORY / "shardkit"

CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
MOST = 16  # modules in one package


def listed(title: str) -> list[tuple[str, list[str]]]:
    """The packages of a list in CONTRIBUTING, each with the names of its modules."""
    block = CONTRIBUTING.partition(f"<!-- {title} -->\n```\n")[2].partition("\n```")[0]
    lines: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        package, *names = ["", *line.split()] if line.startswith(" ") else line.split()
        if package:
            lines.append((package, names))
        else:
            lines[-1][1].extend(names)
    return lines


def module_at(package: str, name: str) -> str:
    return package if name == "__init__" else f"{package}.{name}"


def in_order() -> Iterator[tuple[str, str]]:
    """Every module on the map with its package, from the ground up; a package itself stands before
    its modules.
    """
    for package, names in listed("the packages of shardkit"):
        if package == "load":
            for part, inside in listed("the packages of shardkit.load"):
                prefix = "load" if part == "top" else f"load.{part}"
                yield from ((prefix, module_at(prefix, name)) for name in inside)
        elif package == "plugin":
            yield "plugin", "plugin"
        else:
            top = package in ("words", "top")
            yield from ((package, name if top else module_at(package, name)) for name in names)


# What comes from outside the standard library or prints, and the only places that may know it:
# modules or packages.
ONLY_IN = {
    "torch": ("payloads.cast", "load"),
    "transformers": (
        "load.hub.choose_files",  # which knows models with more files of weights than others
        "load.libraries",
    ),
    "diffusers": ("load.libraries",),
    "huggingface_hub": ("load.hub", "load.libraries.model_folder"),
    "numpy": (
        "payloads.gather",
        "checkpoint.entries",
    ),  # entries: TensorEntry.numpy, which is asked for by name
    "zstandard": ("codecs.zstd",),
    "safetensors": ("writing.reference_check",),
    "xxhash": ("payloads.digests",),
    "click": ("cli",),
    "tqdm": ("system.progress",),
    "ray": ("fleet.ray_cluster",),
    "importlib.metadata": ("sources.registry", "cli"),  # cli: the version
}
FORBIDDEN_NAMES = {
    "utils",
    "util",
    "helpers",
    "helper",
    "common",
    "core",
    "base",
    "manager",
    "misc",
}

MAP = {module: package for package, module in in_order()}
HEIGHT = {module: height for height, module in enumerate(MAP)}


def module_name(path: Path) -> str:
    """'formats.torch_zip' for shardkit/formats/torch_zip.py, 'formats' for its package, '__init__'
    for shardkit's own.
    """
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


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


def is_bare_package(module: str) -> bool:
    """Whether *module* is an `__init__` that holds nothing but its docstring."""
    return MODULES[module].stem == "__init__" and len(tree_of(module).body) <= 1


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def test_the_map_shows_every_module_once() -> None:
    shown = [module for _, module in in_order()]
    assert sorted(shown) == sorted(set(shown))
    assert {module for module in MODULES if not is_bare_package(module)} == set(shown)


@pytest.mark.parametrize("module", MAP)
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    for name in imported(tree_of(module)):
        if name.split(".")[0] == "shardkit" and not is_bare_package(there := own_module(name)):
            assert HEIGHT[there] < HEIGHT[module] or there == module, (
                f"{module} imports {name} from above"
            )


def test_no_package_is_crowded() -> None:
    folders = {path.parent for path in MODULES.values()}
    crowded = {
        str(folder): count
        for folder in folders
        if (count := len(list(folder.glob("*.py"))) - 1) > MOST
    }
    assert not crowded


def test_every_step_of_the_main_paths_exists() -> None:
    drawings = CONTRIBUTING.partition("### The two main paths")[2].partition("\n## ")[0]
    steps = re.findall(r"^[ │├└]*((?:[a-z_]+\.)+\w+)", drawings, re.MULTILINE)
    assert len(steps) > 20
    for step in steps:
        module = own_module(f"shardkit.{step}")
        inside = step.removeprefix(module).strip(".")
        found: ast.AST | None = tree_of(module)
        for part in inside.split(".") if inside else ():
            assert found is not None
            found = next(
                (n for n in ast.iter_child_nodes(found) if getattr(n, "name", None) == part), None
            )
        assert found is not None, f"{step} is not there"


@pytest.mark.parametrize("module", MODULES)
def test_the_outside_world_comes_in_where_the_table_says(module: str) -> None:
    for name in imported(tree_of(module)):
        if name.split(".")[0] == "shardkit":
            continue
        outside = next((known for known in ONLY_IN if f"{name}.".startswith(f"{known}.")), None)
        rooms = ONLY_IN[outside] if outside else ()
        allowed = any(f"{module}.".startswith(f"{room}.") for room in rooms)
        assert allowed or (outside is None and name.split(".")[0] in sys.stdlib_module_names), (
            f"{module} imports {name}"
        )


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] != "cli"])
def test_only_the_command_line_prints(module: str) -> None:
    calls = (node.func for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call))
    assert not [f.lineno for f in calls if isinstance(f, ast.Name) and f.id in ("print", "input")]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_name_that_says_something(module: str) -> None:
    assert not FORBIDDEN_NAMES & set(module.split("."))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_a_sentence(module: str) -> None:
    assert (ast.get_docstring(tree_of(module)) or "").strip(), (
        f"{module} does not say what it is for"
    )
