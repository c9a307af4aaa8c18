"""Containment among unpickled objects: the parts of containers, and which containers hold a tensor,
directly or not.

Nothing here recurses, so that a structure may be cyclic, 100,000 deep, or shared until it has more
paths than atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shardkit.dtypes import DType
from shardkit.pickles.numpy_arrays import Array, is_tensor
from shardkit.pickles.objects import Builder, Dict, Global, LongString, Opaque, key_text
from shardkit.pickles.torch_tensors import TENSORS, Stateful, View
from shardkit.printable import shown

CONTAINERS = frozenset({Dict, list, tuple, Opaque, Array, Stateful})
"""Types of the objects that have parts. An array has them if it is one of objects, a tensor if it
has attributes.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a dict that holds a tensor: a weight, and no place for a name."""

    value: object


Holds = Callable[[object], bool]
"""Says of an object whether it is a tensor, or a container with tensors, near or far."""


def children(node: object, holds: Holds) -> Iterator[tuple[str, object]]:
    """What lies directly in a container, by name. Of keys and the attributes of a dict only those
    that *holds* is true of.
    """
    match node:
        case Dict():
            yield from (
                (key if type(key) is str else key_text(key), value) for key, value in node.items()
            )
            for i, (key, value) in enumerate(node.pairs or ()):
                yield f"<{shown(key)}, item {i}>", value
                if holds(key):
                    yield f"<key of item {i}>", Key(key)
            if node.state is not None and holds(node.state):
                yield from (
                    (name, value) for name, value in _attributes_of_dict(node.state) if holds(value)
                )
        case list() | tuple():
            yield from ((str(i), value) for i, value in enumerate(node))
        case Array():
            yield from children(node.elements, holds)
        case Opaque():
            yield from children(node.args, holds)
            yield from children(node.items or (), holds)
            yield from children(node.mapping, holds)
            for state in node.states:
                yield from attributes(state, holds)


def attributes(state: object, holds: Holds) -> Iterator[tuple[str, object]]:
    """The parts of what `__setstate__` is given: most often a dict, or a dict beside one for the
    slots.
    """
    match state:
        case Dict() | list():
            yield from children(state, holds)
        case tuple() if all(part is None or isinstance(part, Dict) for part in state):
            for part in state:
                yield from children(part, holds)
        case _:
            yield "state", state


def _attributes_of_dict(state: object) -> Iterator[tuple[str, object]]:
    """The attributes of an OrderedDict. What is no plain dict of them is one part, since a dict may
    be its own attributes.
    """
    if isinstance(state, Dict) and state.pairs is None and state.state is None:
        yield from ((key_text(key), value) for key, value in state.items())
    else:
        yield "__dict__", state


def inside(node: object) -> Iterator[object]:
    """Yield the direct parts of a container."""
    match node:
        case Dict():
            yield from node.values()
            for pair in node.pairs or ():
                yield from pair
            if node.state is not None:
                yield node.state
        case list() | tuple():
            yield from node
        case Array():
            yield from node.elements
        case Stateful():
            yield node.state
        case Opaque():
            yield from (*node.args, *(node.items or ()), node.mapping, *node.states)


def bearing_of(root: object) -> frozenset[int]:
    """The ids of all containers at and below *root* that hold a tensor, near or far."""
    parents: dict[int, list[int]] = {id(root): []}
    bearing: list[int] = []
    stack = [root]
    while stack:
        node = stack.pop()
        for child in inside(node):
            kind = type(child)
            if kind in TENSORS or (kind is Array and is_tensor(child)):
                bearing.append(id(node))
            if kind in CONTAINERS:
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


class Named:
    """Which tensors have a name so far, and how many bytes those take that have none."""

    def __init__(self) -> None:
        """Know of no tensor yet."""
        self._storages: set[str] = set()
        self._others: set[int] = set()
        self._entered: set[int] = set()

    def add(self, tensor: object) -> None:
        """*tensor* has a name; so have all views of its storage."""
        if isinstance(tensor, View):
            self._storages.add(tensor.storage.key)
        else:
            self._others.add(id(tensor))

    def rest(self, value: object) -> int:
        """Bytes of the tensors below *value* that have no name. They count once: asked again, it is
        0.
        """
        total, stack = 0, [value]
        while stack:
            node = stack.pop()
            if id(node) in self._entered:
                continue
            self._entered.add(id(node))
            for child in inside(node):
                if is_tensor(child) and not self._has(child):
                    total += child.nbytes  # type: ignore[attr-defined]  # a tensor has bytes
                    self.add(child)
                if type(child) in CONTAINERS:
                    stack.append(child)
        return total

    def _has(self, tensor: object) -> bool:
        if isinstance(tensor, View):
            return tensor.storage.key in self._storages
        return id(tensor) in self._others


def nbytes_of(value: object) -> int:
    """Bytes of a tensor, or of the tensors that lie directly in a list or a tuple; 0 for anything
    else.
    """
    parts = value if isinstance(value, list | tuple) else (value,)
    return sum(part.nbytes for part in parts if isinstance(part, (*TENSORS, Array)))


def attribute(name: str, value: object) -> str:
    """The *name* of an attribute, with its class if that is known, for a person."""
    return f"{shown(name)[1:-1]} ({value.name})" if isinstance(value, Opaque) else shown(name)[1:-1]


def described(value: object) -> str:
    """What kind of thing *value* is, for a person."""
    match value:
        case Array():
            return value.description
        case Opaque() | Global() | Builder():
            return value.name
        case LongString():
            return f"a string of {value.nbytes:,} bytes"
        case DType():
            return value.code
        case Dict():
            return f"a dict of {len(value) + len(value.pairs or ())}"
    return shown(value)
