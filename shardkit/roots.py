"""Where in a nested checkpoint the model is, told by the shape of the tree and never by a list of names.

1. Set aside: subtrees shaped like an optimizer (`state` beside `param_groups`, as torch.optim.Optimizer.state_dict makes
   them), and subtrees that hold nothing but scalars and random-number states (1-d uint8), as loops and meters do.
2. A node with tensors of its own is the model. Otherwise descend while exactly one child holds tensors.
3. Lists (children that are all numbered) give way to a child with names: lists of tensors are optimizer slots and averages.
4. What is left is ambiguous, and the person is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod

from shardkit.checkpoint import Checkpoint, Other, TensorEntry
from shardkit.dtypes import U8
from shardkit.errors import AmbiguousRoot, NothingSelected, listed, shown
from shardkit.hints import option
from shardkit.sizes import format_size


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part of the file that is not converted.

    Attributes:
        name: dotted path of the subtree.
        nbytes: bytes of the tensors in it.
        reason: for a person.
    """

    name: str
    nbytes: int
    reason: str


@dataclass(slots=True)
class Node:
    """A place in the tree of names, and what can be said of all that lies at and below it.

    Attributes:
        step: the last name of its path.
        parent: the place above; None for the root of the tree.
        children: the places below, by their steps.
        tensors: those that have this very path.
        undense: weights of other kinds that have this very path.
        holds_weights: whether there are any at or below.
        is_incidental: whether all of them are scalars or random-number states.
        is_numbered: whether all names below are numbers.
        is_optimizer_state: whether all weights are an optimizer's: of one, of a list of them, or of one beside its slots.
    """

    step: str = ""
    parent: Node | None = None
    children: dict[str, Node] = field(default_factory=dict)
    tensors: list[TensorEntry] = field(default_factory=list)
    undense: list[Other] = field(default_factory=list)
    holds_weights: bool = False
    is_incidental: bool = True
    is_numbered: bool = True
    is_optimizer_state: bool = False

    def judge(self) -> None:
        """Fill in what is said of the place, when it is said of all below."""
        children = self.children.values()
        bearing = [child for child in children if child.holds_weights]
        optimizers = [child for child in bearing if child.is_optimizer_state]
        self.holds_weights = bool(self.tensors or self.undense or bearing)
        self.is_incidental = not self.undense and all(map(_is_incidental, self.tensors)) and all(c.is_incidental for c in bearing)
        self.is_numbered = all(step.isdecimal() and child.is_numbered for step, child in self.children.items())
        beside = (child.is_optimizer_state or child.is_list for child in bearing)
        self.is_optimizer_state = {"state", "param_groups"} <= self.children.keys() or (bool(optimizers) and all(beside))

    @property
    def is_list(self) -> bool:
        return bool(self.children) and self.is_numbered

    @property
    def has_own_weights(self) -> bool:
        """Whether weights hang on this place by names of their own, and not just counters and the like."""
        return any((child.tensors or child.undense) and not child.is_incidental for child in self.children.values())

    @property
    def why_aside(self) -> str | None:
        """Why no model lies here; None where one may."""
        if not self.holds_weights:
            return "holds no tensors"
        if self.is_optimizer_state:
            return "optimizer state"
        return "loop or random-number state" if self.is_incidental else None

    @property
    def path(self) -> tuple[str, ...]:
        """The steps from the root down to this place; not kept, since a tree may be 100,000 deep."""
        steps: list[str] = []
        node = self
        while node.parent is not None:
            steps.append(node.step)
            node = node.parent
        return tuple(reversed(steps))

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights at and below."""
        total, stack = 0, [self]
        while stack:
            node = stack.pop()
            total += sum(entry.nbytes for entry in node.tensors) + sum(other.nbytes for other in node.undense)
            stack.extend(node.children.values())
        return total


@dataclass(frozen=True, slots=True)
class Rooted:
    """The part of a checkpoint that lies below the place *path*, with paths from there on, and what lies elsewhere."""

    tensors: tuple[TensorEntry, ...]
    others: tuple[Other, ...]
    left_out: tuple[LeftOut, ...] = ()
    path: tuple[str, ...] = ()


def select_root(checkpoint: Checkpoint, root: str | None) -> Rooted:
    """What lies below *root*.

    Args:
        checkpoint: what to choose from.
        root: dotted path; "." for everything; None to find the model.

    Raises:
        AmbiguousRoot: several subtrees could be the model.
        NothingSelected: *root* is not in the file, or there is no tensor.
    """
    flat = all(len(entry.path) == 1 for entry in checkpoint.tensors) and not any(o.is_weight for o in checkpoint.others)
    if root == "." or (root is None and flat):
        return Rooted(checkpoint.tensors, checkpoint.others)
    tree = tree_of(checkpoint)
    node = _find_model(tree) if root is None else _named(tree, root)
    aside = _set_aside(node) if root is None else {}
    chosen = _Chosen(node.path, aside)
    left_out = tuple(_left_out(tree, node, aside))
    return Rooted(chosen.tensors(checkpoint.tensors), chosen.others(checkpoint.others), left_out, chosen.path)


def tree_of(checkpoint: Checkpoint) -> Node:
    """The tree that the paths of all tensors and others span."""
    nodes = [Node()]
    for entry in checkpoint.tensors:
        _place(nodes, entry.path).tensors.append(entry)
    for other in checkpoint.others:
        node = _place(nodes, other.path)
        if other.is_weight:
            node.undense.append(other)
    for node in reversed(nodes):  # every place was made after the one above it
        node.judge()
    return nodes[0]


@dataclass(frozen=True, slots=True)
class _Chosen:
    path: tuple[str, ...]
    aside: dict[str, str]

    def tensors(self, entries: Iterable[TensorEntry]) -> tuple[TensorEntry, ...]:
        depth = len(self.path)
        if not depth and not self.aside:
            return tuple(entries)
        return tuple(TensorEntry(e.path[depth:], e.dtype, e.shape, e.payload) for e in entries if self._holds(e.path))

    def others(self, others: Iterable[Other]) -> tuple[Other, ...]:
        depth = len(self.path)
        return tuple(Other(o.path[depth:], o.kind, o.nbytes, o.reason) for o in others if self._holds(o.path))

    def _holds(self, path: tuple[str, ...]) -> bool:
        depth = len(self.path)
        return path[:depth] == self.path and len(path) > depth and path[depth] not in self.aside


def _place(nodes: list[Node], path: tuple[str, ...]) -> Node:
    """The place at *path*; it and those above it are made, and added to *nodes*, where they are missing."""
    node = nodes[0]
    for step in path:
        if step not in node.children:
            node.children[step] = Node(step, node)
            nodes.append(node.children[step])
        node = node.children[step]
    return node


def _find_model(tree: Node) -> Node:
    node = tree
    while not node.has_own_weights:
        bearing = [child for child in node.children.values() if child.why_aside is None]
        candidates = [child for child in bearing if not child.is_list] or bearing
        if not candidates:
            break
        if len(candidates) > 1:
            raise _ambiguous(candidates)
        node = candidates[0]
    return node


def _set_aside(node: Node) -> dict[str, str]:
    """The steps to the subtrees below the model's *node* that are no part of it, each with the reason."""
    subtrees = (child for child in node.children.values() if child.children and child.holds_weights)
    reasons = {child.step: reason for child in subtrees if (reason := child.why_aside)}
    return reasons if len(reasons) < len(node.children) else {}


