"""The dicts in which a module keeps its parameters and buffers, where another thread may have
borrowed some of them: each thread finds its own.

1. A borrowed tensor is in memory that goes to another block when it is released. So only the
   threads that have borrowed it find it; all others find the lazy tensor whose place it took. A
   copy of a model or of a weight is right, whatever other threads run meanwhile.
2. Nothing here waits, and no lock is taken.
3. C code reads the dict itself, and finds borrowed tensors. That is `torch.compile`, in the thread
   that has borrowed them.
"""

from __future__ import annotations

from collections.abc import Collection, ItemsView, Iterable, Iterator, ValuesView
from copy import deepcopy
from threading import get_ident
from typing import Any

import torch

_there = dict.__getitem__

_Table = dict[str, torch.Tensor | None]
Record = tuple[torch.Tensor | None, torch.Tensor | None, Collection[int]]


class BorrowTable(_Table):
    """A dict of tensors in which a thread finds those that it has borrowed, and no other thread's.

    Attributes:
        records: of each name that was ever borrowed, a tuple: the borrowed tensor and the one whose
            place it took, or None twice; and the numbers of the threads that have borrowed it. Who
            lends puts a new tuple here before the borrowed tensor is in the dict, and one with None
            after it was taken away.
    """

    __slots__ = ("records",)

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor | None]] = ()) -> None:
        """Contain *tensors*, none of which is borrowed."""
        super().__init__(tensors)
        self.records: dict[str, Record] = {}

    @classmethod
    def of(cls, attributes: dict[str, Any], key: str) -> BorrowTable:  # Any: those of a module
        """The table that is *key* of the *attributes* of a module, which becomes one."""
        table = attributes[key]
        if type(table) is not cls:
            attributes[key] = table = cls(table.items())
        assert isinstance(table, cls)
        return table

    def __getitem__(self, name: str) -> torch.Tensor | None:
        while True:
            record = self.records.get(name)
            tensor = _there(self, name)
            if record is not None and record[0] is tensor:
                return tensor if get_ident() in record[2] else record[1]
            # A borrowed tensor is there only while its record is. So this one is not borrowed,
            # unless the record is a new one.
            if self.records.get(name) is record:
                return tensor

    # All that reads goes by the above.

    def __iter__(self) -> Iterator[str]:  # with which `dict(table)` calls `__getitem__`
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:  # Any: as a dict declares it
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> Any:  # Any, here and below: a view, which dicts have a type of their own for
        return ItemsView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def copy(self) -> _Table:
        return dict(self)

    __copy__ = copy

    def pop(self, name: str, *default: Any) -> Any:
        found = self.get(name, *default)
        super().pop(name, *default)
        return found

    def popitem(self) -> tuple[str, torch.Tensor | None]:
        name = next(reversed(self))
        return name, self.pop(name)

    def setdefault(self, name: str, default: Any = None) -> Any:
        super().setdefault(name, default)
        return self[name]

    def __or__(self, other: Any) -> Any:
        return dict(self) | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Table:
        memo[id(self)] = copied = {}
        for name, tensor in self.items():
            copied[name] = deepcopy(tensor, memo)
        return copied

    def __reduce_ex__(self, protocol: object) -> Any:
        return dict, (dict(self),)
