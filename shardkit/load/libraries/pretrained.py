"""A folder as Transformers or Diffusers saves it → the model or the pipeline in it, running over
accelerators, CPU and disk.

1. Each library builds the model by arguments that it documents, and gets lazy tensors for weights.
2. Then the weights are placed as the device map says, as for any other model: read, or left to
   stream.
3. Weights that a library computes from others, rather than moves or casts, have been read, and stay
   in memory. If they should have streamed, a warning is raised.
4. The models of a pipeline share one device map, in which their names come first: "unet.mid_block".
   Where a map is made, the largest comes first, as in Diffusers: it runs most often.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from shardkit.errors import LoadError
from shardkit.load.devices.budgets import Device, MaxMemory, device_key, get_max_memory
from shardkit.load.devices.device_lookup import device_of, main_device, torch_device
from shardkit.load.dispatch.attach import DispatchConfig, arrange, reported_map
from shardkit.load.lazy.paged import Paged
from shardkit.load.libraries import diffusers_model, diffusers_pipeline, transformers_model
from shardkit.load.libraries.model_folder import LazyModel, ModelFolder, Request
from shardkit.load.loading.load_checkpoint import floating, without_meaning
from shardkit.load.loading.match import listed
from shardkit.load.modules.model_group import ModelGroup
from shardkit.load.modules.quantised import is_packed
from shardkit.load.modules.sizes import module_sizes
from shardkit.load.modules.weights import Weight, weights_of
from shardkit.load.performance.bandwidth import Rates, rates_for
from shardkit.load.performance.cost_model import Ring
from shardkit.load.placement.device_map import DeviceMap, check_device_map
from shardkit.load.placement.resolve_device_map import MODES, PlacementOptions
from shardkit.printable import shown
from shardkit.sizes import format_size

AnyMap = str | int | torch.device | DeviceMap | None
"""A device map; one device for the whole model; "auto", "balanced", "balanced_low_0" or
"sequential" to have the map made; None for the CPU.
"""


def from_pretrained(
    path: str | PathLike[str],
    device_map: AnyMap = None,
    dtype: str | torch.dtype = "auto",
    *,
    torch_dtype: str | torch.dtype | None = None,
    max_memory: MaxMemory | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    use_safetensors: bool | None = None,
    output_loading_info: bool = False,
    quantization_config: object = None,
    offload_folder: str | PathLike[str] | None = None,
    offload_state_dict: bool | None = None,
    low_cpu_mem_usage: bool | None = None,
    offload: Literal["allow", "never"] = "allow",
    ring: int | str | None = None,
    **components: object,
) -> Any:  # Any: the folder says of which class it is
    """Load the model in a folder, or the pipeline of Diffusers, in evaluation mode.

    Args:
        path: the folder; or the name of a repository on the Hub, if it is in the cache.
        device_map: a device for each part of the model, by name; a device for all of it; or how to
            choose a map: "auto", "balanced", "balanced_low_0", "sequential". None for the CPU, with
            no hooks.
        dtype: what floats are cast to, but for those that the model keeps in float32. "auto" for
            the type in config.json, and with Diffusers, whose config.json has none, for the type of
            most weights.
        torch_dtype: the older name of *dtype*, which Diffusers has.
        max_memory: budget of each device, where *device_map* is a word.
        trust_remote_code: run the code that the folder contains, where it asks for it.
        attn_implementation: "eager", "sdpa" or another name that Transformers knows, for models of
            Transformers.
        subfolder: the folder inside *path* to load.
        variant: the word in the names of the weights, as "fp16" in ``model.fp16.safetensors``. In a
            pipeline it is for those models that have it.
        revision: the branch, tag or commit on the Hub; None for "main".
        cache_dir: where the cache of the Hub is; None for the default of huggingface_hub.
        use_safetensors: True to load safetensors files only, False to load torch files only; None
            for either.
        output_loading_info: return missing and unexpected names too; for a pipeline, by the names
            of its models.
        quantization_config: anything but None is an error: weights are not quantised while they are
            loaded.
        offload_folder: ignored with a warning, since weights stream from *path* itself.
        offload_state_dict: ignored with a warning, since weights are never in memory twice.
        low_cpu_mem_usage: ignored with a warning, for the same reason.
        offload: "never" to raise an error rather than stream weights from disk.
        ring: size of the prefetch buffer: a number of blocks, at least two, or bytes, as in
            "500MB", where the map is a dict. A map that is made here may prefetch fewer blocks,
            because the buffer counts in its budgets. None to choose the number from the measured
            disk, copy and compute throughput; measuring takes a second, and is skipped if at most
            64 MiB stream.
        components: replacements for the parts of a pipeline, by name, as in ``scheduler=…`` or
            ``safety_checker=None``; they are not moved.

    Returns:
        The model or the pipeline; with *output_loading_info* a pair, of which it is the first.

    Raises:
        FormatError: the weights cannot be read.
        PlanError: several subtrees of them could be the model.
        LoadError: Transformers or Diffusers is not installed, or cannot create the model; or it
            does not fit the memory. A weight of another shape is a Mismatch.

    Example:
        >>> import torch
        >>> from shardkit.load import close, from_pretrained
        >>> model = from_pretrained("llama", device_map={"": "disk", "lm_head": "cpu"})
        >>> with torch.inference_mode():
        ...     tuple(model(torch.tensor([[1, 2, 3]])).logits.shape)
        (1, 3, 32)
        >>> close(model)
    """
    if quantization_config is not None:
        raise LoadError(
            "quantization_config: weights are not quantised when they are loaded",
            hint="load a quantised checkpoint",
        )
    given = _given(device_map)
    request = Request(
        _floats(dtype, torch_dtype),
        attn_implementation,
        variant,
        trust_remote_code,
        use_safetensors,
    )
    made, models = _made(
        ModelFolder.at(path, subfolder, revision=revision, cache_dir=cache_dir), request, components
    )
    notes = [note for model in models.values() for note in model.notes]
    notes += without_meaning(
        offload_folder=offload_folder,
        offload_state_dict=offload_state_dict,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    tree = _tree(models)
    whole = frozenset[str]().union(*(model.whole for model in models.values()))
    terms = PlacementOptions(
        ring,
        offload,
        max_memory,
        whole | _uncut(models.values(), max_memory),
        rates=partial(_rates, tree),
    )
    devices, depth = terms.residents(tree, str(device_map) if given is None else given)
    check_device_map(tree, devices)
    devices = _with_what_stays(tree, models, devices)
    wish = _wish(models.values(), devices, depth, chosen=given is None)
    _place(tree, wish)
    if device_map is not None:
        made.hf_device_map = reported_map(tree, wish, devices) if tree is made else dict(devices)
    info = {name: model.info for name, model in models.items()}
    return (made, info.get("", info)) if output_loading_info else made


def _given(device_map: AnyMap) -> dict[str, Device] | None:
    """*device_map* with devices as they are called in maps; None if it is still to be made."""
    if isinstance(device_map, str) and device_map in MODES:
        return None
    whole = (
        device_map
        if isinstance(device_map, Mapping)
        else {"": "cpu" if device_map is None else device_map}
    )
    devices = {name: device_key(device) for name, device in whole.items()}
    main_device(devices)  # or else there is none
    return devices


def _floats(dtype: str | torch.dtype, torch_dtype: str | torch.dtype | None) -> torch.dtype | None:
    """What floats are cast to, whichever name it is given by; None for "auto"."""
    if torch_dtype is not None and dtype != "auto":
        raise LoadError(
            "dtype and torch_dtype are two names of one argument, and both are given",
            hint="leave out torch_dtype",
        )
    asked = dtype if torch_dtype is None else torch_dtype
    return None if asked == "auto" else floating(asked)


def _made(
    folder: ModelFolder, request: Request, components: Mapping[str, object]
) -> tuple[Any, dict[str, LazyModel]]:  # Any: as above
    """What is in *folder*, and the models that it consists of by their names; a model that is all
    of it has none.
    """
    if folder.kind == "pipeline":
        return diffusers_pipeline.addressed(folder, request, components)
    if components:
        raise LoadError(
            (
                f"{shown(next(iter(components)))} is not an argument of from_pretrained for a "
                f"single model"
            ),
            hint="leave it out; parts are given for a pipeline of Diffusers only",
        )
    if folder.kind == "diffusers" and request.attn_implementation:
        raise LoadError(
            "attn_implementation is for models of Transformers, and this is one of Diffusers",
            hint="call set_attention_backend of the model after loading it",
        )
    maker = diffusers_model if folder.kind == "diffusers" else transformers_model
    made = maker.addressed(folder, request)
    return made.model, {"": made}


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
            stacklevel=3,
        )
    return made


def _wish(
    models: Collection[LazyModel], devices: Mapping[str, Device], ring: Ring, *, chosen: bool
) -> DispatchConfig:
    """How *models* shall run."""
    return DispatchConfig(
        device_map=devices,
        main=main_device(devices),
        whole=frozenset[str]().union(*(each.whole for each in models)),
        skip=frozenset[str]().union(*(each.skip for each in models)),
        ring=ring,
        hooks=len(set(devices.values())) > 1 or "disk" in devices.values(),
        chosen=chosen,
    )


def _place(tree: nn.Module, wish: DispatchConfig) -> None:
    """Put the weights of all models where *wish* wants them, and say which cannot be there."""
    _warn_of_computed(tree, wish)
    arrange(tree, wish)


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