def _is_incidental(entry: TensorEntry) -> bool:
    return prod(entry.shape) <= 1 or (entry.dtype == U8 and len(entry.shape) == 1)


def _named(tree: Node, root: str) -> Node:
    """The node at the dotted path *root*; a name on the way may itself hold dots."""
    reached = [(tree, root)]
    while reached:
        node, rest = reached.pop()
        for name, child in node.children.items():
            if rest == name and child.children:
                return child
            if rest.startswith(f"{name}."):
                reached.append((child, rest[len(name) + 1 :]))
    names = ", ".join(shown(name) for name in list(tree.children)[:8])
    raise NothingSelected(
        f"there is nothing to enter at {shown(root)}; the file holds {names or 'nothing'}",
        hint="run `shardkit inspect` to see the tree",
    )


def _left_out(tree: Node, chosen: Node, aside: dict[str, str]) -> Iterator[LeftOut]:
    """What is beside the way down to *chosen*, topmost places only, and what is set aside below it."""
    node = tree
    for step in chosen.path:
        for child in node.children.values():
            if child.step != step:
                yield LeftOut(child.name, child.nbytes, child.why_aside or "beside the model")
        node = node.children[step]
    for step, reason in aside.items():
        yield LeftOut(chosen.children[step].name, chosen.children[step].nbytes, reason)


def _ambiguous(candidates: list[Node]) -> AmbiguousRoot:
    found = listed([f"{shown(node.name)} ({format_size(node.nbytes)})" for node in candidates], most=10)
    return AmbiguousRoot(
        f"several parts of the file could be the model: {found}",
        hint=(
            "choose one with ",
            option("root", max(candidates, key=lambda node: node.nbytes).name),
            ", or take all with ",
            option("root", "."),
        ),
    )
