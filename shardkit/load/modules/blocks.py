"""Which modules stream as one block (pure: modules are inspected, and nothing is read or changed).

1. A block is a module of a class that must not be split; else a child of a `ModuleList`,
   `ModuleDict` or `Sequential`; else a module without children. A container is not a block: the
   first two are never called, and the children of the third are better.
2. The device map cuts: a module whose weights do not all go to one place is not a block, and its
   children are examined.
3. Modules that torch.jit.script has compiled take no hooks, and are not blocks; nor are modules
   that contain one.
4. Blocks are disjoint and never nest. A streamed weight is in exactly one block, or stays in
   memory: tied weights, weights in a module that two blocks share, and direct weights of a module
   that contains blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shardkit.load.modules.torch_internals import own_modules
from shardkit.load.modules.weights import ParameterSlot, Weight, named_modules

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True, eq=False, slots=True)
class ModuleBlock:
    """A module whose weights come and go together.

    Attributes:
        name: the first name of the module in its model; "" for the model itself.
        module: the module, whose forward needs them.
        weights: those of its weights that stream, in the order of its modules.
        seats: where each of *weights* belongs.
    """

    name: str
    module: nn.Module
    weights: tuple[Weight, ...]
    seats: tuple[ParameterSlot, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Cut:
    """A model, cut.

    Attributes:
        blocks: what streams, in the order of the model.
        resident: every other weight, in the order of the model.
    """

    blocks: tuple[ModuleBlock, ...]
    resident: tuple[Weight, ...]


Target = Callable[[Weight], Hashable]


def cut(
    model: nn.Module, weights: Collection[Weight], *, target: Target, whole: Collection[str] = ()
) -> Cut:
    """Find the blocks of *model*.

    Args:
        model: whose modules they are.
        weights: all its weights.
        target: where a weight streams to and from; None for a weight that stays in memory.
        whole: names of the classes that must stay whole.
    """
    places = {weight.names[0]: target(weight) for weight in weights}
    untied = [weight for weight in weights if len(weight.seats) == 1]
    found = list(
        _Walk(_targets(dict(named_modules(model)), untied, places), model, whole).blocks(model)
    )
    lent = Counter(part for _, module in found for part in set(module.modules()))
    owned: dict[nn.Module, list[Weight]] = {}
    for weight in untied:
        owner = weight.seats[0].owner
        if places[weight.names[0]] is not None and lent[owner] == 1:
            owned.setdefault(owner, []).append(weight)
    blocks = []
    for name, module in found:
        inside = tuple(weight for part in module.modules() for weight in owned.get(part, ()))
        if inside:
            blocks.append(
                ModuleBlock(name, module, inside, tuple(weight.seats[0] for weight in inside))
            )
    streamed = {weight.names[0] for block in blocks for weight in block.weights}
    return Cut(
        tuple(blocks), tuple(weight for weight in weights if weight.names[0] not in streamed)
    )


def _targets(
    modules: Mapping[str, nn.Module], weights: Iterable[Weight], places: Mapping[str, Hashable]
) -> Mapping[nn.Module, set[Hashable]]:
    """For each module, where the weights in it stream to."""
    owners: dict[str, set[Hashable]] = {}
    for weight in weights:
        place = places[weight.names[0]]
        if not weight.is_buffer or place is not None:  # a buffer that stays divides nothing
            for name in weight.names:
                owners.setdefault(name.rpartition(".")[0], set()).add(place)
    targets: dict[nn.Module, set[Hashable]] = {}
    for path, found in owners.items():
        steps = path.split(".") if path else []
        for count in range(len(steps) + 1):
            targets.setdefault(modules[".".join(steps[:count])], set()).update(found)
    return targets


class _Walk:
    """Down the tree of modules, in search of blocks."""

    def __init__(
        self, targets: Mapping[nn.Module, set[Hashable]], model: nn.Module, whole: Collection[str]
    ) -> None:
        self._targets = targets
        self._whole = {module for module in model.modules() if type(module).__name__ in whole}
        self._around = {
            module for module in model.modules() if self._whole and self._has_whole_inside(module)
        }
        self._seen: set[nn.Module] = set()

    def blocks(
        self, module: nn.Module, name: str = "", *, listed: bool = False
    ) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the blocks from *module* down, which is *listed* if its parent is a
        container.
        """
        if (
            module in self._seen
            or module not in self._targets
            or isinstance(module, torch.jit.ScriptModule)
        ):
            return
        self._seen.add(module)
        if len(self._targets[module]) == 1 and self._is_block(module, listed=listed):
            yield name, module
            return
        for step, child in own_modules(module).items():
            if child is not None:
                yield from self.blocks(
                    child, f"{name}.{step}" if name else step, listed=isinstance(module, CONTAINERS)
                )

    def _is_block(self, module: nn.Module, *, listed: bool) -> bool:
        if module in self._whole:
            return True
        if module in self._around or isinstance(module, CONTAINERS):
            return False
        return listed or not own_modules(module)

    def _has_whole_inside(self, module: nn.Module) -> bool:
        return any(part in self._whole for part in module.modules() if part is not module)
