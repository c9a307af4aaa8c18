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
from shardkit.errors import AmbiguousRoot, NothingSelected, shown
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
    """A place in the tree of names, with the tensors and the weights of other kinds that have this very name."""

    path: tuple[str, ...]
    children: dict[str, Node] = field(default_factory=dict)
    tensors: list[TensorEntry] = field(default_factory=list)
    undense: list[Other] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights at and below this node."""
        return sum(
            sum(entry.nbytes for entry in node.tensors) + sum(other.nbytes for other in node.undense) for node in self.walk()
        )

    @property
    def holds_weights(self) -> bool:
        return any(node.tensors or node.undense for node in self.walk())

    @property
    def own(self) -> list[TensorEntry]:
        """The tensors that hang on this node by a name of their own."""
        return [entry for child in self.children.values() for entry in child.tensors]


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
    chosen = _Chosen(node, aside)
    left_out = tuple(_left_out(tree, node, aside))
    return Rooted(chosen.tensors(checkpoint.tensors), chosen.others(checkpoint.others), left_out, node.path)


def tree_of(checkpoint: Checkpoint) -> Node:
    """The tree that the paths of all tensors and others span."""
    tree = Node(())
    for entry in checkpoint.tensors:
        _place(tree, entry.path).tensors.append(entry)
    for other in checkpoint.others:
        node = _place(tree, other.path)
        if other.is_weight:
            node.undense.append(other)
    return tree


@dataclass(frozen=True, slots=True)
class _Chosen:
    node: Node
    aside: dict[tuple[str, ...], str]

    def tensors(self, entries: Iterable[TensorEntry]) -> tuple[TensorEntry, ...]:
        depth = len(self.node.path)
        if not depth and not self.aside:
            return tuple(entries)
        return tuple(TensorEntry(e.path[depth:], e.dtype, e.shape, e.payload) for e in entries if self._holds(e.path))

    def others(self, others: Iterable[Other]) -> tuple[Other, ...]:
        depth = len(self.node.path)
        return tuple(Other(o.path[depth:], o.kind, o.nbytes, o.reason) for o in others if self._holds(o.path))

    def _holds(self, path: tuple[str, ...]) -> bool:
        depth = len(self.node.path)
        return path[:depth] == self.node.path and len(path) > depth and path[: depth + 1] not in self.aside


def _place(tree: Node, path: tuple[str, ...]) -> Node:
    node = tree
    for depth, name in enumerate(path, 1):
        child = node.children.get(name)
        if child is None:
            child = node.children[name] = Node(path[:depth])
        node = child
    return node


def _find_model(tree: Node) -> Node:
    node = tree
    while all(map(_is_incidental, node.own)):
        candidates = _candidates(node)
        if not candidates:
            break
        if len(candidates) > 1:
            raise _ambiguous(candidates)
        node = candidates[0]
    if not node.children:  # a lone tensor, named by the step that led to it
        return Node(node.path[:-1], {node.path[-1]: node}) if node.path else node
    return node


def _candidates(node: Node) -> list[Node]:
    bearing = [child for name, child in node.children.items() if _why_aside(child) is None]
    named = [child for child in bearing if not _is_list(child)]
    return named or bearing


def _set_aside(node: Node) -> dict[tuple[str, ...], str]:
    """The subtrees below the model's *node* that are no part of it, each with the reason."""
    subtrees = [child for child in node.children.values() if child.children and child.holds_weights]
    reasons = {child.path: reason for child in subtrees if (reason := _why_aside(child))}
    return reasons if len(reasons) < len(node.children) else {}


def _why_aside(node: Node) -> str | None:
    if not node.holds_weights:
        return "holds no tensors"
    if _is_optimizer_state(node):
        return "optimizer state"
    if all(not each.undense and all(map(_is_incidental, each.tensors)) for each in node.walk()):
        return "loop or random-number state"
    return None


def _is_optimizer_state(node: Node) -> bool:
    """Whether all its weights are an optimizer's: of one, of a list of them, or of one wrapped with its slots."""
    if {"state", "param_groups"} <= node.children.keys():
        return True
    inside = [child for child in node.children.values() if child.holds_weights]
    optimizers = [child for child in inside if child.children and _is_optimizer_state(child)]
    return bool(optimizers) and all(child in optimizers or _is_list(child) for child in inside)


def _is_list(node: Node) -> bool:
    return bool(node.children) and all(name.isdecimal() for each in node.walk() for name in each.children)


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


def _left_out(tree: Node, chosen: Node, aside: dict[tuple[str, ...], str]) -> Iterator[LeftOut]:
    """What is beside the way down to *chosen*, topmost places only, and what is set aside below it."""
    node = tree
    for name in chosen.path:
        for child in node.children.values():
            if child.path[-1] != name:
                yield LeftOut(child.name, child.nbytes, _why_aside(child) or "beside the model")
        node = node.children[name]
    for path, reason in aside.items():
        yield LeftOut(".".join(path), chosen.children[path[-1]].nbytes, reason)


def _ambiguous(candidates: list[Node]) -> AmbiguousRoot:
    listed = ", ".join(f"{shown(node.name)} ({format_size(node.nbytes)})" for node in candidates[:10])
    more = f" and {len(candidates) - 10} more" if len(candidates) > 10 else ""
    return AmbiguousRoot(
        f"several parts of the file could be the model: {listed}{more}",
        hint=f"choose one with --root {candidates[0].name}, or take all with --root .",
    )
