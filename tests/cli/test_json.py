"""Every document of --json against its schema, the page that is made from the schemas, and the
versions in both.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from repository import ROOT
from shardkit.checkpoint.entries import OtherKind
from shardkit.cli import main
from shardkit.cli.group import _COMMANDS

SCHEMAS = ROOT / "docs" / "schemas"
GOOD = ROOT / "fixtures" / "good"
TRAINING = GOOD / "zip-training.pt"
TORCH: list[str | Path] = ["place", TRAINING, "--max-memory", "cpu=60B"]


def strict(schema: Any) -> Any:
    """*schema* with every key forbidden that it does not list, so that no key is without
    documentation.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    return (
        made | {"additionalProperties": False} if isinstance(made.get("properties"), dict) else made
    )


@cache
def validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(strict(schema))


def check(text: str, name: str) -> dict[str, Any]:
    document = json.loads(text)
    assert isinstance(document, dict)
    assert next(iter(document)) == "schema"
    assert document["schema"] == f"shardkit.{name}/1"
    validator(name).validate(document)
    return document


DOCUMENTS: dict[str, tuple[str, list[str | Path], int]] = {
    "convert": ("convert", ["convert", TRAINING, "-o", "out"], 0),
    "convert, compressed": ("convert", ["convert", TRAINING, "-o", "out", "--compress", "zstd"], 0),
    "convert, tied": ("convert", ["convert", GOOD / "zip-shared.pt", "-o", "out"], 0),
    "convert, one file": (
        "convert",
        ["convert", TRAINING, "-o", "out.safetensors", "--dtype", "bf16"],
        0,
    ),
    "convert, dry": ("convert.dry-run", ["convert", TRAINING, "-o", "out", "--dry-run"], 0),
    "convert, a part": ("convert", ["convert", TRAINING, "-o", "out", "--part", "1/2"], 0),
    "status": ("status", ["status", "out"], 0),
    "offload-prep": ("offload-prep", ["offload-prep", TRAINING, "-o", "out"], 0),
    "offload-prep, dry": (
        "offload-prep.dry-run",
        ["offload-prep", TRAINING, "-o", "out", "--dry-run"],
        0,
    ),
    "verify": ("verify", ["verify", TRAINING], 0),
    "verify, different": ("verify", ["verify", TRAINING, "--against", TRAINING], 1),
    "diff": ("diff", ["diff", TRAINING, GOOD / "legacy-training.pt"], 0),
    "diff, different": ("diff", ["diff", TRAINING, GOOD / "zip-shared.pt"], 1),
    "inspect, a part": ("inspect", ["inspect", TRAINING, "--root", "state_dict"], 0),
    "place": ("place", ["place", TRAINING], 0),
    "place, tied": ("place", ["place", GOOD / "zip-shared.pt", "--max-memory", "0=1GB,cpu=1GB"], 0),
    "place, given rates": ("place", [*TORCH, "--rates", "disk=1GB,compute=1GB"], 0),
    "place, without compute": ("place", [*TORCH, "--rates", "disk=1GB"], 0),
    "place, measured": ("place", [*TORCH, "--predict"], 0),
    "formats": ("formats", ["formats"], 0),
}
NEED_TORCH = {
    "convert, one file",
    "place, given rates",
    "place, without compute",
    "place, measured",
}


@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=[pytest.mark.torch] * (what in NEED_TORCH)) for what in DOCUMENTS],
)
def test_a_document_is_as_its_schema_has_it(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, arguments, code = DOCUMENTS[what]
    assert main([*map(str, arguments), "--json"]) == code
    document = check(capsys.readouterr().out, name)
    if "different" in what:
        assert document["differences"]
    if what == "inspect, a part":
        assert document["root"] == {"name": "state_dict"}
        assert document["tensors"][0]["path"] == ["0.weight"]
        assert {part["path"] for part in document["left_out"]} > {"optimizer_states"}
        assert document["calls"] == ["argparse.Namespace"]
    if what == "place, measured":
        assert document["forecast"]["rates"]["spread"]
        assert document["forecast"]["predicted"]["spread"]


@pytest.mark.parametrize("fixture", sorted(GOOD.iterdir()), ids=lambda path: path.name)
def test_what_inspect_and_diff_say_of_any_file_is_as_the_schema_has_it(
    fixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(fixture), "--json"]) == 0
    check(capsys.readouterr().out, "inspect")
    if (
        main(["diff", str(fixture), str(TRAINING), "--json"]) != 2
    ):  # several subtrees could be the model
        check(capsys.readouterr().out, "diff")


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": "3"},
        {"same": 1},
        {"unheard": 0},
        {"differences": [{"name": "a"}]},
        {"schema": "x"},
    ],
)
def test_a_schema_refuses_what_is_none(
    change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(TRAINING), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert validator("verify").is_valid(document)
    assert not validator("verify").is_valid(document | change)


def test_files_that_are_left_out_have_their_place() -> None:
    left_out = [{"path": "unet/model.safetensors", "nbytes": 3, "reason": "another model"}]
    for name in (
        "inspect",
        "convert",
        "offload-prep",
        "convert.dry-run",
        "verify",
        "diff",
        "place",
    ):
        schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))["properties"][
            "left_out"
        ]
        assert Draft202012Validator(strict(schema)).is_valid(left_out)


def test_the_documents_of_a_run_in_parts_are_as_their_schemas_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(TRAINING), "-o", "out", "--part", "1/1", "-q"]) == 0
    for name in ("status", "commit", "status"):
        assert main([name, "out", "--json"]) == 0
        check(capsys.readouterr().out, name)


def test_every_command_has_a_schema_and_every_key_a_meaning() -> None:
    names = {path.stem for path in SCHEMAS.glob("*.json")}
    assert {name.partition(".")[0] for name in names} == set(_COMMANDS)
    for name in names:
        assert json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))["title"]
        for key, schema in keys(validator(name).schema):
            assert schema.get("description", "").endswith("."), f"{name}: {key} has no description"


def keys(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in schema.get("properties", {}).items():
        yield key, value
        yield from keys(value)
        yield from keys(value.get("items", {}))


def test_the_kinds_of_what_is_no_tensor_are_those_of_the_code() -> None:
    schema = json.loads((SCHEMAS / "inspect.json").read_text(encoding="utf-8"))
    kinds = schema["properties"]["others"]["items"]["properties"]["kind"]["enum"]
    assert set(kinds) == {*OtherKind} - {OtherKind.CALL}


def test_the_page_is_made_from_the_schemas() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert (ROOT / "docs" / "json.md").read_text(encoding="utf-8") == tables.page(), (
        "python docs/tables.py > docs/json.md"
    )
