"""Writes docs/api.md from the docstrings of what is public, and of the type aliases in its
signatures: `python docs/api.py > docs/api.md`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise

PUBLIC = {
    "shardkit": (
        "Open, convert and compare checkpoints. Nothing here imports torch before it is needed."
    ),
    "shardkit.load": (
        "Build models without memory, and run them over GPU, CPU and disk. Needs torch."
    ),
    "shardkit.plugin": "What the author of a format or a codec imports.",
    "shardkit.testing": "The conformance kit that every format and codec must pass.",
}
HEAD = """# Public names

Import from these four modules only: modules below them move without notice.
`help(shardkit.convert)` shows arguments, types and errors.
"""


ALIASES = """## Types in signatures

`help()` shows these names in signatures. They stand for the types beside them, and need not be
imported.
"""
_NAME = re.compile(r"""(?<![\w."'])[A-Z]\w*""")


def page() -> str:
    """All of docs/api.md."""
    sections = (line for name in PUBLIC for line in _section(name))
    return "\n".join([HEAD, *sections, ALIASES, *_aliases()])


def _section(module: str) -> Iterator[str]:
    yield f"## `{module}`\n\n{PUBLIC[module]}\n"
    yield "| name | |\n|---|---|"
    exported = import_module(module)
    for name in sorted(exported.__all__, key=lambda name: (name.lower(), name)):
        if not name.startswith("__"):
            yield f"| `{name}` | {_summary(getattr(exported, name))} |"
    yield ""


def _summary(public: object) -> str:
    """The first paragraph of the docstring; of a plain value, its type."""
    if isinstance(public, int | str | bytes | tuple | dict):
        return f"a constant, of type `{type(public).__name__}`"
    if isinstance(public, types.UnionType):
        return "any of " + ", ".join(f"`{each.__name__}`" for each in public.__args__)
    paragraph = (inspect.getdoc(public) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", "\\|").replace("*", "`")


def _aliases() -> Iterator[str]:
    """The table of the aliases that the signatures of public functions and classes name."""
    found: dict[str, tuple[str, str]] = {}
    exported = {name for module in PUBLIC for name in import_module(module).__all__}
    for function in _functions():
        for annotation in function.__annotations__.values():
            for name in _NAME.findall(str(annotation)):
                if name not in exported and (alias := _alias(function.__module__, name)):
                    found[name] = alias
    yield "| name | stands for | |\n|---|---|---|"
    for name, (kinds, meaning) in sorted(found.items()):
        yield f"| `{name}` | `{kinds}` | {meaning} |"
    yield ""


def _functions() -> Iterator[types.FunctionType]:
    """Public functions, and the public methods and constructors of public classes."""
    for module in PUBLIC:
        exported = import_module(module)
        for name in sorted(exported.__all__):
            public = getattr(exported, name)
            members = vars(public).values() if inspect.isclass(public) else (public,)
            for member in members:
                plain = getattr(member, "__func__", getattr(member, "fget", member))
                if inspect.isfunction(plain) and not re.match("_(?!_init)", plain.__name__):
                    yield plain


def _alias(module: str, name: str) -> tuple[str, str] | None:
    """What the alias *name* in *module* stands for, and its docstring; None for a class."""
    tree = ast.parse(inspect.getsource(import_module(module)))
    for node, behind in pairwise([*tree.body, ast.Pass()]):
        match node:
            case ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                kinds = ast.unparse(node.value).replace("|", "\\|")
                return kinds, _docstring(module, name, behind)
            case ast.ImportFrom(module=str(source)) if source.startswith("shardkit"):
                if name in {each.name for each in node.names}:
                    return _alias(source, name)
    return None


def _docstring(module: str, name: str, node: ast.AST) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return " ".join(text.split()).replace("*", "`")
    sys.exit(f"{module}.{name} is in a public signature, and no docstring follows it")


if __name__ == "__main__":
    sys.stdout.write(page())
