"""Libraries that ours is held against: what asks one that is not installed for anything is skipped,
with that for a reason.
"""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import pytest


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


class _Absent:
    """Skips the test that asks it for anything; at the door of a module, all of its tests."""

    def __init__(self, library: str) -> None:
        self._library = library

    def __getattr__(self, name: str) -> NoReturn:
        pytest.skip(f"{self._library} is not installed", allow_module_level=True)
