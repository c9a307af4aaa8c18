"""A checkpoint as a tree of names, folded to the lines that a person will read. Pure, and without
recursion.

1. A name is cut at its dots. A place with one child and nothing of its own is drawn on the line of
   that child.
2. What fits in the given number of lines is drawn whole.
3. Otherwise runs of numbered siblings that look alike become one, and the tree is opened from the
   top, level by level, as far as the lines go. What stays closed says how much is in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

_DEEPEST = 64  # parts of one name, so that a name of a million dots is no tree of a million levels
_FEWEST_ALIKE = 3


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor, or something else that has a name.

    Attributes:
        kind: its type, or what it is.
        shape: as text; empty where it has none.
        nbytes: what it takes; 0 for a name that is tied to another.
        remark: what else there is to say.
        is_tensor: whether it counts as one.
        tie: for a tied name, the other one as seen from here; empty for any other.
    """

    kind: str
    shape: str
    nbytes: int
    remark: str
    is_tensor: bool = True
    tie: str = ""

    @property
    def look(self) -> object:
        """What two leaves have in common that look alike."""
        return self.kind, self.shape, self.nbytes, self.tie or self.remark


_NOTHING: MappingProxyType[str, Place] = MappingProxyType(
    {}
)  # most places have nothing below, and there may be many


@dataclass(slots=True)
class Place:
    """A part of a name: what is at it, and what lies below, with how many tensors and bytes there
    are in all.
    """

    label: str
    leaves: tuple[Leaf, ...] = ()
    children: dict[str, Place] | MappingProxyType[str, Place] = field(
        default_factory=lambda: _NOTHING
    )
    tensors: int = 0
    nbytes: int = 0
    look: int = 0


@dataclass(slots=True)
class Item:
    """One line of the outline.

    Attributes:
        label: the name, from the item around it on.
        place: what it stands for; the first of them if it is *times* alike.
        leaf: the leaf that is drawn on this line.
        times: how many siblings that look alike it stands for.
        items: what is drawn below it; empty while it is closed.
        hidden: how many more there would be below it.
    """

    label: str
    place: Place
    leaf: Leaf | None = None
    times: int = 1
    items: list[Item] = field(default_factory=list)
    hidden: int = 0

    @property
    def tensors(self) -> int:
        """How many tensors the line stands for, with what is below it."""
        below = self.place.tensors - sum(leaf.is_tensor for leaf in self.place.leaves)
        return self.times * (self.leaf.is_tensor if self.leaf else below)

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        below = self.place.nbytes - sum(leaf.nbytes for leaf in self.place.leaves)
        return self.times * (self.leaf.nbytes if self.leaf else below)


@dataclass(frozen=True, slots=True)
class Line:
    """A line to be drawn: an *item*, or that there are *hidden* more; *depth* levels in."""

    depth: int
    item: Item | None
    hidden: int = 0


def outline(
    leaves: Iterable[tuple[tuple[str, ...], Leaf]], *, most: int | None
) -> tuple[list[Line], bool]:
    """The lines for leaves with these paths, and whether anything is folded.

    Args:
        leaves: what there is, in the order of the file.
        most: how many lines there may be; None for all there are.
    """
    places = _grown(leaves)
    whole = Item("", places[0])
    if _opened(whole, most, fold=False):
        return list(_lines(whole)), False
    _see_looks(places)
    whole = Item("", places[0])
    _opened(whole, most, fold=True)
    return list(_lines(whole)), True


def _grown(leaves: Iterable[tuple[tuple[str, ...], Leaf]]) -> list[Place]:
    """All places, each before those below it."""
    places = [Place("")]
    labels: dict[str, str] = {}  # most names end as others do, and one text is enough for them
    for path, leaf in leaves:
        place = places[0]
        for label in _parts(path):
            child = place.children.get(label)
            if child is None:
                child = Place(labels.setdefault(label, label))
                place.children = place.children if isinstance(place.children, dict) else {}
                place.children[child.label] = child
                places.append(child)
            place = child
            place.tensors += leaf.is_tensor
            place.nbytes += leaf.nbytes
        place.leaves = (*place.leaves, leaf)
    return places


