"""Libraries that ours is held against: what asks one that is not installed for anything is skipped,
with that for a reason.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import pytest
from packaging.version import Version


def peer(name: str) -> Any:
    """The module *name*, or what stands for it where its library is not installed; one that is
    broken is an error.
    """
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
    return _Absent(library)


def as_of(library: str, least: str) -> pytest.MarkDecorator:
    """Skips a test of what *library* does in version *least*, where an older one is installed."""
    try:
        older = Version(version(library)) < Version(least)
    except PackageNotFoundError:
        older = False  # the test asks the peer, which skips it
    return pytest.mark.skipif(older, reason=f"is compared with {library} {least}, which differs")


class _Absent:
    """Skips the test that asks it for anything; at the door of a module, all of its tests."""

    def __init__(self, library: str) -> None:
        self._library = library

    def __getattr__(self, name: str) -> NoReturn:
        pytest.skip(f"{self._library} is not installed", allow_module_level=True)
