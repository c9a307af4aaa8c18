"""A folder as Transformers saves it → the model of its configuration, running over accelerators, CPU and disk.

1. Transformers does what it knows best, by arguments that it documents: it makes the model without memory, renames, fuses and
   casts the weights, ties them, fills in what is missing, and says so. It gets addresses for weights, and reads none.
2. Then the addresses are put where the device map wants them, as for any other model: read, or left to stream.
3. What Transformers computes from weights, rather than moves or casts, has been read, and stays in memory. If it should have
   streamed, a warning says so.
4. Transformers 5.0, 5.8 and 5.23 were tested. Folders of Diffusers are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import nn

from shardkit.errors import LoadError, Mismatch, shown, shown_path
from shardkit.load.arrangement import Wish, arrange
from shardkit.load.assign import listed
from shardkit.load.budgets import Device, MaxMemory, device_key
from shardkit.load.device_maps import DeviceMap, check_device_map
from shardkit.load.loading import floating, main_device
from shardkit.load.mapping import tensors
from shardkit.load.model_folder import ModelFolder, told
from shardkit.load.modes import MODES, Terms
from shardkit.load.module_sizes import class_names
from shardkit.load.paged import Paged
from shardkit.load.weights import weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN = (torch.Tensor, nn.Parameter, Paged)
AnyMap = str | int | torch.device | DeviceMap | None
Info = dict[str, Any]  # Any: what Transformers tells, which differs from key to key


@overload
def from_pretrained(
    path: str | PathLike[str],
    device_map: AnyMap = ...,
    dtype: str | torch.dtype = ...,
    *,
    max_memory: MaxMemory | None = ...,
    trust_remote_code: bool = ...,
    attn_implementation: str | None = ...,
    subfolder: str = ...,
    variant: str | None = ...,
    output_loading_info: Literal[False] = ...,
    quantization_config: None = ...,
    offload: Literal["allow", "never"] = ...,
    ring: int | str = ...,
) -> PreTrainedModel: ...


@overload
def from_pretrained(
    path: str | PathLike[str],
    device_map: AnyMap = ...,
    dtype: str | torch.dtype = ...,
    *,
    max_memory: MaxMemory | None = ...,
    trust_remote_code: bool = ...,
    attn_implementation: str | None = ...,
    subfolder: str = ...,
    variant: str | None = ...,
    output_loading_info: Literal[True],
    quantization_config: None = ...,
    offload: Literal["allow", "never"] = ...,
    ring: int | str = ...,
) -> tuple[PreTrainedModel, Info]: ...


def from_pretrained(
    path: str | PathLike[str],
    device_map: AnyMap = None,
    dtype: str | torch.dtype = "auto",
    *,
    max_memory: MaxMemory | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    output_loading_info: bool = False,
    quantization_config: object = None,
    offload: Literal["allow", "never"] = "allow",
    ring: int | str = 4,
) -> PreTrainedModel | tuple[PreTrainedModel, Info]:
    """The model in a folder, of the class that its config.json names, in evaluation mode.

    Args:
        path: the folder; or the name of a model on the Hub that is in its cache.
        device_map: a device for each part of the model, by name; a device for all of it; or how to make a map: "auto",
            "balanced", "balanced_low_0", "sequential". None for the CPU, with nothing attached.
        dtype: what floats are cast to, but for those that the model keeps in float32; "auto" for what config.json says.
        max_memory: what each device may hold, where *device_map* says how to make a map.
        trust_remote_code: run the code that lies in the folder, where its config.json asks for it.
        attn_implementation: "eager", "sdpa" or what else Transformers has.
        subfolder: the folder inside *path* that is meant.
        variant: the word in the names of the weights, as "fp16" in ``model.fp16.safetensors``.
        output_loading_info: also give what Transformers says of missing and unexpected weights.
        quantization_config: weights are not quantised while they are loaded; anything but None is an error.
        offload: "never" to fail rather than let weights stream from disk.
        ring: how many blocks of streamed weights are in memory at a time, at least two; or how much they may take, as in
            "500MB", where the map is a dict. A map that is made here counts them, and may have room for fewer.

    Raises:
        FormatError: the weights cannot be read.
        PlanError: several parts of them could be the model.
        LoadError: Transformers is not there, or makes no model of the folder; or the model does not fit the memory. A weight
            that has another shape is a Mismatch.
    """
    if quantization_config is not None:
        raise LoadError("quantization_config: weights are not quantised when they are loaded", hint="load a quantised checkpoint")
    given = _given(device_map)
    floats = dtype if dtype == "auto" else floating(dtype)
    folder = ModelFolder.at(path, subfolder=subfolder, variant=variant, trusted=trust_remote_code)
    model, info = _addressed(folder, floats, attn_implementation)
    model.config.name_or_path = model.name_or_path = str(path)
    no_split = class_names(model._no_split_modules)
    devices = given
    if devices is None:
        devices, ring = Terms(ring, offload, max_memory, no_split).residents(model, str(device_map))
    check_device_map(model, devices)
    _place(model, devices, no_split, ring, chosen=given is None)
    if device_map is not None:
        model.hf_device_map = dict(devices)  # type: ignore[assignment]  # an attribute that no module declares
    return (model, info) if output_loading_info else model


def _given(device_map: AnyMap) -> dict[str, Device] | None:
    """*device_map* with devices as they are called in maps; None if it is still to be made."""
    if isinstance(device_map, str) and device_map in MODES:
        return None
    whole = device_map if isinstance(device_map, Mapping) else {"": "cpu" if device_map is None else device_map}
    devices = {name: device_key(device) for name, device in whole.items()}
    main_device(devices)  # or else there is none
    return devices


def _addressed(
    folder: ModelFolder, dtype: str | torch.dtype | None, attn_implementation: str | None
) -> tuple[PreTrainedModel, Info]:
    """The model as Transformers makes it, with addresses for weights, and what it says of them."""
    weights = tensors(folder.weights)
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    load = cast("Callable[..., tuple[PreTrainedModel, Info]]", folder.kind.from_pretrained)
    with told(folder.path):
        model, info = load(
            None,
            config=folder.config,
            state_dict=weights,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # which are told below, by name
            output_loading_info=True,
            **options,
        )
        _check_shapes(folder.path, info["mismatched_keys"])
        _check_plain(folder.path, model)
        if model.can_generate():
            model.generation_config = folder.generation_config()
    return model, info


def _check_shapes(folder: Path, mismatched: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    wrong = {name: (tuple(there), tuple(here)) for name, there, here in sorted(mismatched)}
    if wrong:
        first, (there, here) = next(iter(wrong.items()))
        more = f", and so with {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Mismatch(
            f"{shown_path(folder)}: config.json asks for another model: {shown(first)} would be {list(here)}, "
            f"and is {list(there)}{more}",
            wrong_shape=wrong,
        )


def _check_plain(folder: Path, model: nn.Module) -> None:
    """See that no weight is an object of a library that quantises: it could neither stream nor be moved as it should."""
    odd = next((weight for weight in weights_of(model) if type(weight.tensor) not in _PLAIN), None)
    if odd is not None:
        raise LoadError(
            f"{shown_path(folder)}: {shown(odd.names[0])} becomes a {type(odd.tensor).__name__}, and is no plain tensor then",
            hint="load it with Transformers itself, or store it in a format whose weights are plain tensors",
        )


def _place(
    model: PreTrainedModel, devices: Mapping[str, Device], no_split: frozenset[str], ring: int | str, *, chosen: bool
) -> None:
    wish = Wish(
        device_map=devices,
        main=main_device(devices),
        whole=no_split,
        skip=class_names(model._skip_keys_device_placement),
        ring=ring,
        hooks=len(set(devices.values())) > 1 or "disk" in devices.values(),
        chosen=chosen,
    )
    _warn_of_computed(model, wish)
    arrange(model, wish)


def _warn_of_computed(model: nn.Module, wish: Wish) -> None:
    """Say which weights should stream and cannot, since Transformers did more to them than can be noted down."""
    weights = [weight for block in wish.cut(model).blocks for weight in block.weights]
    computed = [weight.names[0] for weight in weights if not isinstance(weight.tensor, Paged)]
    if computed:
        warnings.warn(
            f"in memory, and not streamed, since Transformers computed them or the checkpoint has none: {listed(computed)}",
            UserWarning,
            stacklevel=4,
        )
