"""From unpickled objects to named tensors: dicts, lists, unknown objects and whole modules, walked without recursion.

1. A key is one step of a path, dots and all: the "layers.0.weight" of a state dict is not split.
2. A module is known by the shape of its state (`_parameters`, `_buffers`, `_modules`), since its class cannot be imported.
   It stands for its state dict: names relative to the outermost module are one step, joined with dots, in torch's order.
   A module under two names gives both, as in torch. What `get_extra_state` would compute cannot be known and is missing.
3. Any other container is entered once, so that cycles and shared structures end; the second time it is named as the same.
4. A subtree without a tensor is one `Other` at its top. Plain attributes of a module are not mentioned, unless they are
   tensors: torch leaves these out of the state dict too, but they should not vanish in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardkit.checkpoint import Other, OtherKind, TensorEntry
from shardkit.dtypes import DType
from shardkit.errors import LimitExceeded, Malformed, shown
from shardkit.limits import Limits
from shardkit.module_tree import module_items, module_state
from shardkit.stand_ins import Builder, Dict, Global, LongString, Opaque, key_text
from shardkit.torch_tensors import Record, Storage, Undense, View

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What a tree of objects holds, in its order."""

    tensors: tuple[TensorEntry, ...]
    others: tuple[Other, ...]


def collect(
    path: Path, root: object, *, record: Record, limits: Limits, calls: Iterable[str] = (), big_endian: bool = False
) -> Found:
    """Name all tensors below *root*.

    Args:
        path: the file, for messages.
        root: what `pickles.unpickle` gave.
        record: finds the bytes of a storage.
        limits: `tensors` and `held_bytes` bound what is found.
        calls: what was never called; each becomes an `Other`.
        big_endian: whether the bytes of multi-byte words stand in reverse.

    Raises:
        Malformed: a tensor does not fit its storage.
        LimitExceeded: there are too many.
    """
    walk = _Walk(path, record, limits, big_endian, _bearing(root))
    walk.everything(root)
    for call in calls:
        walk.other((), OtherKind.CALL, call)
    return Found(tuple(walk.tensors), tuple(walk.others))


def children(node: object) -> Iterator[tuple[str, object]]:
    """What lies directly in a container, by name."""
    match node:
        case Dict():
            yield from ((key if type(key) is str else key_text(key), value) for key, value in node.items())
            yield from ((f"<{shown(key)}, item {i}>", value) for i, (key, value) in enumerate(node.pairs or ()))
        case list() | tuple():
            yield from ((str(i), value) for i, value in enumerate(node))
        case Opaque():
            yield from children(node.args)
            yield from children(node.items or ())
            yield from children(node.mapping)
            for state in node.states:
                yield from _attributes(state)


_TENSORS = (View, Undense, Storage)
_CONTAINERS = frozenset({Dict, list, tuple, Opaque})


def _attributes(state: object) -> Iterator[tuple[str, object]]:
    """The parts of what `__setstate__` is given: most often a dict, or a dict beside one for the slots."""
    match state:
        case Dict() | list():
            yield from children(state)
        case tuple() if all(part is None or isinstance(part, Dict) for part in state):
            for part in state:
                yield from children(part)
        case _:
            yield "state", state


def _inside(node: object) -> Iterator[object]:
    """What lies directly in a container."""
    match node:
        case Dict():
            yield from node.values()
            yield from (value for _, value in node.pairs or ())
        case list() | tuple():
            yield from node
        case Opaque():
            yield from (*node.args, *(node.items or ()), node.mapping, *node.states)


def _bearing(root: object) -> frozenset[int]:
    """The ids of all containers at and below *root* that hold a tensor, near or far."""
    parents: dict[int, list[int]] = {id(root): []}
    bearing: list[int] = []
    stack = [root]
    while stack:
        node = stack.pop()
        for child in _inside(node):
            kind = type(child)
            if kind in _TENSORS:
                bearing.append(id(node))
            elif kind in _CONTAINERS:
                if id(child) not in parents:
                    parents[id(child)] = []
                    stack.append(child)
                parents[id(child)].append(id(node))
    return _closed(bearing, parents)


def _closed(bearing: list[int], parents: dict[int, list[int]]) -> frozenset[int]:
    closed: set[int] = set()
    while bearing:
        node = bearing.pop()
        if node not in closed:
            closed.add(node)
            bearing.extend(parents[node])
    return frozenset(closed)


