"""What users import: the names that docs/api.md lists, from five modules, and what has moved since
the last version.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from repository import ROOT

PUBLIC = ("shardkit", "shardkit.load", "shardkit.plugin", "shardkit.testing")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "plugins").glob("*.md")],
    key=lambda page: page.as_posix(),
)
IMPORT = re.compile(r"^\s*(?:from (shardkit[\w.]*) import|import (shardkit[\w.]*))", re.MULTILINE)


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.torch
def test_the_documented_names_are_those_that_are_exported() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == generator().page(), "python docs/api.py > docs/api.md"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.torch] * (name == "shardkit.load")) for name in PUBLIC],
)
def test_every_exported_name_is_there_and_listed(name: str) -> None:
    module = import_module(name)
    assert all(hasattr(module, each) for each in module.__all__)
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_documents_import_from_public_modules_only(page: Path) -> None:
    found = {first or second for first, second in IMPORT.findall(page.read_text(encoding="utf-8"))}
    assert {name for name in found if not name.startswith("shardkit_")} <= {*PUBLIC}


@pytest.mark.torch
def test_a_name_that_moved_is_still_found_and_warns() -> None:
    old = import_module("shardkit.load.rates")
    with pytest.warns(DeprecationWarning, match="import Rates from shardkit.load"):
        moved = old.Rates
    assert moved is import_module("shardkit.load").Rates
    with pytest.raises(AttributeError):
        _ = old.Nothing
