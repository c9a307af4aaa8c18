"""Writes docs/api.md from the docstrings of what is public: `python docs/api.py > docs/api.md`."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from importlib import import_module

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


def page() -> str:
    """All of docs/api.md."""
    return "\n".join([HEAD, *(line for name in PUBLIC for line in _section(name))])


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


if __name__ == "__main__":
    sys.stdout.write(page())
