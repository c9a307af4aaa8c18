"""Positions of containers in an object tree, and whether a container that is met again may be
walked again.

A container at two places gives its tensors at both. Shared containers inside of shared ones can
make more paths than there is time for, so the work of repeated walks is limited: a container is
counted first, and then walked completely or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from shardkit.pickles.modules import module_items, module_state
from shardkit.pickles.object_graph import inside

_MOST_AGAIN = 100_000
_MOST_COUNTED = 1_000_000


class Meeting(Enum):
    """What to do with a container that was met."""

    ENTER = "walk it"
    CYCLE = "it contains itself"
    TOO_MANY = "what is below it would take too many names"


class Repeats:
    """The containers that the walk has met, and how much may still be walked again.

    Attributes:
        refused: how many places were not walked again.
    """

    def __init__(self, bearing: frozenset[int], most: int) -> None:
        """Let no more than *most* objects be met again; *bearing* are the ids of all containers
        that hold a tensor.
        """
        self.refused = 0
        self._bearing = bearing
        self._left = min(most, _MOST_AGAIN)
        self._count = self._most = 0  # objects below the container that is being counted
        self._to_count = _MOST_COUNTED
        self._first: dict[
            int, tuple[int, str]
        ] = {}  # where each was first met: the one around it, and its name
        self._around: dict[int, None] = {}  # from the root to the container that is being walked
        self._too_large: set[int] = set()
        self._again: int | None = None  # the outermost container on the way that is walked again

    def meet(self, node: object, around: int, name: str, room: int) -> Meeting:
        """Say what to do with *node*, found as *name* in the container *around*; *room* is how many
        names there is memory for.
        """
        key = id(node)
        if key in self._around:
            return Meeting.CYCLE
        if key not in self._first:
            self._first[key] = (around, name)
        elif self._again is None:
            if not self._fits(node, min(self._left, room)):
                self.refused += 1
                return Meeting.TOO_MANY
            self._left -= self._count
            self._again = key
        self._around[key] = None
        return Meeting.ENTER

    def leave(self) -> None:
        """The innermost container has been walked."""
        key, _ = self._around.popitem()
        if key == self._again:
            self._again = None

    def first_name(self, node: object) -> str:
        """The place at which *node* was first met, dotted."""
        names: list[str] = []
        key = id(node)
        while key in self._first:
            key, name = self._first[key]
            names.append(name)
        return ".".join(reversed(names[:-1])) or "the root"

    def _fits(self, node: object, most: int) -> bool:
        """Whether the walk would meet no more than *most* objects below *node*, as far as they can
        be counted.
        """
        if id(node) in self._too_large:
            return False
        self._count, self._most = 0, most
        try:
            self._count_below(node)
        except _TooMany:
            self._too_large.add(id(node))
            return False
        return True

    def _count_below(self, node: object) -> None:
        way: list[tuple[int, Iterator[object]]] = [(id(node), inside(node))]
        within = {id(node)}
        while way:
            for child in way[-1][1]:
                self._one_more()
                key = id(child)
                if key in self._bearing and key not in within and key not in self._around:
                    within.add(key)
                    way.append((key, self._inside(child)))
                    break
            else:
                within.remove(way.pop()[0])

    def _inside(self, node: object) -> Iterator[object]:
        """What the walk meets directly in a container; of a module it meets the weights, and not
        the parts that it is made of.
        """
        state = module_state(node)
        if state is None:
            yield from inside(node)
        else:
            yield from (
                None
                for _ in module_items(
                    state, self._one_more, lambda value: id(value) in self._bearing
                )
            )

    def _one_more(self, _length: int = 0) -> None:
        self._count += 1
        self._to_count -= 1
        if self._count > self._most or self._to_count <= 0:
            raise _TooMany


class _TooMany(Exception):
    """There is more below a container than may be walked again."""
