"""Where the weights of the models of a folder go: the models as one tree, the device of each part,
and what streams.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from shardkit.load.devices.budgets import Device, MaxMemory, device_key, get_max_memory
from shardkit.load.devices.device_lookup import device_of, main_device, torch_device
from shardkit.load.dispatch.attach import DispatchConfig, arrange
from shardkit.load.lazy.paged import Paged
from shardkit.load.libraries.model_folder import LazyModel
from shardkit.load.loading.match import listed
from shardkit.load.modules.model_group import ModelGroup
from shardkit.load.modules.quantised import is_packed
from shardkit.load.modules.sizes import module_sizes
from shardkit.load.modules.weights import Weight, weights_of
from shardkit.load.performance.bandwidth import Rates, rates_for
from shardkit.load.performance.cost_model import Ring
from shardkit.load.placement.device_map import DeviceMap, check_device_map
from shardkit.load.placement.resolve_device_map import MODES, PlacementOptions
from shardkit.sizes import format_size

AnyMap = str | int | torch.device | DeviceMap | None
"""A device map; one device for the whole model; "auto", "balanced", "balanced_low_0" or
"sequential" to have the map made; None for the CPU.
"""


@dataclass(frozen=True, slots=True)
class Placing:
    """What decides where the weights go.

    Attributes:
        word: how the map is made; "" where it is given.
        given: the map with devices as they are called in maps.
        max_memory: budget of each device, where the map is made.
        offload: "never" to refuse the disk.
        ring: size of the prefetch buffer; None to choose it.
        is_measured: whether the throughput of this machine decides too, which takes a second.
    """

    word: str
    given: Mapping[str, Device]
    max_memory: MaxMemory | None
    offload: str
    ring: Ring
    is_measured: bool = True

    @classmethod
    def of(
        cls, device_map: AnyMap, max_memory: MaxMemory | None, offload: str, ring: Ring
    ) -> Placing:
        """From the arguments of `from_pretrained`.

        Raises:
            LoadError: there is no such device, or map.
        """
        if isinstance(device_map, str) and device_map in MODES:
            return cls(device_map, {}, max_memory, offload, ring)
        whole = (
            device_map
            if isinstance(device_map, Mapping)
            else {"": "cpu" if device_map is None else device_map}
        )
        devices = {name: device_key(device) for name, device in whole.items()}
        main_device(devices)  # or else there is none
        return cls("", devices, max_memory, offload, ring)

    def options(self, whole: frozenset[str], tree: nn.Module) -> PlacementOptions:
        """Those of *tree*, in which modules of the classes *whole* are not split."""
        options = PlacementOptions(self.ring, self.offload, self.max_memory, whole)
        return replace(options, rates=partial(_rates, tree)) if self.is_measured else options


@dataclass(frozen=True, eq=False, slots=True)
class Placed:
    """Models, and where each part of them goes.

    Attributes:
        models: by their names; a model that is all there is has none.
        tree: all of them as one module.
        devices: the device of each part.
        ring: size of the prefetch buffer.
        chosen: whether the map was made here.
    """

    models: Mapping[str, LazyModel]
    tree: nn.Module
    devices: dict[str, Device]
    ring: Ring
    chosen: bool

    @classmethod
    def of(cls, models: Mapping[str, LazyModel], placing: Placing) -> Placed:
        """Decide for *models*; nothing is moved.

        Raises:
            LoadError: the map is none, or leaves weights out.
            OverBudget: what streams has no room, or would be on disk and may not.
        """
        tree = _tree(models)
        whole = frozenset[str]().union(*(model.whole for model in models.values()))
        terms = placing.options(whole | _uncut(models.values(), placing.max_memory), tree)
        devices, depth = terms.residents(tree, placing.word or placing.given)
        check_device_map(tree, devices)
        devices = _with_what_stays(tree, models, devices)
        return cls(models, tree, devices, depth, bool(placing.word))

    @property
    def config(self) -> DispatchConfig:
        """How the models shall run."""
        models, devices = self.models.values(), self.devices
        return DispatchConfig(
            device_map=devices,
            main=main_device(devices),
            whole=frozenset[str]().union(*(each.whole for each in models)),
            skip=frozenset[str]().union(*(each.skip for each in models)),
            ring=self.ring,
            hooks=len(set(devices.values())) > 1 or "disk" in devices.values(),
            chosen=self.chosen,
        )

    def put(self) -> None:
        """Put the weights where they go, and warn of those that cannot be there."""
        config = self.config
        _warn_of_computed(self.tree, config)
        arrange(self.tree, config)


def _tree(models: Mapping[str, LazyModel]) -> nn.Module:
    """One module with all of *models* under their names, the largest first."""
    if "" in models:
        return models[""].model
    sizes = {name: module_sizes(each.model)[""] for name, each in models.items()}
    return ModelGroup(
        {name: models[name].model for name in sorted(models, key=sizes.__getitem__, reverse=True)}
    )


def _uncut(models: Iterable[LazyModel], max_memory: MaxMemory | None) -> frozenset[str]:
    """The classes of models that are not to be spread over accelerators.

    Nobody knows at which places such a model may be cut so that what is added up is on one device.
    """
    accelerators = [
        device
        for device, room in get_max_memory(max_memory).items()
        if device not in ("cpu", "disk") and room
    ]
    silent = (type(each.model).__name__ for each in models if not each.whole)
    return frozenset(silent if len(accelerators) > 1 else ())


def _rates(model: nn.Module, device: Device) -> Rates:
    """Those at which the weights of *model* that are addresses stream to *device*."""
    addresses = (weight.tensor for weight in weights_of(model) if isinstance(weight.tensor, Paged))
    return rates_for(
        ((each.recipe.storage, each.dtype, each.shape) for each in addresses), torch_device(device)
    )


def _with_what_stays(
    tree: nn.Module, models: Mapping[str, LazyModel], devices: Mapping[str, Device]
) -> dict[str, Device]:
    """*devices*, but that models of which nothing can stream are in the memory of what runs
    them.
    """
    made, main = dict(devices), device_key(main_device(devices))
    for name in (name for name, model in models.items() if model.stays):
        inside = {part for part in devices if not name or f"{part}.".startswith(f"{name}.")} | (
            {name} if name else set()
        )
        made |= {part: main for part in inside if device_of(part, devices) in ("cpu", "disk")}
    if made != devices:
        streams = (
            each
            for each in weights_of(tree)
            if device_of(each.names[0], devices) != device_of(each.names[0], made)
        )
        nbytes = sum(weight.tensor.nbytes for weight in streams)
        warnings.warn(
            f"in memory, and not streamed: {format_size(nbytes)} of weights, and more from the "
            "first forward on, in which compressed-tensors decompresses them all",
            UserWarning,
            stacklevel=4,
        )
    return made


def _warn_of_computed(model: nn.Module, wish: DispatchConfig) -> None:
    """Say which weights should stream and cannot, since their library did more to them than can be
    noted down.
    """
    parts = wish.cut(model)
    should = [
        weight
        for block in parts.blocks
        for weight in block.weights
        if not isinstance(weight.tensor, Paged)
    ]
    if should:
        _warn_of(should, "which the library computed, or which the checkpoint does not have")
    packed = [weight for weight in parts.resident if is_packed(weight.tensor)]
    offloaded = [
        weight for weight in packed if device_of(weight.names[0], wish.device_map) == "disk"
    ]
    if offloaded:
        _warn_of(offloaded, "which bitsandbytes turns into objects of its own")


def _warn_of(weights: Sequence[Weight], why: str) -> None:
    nbytes = format_size(sum(weight.tensor.nbytes for weight in weights))
    names = listed(weight.names[0] for weight in weights)
    warnings.warn(
        f"in memory, and not streamed: {nbytes} of weights, {why}: {names}",
        UserWarning,
        stacklevel=5,
    )
