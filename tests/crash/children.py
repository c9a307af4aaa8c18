"""Children of a fork, for tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
threaded = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_a_child(check: Callable[[], bool]) -> bool:
    """What *check* says in the child of a fork."""
    return said_by(begun(check))


def begun(check: Callable[[], bool]) -> int:
    """The child of a fork, which asks *check* while this process goes on."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    return child


def said_by(child: int) -> bool:
    """What *child* says when it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