class _Walk:
    """One pass over the objects, and what it has found so far."""

    def __init__(self, path: Path, record: Record, limits: Limits, big_endian: bool, bearing: frozenset[int]) -> None:
        self.path = path
        self.record = record
        self.limits = limits
        self.big_endian = big_endian
        self.bearing = bearing
        self.tensors: list[TensorEntry] = []
        self.others: list[Other] = []
        self._entered: dict[int, tuple[int, str]] = {}  # where a container was first met: the one around it, and its name
        self._names: list[str] = []  # from the root to the container that is being read
        self._seen = 0
        self._held = 0

    def everything(self, root: object) -> None:
        """Visit *root* and, in the order of the file, all that lies below it."""
        stack = [(0, iter([("", root)]))]
        while stack:
            around, items = stack[-1]
            for name, value in items:
                if self._visit(around, name, value):
                    self._names.append(name)
                    stack.append((id(value), children(value)))
                    break
            else:
                stack.pop()
                del self._names[-1:]

    def _visit(self, around: int, name: str, value: object) -> bool:
        """Note *value*, or say that it should be entered."""
        if type(value) is View:
            self._dense(self._path_to(name) or ("tensor",), value)
        elif isinstance(value, _TENSORS):
            self.weight(self._path_to(name) or ("tensor",), value)
        elif id(value) not in self.bearing:
            self.other(self._path_to(name), OtherKind.OBJECT, _described(value))
        elif (state := module_state(value)) is not None:
            self._module(self._path_to(name), state)
        elif id(value) in self._entered:
            self.other(self._path_to(name), OtherKind.OBJECT, f"the same object as {shown(self._first_name(id(value)))}")
        else:
            self._entered[id(value)] = (around, name)
            return True
        return False

    def _path_to(self, name: str) -> Names:
        # The first name is that of the root, which has none.
        return (*self._names[1:], name) if self._names else ()

    def _first_name(self, node: int) -> str:
        names: list[str] = []
        while node in self._entered:
            node, name = self._entered[node]
            names.append(name)
        return ".".join(reversed(names[:-1])) or "the root"

    def _module(self, names: Names, state: Dict) -> None:
        for item in module_items(state, self._spend):
            path = (*names, item.name)
            if item.aside:
                self.other(path, OtherKind.OBJECT, item.aside, _nbytes(item.value))
            elif isinstance(item.value, _TENSORS):
                self.weight(path, item.value)
            else:
                self._unreadable(path, item.value)

    def _unreadable(self, path: Names, value: object) -> None:
        """What stands where a module or a parameter should, and has no state that we know."""
        holds = id(value) in self.bearing
        self.other(
            path, OtherKind.UNKNOWN_TENSOR if holds else OtherKind.OBJECT, f"{_described(value)}, whose state is its own affair"
        )

    def weight(self, path: Names, value: View | Undense | Storage) -> None:
        """Note a tensor."""
        match value:
            case View():
                self._dense(path, value)
            case Undense():
                self.other(path, value.kind, value.reason, value.nbytes)
            case Storage():
                self.other(path, OtherKind.UNKNOWN_TENSOR, f"a bare storage of {value.kind.dtype.code}", value.nbytes)

    def other(self, path: Names, kind: OtherKind, reason: str, nbytes: int = 0) -> None:
        """Note what is no dense tensor."""
        self._spend(8 * len(path) + len(reason))
        self.others.append(Other(path, kind, nbytes, reason))

    def _dense(self, path: Names, view: View) -> None:
        self._spend(8 * len(path) + len(path[-1]))
        try:
            payload = view.payload(self.record, big_endian=self.big_endian)
            self.tensors.append(TensorEntry(path, view.dtype, view.logical_shape, payload))
        except ValueError as error:
            hint = "the file is damaged, or made to mislead: fetch it again, from where you trust it"
            raise Malformed(self.path, str(error), where=f"tensor {shown('.'.join(path))}", hint=hint) from None

    def _spend(self, nbytes: int) -> None:
        """Count one thing found, whose name takes *nbytes* to hold."""
        self._seen += 1
        self._held += nbytes
        most = self.limits.tensors
        if self._seen > 4 * most:
            raise LimitExceeded(self.path, f"holds more than {self._seen:,} names", limit="tensors", actual=self._seen)
        if len(self.tensors) > most:
            raise LimitExceeded(self.path, f"holds more than {most:,} tensors", limit="tensors", actual=2 * most)
        if self._held > self.limits.held_bytes:
            raise LimitExceeded(
                self.path, f"its names take more than {self._held:,} bytes", limit="held_bytes", actual=2 * self._held
            )


def _nbytes(value: object) -> int:
    parts = value if isinstance(value, list | tuple) else (value,)
    return sum(part.nbytes for part in parts if isinstance(part, View | Undense | Storage))


def _described(value: object) -> str:
    """What kind of thing *value* is, for a person."""
    match value:
        case Opaque() | Global() | Builder():
            return value.name
        case LongString():
            return f"a string of {value.nbytes:,} bytes"
        case DType():
            return value.code
        case Dict():
            return f"a dict of {len(value) + len(value.pairs or ())}"
    return shown(value)
