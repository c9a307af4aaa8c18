"""Create a model of Diffusers with lazy weights.

1. Its class creates it from its configuration, empty, and renames the weights of old checkpoints.
   The weights are then matched and installed as for any other model.
2. If no type is requested, it has the type of most of its weights. Diffusers would make it float32.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shardkit.checkpoint.entries import TensorEntry
from shardkit.errors import LoadError
from shardkit.load.lazy.checkpoint import LoadedHeaders
from shardkit.load.lazy.paged import Paged
from shardkit.load.libraries.model_folder import (
    MAKE_IT,
    Info,
    LazyModel,
    ModelFolder,
    Request,
    Saved,
    library,
    loads_as_all_do,
    prevalent_dtype,
    translated_errors,
    written,
)
from shardkit.load.loading.install import install, read_extra
from shardkit.load.loading.load_checkpoint import match
from shardkit.load.modules.init_empty import init_empty_weights
from shardkit.load.modules.sizes import class_names
from shardkit.metadata.shard_names import DIFFUSERS_STEM
from shardkit.printable import shown, shown_path

LEAST = (0, 37)
# Diffusers leaves its models half typed: the class that it exports is a dummy, for want of torch
_Model = Any
_Kind = Any  # and so the classes
_WEIGHTS = tuple(
    f"{DIFFUSERS_STEM}.{each}"
    for each in ("safetensors.index.json", "safetensors", "bin", "bin.index.json")
)


def addressed(folder: ModelFolder, request: Request, kind: _Kind | None = None) -> LazyModel:
    """The model in *folder*, of which no weight has been read.

    Args:
        folder: where it is.
        request: how it is made.
        kind: its class; None for the one that its config.json names.

    Raises:
        FormatError: the weights cannot be read.
        LoadError: Diffusers is not there, or makes no model of the folder, or the weights are not
            of that model.
    """
    diffusers = library("diffusers", LEAST)
    _check_not_quantised(folder)
    opened = LoadedHeaders.at(folder.weights(_WEIGHTS, request))
    dtype = request.dtype or prevalent_dtype(
        (entry.dtype, entry.nbytes) for entry in opened.entries.values()
    )
    with translated_errors(folder, diffusers):
        model = _empty(folder, kind, request.trusted, dtype)
        opened = replace(opened, entries=_renamed(model, opened.entries))
    found = match(model, opened, dtype=dtype, keep_in_fp32=class_names(model._keep_in_fp32_modules))
    learned = [name for name, each in model.named_parameters() if each.requires_grad]
    lazy = {home.name: Paged.of(home.stored, files=opened.files) for home in found.homes}
    install(model, found.homes, lazy, read_extra(found.extra))
    for name in learned:
        model.get_parameter(name).requires_grad_()
    info: Info = {
        "missing_keys": [*found.missing],
        "unexpected_keys": [*found.unexpected],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    return LazyModel(
        model.eval(),
        info,
        _whole(model),
        class_names(model._skip_keys),
        (*opened.notes, *found.notes),
    )


def saved(model: nn.Module) -> Saved | None:
    """What Diffusers would save of *model*, of which no weight is read; None if it is not its
    own.
    """
    if "diffusers" not in sys.modules:
        return None
    from diffusers import ModelMixin

    own: Any = model  # as above
    if not isinstance(model, ModelMixin):
        return None
    return Saved(model.state_dict(), written(own.save_config), stem=DIFFUSERS_STEM)


def without_weights(folder: ModelFolder, trusted: bool) -> nn.Module:
    """The model in *folder* with nothing in its weights, which have no memory.

    Raises:
        LoadError: Diffusers is not there, or makes no model of the folder.
    """
    with translated_errors(folder, library("diffusers", LEAST)):
        model: nn.Module = _empty(folder, None, trusted, torch.float32)
        return model


def has_variant(folder: ModelFolder, variant: str | None) -> bool:
    """Whether *folder* has weights of that *variant*."""
    return folder.has_variant(_WEIGHTS, variant)


def _check_not_quantised(folder: ModelFolder) -> None:
    config = folder.fields.get("quantization_config")
    if config is not None:
        method = config.get("quant_method") if isinstance(config, dict) else config
        raise LoadError(
            (
                f"{shown_path(folder.path)} is quantised with {shown(method)}, which Diffusers "
                f"does not load as plain tensors"
            ),
            hint="load it with Diffusers itself",
        )


def _empty(folder: ModelFolder, kind: _Kind | None, trusted: bool, dtype: torch.dtype) -> _Model:
    """The model with no weights."""
    make = (
        (kind or _class(folder)).from_config
        if kind or not _has_code(folder)
        else _own_code(folder, trusted)
    )
    with _made_as(dtype), init_empty_weights():
        model = make(dict(folder.fields))
    model.register_to_config(_name_or_path=folder.name)
    return model


@contextmanager
def _made_as(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors be of the type *dtype*, as Diffusers has it while it makes a model: buffers
    depend on it.
    """
    before = torch.get_default_dtype()
    if dtype.itemsize > 1:  # with narrower ones torch makes nothing, and Diffusers casts afterwards
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _has_code(folder: ModelFolder) -> bool:
    auto_map = folder.fields.get("auto_map")
    return isinstance(auto_map, dict) and "AutoModel" in auto_map


def _own_code(folder: ModelFolder, trusted: bool) -> Callable[[dict[str, object]], _Model]:
    """Create a model whose code is in *folder*."""
    if not trusted:
        raise LoadError(
            f"{shown_path(folder.path)} contains code for its model",
            hint="read it, and if you trust it, pass trust_remote_code=True",
        )
    import diffusers

    auto: _Kind = diffusers.AutoModel
    place = {"_name_or_path": str(folder.path)}  # where it looks for the code
    return lambda fields: auto.from_config(
        fields | place, trust_remote_code=True, local_files_only=True
    )


def _class(folder: ModelFolder) -> _Kind:
    """The class that config.json asks for."""
    import diffusers

    name = folder.fields["_class_name"]
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise LoadError(
            (
                f"{shown_path(folder.path / 'config.json')} asks for {shown(name)}, which "
                "Diffusers "
                f"{diffusers.__version__} has not"
            ),
            hint="update Diffusers",
        )
    if not loads_as_all_do(found, diffusers.ModelMixin):
        raise LoadError(
            f"{shown_path(folder.path)} holds a {name}, which Diffusers loads by a method of its "
            f"own",
            hint=MAKE_IT,
        )
    return found


def _renamed(model: _Model, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """*entries* by the names that *model* has for them, without those that it knows to be of no
    use.
    """
    renamed = dict(entries)
    model._fix_state_dict_keys_on_load(renamed)
    known, useless = (
        model.state_dict(keep_vars=True),
        model._keys_to_ignore_on_load_unexpected or (),
    )
    return {
        name: entry
        for name, entry in renamed.items()
        if name in known or not any(re.search(each, name) for each in useless)
    }


def _whole(model: _Model) -> frozenset[str]:
    """The classes whose modules stay on one device, as the models say that *model* consists of."""
    named = (class_names(getattr(module, "_no_split_modules", None)) for module in model.modules())
    return frozenset[str]().union(*named)
