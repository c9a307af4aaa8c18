"""torch's private names stand in one module, and the installed torch has each of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from repository import ROOT
from shardkit.load.modules import torch_internals
from shardkit.load.modules.torch_internals import forward_hook_tables

INTERNALS = Path(torch_internals.__file__)
PACKAGE = ROOT / "shardkit"
# No other knows torch (see test_floors); those that parse its pickles name what is in the files.
KNOWING = [*sorted((PACKAGE / "load").rglob("*.py")), PACKAGE / "payloads" / "cast.py"]

HOLDERS = (
    nn.Linear(1, 1),
    torch.Tensor,
    nn.Parameter(torch.zeros(1)),
    torch,
    torch._C,
    torch.nn.modules.module,
    torch.ops.aten.add.Tensor,
    torch.utils._python_dispatch,
)
"""What shardkit gets from torch, and what of it may have private names."""

KNOWN = {name for each in HOLDERS for name in dir(each)} | {"_is_param"}
"""`_is_param` is on no object of torch, which only looks for it."""

COMPILER = {"_FrameAction", "_FrameExecStrategy"}
"""What torch 2.6 lacks, and shardkit does without."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The private names of torch in *tree*, each with its line, also those in strings."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls" | "os" | "sys")):
                pass
            case ast.Attribute(attr=name) if is_private(name):
                yield node.lineno, name
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "torch":
                names = (*module.split("."), *(alias.name for alias in node.names))
                yield from ((node.lineno, name) for name in names if is_private(name))
            case ast.Import():
                names = tuple(part for alias in node.names for part in alias.name.split("."))
                yield from ((node.lineno, name) for name in names if is_private(name))
            case ast.Constant(value=str(text)) if text.isidentifier() and is_private(text):
                yield node.lineno, text
            case ast.Constant(value=str(text)) if text.startswith("torch._") and " " not in text:
                yield node.lineno, text


@pytest.mark.parametrize("path", KNOWING, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_uses_a_private_name_of_torch(path: Path) -> None:
    if path != INTERNALS:
        found = private_names(ast.parse(path.read_text(encoding="utf-8")))
        ours = {"_storage"}  # an attribute of `Paged`
        uses = [f"line {line}: {name}" for line, name in found if name in KNOWN - ours]
        assert not uses, "name it in torch_internals"


def test_the_installed_torch_has_every_private_name() -> None:
    tree = ast.parse(INTERNALS.read_text(encoding="utf-8"))
    found = {name for _, name in private_names(tree)}
    nested = {*dir(torch.ops.aten), *dir(torch._C._nn), *dir(torch._C._functorch)}
    missing = found - KNOWN - nested - COMPILER - {"torch._dynamo", "_dynamo", "_ops"}
    missing -= {"_python_dispatch"} if hasattr(torch.utils, "_python_dispatch") else set()
    assert len(found) > 30
    assert not missing


def test_every_hook_has_its_key_in_its_tables() -> None:
    module = nn.Linear(1, 1)
    before, after = forward_hook_tables(module)
    first = module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    last = module.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    assert all(first.id in table for table in before)
    assert all(last.id in table for table in after)
    for tables in (before, after):
        for table in tables:
            table.clear()
    assert module(torch.ones(1)).shape == (1,)
