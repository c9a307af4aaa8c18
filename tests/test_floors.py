"""The house's floors: which module may import which, and where the outside world comes in.

A module imports only from lower floors, or from what stands before it on its own floor, so that no circle is possible.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "shardkit"

# One line per floor, lowest first; within a floor, from left to right.
FLOORS = """
hints errors sizes dtypes forks near_names brief
limits payload open_extents small_reads checkpoint
codec expansion zips format strict_json header index checksums manifest records offload_record weight_names tie_records runs \
    gathering strided joining casting stand_ins pickle_machine pickle_opcodes pickles pickle_strings torch_tensors numpy_arrays \
    torch_objects module_tree object_graph repeats object_tree \
    foreign_kinds foreign_marks foreign_archives foreign_files foreign_folders pieces diagnosis
plugin root_names name_tree roots emptiness quantised edits named_blocks fitting block_layout plan framing \
    codecs codecs.zstd formats formats.safetensors formats.torch_zip formats.torch_legacy formats.torch_script \
    formats.accelerate_dat
registry locations shards freshness candidates scanner surroundings leftovers loose_files source companions \
    destination copying pools parallel integrity placing journal compressing \
    reference_reader writer host_memory progress
comparison uncompared soundness preparation conversion offload compare load testing
__init__ cli __main__
""".strip().splitlines()

# What comes from outside the standard library or prints, and the only rooms that may know it. A room is a module or a package.
ONLY_IN = {
    "torch": ("casting", "load"),
    "transformers": ("load.transformers_model", "load.diffusers_pipeline"),
    "diffusers": ("load.diffusers_model", "load.diffusers_pipeline"),
    "huggingface_hub": ("load.model_folder",),
    "numpy": ("gathering", "checkpoint"),  # checkpoint: TensorEntry.numpy, which is asked for by name
    "zstandard": ("codecs.zstd",),
    "safetensors": ("reference_reader",),
    "xxhash": ("checksums",),
    "click": ("cli",),
    "tqdm": ("progress",),
    "importlib.metadata": ("registry", "cli"),  # cli: the version
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
    """The module of shardkit that importing *name* ('shardkit.payload.Extent') loads."""
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
