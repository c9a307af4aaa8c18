"""Device maps: names of modules and tensors, each with the device that it goes to; "" is the whole
model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from shardkit.errors import LoadError, OverBudget
from shardkit.load.devices.budgets import Device
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.modules.sizes import AnyDType, module_sizes, named_tensors, prefixes
from shardkit.printable import shown
from shardkit.sizes import format_size

DeviceMap = Mapping[str, int | str | torch.device]
"""A device for each part of a model: names of modules or weights, "" for the whole model, each with
the number of an accelerator, "mps", "cpu", "disk" or a `torch.device`.
"""

_LISTED = 8


def covers(device_map: Mapping[str, object], name: str) -> bool:
    """Tell whether *device_map* gives a device to the tensor or module *name*, or to an enclosing
    module.
    """
    return any(prefix in device_map for prefix in prefixes(name))


def inside(module: str, device_map: Mapping[str, Device]) -> dict[str, Device]:
    """Return the part of *device_map* below *module*, by the names of its parts in it."""
    own = {
        name.removeprefix(f"{module}."): device
        for name, device in device_map.items()
        if name.startswith(f"{module}.")
    }
    whole = [device_map[name] for name in ("", module) if name in device_map]
    return {"": whole[-1], **own} if whole else own


def reported(
    device_map: DeviceMap, main: Device, streamed: Iterable[str]
) -> dict[str, int | str | torch.device]:
    """Return the map that a dispatched model reports as its hf_device_map, which libraries read.

    A part that is offloaded is on the device that runs it, as are its buffers and whatever is added
    to it later; its weights are named one by one, with where they stream from. So an adapter that
    is loaded into such a part is placed where it is used, and the first device of the map is one
    that inputs can be moved to.

    Args:
        device_map: what was given, or chosen.
        main: the device that runs the parts on CPU or disk.
        streamed: names of the weights that stream.
    """
    below: dict[str, list[str]] = {}
    for name in streamed:
        below.setdefault(
            next(each for each in reversed(list(prefixes(name))) if each in device_map), []
        ).append(name)
    made: dict[str, int | str | torch.device] = {}
    for part, device in device_map.items():
        made[part] = main if str(device) in ("cpu", "disk") and str(device) != main else device
        made |= dict.fromkeys(below.get(part, ()), device)
    if next(iter(made.values()), main) == "disk":  # the first part is itself a weight
        made = {"": made.get("", main), **made}
    return made


def clean_device_map(device_map: Mapping[str, Device]) -> dict[str, Device]:
    """Shorten the map: where all names below one have the same device, that one replaces them."""
    places = [_Place("")]
    for name, device in device_map.items():
        _grow(places, name).device = device
    for place in reversed(places):  # each was made after the one above it
        place.close()
    return dict(places[0].written())


def check_device_map(model: nn.Module, device_map: DeviceMap) -> None:
    """Check that *device_map* gives a device to each tensor of *model*; warn of names that it does
    not have.

    A buffer that no checkpoint holds needs none, as in Accelerate: without one, it is on the main
    device.

    Args:
        model: the model, on any device.
        device_map: a device for each module or tensor, by name; "" is the whole model.

    Raises:
        LoadError: a tensor has no device.

    Example:
        >>> import shardkit
        >>> from shardkit.load import check_device_map, init_empty_weights
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> check_device_map(model, {"": "cpu", "2": "disk"})
        >>> try:
        ...     check_device_map(model, {"0": "cpu"})
        ... except shardkit.LoadError as error:
        ...     print(error)
        the device map gives no device to 2 of the model's tensors: '2.weight', '2.bias'
    """
    weights = list(model.state_dict(keep_vars=True))
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known.update(weights, (name for name, _ in model.named_buffers(remove_duplicate=False)))
    unknown = [name for name in device_map if name not in known]
    if unknown:
        warnings.warn(
            f"the device map names parts that the model does not have: {_listed(unknown)}",
            UserWarning,
            stacklevel=2,
        )
    homeless = [name for name in weights if not covers(device_map, name)]
    if homeless:
        raise LoadError(
            (
                f"the device map gives no device to {len(homeless)} of the model's tensors: "
                f"{_listed(homeless)}"
            ),
            hint='give the rest of the model a device, as in {"": "cpu"}',
        )


def refuse_disk(
    model: nn.Module,
    device_map: Mapping[str, Device],
    budgets: Mapping[Device, int],
    *,
    dtype: AnyDType | None = None,
    special_dtypes: Mapping[str, AnyDType] | None = None,
) -> None:
    """Check that nothing is placed on disk.

    Raises:
        OverBudget: something is; with what the last device before the disk needs, and its budget.
    """
    sizes = module_sizes(model, dtype, special_dtypes)
    devices = {
        name: device_of(name, device_map)
        for name, _ in named_tensors(model)
        if covers(device_map, name)
    }
    offloaded = sum(sizes[name] for name, device in devices.items() if device == "disk")
    if "disk" not in devices.values():
        return
    last = next((device for device in reversed(list(budgets)) if device != "disk"), "cpu")
    needed = offloaded + sum(sizes[name] for name, device in devices.items() if device == last)
    available = min(budgets.get(last, 0), needed)
    parts = [name for name, device in device_map.items() if device == "disk"]
    raise OverBudget(
        f"{format_size(offloaded)} would be offloaded to disk: {_listed(parts)}; {last!r} needs "
        f"{format_size(needed)} but its budget is {format_size(available)} "
        f"({format_size(needed - available)} short)",
        needed=needed,
        available=available,
        hint="raise max_memory, pass a narrower dtype, or allow the disk",
    )


@dataclass(slots=True)
class _Place:
    """A name of a map or part of one.

    Attributes:
        name: the complete name.
        device: its device in the map.
        children: the names one step longer.
        count: how many names of the map there are at it and below.
        shared: the one device of all these; None where there are several.
    """

    name: str
    device: Device | None = None
    children: dict[str, _Place] = field(default_factory=dict)
    count: int = 0
    shared: Device | None = None

    def close(self) -> None:
        """Compute what follows from all names below."""
        below = self.children.values()
        devices = {child.shared for child in below} | (
            {self.device} if self.device is not None else set()
        )
        self.count = sum(child.count for child in below) + (self.device is not None)
        self.shared = devices.pop() if len(devices) == 1 else None

    def written(self) -> Iterator[tuple[str, Device]]:
        """Yield the names that are needed, and their devices."""
        if self.shared is not None and (self.count > 1 or self.device is not None):
            yield self.name, self.shared
            return
        if self.device is not None:
            yield self.name, self.device
        for child in self.children.values():
            yield from child.written()


def _grow(places: list[_Place], name: str) -> _Place:
    """Return the place called *name*; create it and those above it in *places*, where they are
    missing.
    """
    place = places[0]
    for prefix in list(prefixes(name))[1:] if name else ():
        if prefix not in place.children:
            place.children[prefix] = _Place(prefix)
            places.append(place.children[prefix])
        place = place.children[prefix]
    return place


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown(name) for name in names[:_LISTED]) + more
