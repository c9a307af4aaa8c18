"""Find the model in a nested checkpoint, by the shape of the tree, and by names only where several
parts could be it.

1. Set aside: subtrees shaped like the state of an optimizer (`state` beside `param_groups`, as
   torch.optim.Optimizer.state_dict makes them, or a partition of DeepSpeed ZeRO) or of a scheduler,
   and random-number states (one axis of unsigned integers). Subtrees of scalars only are set aside
   too where their name, or one beside it, is of a training run (`epoch`, `loops`): a scalar with
   the name of a parameter, or without such a name beside it, is a weight. A file of which
   everything is set aside is refused.
2. A node with tensors of its own is the model. Otherwise descend while exactly one child holds
   tensors.
3. Lists (children that are all numbered) give way to a child with names: lists of tensors are
   optimizer slots and averages.
4. If one child has the name that training programs give to the model (`state_dict`, `model`), it is
   the model if everything beside it is settings, callbacks and the like. A moving average of the
   weights is not.
5. Anything else is ambiguous, and the user is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from shardkit.checkpoint.entries import Checkpoint, LeftOut, Other, OtherKind, TensorEntry
from shardkit.checkpoint.name_tree import PARTITION, RANDOM, Node, is_only_random, tree_of
from shardkit.checkpoint.root_names import (
    CONVENTIONAL,
    is_average,
    is_no_model,
    is_of_training,
    is_parameter,
    is_state_dict,
    is_unmistakable,
)
from shardkit.errors import AmbiguousRoot, NothingSelected
from shardkit.hints import Option, option
from shardkit.printable import listed, shown, shown_path
from shardkit.sizes import format_size


@dataclass(frozen=True, slots=True)
class Rooted:
    """The part of a checkpoint that lies below the place *path*, with paths from there on, and what
    lies elsewhere.
    """

    tensors: tuple[TensorEntry, ...]
    others: tuple[Other, ...]
    left_out: tuple[LeftOut, ...] = ()
    path: tuple[str, ...] = ()


def select_root(checkpoint: Checkpoint, root: str | None) -> Rooted:
    """Return the items below *root*.

    Args:
        checkpoint: what to choose from.
        root: dotted path; "." for everything; None to find the model.

    Raises:
        AmbiguousRoot: several subtrees could be the model.
        NothingSelected: *root* is not in the file, or there is no tensor, or the file holds the
            state of an optimizer, a scheduler or a random-number generator, and no model.
    """
    if root is None:
        _refuse_no_model(checkpoint, RANDOM if is_only_random(checkpoint) else "")
    flat = all(len(entry.path) == 1 for entry in checkpoint.tensors) and not any(
        o.is_weight for o in checkpoint.others
    )
    if root == "." or (root is None and flat):
        return Rooted(checkpoint.tensors, checkpoint.others)
    tree = tree_of(checkpoint)
    if root is None:
        _refuse_no_model(checkpoint, _no_model(tree))
    node = _find_model(tree) if root is None else _named(tree, root)
    aside = _set_aside(node) if root is None else {}
    chosen = _Chosen(node.path, aside)
    left_out = tuple(_left_out(tree, node, aside))
    return Rooted(
        chosen.tensors(checkpoint.tensors), chosen.others(checkpoint.others), left_out, chosen.path
    )


def at_root(checkpoint: Checkpoint, root: str) -> Checkpoint:
    """*checkpoint* with what is below *root* alone, under the names that it has there. What the
    file asks to call stays.

    Raises:
        NothingSelected: *root* is not in the file.
    """
    rooted = select_root(checkpoint, root)
    calls = (each for each in checkpoint.others if each.kind is OtherKind.CALL)
    others = tuple(each for each in rooted.others if each.kind is not OtherKind.CALL)
    left_out = (*checkpoint.left_out, *rooted.left_out)
    return replace(checkpoint, tensors=rooted.tensors, others=(*others, *calls), left_out=left_out)


@dataclass(frozen=True, slots=True)
class _Chosen:
    path: tuple[str, ...]
    aside: dict[str, str]

    def tensors(self, entries: Iterable[TensorEntry]) -> tuple[TensorEntry, ...]:
        depth = len(self.path)
        if not depth and not self.aside:
            return tuple(entries)
        return tuple(
            TensorEntry(e.path[depth:], e.dtype, e.shape, e.payload)
            for e in entries
            if self._holds(e.path)
        )

    def others(self, others: Iterable[Other]) -> tuple[Other, ...]:
        depth = len(self.path)
        return tuple(
            Other(o.path[depth:], o.kind, o.nbytes, o.reason) for o in others if self._holds(o.path)
        )

    def _holds(self, path: tuple[str, ...]) -> bool:
        depth = len(self.path)
        return path[:depth] == self.path and len(path) > depth and path[depth] not in self.aside


def _find_model(tree: Node) -> Node:
    node = tree
    while True:
        model = _conventional(node)
        if model is None and node.has_own_weights:
            return node
        bearing = [child for child in node.children.values() if child.why_aside is None]
        named = [child for child in bearing if not child.is_list] or bearing
        candidates = [child for child in named if not is_no_model(child.step)] or named
        if model is None and len(candidates) > 1:
            raise _ambiguous(candidates)
        if model is None and not candidates:
            return node
        node = model or candidates[0]


def _conventional(node: Node) -> Node | None:
    """The one child of *node* that is called as models are, if nothing beside it could be a model
    too.
    """
    called = [node.children[name] for name in CONVENTIONAL if name in node.children]
    models = [child for child in called if child.children and child.why_aside is None]
    if len(models) != 1:
        return None
    beside = (child for child in node.children.values() if child is not models[0])
    return None if any(_is_rival(child, models[0]) for child in beside) else models[0]


def _is_rival(child: Node, model: Node) -> bool:
    """Whether *child*, which is beside the *model*, could be the model as well, or a part of it."""
    if child.why_aside:
        return False
    if is_average(child.step) or is_state_dict(child.step):
        return True
    if is_no_model(child.step) or child.is_list:
        return False
    if child.is_incidental and child.tensors:
        return child.is_called_weight or not is_of_training(model.step)
    if is_unmistakable(model.step):
        return is_parameter(child.step) if not child.children else child.has_matrix
    return is_parameter(child.step) or bool(child.children) or child.has_matrix


def _no_model(tree: Node) -> str:
    """What a file holds that has no model in it; empty if there may be one."""
    if tree.has_own_weights:
        return ""
    bearing = [child for child in tree.children.values() if child.holds_weights]
    states = dict.fromkeys(child.state_of for child in bearing if child.state_of)
    if tree.state_of or not (states and all(child.why_aside for child in bearing)):
        return tree.state_of
    return " and ".join(states)


def _refuse_no_model(checkpoint: Checkpoint, state: str) -> None:
    if not state:
        return
    where = shown_path(checkpoint.files[0].path) if checkpoint.files else "the file"
    model = (
        "the *_model_states.pt files beside it hold the weights, and zero_to_fp32.py, which "
        "DeepSpeed writes into the checkpoint "
        "folder, joins the partitions"
    )
    if PARTITION not in state:
        model = (
            "the model is probably in a file beside it, such as model.safetensors or "
            "pytorch_model.bin"
        )
    hint = (f"{model}; to convert it anyway, add ", option("root", "."))
    raise NothingSelected(f"{where}: holds {state} but no model", hint=hint)


def _set_aside(node: Node) -> dict[str, str]:
    """The steps to the subtrees below the model's *node* that are no part of it, each with the
    reason.
    """
    subtrees = (child for child in node.children.values() if child.children and child.holds_weights)
    reasons = {child.step: reason for child in subtrees if (reason := child.why_aside)}
    return reasons if len(reasons) < len(node.children) else {}


def _named(tree: Node, root: str) -> Node:
    """The node at the dotted path *root*; a name on the way may itself hold dots."""
    reached = [(tree, root)]
    is_single = False
    while reached:
        node, rest = reached.pop()
        for name, child in node.children.items():
            if rest == name and child.children:
                return child
            is_single = is_single or rest == name
            if rest.startswith(f"{name}."):
                reached.append((child, rest[len(name) + 1 :]))
    if is_single:
        raise NothingSelected(
            f"{shown(root)} is a single item, and not a subtree that holds others",
            hint="run `shardkit inspect` to see the tree",
        )
    names = ", ".join(shown(name) for name in list(tree.children)[:8])
    raise NothingSelected(
        f"there is no subtree {shown(root)}; the file holds {names or 'nothing'}",
        hint="run `shardkit inspect` to see the tree",
    )


def _left_out(tree: Node, chosen: Node, aside: dict[str, str]) -> Iterator[LeftOut]:
    """What is beside the way down to *chosen*, topmost places only, and what is set aside below
    it.
    """
    node = tree
    for step in chosen.path:
        for child in node.children.values():
            if child.step != step:
                yield LeftOut(child.name, child.nbytes, child.why_aside or "beside the model")
        node = node.children[step]
    for step, reason in aside.items():
        yield LeftOut(chosen.children[step].name, chosen.children[step].nbytes, reason)


def _ambiguous(candidates: list[Node]) -> AmbiguousRoot:
    found = listed(
        [f"{shown(node.name)} ({format_size(node.nbytes)})" for node in candidates], most=10
    )
    likeliest = _likeliest(candidates)
    averages = [node for node in candidates if is_average(node.step) and node is not likeliest]
    average: tuple[str | Option, ...] = ()
    if averages:
        average = (", or its moving average with ", option("root", averages[0].name))
    return AmbiguousRoot(
        f"several subtrees of the file could be the model: {found}",
        hint=(
            "choose one with ",
            option("root", likeliest.name),
            *average,
            ", or convert everything with ",
            option("root", "."),
        ),
    )


def _likeliest(candidates: list[Node]) -> Node:
    """The one that is called as models are; where none is, the largest."""
    called = [node for name in CONVENTIONAL for node in candidates if node.step == name]
    return called[0] if called else max(candidates, key=lambda node: node.nbytes)
