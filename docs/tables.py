"""Writes docs/json.md from the schemas beside it: `python docs/tables.py > docs/json.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).parent / "schemas"
ORDER = (
    "inspect",
    "convert",
    "convert.dry-run",
    "offload-prep",
    "offload-prep.dry-run",
    "commit",
    "status",
    "verify",
    "diff",
    "place",
    "formats",
)
HEAD = """# JSON documents

`--json` prints one document on one line. Its first key is `schema`: the name of the command and a
version, as in `shardkit.convert/1`. A version only gains keys; a key that changes its meaning or
goes makes a new version. Sizes are in bytes.

The tables below are made from the JSON Schema files in [schemas](schemas), against which the tests
validate what every command prints. A key in *italics* may be absent.
"""

Schema = Mapping[str, Any]  # as JSON has it


def page() -> str:
    """All of docs/json.md."""
    return "\n".join([HEAD, *(line for name in ORDER for line in _section(name))])


def _section(name: str) -> Iterator[str]:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    yield (
        f"## {schema['properties']['schema']['const']}\n\n{schema['title']}\n\n| key | type | "
        "meaning |\n|---|---|---|"
    )
    yield from _rows(schema, "")
    yield ""


def _rows(schema: Schema, before: str) -> Iterator[str]:
    for key, value in schema["properties"].items():
        name = f"`{before}{key}`" if key in schema["required"] else f"*`{before}{key}`*"
        yield f"| {name} | {_kind(value)} | {value.get('description', '')} |"
        if "properties" in value:
            yield from _rows(value, f"{before}{key}.")
        elif "properties" in value.get("items", {}):
            yield from _rows(value["items"], f"{before}{key}[].")


def _kind(schema: Schema) -> str:
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return "one of " + ", ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return " or ".join(_one(kind, schema) for kind in kinds)


def _one(kind: str, schema: Schema) -> str:
    if kind == "array" and "type" in schema["items"]:
        return f"array of {schema['items']['type']}"
    if kind == "object" and "additionalProperties" in schema:
        return f"object of {schema['additionalProperties']['type']}"
    return kind


if __name__ == "__main__":
    sys.stdout.write(page())
