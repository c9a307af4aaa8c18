"""Accelerate's family of big-model inference, with its names, arguments and meaning, for every
format that shardkit can open.

What differs, and why:

1. Weights that the device map sends to the disk stream from the checkpoint itself, whatever its
   format. Nothing is written for it, so *offload_folder* stays empty; *offload_dir* is written to
   only where a model that is in memory goes to disk.
2. Every error is raised before a weight is modified, and for every device. *strict* refuses both
   missing and unexpected names.
3. Outside its block's forward a streamed weight is a lazy tensor that is read when it is used, and
   not a meta tensor.
4. *preload_module_classes* are classes whose modules stream as one block. More modules than these
   do (see `blocks`), so the argument is seldom needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from shardkit.checkpoint.entries import SourceFile
from shardkit.load.devices.budgets import Device, MaxMemory, device_key
from shardkit.load.devices.device_lookup import device_of, main_device, torch_device
from shardkit.load.dispatch.attach import (
    DispatchConfig,
    arrange,
    check_ring,
    kept_addresses,
    reported_map,
)
from shardkit.load.dispatch.offload_to_disk import fill_empty, spill
from shardkit.load.lazy.checkpoint import LoadedHeaders
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.loading import install
from shardkit.load.loading.load_checkpoint import (
    floating,
    load_checkpoint_in_model,
    match,
    without_meaning,
)
from shardkit.load.loading.match import Match
from shardkit.load.modules.blocks import Cut
from shardkit.load.modules.sizes import class_names
from shardkit.load.modules.weights import weights_of
from shardkit.load.performance.bandwidth import Rates, rates_for
from shardkit.load.performance.cost_model import Ring
from shardkit.load.placement.device_map import DeviceMap, check_device_map
from shardkit.load.placement.resolve_device_map import PlacementOptions

_Model = TypeVar("_Model", bound=nn.Module)
AnyDevice = str | int | torch.device
"""A device that computes: the number of an accelerator, a name such as "cuda:0" or "cpu", or a
`torch.device`.
"""
Names = Iterable[str] | str | None
"""Names, a single one, or None for none."""


def load_checkpoint_and_dispatch(
    model: _Model,
    checkpoint: str | PathLike[str],
    device_map: str | DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    no_split_module_classes: Names = None,
    offload_folder: str | PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: Names = None,
    preload_module_classes: Names = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    *,
    offload: Literal["allow", "never"] = "allow",
    ring: int | str | None = None,
    verify: bool = False,
) -> _Model:
    """Load a checkpoint into *model*, and prepare it to run over accelerators, CPU and disk.

    The arguments are those of Accelerate's function of this name, and three more.

    Args:
        model: the model, empty or not. It is modified and returned.
        checkpoint: a file of any format, an index or a folder, as `shardkit.open` takes it.
        device_map: a device for each part of the model, by name; or how to choose one: "auto" and
            "balanced" spread the model over the accelerators, and choose the resident blocks so
            that computation hides most reads; "balanced_low_0" leaves the first accelerator as
            empty as possible, "sequential" fills one after the other. None loads all weights where
            the model has them, empty ones onto the CPU, and attaches nothing.
        max_memory: budget of each device, as in ``{0: "10GB", "cpu": "80%"}``, where *device_map*
            is a word.
        no_split_module_classes: names of classes whose modules stay on one device, and stream as
            one block.
        offload_folder: ignored with a warning, since weights stream from *checkpoint* itself.
        offload_buffers: stream buffers with the parameters beside them, instead of keeping them in
            memory.
        dtype: what floats are cast to; None for the types that *model* has.
        offload_state_dict: ignored with a warning, since weights are never in memory twice.
        skip_keys: keys of arguments that are not moved to another device.
        preload_module_classes: names of classes whose modules stream as one block, for forwards
            that use their submodules' weights.
        force_hooks: move inputs and outputs even if all of the model is on one device.
        strict: raise an error for missing and unexpected names. Otherwise they are warnings, and
            missing weights keep their values.
        full_state_dict: False is an error: one process reads the complete checkpoint.
        broadcast_from_rank0: True is an error, for the same reason.
        offload: "never" to raise an error rather than stream weights from disk.
        ring: size of the prefetch buffer: a number of blocks, at least two, or bytes, as in
            "500MB", where the map is a dict. With "auto" and "balanced" fewer blocks may be
            prefetched, because the buffer counts in the budgets. None to choose the number from
            the measured disk, copy and compute throughput; measuring takes a second, and is skipped
            if at most 64 MiB stream.
        verify: check the files against their checksums first, including those that stream, as
            `load_checkpoint_in_model` does.

    Returns:
        *model*, with `hf_device_map` set.

    Raises:
        FormatError: the checkpoint cannot be read.
        PlanError: several subtrees of it could be the model.
        LoadError: it does not match the model, or the model does not fit the memory; raised before
            a weight is modified.

    Example:
        >>> import torch
        >>> from shardkit.load import close, init_empty_weights, load_checkpoint_and_dispatch
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = load_checkpoint_and_dispatch(
        ...     model, "model.safetensors", device_map={"0": "cpu", "1": "cpu", "2": "disk"}
        ... )
        >>> with torch.inference_mode():
        ...     tuple(model(torch.ones(3, 4)).shape)
        (3, 4)
        >>> close(model)
    """
    if (
        device_map is None or broadcast_from_rank0 or not full_state_dict
    ):  # the last two are errors, and it says so
        load_checkpoint_in_model(
            model,
            checkpoint,
            dtype=dtype,
            strict=strict,
            full_state_dict=full_state_dict,
            broadcast_from_rank0=broadcast_from_rank0,
            verify=verify,
        )
        return model
    target, no_split = floating(dtype), class_names(no_split_module_classes)
    opened = LoadedHeaders.at(checkpoint)
    found = match(model, opened, dtype=target, strict=strict)
    preload = class_names(preload_module_classes)
    rates = partial(_rates, found.homes)
    terms = PlacementOptions(
        ring, offload, max_memory, no_split, preload, target, offload_buffers, rates
    )
    chosen = isinstance(device_map, str)
    device_map, depth = terms.residents(model, device_map)
    check_device_map(model, device_map)
    wish = _wish(
        device_map,
        None,
        no_split | preload,
        offload_buffers,
        skip_keys,
        force_hooks,
        depth,
        chosen=chosen,
    )
    parts = wish.cut(model)
    stored = _stored(parts, found.homes, opened.files)
    check_ring(parts, wish, stored)
    if verify:
        opened.verify([*(home.entry for home in found.homes), *found.extra.values()])
    addresses = {
        name: recipe
        for name, recipe in stored.items()
        if device_of(name, wish.device_map) == "disk"
    }
    addresses |= kept_addresses(parts, wish, stored)
    values = install.read(
        (home, wish.lies_on(home.name)) for home in found.homes if home.name not in addresses
    )
    extra = install.read_extra(found.extra)
    opened.check_unchanged()
    install.install(model, found.homes, values, extra)
    arrange(model, wish, addresses=addresses)
    opened.check_unchanged()  # from here on, each forward sees to that
    idle = without_meaning(offload_folder=offload_folder, offload_state_dict=offload_state_dict)
    for note in (*opened.notes, *found.notes, *idle):
        warnings.warn(note, UserWarning, stacklevel=2)
    return _mapped(model, wish, device_map)


def dispatch_model(
    model: _Model,
    device_map: DeviceMap,
    main_device: AnyDevice | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | PathLike[str] | None = None,
    offload_index: Mapping[str, Mapping[str, Any]] | None = None,  # Any: as Accelerate has it
    offload_buffers: bool = False,
    skip_keys: Names = None,
    preload_module_classes: Names = None,
    force_hooks: bool = False,
    *,
    ring: int | str | None = None,
) -> _Model:
    """Prepare *model*, whose weights are loaded, to run over accelerators, CPU and disk.

    Args:
        model: the model. It is modified and returned.
        device_map: a device for each part of it, by name.
        main_device: the device that runs the parts on CPU and disk; None for the first accelerator
            in *device_map*, or else the CPU.
        state_dict: the values of weights that are on the meta device.
        offload_dir: a checkpoint with the values of weights that are on the meta device, from which
            those on disk stream. Weights in memory that go to disk are written there, to a folder
            that is new, empty, or holds only them.
        offload_index: the files of weights that are on the meta device, as in ``{"a.weight":
            {"safetensors_file": "x.safetensors"}}``; or, for what *offload_dir* holds, type and
            shape.
        offload_buffers: stream buffers with the parameters beside them.
        skip_keys: keys of arguments that are not moved to another device.
        preload_module_classes: names of classes whose modules stream as one block.
        force_hooks: move inputs and outputs even if all of the model is on one device.
        ring: size of the prefetch buffer: a number of blocks, at least two, or bytes, as in
            "500MB"; None to choose it from the measured throughput.

    Returns:
        *model*, with `hf_device_map` set.

    Raises:
        FormatError: a file cannot be read.
        OutputError: *offload_dir* cannot be written.
        LoadError: the map or the files do not match the model, or a weight has no value.

    Example:
        >>> import torch
        >>> from shardkit.load import close, dispatch_model
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> with torch.inference_mode():
        ...     before = model(torch.ones(3, 4))
        ...     device_map = {"0": "cpu", "1": "cpu", "2": "disk"}
        ...     model = dispatch_model(model, device_map, offload_dir="spilled")
        ...     torch.equal(model(torch.ones(3, 4)), before)
        True
        >>> close(model)
    """
    check_device_map(model, device_map)
    wish = _wish(
        device_map,
        main_device,
        class_names(preload_module_classes),
        offload_buffers,
        skip_keys,
        force_hooks,
        ring,
    )
    _dispatch(model, wish, state_dict, offload_dir, offload_index)
    return _mapped(model, wish, device_map)


def cpu_offload(
    model: _Model,
    execution_device: AnyDevice | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Names = None,
) -> _Model:
    """Keep the weights of *model* in main memory, and stream them to *execution_device* in each
    forward.

    Args:
        model: the model. It is modified and returned.
        execution_device: the device that runs it; None for the device of its first parameter. On
            the CPU nothing needs to stream.
        offload_buffers: stream buffers too.
        state_dict: the values of weights that are on the meta device.
        preload_module_classes: names of classes whose modules stream as one block.

    Returns:
        *model*.

    Raises:
        LoadError: a weight has no value, or there is not enough memory.

    Example:
        >>> import torch
        >>> from shardkit.load import cpu_offload, remove_hooks
        >>> from torch import nn
        >>> device = "cuda" if torch.cuda.is_available() else "cpu"
        >>> model = cpu_offload(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), device)
        >>> with torch.inference_mode():
        ...     tuple(model(torch.ones(3, 4, device=device)).shape)
        (3, 4)
        >>> remove_hooks(model)
    """
    wish = _wish(
        {"": "cpu"},
        _runs_on(model, execution_device),
        preload_module_classes,
        offload_buffers,
        None,
        True,
        None,
    )
    _dispatch(model, wish, state_dict, None, None)
    return model


def disk_offload(
    model: _Model,
    offload_dir: str | PathLike[str],
    execution_device: AnyDevice | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Names = None,
) -> _Model:
    """Write the weights of *model* to *offload_dir*, and stream them from there in each forward.

    Args:
        model: the model. It is modified and returned.
        offload_dir: a folder that is new, empty, or holds only these weights; or a checkpoint with
            the values of weights that are on the meta device.
        execution_device: the device that runs it; None for the device of its first parameter.
        offload_buffers: stream buffers too.
        preload_module_classes: names of classes whose modules stream as one block.

    Returns:
        *model*.

    Raises:
        FormatError: a file cannot be read.
        OutputError: *offload_dir* cannot be written.
        LoadError: the files do not match the model, or a weight has no value.

    Example:
        >>> import torch
        >>> from shardkit.load import close, disk_offload
        >>> from torch import nn
        >>> model = disk_offload(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "offload")
        >>> with torch.inference_mode():
        ...     tuple(model(torch.ones(3, 4)).shape)
        (3, 4)
        >>> close(model)
    """
    wish = _wish(
        {"": "disk"},
        _runs_on(model, execution_device),
        preload_module_classes,
        offload_buffers,
        None,
        True,
        None,
    )
    _dispatch(model, wish, None, offload_dir, None)
    return model


def _dispatch(
    model: nn.Module,
    wish: DispatchConfig,
    state_dict: Mapping[str, torch.Tensor] | None,
    offload_dir: str | PathLike[str] | None,
    offload_index: Mapping[str, Mapping[str, Any]] | None,  # Any: as Accelerate has it
) -> None:
    folder = None if offload_dir is None else Path(offload_dir)
    fill_empty(model, state_dict or {}, folder, offload_index or {})
    arrange(model, wish, addresses=spill(model, wish, folder))


def _wish(
    device_map: DeviceMap,
    runs_on: AnyDevice | None,
    whole: Names,
    offload_buffers: bool,
    skip_keys: Names,
    force_hooks: bool,
    ring: Ring,
    *,
    chosen: bool = False,
) -> DispatchConfig:
    devices = {name: device_key(device) for name, device in device_map.items()}
    several = len(set(devices.values())) > 1 or "disk" in devices.values()
    return DispatchConfig(
        device_map=devices,
        main=main_device(devices) if runs_on is None else torch_device(device_key(runs_on)),
        whole=class_names(whole),
        offload_buffers=offload_buffers,
        skip=class_names(skip_keys),
        ring=ring,
        hooks=several or force_hooks,
        chosen=chosen,
    )


def _rates(homes: Sequence[Match], device: Device) -> Rates:
    """Measure the throughput at which the weights of *homes* stream to *device*."""
    return rates_for(
        ((home.payload, home.dtype, home.shape) for home in homes), torch_device(device)
    )


def _stored(parts: Cut, homes: Iterable[Match], files: tuple[SourceFile, ...]) -> dict[str, Recipe]:
    """Map the streamed weights among *homes* to their bytes in a checkpoint of *files*."""
    streamed = {weight.names[0] for block in parts.blocks for weight in block.weights}
    return {home.name: Recipe.of(home.stored, files) for home in homes if home.name in streamed}


def _runs_on(model: nn.Module, device: AnyDevice | None) -> AnyDevice:
    """Return *device*, which may be 0; or the device of the first weight of *model*."""
    if device is not None:
        return device
    return next((weight.tensor.device for weight in weights_of(model)), torch.device("cpu"))


def _mapped(model: _Model, wish: DispatchConfig, device_map: DeviceMap) -> _Model:
    model.hf_device_map = reported_map(model, wish, device_map)  # type: ignore[assignment]  # an attribute that no module declares
    return model
