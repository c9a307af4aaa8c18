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
from os import PathLike
from typing import Any, Literal

import torch

from shardkit.errors import LoadError
from shardkit.load.devices.budgets import MaxMemory
from shardkit.load.dispatch.attach import reported_map
from shardkit.load.libraries import folder_models
from shardkit.load.libraries.hub_folder import HubOptions
from shardkit.load.libraries.model_folder import Request
from shardkit.load.libraries.place_models import AnyMap, Placed, Placing
from shardkit.load.loading.load_checkpoint import floating, without_meaning


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
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
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
        path: the folder; or the name of a repository on the Hub, as "bigscience/T0pp", which is
            downloaded into its cache unless all that is needed is there.
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
        token: what shows the Hub who asks; None for HF_TOKEN or the one that `hf auth login` has
            stored, False for none.
        local_files_only: send no request; what is not in the cache is an error.
        force_download: download all of it again.
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
    placing = Placing.of(device_map, max_memory, offload, ring)
    request = Request(
        _floats(dtype, torch_dtype),
        attn_implementation,
        variant,
        trust_remote_code,
        use_safetensors,
    )
    hub = HubOptions(revision, cache_dir, token, local_files_only, force_download)
    folder = hub.folder(path, subfolder, request, placing, components)
    made, models = folder_models.made(folder, request, components)
    notes = [note for model in models.values() for note in model.notes]
    notes += without_meaning(
        offload_folder=offload_folder,
        offload_state_dict=offload_state_dict,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    placed = Placed.of(models, placing)
    placed.put()
    if device_map is not None:
        made.hf_device_map = (
            reported_map(made, placed.config, placed.devices)
            if placed.tree is made
            else dict(placed.devices)
        )
    info = {name: model.info for name, model in models.items()}
    return (made, info.get("", info)) if output_loading_info else made


def _floats(dtype: str | torch.dtype, torch_dtype: str | torch.dtype | None) -> torch.dtype | None:
    """What floats are cast to, whichever name it is given by; None for "auto"."""
    if torch_dtype is not None and dtype != "auto":
        raise LoadError(
            "dtype and torch_dtype are two names of one argument, and both are given",
            hint="leave out torch_dtype",
        )
    asked = dtype if torch_dtype is None else torch_dtype
    return None if asked == "auto" else floating(asked)
