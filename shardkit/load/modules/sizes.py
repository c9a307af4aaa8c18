"""The size of each part of a model when it is loaded, tied weights, and modules that are not split.
No value is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardkit.alignment import ceil_div
from shardkit.dtypes import BY_TORCH, parse_dtype
from shardkit.errors import BadDType
from shardkit.load.modules.torch_internals import own_modules
from shardkit.load.modules.weights import torch_type
from shardkit.printable import shown

Node = nn.Module | torch.Tensor
AnyDType = str | torch.dtype
"""A type of elements: `torch.bfloat16`, or its name, as "bfloat16" or "bf16"."""

_SHELL = re.compile(
    r"torch\.u?int([1-7])"
)  # types of torch that have a name and a width, and no operations


def module_sizes(
    model: nn.Module,
    dtype: AnyDType | None = None,
    special_dtypes: Mapping[str, AnyDType] | None = None,
) -> dict[str, int]:
    """Bytes of every tensor of *model* by its name, and of every module by its; "" is all of them.
    What is tied counts once.

    Args:
        model: the model, on any device.
        dtype: what its floats are cast to; None for the types that they have. As in `shardkit
            convert`, floats of less than 16 bits are codes of a quantised weight, and keep their
            type.
        special_dtypes: the types of some tensors, by name, that overrule *dtype*.
    """
    target = None if dtype is None else as_torch_dtype(dtype)
    special = {name: as_torch_dtype(each) for name, each in (special_dtypes or {}).items()}
    sizes = {"": 0}
    for name, tensor in named_tensors(model):
        size = _loaded(tensor, special.get(name) or (target if _is_cast(tensor.dtype) else None))
        for prefix in prefixes(name):
            sizes[prefix] = sizes.get(prefix, 0) + size
    return sizes


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then buffers; each once, under its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def prefixes(name: str) -> Iterator[str]:
    """*name* and the names of all that is around it, down from ""."""
    yield ""
    for match in re.finditer(r"\.", name):
        yield name[: match.start()]
    yield name


def as_torch_dtype(dtype: AnyDType | Enum) -> torch.dtype:
    """The type called "float16", "torch.float16", "fp16" or the like; an Enum stands for its value.

    Raises:
        BadDType: it is none, or none of the torch that is installed.
    """
    if isinstance(dtype, Enum):  # Accelerate's CustomDtype, as Transformers' quantisers give it
        dtype = str(dtype.value)
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        found = torch_type(parse_dtype(dtype))
    if found is None:
        raise BadDType(
            f"torch {torch.__version__}, which is installed, has no {shown(dtype)}",
            hint="update torch, or give another dtype",
        )
    return found


def tied_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(sorted(group)) for group in names.values() if len(group) > 1]


def class_names(no_split: Iterable[str] | str | None) -> frozenset[str]:
    """Return the names of the classes whose modules are not split."""
    return frozenset([no_split] if isinstance(no_split, str) else no_split or ())


def parts(name: str, module: nn.Module) -> list[tuple[str, Node]]:
    """What stands directly in *module*, which is called *name*, under all its names: parameters,
    buffers, modules.
    """
    prefix = f"{name}." if name else ""
    parameters: list[tuple[str, Node]] = list(
        module.named_parameters(recurse=False, remove_duplicate=False)
    )
    buffers: list[tuple[str, Node]] = list(
        module.named_buffers(recurse=False, remove_duplicate=False)
    )
    modules = [(step, child) for step, child in own_modules(module).items() if child is not None]
    # Accelerate takes the buffers of the whole model last, and those of the modules in it that are
    # split not at all.
    own = [*parameters, *buffers, *modules] if name else [*parameters, *modules, *buffers]
    return [(f"{prefix}{step}", node) for step, node in own]


@dataclass(frozen=True, slots=True)
class Largest:
    """The size of the largest layers somewhere, and their names."""

    size: int = 0
    names: frozenset[str] = frozenset()


@dataclass(slots=True)
class Layers:
    """The layers of a model, which are never split: modules without children, and those of the
    classes *no_split*.
    """

    sizes: Mapping[str, int]
    no_split: frozenset[str]
    seen: dict[str, Largest] = field(default_factory=dict)

    def is_whole(self, node: Node) -> bool:
        """Whether *node* is never split."""
        return (
            isinstance(node, torch.Tensor)
            or type(node).__name__ in self.no_split
            or not _children("", node)
        )

    def largest(self, name: str, node: Node) -> Largest:
        """The largest layers at and below *node*, which is called *name*."""
        if name not in self.seen:
            whole = self.is_whole(node) or isinstance(node, torch.Tensor)
            size = self.sizes.get(name, 0)
            self.seen[name] = (
                Largest(size, frozenset([name]))
                if whole
                else self.largest_of(_children(name, node))
            )
        return self.seen[name]

    def largest_of(self, nodes: Iterable[tuple[str, Node]]) -> Largest:
        """The largest layers of all *nodes*."""
        found = [self.largest(name, node) for name, node in nodes]
        size = max((each.size for each in found), default=0)
        return Largest(
            size, frozenset().union(*(each.names for each in found if each.size == size))
        )


def _children(name: str, node: Node) -> list[tuple[str, Node]]:
    prefix = f"{name}." if name else ""
    own = own_modules(node).items() if isinstance(node, nn.Module) else ()
    return [(f"{prefix}{step}", child) for step, child in own if child is not None]


def _is_cast(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _loaded(tensor: torch.Tensor, target: torch.dtype | None) -> int:
    if is_lazy(tensor):
        return 0
    if target is None or target == tensor.dtype:
        return tensor.numel() * tensor.element_size()
    return ceil_div(tensor.numel() * _bits(target), 8)


def _bits(dtype: torch.dtype) -> int:
    if shell := _SHELL.fullmatch(str(dtype)):
        return int(shell[1])
    known = BY_TORCH.get(str(dtype).removeprefix("torch."))
    return known.bits if known else dtype.itemsize * 8