def _parts(path: tuple[str, ...]) -> list[str]:
    return ".".join(path).split(".", _DEEPEST)


def _see_looks(places: Sequence[Place]) -> None:
    """Give places the same look whose leaves and children have the same names, types, shapes and
    remarks.
    """
    looks: dict[object, int] = {}
    seen: dict[int, int] = {}  # by identity: it is the same few leaves over and over
    for place in reversed(places):
        for leaf in place.leaves:
            if id(leaf) not in seen:
                seen[id(leaf)] = looks.setdefault(leaf.look, len(looks))
        look: list[object] = [seen[id(leaf)] for leaf in place.leaves]
        if place.children:
            look += [(child.label, child.look) for child in place.children.values()]
        place.look = looks.setdefault(tuple(look), len(looks))


def _opened(whole: Item, most: int | None, *, fold: bool) -> bool:
    """Open *whole* and the items below it, those nearest to the top first, up to *most* lines;
    whether that is all of them.
    """
    left = float("inf") if most is None else most
    closed: list[tuple[Item, list[Item]]] = []
    queue = deque([whole])
    while queue:
        item = queue.popleft()
        if item.leaf is None and not fold and len(item.place.children) > left:
            return False  # before a line is made for each
        items = list(_items(item.place, fold=fold)) if item.leaf is None else []
        if len(items) > left:
            if not fold:
                return False
            closed.append((item, items))
            continue
        item.items = items
        left -= len(items)
        queue.extend(items)
    _open_in_part(closed, int(left) if closed else 0)
    return not closed


def _open_in_part(closed: Iterable[tuple[Item, list[Item]]], left: int) -> None:
    """Spend the lines that are left on the first item that a part of would say more about."""
    for item, items in closed:
        if left > _FEWEST_ALIKE:
            item.items, item.hidden = items[: left - 1], len(items) - left + 1
            return


def _items(place: Place, *, fold: bool) -> Iterator[Item]:
    for run in _runs(_ordered(place), fold=fold):
        first, last = run[0], run[-1]
        if len(run) >= _FEWEST_ALIKE:
            yield Item(
                f"{first.label} … {last.label}",
                first,
                first.leaves[0] if first.leaves else None,
                len(run),
            )
        else:
            for child in run:
                yield from _drawn(child)


def _drawn(place: Place) -> Iterator[Item]:
    """The lines for *place*: one for each leaf it has, and one for everything below it."""
    labels = [place.label]
    while len(place.children) == 1 and not place.leaves:
        (place,) = place.children.values()
        labels.append(place.label)
    label = ".".join(labels)
    yield from (Item(label, place, leaf) for leaf in place.leaves)
    if place.children:
        yield Item(label, place)


def _ordered(place: Place) -> list[Place]:
    """The children in the order of the file; those that are all numbered, by number."""
    children = list(place.children.values())
    if all(_is_number(child.label) for child in children):
        children.sort(key=lambda child: int(child.label))
    return children


def _runs(children: Iterable[Place], *, fold: bool) -> Iterator[list[Place]]:
    run: list[Place] = []
    for child in children:
        if run and not (fold and _follows(run[-1], child)):
            yield run
            run = []
        run.append(child)
    if run:
        yield run


def _follows(last: Place, child: Place) -> bool:
    numbered = (
        _is_number(last.label)
        and _is_number(child.label)
        and int(child.label) == int(last.label) + 1
    )
    return numbered and last.look == child.look and len(child.leaves) + bool(child.children) == 1


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdecimal() and len(label) < 10


def _lines(whole: Item) -> Iterator[Line]:
    stack: list[Line] = []
    _push(stack, whole, 0)
    while stack:
        line = stack.pop()
        yield line
        if line.item is not None:
            _push(stack, line.item, line.depth + 1)


def _push(stack: list[Line], item: Item, depth: int) -> None:
    if item.hidden:
        stack.append(Line(depth, None, item.hidden))
    stack.extend(Line(depth, each) for each in reversed(item.items))
