"""Restore locks and threads in the child of a fork: no other thread exists there, and a lock that
one of them held stays locked.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import TypeVar

_Owner = TypeVar("_Owner")


def begin_again_in_children(owner: _Owner, begin: Callable[[_Owner], object]) -> None:
    """Call *begin* with *owner* first of all in every child of a fork, as long as *owner* is there;
    who came first is first.
    """
    number = next(_NUMBERS)
    _LIVING[number] = partial(_begin, weakref.ref(owner, lambda _: _LIVING.pop(number)), begin)


def never_free(owner: object) -> None:
    """Keep *owner*, and what it has, until the process is gone: not even at its end does the
    interpreter let go of it.

    That is for what only the parent can give back, such as the memory of its device: the attempt
    would end the child.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def _begin(found: weakref.ref[_Owner], begin: Callable[[_Owner], object]) -> None:
    owner = found()
    if owner is not None:
        begin(owner)


def _after_fork() -> None:
    for begin in list(_LIVING.values()):
        begin()


_NUMBERS = count()
_LIVING: dict[int, Callable[[], None]] = {}

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
