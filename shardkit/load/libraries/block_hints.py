"""What the class of a model and a run of it know about blocks: which modules are not split, and in
which order they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

from torch import nn

from shardkit.errors import LoadError, shown_path
from shardkit.hints import option
from shardkit.load.libraries import diffusers_model, transformers_model
from shardkit.load.libraries.model_folder import ModelFolder
from shardkit.load.modules.sizes import class_names
from shardkit.load.modules.torch_internals import own_buffers, own_parameters


def no_split_pattern(
    path: str | PathLike[str], *, trust_remote_code: bool = False
) -> re.Pattern[str]:
    """What is found in the names of those modules that the class of the model in a folder says must
    not be split.

    Transformers or Diffusers makes the model of config.json, without memory, and each module of a
    class in its ``_no_split_modules`` counts. Without them there is no such class, and names have
    to tell what is a block, as they do by
    default: for models whose layers are numbered it is the same.

    Args:
        path: the folder; or the name of a model on the Hub that is in its cache.
        trust_remote_code: run the code that lies in the folder, where its config.json asks for it.

    Raises:
        LoadError: the library is not there, or the folder names no class; or the class says
            nothing.
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
            f"{shown_path(folder.path)}: {type(model).__name__} does not say "
            "what must not be split",
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
    """A list that gets the name of each module with weights of its own when it is first run, until
    the context ends.

    ``json.dump`` it, and give the file to ``shardkit offload-prep --order``, or the list to
    `shardkit.offload_prep`.

    Args:
        model: resident or streamed.
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
