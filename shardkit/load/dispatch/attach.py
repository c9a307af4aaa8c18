"""Place the weights of a model as a device map says, in memory or as lazy tensors that hooks load
and release.

1. A weight is a tensor in memory, or a `Paged`, which is lazy. A model may have both.
2. Weights mapped to an accelerator are in its memory. Weights mapped to the CPU are in main memory,
   and stream from there if the model runs on an accelerator, which copies them from a pinned host
   copy. Weights mapped to the disk stream from their files in place. Tensors that belong to the
   model itself, and to none of its submodules, go to its main device, as in Accelerate: its inputs
   arrive there.
3. A weight that should stream and is in no block stays in the memory of the device that it is
   needed on, as do buffers unless they are to be offloaded; buffers that no checkpoint holds always
   do, on the main device if the map leaves them out.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardkit.errors import LoadError
from shardkit.load.devices.budgets import Device, device_key
from shardkit.load.devices.device_lookup import device_of, torch_device
from shardkit.load.devices.transfers import DeviceTransfer, lane_to
from shardkit.load.dispatch.attachments import detach, pagers_of
from shardkit.load.dispatch.streamed_block import StreamedBlock, ring_for
from shardkit.load.hooks.device_moves import attach_movers
from shardkit.load.hooks.forward_timer import Clock
from shardkit.load.hooks.gradients import Training
from shardkit.load.hooks.reloading import guard
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.file_watch import Sources
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.lazy.paged import Paged, is_address
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.loading.install import place, renew
from shardkit.load.loading.match import listed
from shardkit.load.modules.blocks import Cut, ModuleBlock, cut
from shardkit.load.modules.model_group import called
from shardkit.load.modules.quantised import is_packed
from shardkit.load.modules.torch_internals import non_persistent_buffers, own_buffers
from shardkit.load.modules.weights import Weight, weights_of
from shardkit.load.performance.cost_model import Depth, Ring
from shardkit.load.placement.device_map import DeviceMap, covers, inside, reported
from shardkit.load.streaming.page_layout import Layout
from shardkit.load.streaming.pinned_blocks import kept_recipes
from shardkit.load.streaming.prefetcher import Stream
from shardkit.load.streaming.ring_buffer import room_for
from shardkit.printable import several

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """How a model shall run.

    Attributes:
        device_map: a device for each part of the model.
        main: the device that runs what is on CPU or disk.
        whole: names of classes whose modules stream as one.
        offload_buffers: whether buffers stream like parameters.
        skip: keys of arguments that are not moved between devices.
        ring: blocks of streamed weights that are in memory at a time, or how much they may take;
            None to choose automatically.
        hooks: whether arguments are moved where nothing streams and all is on one device.
        chosen: whether the map was made from a word.
    """

    device_map: Mapping[str, Device]
    main: torch.device
    whole: Collection[str] = ()
    offload_buffers: bool = False
    skip: Collection[str] = ()
    ring: Ring = None
    hooks: bool = False
    chosen: bool = False

    def runs_on(self, name: str) -> torch.device:
        """The device that uses the tensor *name*: the main one, if the map leaves it out, as it may
        with other buffers.
        """
        if not covers(self.device_map, name):
            return self.main
        device = device_of(name, self.device_map)
        return self.main if device in ("cpu", "disk") or "." not in name else torch_device(device)

    def lies_on(self, name: str) -> torch.device:
        """The device that has the part *name* in its memory, if it has memory."""
        return _CPU if device_of(name, self.device_map) == "cpu" else self.runs_on(name)

    def streams(self, weight: Weight) -> Hashable:
        """From and to which device *weight* streams; None if it stays in memory."""
        name = weight.names[0]
        device, runs_on = device_of(name, self.device_map), self.runs_on(name)
        offloaded = device == "disk" or (device == "cpu" and runs_on.type != "cpu")
        may = (self.offload_buffers or not weight.is_buffer) and not is_packed(weight.tensor)
        return (device, runs_on) if offloaded and may else None

    def keeps(self, block: ModuleBlock) -> bool:
        """Whether *block*, which streams, does so from main memory."""
        return device_of(block.weights[0].names[0], self.device_map) == "cpu"

    def cut(self, model: nn.Module) -> Cut:
        """What of *model* streams, and what stays in memory."""
        return cut(model, list(weights_of(model)), target=self.streams, whole=self.whole)


def arrange(
    model: nn.Module, wish: DispatchConfig, *, addresses: Mapping[str, Recipe] | None = None
) -> None:
    """Bring every weight of *model* to its place, and attach the hooks.

    Args:
        model: its weights are in memory, or `Paged`, or have an address.
        wish: how it shall run.
        addresses: of weights that stream, whatever the model holds in their place; by their first
            names.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: a weight has no value, or there is no room for it; or another thread runs the
            model.
    """
    addresses = addresses or {}
    for pager in pagers_of(model):  # it may have been arranged before
        pager.let_go()
    parts = wish.cut(model)
    check_ring(parts, wish, addresses)
    inside = (weight for block in parts.blocks for weight in block.weights)
    _refuse_empty(
        [*parts.resident, *(weight for weight in inside if weight.names[0] not in addresses)]
    )
    detach(model)
    settle([(weight, wish.runs_on(weight.names[0])) for weight in parts.resident])
    _settle_other_buffers(model, wish)
    blocks = list(parts.blocks)
    del parts  # as what is copied from here on shall go, block by block
    if wish.hooks:
        attach_movers(model, wish.runs_on, wish.main, wish.skip)
    _stream(
        blocks, model, wish, addresses
    )  # whose hooks are behind those: a forward ends when its output is where it goes


def check_ring(parts: Cut, wish: DispatchConfig, addresses: Mapping[str, Recipe]) -> None:
    """Raise OverBudget unless each block of *parts* fits into the ring."""
    if isinstance(wish.ring, str):
        known = (
            block
            for block in parts.blocks
            if all(_has_value(weight, addresses) for weight in block.weights)
        )
        pieces = (
            StreamedBlock.of(block, wish.runs_on(block.weights[0].names[0]), addresses).pieces
            for block in known
        )
        room_for(
            (Layout.of([piece.payload for piece in each]).nbytes for each in pieces), wish.ring
        )


def kept_addresses(
    parts: Cut, wish: DispatchConfig, stored: Mapping[str, Recipe]
) -> dict[str, Recipe]:
    """Read what of *parts* streams from main memory, and say where it is.

    Args:
        parts: of a model, cut by *wish*.
        wish: how the model shall run.
        stored: where weights are that are not in memory yet, by their first names; of a block all
            are read, or none.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room for it.
    """
    kept: dict[str, Recipe] = {}
    for device, names in _kept_blocks(parts, wish, stored).items():
        recipes = kept_recipes([[stored[name] for name in each] for each in names], lane_to(device))
        kept |= {
            name: recipe
            for each in zip(names, recipes, strict=True)
            for name, recipe in zip(*each, strict=True)
        }
    return kept


def settle(places: Iterable[tuple[Weight, torch.device]]) -> None:
    """Bring weights of a model into the memory of devices, those that are addresses by reading
    them.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room for it.
    """
    places = list(places)
    paged = [
        (weight, device, weight.tensor)
        for weight, device in places
        if isinstance(weight.tensor, Paged) and is_address(weight.tensor)
    ]
    laid_out = [tensor.recipe.in_memory for _, _, tensor in paged]
    flat = [
        ((payload, tensor.dtype, (tensor.numel(),)), device)
        for (payload, _), (_, device, tensor) in zip(laid_out, paged, strict=True)
    ]
    for (weight, _, tensor), (_, strides), placed in zip(paged, laid_out, place(flat), strict=True):
        put(weight, placed.as_strided(tensor.shape, strides))
    for weight, device in places:
        if isinstance(weight.tensor, Paged):
            if not is_address(weight.tensor):  # it was written to
                put(weight, weight.tensor.detach().to(device))
        elif weight.tensor.device != device:
            _move(weight, device)


def _move(weight: Weight, device: torch.device) -> None:
    """Bring *weight*, which is in memory, into that of *device*."""
    if not is_packed(weight.tensor):
        renew(weight.seats, weight.tensor.detach().to(device))
        return
    moved = weight.tensor.to(device)  # which brings along what belongs to it
    for seat in weight.seats:
        seat.take(moved)


def put(weight: Weight, tensor: torch.Tensor) -> None:
    """Let *tensor* be in all places of *weight*, as a parameter if that was one."""
    if not weight.is_buffer and not isinstance(tensor, nn.Parameter):
        asks = (
            weight.tensor.asks
            if isinstance(weight.tensor, Streamed)
            else weight.tensor.requires_grad
        )
        tensor = nn.Parameter(tensor, requires_grad=asks and not isinstance(tensor, Paged))
    for seat in weight.seats:
        seat.take(tensor)


def reported_map(
    model: nn.Module, wish: DispatchConfig, device_map: DeviceMap
) -> dict[str, int | str | torch.device]:
    """What *model*, which runs as *wish* says, has as hf_device_map where *device_map* was asked
    for.
    """
    streamed = (weight.names for weight in weights_of(model) if isinstance(weight.tensor, Streamed))
    return reported(
        device_map, device_key(wish.main), (name for names in streamed for name in names)
    )


def _kept_blocks(
    parts: Cut, wish: DispatchConfig, stored: Container[str]
) -> dict[torch.device, list[list[str]]]:
    """For each device that something streams to from main memory the names of its weights, block by
    block.
    """
    found: dict[torch.device, list[list[str]]] = {}
    for block in filter(wish.keeps, parts.blocks):
        names = [weight.names[0] for weight in block.weights]
        if all(name in stored for name in names):
            found.setdefault(wish.runs_on(names[0]), []).append(names)
    return found


def _has_value(weight: Weight, addresses: Mapping[str, Recipe]) -> bool:
    return weight.names[0] in addresses or not (weight.tensor.is_meta or is_lazy(weight.tensor))


def _refuse_empty(weights: Iterable[Weight]) -> None:
    empty = [
        weight.names[0] for weight in weights if weight.tensor.is_meta or is_lazy(weight.tensor)
    ]
    if empty:
        raise LoadError(
            f"the model has {several(len(empty), 'weight')} without values: {listed(empty)}",
            hint="load a checkpoint into the model, or pass their values as state_dict or "
            "offload_dir",
        )


def _settle_other_buffers(model: nn.Module, wish: DispatchConfig) -> None:
    """Bring the buffers that no checkpoint holds to where their modules run."""
    for prefix, module in model.named_modules():
        for name in non_persistent_buffers(module):
            buffer = own_buffers(module).get(name)
            if buffer is not None:
                own_buffers(module)[name] = buffer.to(
                    wish.runs_on(f"{prefix}.{name}" if prefix else name)
                )


def _stream(
    blocks: list[ModuleBlock],
    model: nn.Module,
    wish: DispatchConfig,
    addresses: Mapping[str, Recipe],
) -> None:
    """Let *blocks*, which are taken from the list one by one, stream: one ring for each device."""
    lanes: dict[torch.device, DeviceTransfer] = {}
    streamed = []
    while blocks:
        streamed.append(_brought(blocks.pop(0), wish, addresses, lanes))
    sources = Sources(
        source.path
        for each in streamed
        for recipe in each.recipes
        for source in recipe.storage.sources
    )
    streams, depths = [], []
    for device, lane in lanes.items():
        group = [each for each in streamed if each.device == device]
        depth = ring_for(group, model, wish.ring)
        ring = depth.blocks if isinstance(depth, Depth) else depth
        stream = Stream([each.pieces for each in group], lane, ring=ring, verify=sources.verify)
        streams.append(stream)
        depths.append(str(depth) if isinstance(depth, Depth) else f"{depth}, as requested")
        for number, each in enumerate(group):
            Pager(stream, number, each.seats, each.recipes).attach(each.module)
    guard(model, [each.module for each in streamed])
    names = {each: name for name, each in model.named_children()}
    for callee in called(model) if streamed else ():
        sources.attach(callee)
        device_map = wish.device_map if callee is model else inside(names[callee], wish.device_map)
        Clock(streams, chosen=wish.chosen, depths=depths, device_map=device_map).attach(callee)
        Training().attach(callee)


def _brought(
    block: ModuleBlock,
    wish: DispatchConfig,
    addresses: Mapping[str, Recipe],
    lanes: dict[torch.device, DeviceTransfer],
) -> StreamedBlock:
    """*block*, its weights where they stream from, and addresses in their places."""
    device = wish.runs_on(block.weights[0].names[0])
    if device not in lanes:
        lanes[device] = lane_to(device)
    streamed = StreamedBlock.of(block, device, addresses)
    if wish.keeps(block):
        streamed = streamed.kept(lanes[device])
    streamed.stand_in()
    return streamed
