"""Choose a device for each part of a model: accelerators first, then the CPU, then the disk.

The rules are those of Accelerate's function of the same name:

1. Parts are taken in the order of the model, each onto the first device from the current one on
   that has room for it. A part that fits none is split into its submodules, unless it is a layer;
   then the next device becomes the current one, for good.
2. The first accelerator, and the CPU, keep room for the largest layer among those that are not
   placed yet: layers on lower tiers are loaded there to be run.
3. Parts with tied weights are placed together; one of them is split if that makes them fit.

`get_balanced_memory` gives the budgets that spread a model evenly over the accelerators.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from torch import nn

from shardkit.checkpoint.device_fit import DeviceQueue
from shardkit.load.devices.budgets import Device, MaxMemory, get_max_memory
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.modules.sizes import (
    AnyDType,
    Largest,
    Layers,
    Node,
    class_names,
    module_sizes,
    parts,
    tied_groups,
)
from shardkit.load.placement.device_map import clean_device_map
from shardkit.sizes import format_size

Item = tuple[str, Node]

_log = logging.getLogger(__name__)


def infer_auto_device_map(
    model: nn.Module,
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: AnyDType | None = None,
    special_dtypes: Mapping[str, AnyDType] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, Device]:
    """Choose a device for every part of *model*, from sizes alone; weights may be on the meta
    device.

    Accelerators are filled first, then the CPU, then the disk, by the rules of Accelerate's
    function of this name.

    Args:
        model: the model.
        max_memory: budget of each device, as `get_max_memory` takes it.
        no_split_module_classes: names of classes whose modules stay on one device, such as those
            with a residual connection.
        dtype: what floats are cast to when the weights are loaded; None for the types that the
            model has.
        special_dtypes: the types of some tensors, by name, that override *dtype*.
        verbose: log every decision at level INFO, and not at DEBUG, to the logger
            ``shardkit.load.placement.infer_device_map``.
        clean_result: name a module in place of its parts where all have one device.
        offload_buffers: whether buffers of modules on CPU or disk stay there too; if not, a warning
            is raised where no accelerator has room for them.
        fallback_allocation: before a device is left empty, look for a later part that fits.

    Returns:
        A device for each name: the number of an accelerator, "mps", "cpu" or "disk".

    Raises:
        LoadError: a device or a budget is invalid.
        BadSize: a size cannot be parsed.

    Example:
        >>> from shardkit.load import infer_auto_device_map, init_empty_weights
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(4)])
        >>> infer_auto_device_map(model, max_memory={"cpu": "13MB"})
        {'0': 'cpu', '1': 'cpu', '2': 'disk', '3': 'disk'}
    """
    budgets = get_max_memory(max_memory)
    layers = Layers(
        module_sizes(model, dtype, special_dtypes), class_names(no_split_module_classes)
    )
    level = logging.INFO if verbose else logging.DEBUG
    planner = _Planner(
        DeviceQueue(budgets, keepers=_keepers(budgets)),
        layers,
        tied_groups(model),
        fallback_allocation,
        level,
        deque(parts("", model)),
    )
    planner.place_all()
    if not offload_buffers:
        _warn_of_buffers(model, planner)
    return clean_device_map(planner.placed) if clean_result else planner.placed


@dataclass(slots=True)
class _Planner:
    devices: DeviceQueue[Device]
    layers: Layers
    ties: list[tuple[str, ...]]
    falls_back: bool
    level: int
    queue: deque[Item]
    placed: dict[str, Device] = field(default_factory=dict)
    kept: Largest = field(default_factory=Largest)  # the largest layers that are to come
    tried: set[tuple[Device, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.kept = self.layers.largest_of(self.queue)

    def place_all(self) -> None:
        while self.queue:
            self._treat(self.queue.popleft())

    def _treat(self, item: Item) -> None:
        name, node = item
        self._forget(item)
        partners = self._partners(name, self.queue)
        size = self._size(name)
        together = size + sum(self._size(partner) for partner, _ in partners)
        room = self.devices.room(self.kept.size)
        if together <= room:
            self._put([item, *partners], together)
        elif partners and size <= room and self._split_one_of(partners):
            self.queue.appendleft(item)
            self._see_largest()
        elif size >= room and not self.layers.is_whole(node):
            self._log_of(name, "is split")
            self._replace(-1, item)
            self._see_largest()
        elif not self._falls_back(item, together):
            self._leave_device(item, together)

    def _put(self, items: list[Item], nbytes: int) -> None:
        device = self.devices.put(nbytes)
        names = {name for name, _ in items}
        if len(items) > 1:
            self.queue = deque(item for item in self.queue if item[0] not in names)
        for name, _ in items:
            self.placed[name] = device
            self._log_of(name, f"goes to {device}")

    def _forget(self, item: Item) -> None:
        """Keep no room any more for *item* and what is in it."""
        rest = self.kept.names - self.layers.largest(*item).names
        self.kept = Largest(self.kept.size, rest)
        if not rest:
            self._see_largest()

    def _see_largest(self) -> None:
        """Find the largest layers again; single tensors count only as long as nothing was split, as
        in Accelerate.
        """
        self.kept = self.layers.largest_of(
            item for item in self.queue if isinstance(item[1], nn.Module)
        )

    def _partners(self, name: str, among: Iterable[Item]) -> list[Item]:
        """What else holds weights that are tied to those of *name*."""
        outside = [tied for group in self.ties for tied in _outside(group, name)]
        if not outside:
            return []
        found = (next((item for item in among if _is_in(tied, item[0])), None) for tied in outside)
        return list({item[0]: item for item in found if item is not None}.values())

    def _split_one_of(self, items: list[Item]) -> bool:
        for item in items:
            if not self.layers.is_whole(item[1]):
                self._log_of(item[0], "is split, to fit with the weights tied to it")
                at = next(at for at, (name, _) in enumerate(self.queue) if name == item[0])
                del self.queue[at]
                self._replace(at - 1, item)
                return True
        return False

    def _replace(self, at: int, item: Item) -> None:
        """Queue what stands in *item* behind the place *at*."""
        name, module = item
        assert isinstance(module, nn.Module)
        self.queue.rotate(-at - 1)
        self.queue.extendleft(reversed(parts(name, module)))
        self.queue.rotate(at + 1)

    def _falls_back(self, item: Item, together: int) -> bool:
        """Whether there is a later part for a device that would stay empty; it and then *item* are
        next.
        """
        device = self.devices.current
        if not self.falls_back or self.devices.used[device]:
            return False
        fitting = self._first_fitting(self.devices.budgets[device] - max(self.kept.size, together))
        if fitting is None:
            return False
        self.tried.add((device, fitting[0]))
        self._expose(fitting[0])
        self.queue.extendleft((item, fitting))
        return True

    def _first_fitting(self, room: int) -> Item | None:
        waiting = deque(self.queue)
        while waiting:
            name, node = waiting.popleft()
            together = self._size(name) + sum(
                self._size(partner) for partner, _ in self._partners(name, waiting)
            )
            if together <= room and (self.devices.current, name) not in self.tried:
                return name, node
            if isinstance(node, nn.Module) and not self.layers.is_whole(node):
                waiting.extendleft(reversed(parts(name, node)))
        return None

    def _expose(self, name: str) -> None:
        """Take *name* out of the queue, and so split what is around it."""
        while True:
            at, item = next(
                (at, item) for at, item in enumerate(self.queue) if _is_in(name, item[0])
            )
            del self.queue[at]
            if item[0] == name:
                return
            self._replace(at - 1, item)

    def _leave_device(self, item: Item, together: int) -> None:
        device, kept = self.devices.current, self.devices.kept(self.kept.size)
        if not self.devices.used[device]:
            _log.info(
                "%s: nothing fits; %s would need %s there, with the room that is kept free",
                device,
                item[0],
                format_size(together + kept),
            )
        self.devices.put(kept)  # which counts as used from now on
        self.devices.advance()
        self.queue.appendleft(item)

    def _size(self, name: str) -> int:
        return self.layers.sizes.get(name, 0)

    def _log_of(self, name: str, what: str) -> None:
        _log.log(self.level, "%s (%s) %s", name, format_size(self._size(name)), what)


def _keepers(budgets: Iterable[Device]) -> tuple[Device, ...]:
    """The devices that keep room: the first accelerator and the CPU; "mps" alone, whose memory is
    that of the CPU.
    """
    accelerators = [device for device in budgets if device not in ("cpu", "disk")]
    return ("mps",) if "mps" in accelerators else (*accelerators[:1], "cpu")


def _outside(group: tuple[str, ...], name: str) -> list[str]:
    """Return the names in *group* that are not inside *name*, if others are."""
    outside = [tied for tied in group if not _is_in(tied, name)]
    return outside if len(outside) < len(group) else []


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _warn_of_buffers(model: nn.Module, planner: _Planner) -> None:
    sizes, placed = planner.layers.sizes, planner.placed
    needed = sum(
        sizes[name]
        for name, _ in model.named_buffers()
        if device_of(name, placed) in ("cpu", "disk")
    )
    free = [nbytes for device, nbytes in planner.devices.free.items() if device != "cpu"]
    if needed and free and needed > max(free):
        warnings.warn(
            f"the buffers of what is offloaded take {format_size(needed)}, and no accelerator "
            "has as much left: "
            "if memory runs out, try offload_buffers=True",
            UserWarning,
            stacklevel=3,
        )


_SHARE_OF_ONE = (
    0.9  # of an only accelerator, where the user sets no budget: the rest is for activations
)
_SLACK = (
    1.25  # layers by which a budget is larger than an even share, since layers do not come out even
)


def get_balanced_memory(
    model: nn.Module,
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: AnyDType | None = None,
    special_dtypes: Mapping[str, AnyDType] | None = None,
    low_zero: bool = False,
) -> dict[Device, int]:
    """Return budgets for `infer_auto_device_map` that spread *model* evenly over the accelerators.

    The last accelerator keeps its complete budget, so that everything is placed. A single one gets
    90% of its free memory, if *max_memory* is not given.

    Args:
        model: the model, on any device.
        max_memory: budget of each device, as `get_max_memory` takes it.
        no_split_module_classes: names of classes whose modules stay on one device.
        dtype: what floats are cast to when the weights are loaded; None for the types that the
            model has.
        special_dtypes: the types of some tensors, by name, that override *dtype*.
        low_zero: give the first accelerator only what the others cannot hold; `generate` needs
            memory there.

    Returns:
        Bytes for each device.

    Raises:
        LoadError: a device or a budget is invalid.
        BadSize: a size cannot be parsed.

    Example:
        >>> from shardkit.load import get_balanced_memory, init_empty_weights
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(4)])
        >>> get_balanced_memory(model, {"cpu": "1GB"})["cpu"]  # no accelerator to balance
        1000000000
    """
    budgets = get_max_memory(max_memory)
    accelerators = [device for device in budgets if isinstance(device, int)]
    usable = [device for device in accelerators if budgets[device] > 0]
    if len(usable) == 1 and max_memory is None:
        budgets[usable[0]] = int(budgets[usable[0]] * _SHARE_OF_ONE)
    if len(usable) < 2:
        return budgets
    sizes = module_sizes(model, dtype, special_dtypes)
    spares_first = low_zero and usable[0] == accelerators[0]
    sharers = usable[1:] if spares_first else usable
    share = sizes[""] // len(sharers) + int(
        _SLACK * _typical_layer(model, sizes, class_names(no_split_module_classes))
    )
    for device in sharers[:-1]:
        budgets[device] = min(share, budgets[device])
    if spares_first:
        left_over = sizes[""] - sum(budgets[device] for device in sharers)
        budgets[usable[0]] = min(max(0, left_over), budgets[usable[0]])
    return budgets


def _typical_layer(model: nn.Module, sizes: Mapping[str, int], no_split: frozenset[str]) -> int:
    """The largest module that stays whole, or the mean of the innermost modules with tensors if
    that is more.
    """
    modules = model.named_modules(remove_duplicate=False)
    whole = (
        sizes.get(name, 0) for name, module in modules if name and type(module).__name__ in no_split
    )
    innermost = _innermost(sizes)
    return max(
        int(fmean(sizes[name] for name in innermost)) if innermost else 0, max(whole, default=0)
    )


def _innermost(sizes: Mapping[str, int]) -> list[str]:
    """The modules with tensors that hold no other such module."""
    modules = {name for name in sizes if name} - set(_without_parts(sizes))
    return _without_parts(modules)


def _without_parts(names: Iterable[str]) -> list[str]:
    around = {name.rpartition(".")[0] for name in names}
    return [name for name in names if name and name not in around]
