"""The names of a checkpoint as a tree, and what follows for each node from the items at and below
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from shardkit.checkpoint.entries import Checkpoint, Other, TensorEntry
from shardkit.checkpoint.root_names import is_coefficient, is_model, is_progress

OPTIMIZER = "optimizer state"
PARTITION = "optimizer state that DeepSpeed ZeRO has partitioned"
SCHEDULER = "state of a learning-rate scheduler"
RANDOM = "random-number state"


@dataclass(slots=True)
class Node:
    """A place in the tree of names, and what can be said of all that lies at and below it.

    Attributes:
        step: the last name of its path.
        parent: the place above; None for the root of the tree.
        children: the places below, by their steps.
        tensors: those that have this very path.
        non_dense: weights of other kinds that have exactly this path.
        holds_weights: whether there are any at or below.
        is_incidental: whether all of them are scalars or random-number states.
        is_random: whether one of them is the state of a random-number generator.
        is_numbered: whether all names below are numbers.
        has_matrix: whether one of the weights has two axes or more, or is no dense tensor.
        state_of: what all weights belong to if that is no model: an optimizer, a list of them, one
            beside its slots, or a learning-rate scheduler; empty for anything else.
        in_training: whether something right below it is of a training run; None until asked.
    """

    step: str = ""
    parent: Node | None = None
    children: dict[str, Node] = field(default_factory=dict)
    tensors: list[TensorEntry] = field(default_factory=list)
    non_dense: list[Other] = field(default_factory=list)
    holds_weights: bool = False
    is_incidental: bool = True
    is_random: bool = False
    is_numbered: bool = True
    has_matrix: bool = False
    state_of: str = ""
    in_training: bool | None = None

    def judge(self) -> None:
        """Fill in what is said of the place, when it is said of all below."""
        tensors = self.tensors
        self.holds_weights = bool(tensors or self.non_dense)
        self.has_matrix = bool(self.non_dense) or any(len(entry.shape) > 1 for entry in tensors)
        self.is_incidental = not self.non_dense and all(map(_is_incidental, tensors))
        self.is_random = self.is_incidental and any(map(_is_random, tensors))
        if not self.children:  # as of most places
            return
        bearing = [child for child in self.children.values() if child.holds_weights]
        self.holds_weights |= bool(bearing)
        self.has_matrix |= any(child.has_matrix for child in bearing)
        self.is_incidental &= all(child.is_incidental for child in bearing)
        self.is_random |= any(child.is_random for child in bearing)
        self.is_numbered = all(
            step.isdecimal() and child.is_numbered for step, child in self.children.items()
        )
        self.state_of = self._state_of(bearing)

    def _state_of(self, bearing: list[Node]) -> str:
        for marks, what in _STATES:
            if marks <= self.children.keys():
                return what
        found = next((child.state_of for child in bearing if child.state_of), "")
        return found if all(child.state_of or child.is_list for child in bearing) else ""

    @property
    def is_list(self) -> bool:
        return bool(self.children) and self.is_numbered

    @property
    def has_own_weights(self) -> bool:
        """Whether weights hang on this place by names of their own, and not just counters and the
        like.
        """
        return any(
            (child.tensors or child.non_dense) and child.why_aside is None
            for child in self.children.values()
        )

    @property
    def why_aside(self) -> str | None:
        """Why no model is here; None where one may be."""
        if not self.holds_weights:
            return "holds no tensors"
        if self.state_of:
            return self.state_of
        if not self.is_incidental:
            return None
        if self.is_random or is_progress(self.step):
            return "loop or random-number state"
        if is_model(self.step) or self.is_called_weight or self.parent is None:
            return None
        return "scalars beside training state" if self.parent.keeps_training else None

    @property
    def is_called_weight(self) -> bool:
        """Whether it could be a parameter by its name, if it is a scalar; one of integers is a
        counter.
        """
        return is_coefficient(self.step) and (
            not self.tensors or any(entry.dtype.kind == "float" for entry in self.tensors)
        )

    @property
    def keeps_training(self) -> bool:
        """Whether something right below is of a training run, by its name or its shape."""
        if self.in_training is None:
            below = self.children.values()
            self.in_training = any(
                child.state_of or child.is_random or is_progress(child.step) for child in below
            )
        return self.in_training

    @property
    def path(self) -> tuple[str, ...]:
        """The steps from the root down to this place; not kept, since a tree may be 100,000
        deep.
        """
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
            total += sum(entry.nbytes for entry in node.tensors) + sum(
                other.nbytes for other in node.non_dense
            )
            stack.extend(node.children.values())
        return total


def tree_of(checkpoint: Checkpoint) -> Node:
    """The tree that the paths of all tensors and others span."""
    nodes = [Node()]
    for entry in checkpoint.tensors:
        _place(nodes, entry.path).tensors.append(entry)
    for other in checkpoint.others:
        node = _place(nodes, other.path)
        if other.is_weight:
            node.non_dense.append(other)
    for node in reversed(nodes):  # every place was made after the one above it
        node.judge()
    return nodes[0]


def is_only_random(checkpoint: Checkpoint) -> bool:
    """Whether the file holds the state of a random-number generator, and besides that nothing but
    scalars and the like.
    """
    if any(other.is_weight for other in checkpoint.others):
        return False
    return all(map(_is_incidental, checkpoint.tensors)) and any(map(_is_random, checkpoint.tensors))


def _place(nodes: list[Node], path: tuple[str, ...]) -> Node:
    """The place at *path*; it and those above it are made, and added to *nodes*, where they are
    missing.
    """
    node = nodes[0]
    for step in path:
        if step not in node.children:
            node.children[step] = Node(step, node)
            nodes.append(node.children[step])
        node = node.children[step]
    return node


def _is_incidental(entry: TensorEntry) -> bool:
    """Whether it is a scalar, or what random-number states consist of: one axis of unsigned
    integers.
    """
    return prod(entry.shape) <= 1 or (
        len(entry.shape) == 1 and entry.dtype.code in ("U8", "U32", "U64")
    )


def _is_random(entry: TensorEntry) -> bool:
    """Whether it is what `torch.get_rng_state` or `numpy.random.get_state` gives."""
    return (entry.dtype.code, entry.shape) in _GENERATORS


_GENERATORS = {
    ("U8", (5056,)),
    ("U8", (5048,)),
    ("U32", (624,)),
}  # torch has 5048 where a long has 4 bytes
_STATES = (
    (frozenset({"state", "param_groups"}), OPTIMIZER),
    (frozenset({"state", "hypers"}), OPTIMIZER),  # of fastai
    (frozenset({"single_partition_of_fp32_groups"}), PARTITION),
    (frozenset({"fp32_flat_groups"}), PARTITION),
    (frozenset({"last_epoch", "_step_count"}), SCHEDULER),
)
