"""Blocks and their order, from the class of a model and from a run of it: which modules are not
split, and in which order they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

from torch import nn

from shardkit.errors import LoadError
from shardkit.hints import option
from shardkit.load.libraries import diffusers_model, transformers_model
from shardkit.load.libraries.model_folder import ModelFolder
from shardkit.load.modules.sizes import class_names
from shardkit.load.modules.torch_internals import own_buffers, own_parameters
from shardkit.printable import shown_path


def no_split_pattern(
    path: str | PathLike[str], *, trust_remote_code: bool = False
) -> re.Pattern[str]:
    """Return a regular expression for the modules that must not be split, for
    `shardkit.offload_prep`.

    Transformers or Diffusers creates the model from config.json, without memory, and each module of
    a class in its ``_no_split_modules`` counts. Without this, blocks are inferred from tensor
    names; for models whose layers are numbered the result is the same.

    Args:
        path: the folder; or the name of a model on the Hub that is in its cache.
        trust_remote_code: run the code that the folder contains, where its config.json asks for it.

    Returns:
        A pattern that is found in the names of these modules.

    Raises:
        LoadError: the library is not installed, the folder names no class, or the class does not
            declare such modules.

    Example:
        >>> from shardkit.load import no_split_pattern
        >>> bool(no_split_pattern("llama").search("model.layers.0"))
        True
    """
    folder = ModelFolder.at(path)
    if folder.kind == "pipeline":
        raise LoadError(
            f"{shown_path(folder.path)} holds a pipeline of several models",
            hint="give the folder of one of them",
        )
    maker = diffusers_model if folder.kind == "diffusers" else transformers_model
    model = maker.without_weights(folder, trust_remote_code)
    whole = {
        name
        for module in model.modules()
        for name in class_names(getattr(module, "_no_split_modules", None))
    }
    names = [name for name, module in model.named_modules() if type(module).__name__ in whole]
    if not names:
        raise LoadError(
            f"{shown_path(folder.path)}: {type(model).__name__} does not declare _no_split_modules",
            hint=(
                "give a pattern with ",
                option("blocks"),
                ", or none, and blocks are inferred from tensor names",
            ),
        )
    # A checkpoint of the model with its head has this step before its names, one of the model
    # without may not.
    base = f"{getattr(model, 'base_model_prefix', '')}.".removeprefix(".")
    inside = "|".join(re.escape(name.removeprefix(base)) for name in names)
    return re.compile(f"^(?:{re.escape(base)})?(?:{inside})$")


@contextmanager
def recorded_order(model: nn.Module) -> Iterator[list[str]]:
    """Record the order in which the modules of *model* run, until the context ends.

    The list gets the name of each module that has weights of its own, when it is first run. Pass it
    to `shardkit.offload_prep`, or save it with ``json.dump`` for ``shardkit offload-prep --order``.

    Args:
        model: resident or streamed.

    Yields:
        The names, in the order of their first run.

    Example:
        >>> import shardkit
        >>> import torch
        >>> from shardkit.load import recorded_order
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> with recorded_order(model) as order, torch.inference_mode():
        ...     _ = model(torch.ones(1, 4))
        >>> order
        ['0', '2']
        >>> report = shardkit.offload_prep("model.safetensors", "offload", order=order)
    """
    order: dict[str, None] = {}
    names: list[str] = []

    def note(name: str) -> None:
        if name not in order:
            order[name] = None
            names.append(name)

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: note(name))
        for name, module in model.named_modules()
        if own_parameters(module) or own_buffers(module)
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
