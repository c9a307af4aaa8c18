"""Create a model of Transformers with lazy weights.

Transformers gets the configuration and a state dict of lazy tensors, by arguments that it
documents. It creates the model without memory, renames, fuses and casts the weights, ties them,
initialises missing ones, and reports them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from shardkit.errors import LoadError, Mismatch, ReadOnly
from shardkit.load.lazy.checkpoint import tensors
from shardkit.load.lazy.paged import Paged
from shardkit.load.libraries.model_folder import (
    Info,
    LazyModel,
    ModelFolder,
    Request,
    Saved,
    library,
    prevalent_dtype,
    translated_errors,
    written,
)
from shardkit.load.loading.match import listed
from shardkit.load.modules.init_empty import init_empty_weights
from shardkit.load.modules.quantised import expands_itself, is_packed, method_of, packed_names
from shardkit.load.modules.sizes import class_names
from shardkit.load.modules.torch_internals import non_persistent_buffers, own_buffers
from shardkit.load.modules.weights import weights_of
from shardkit.printable import shown, shown_path

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

LEAST = (5, 0)
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PLAIN = (torch.Tensor, nn.Parameter, Paged)
_FEW = 16  # weights that are read because they are written to


def addressed(
    folder: ModelFolder, request: Request, kind: type[PreTrainedModel] | None = None
) -> LazyModel:
    """The model in *folder*, of which no weight has been read that Transformers only moves, casts
    or joins.

    Args:
        folder: where it is.
        request: how it is made.
        kind: its class; None for the one that its config.json names.

    Raises:
        FormatError: the weights cannot be read.
        LoadError: Transformers is not there, or makes no model of the folder.
    """
    transformers = library("transformers", LEAST)
    with translated_errors(folder, transformers):
        kind = kind or _class(folder, request.trusted)
        config = _configuration(folder, kind, request.trusted)
    weights = tensors(_weights(folder, request, config))
    packed = packed_names(weights) if method_of(folder.fields) == "bitsandbytes" else ()
    dtype = request.dtype or (
        prevalent_dtype((each.stored, each.payload.nbytes) for each in weights.values())
        if request.as_stored
        else "auto"
    )
    options = (
        {"attn_implementation": request.attn_implementation} if request.attn_implementation else {}
    )
    load = cast("Callable[..., tuple[PreTrainedModel, Info]]", kind.from_pretrained)
    with translated_errors(folder, transformers):
        model, info = _made(
            load,
            weights,
            {name: weights[name].read() for name in packed},
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # which are reported below, by name
            output_loading_info=True,
            **options,
        )
        _check_shapes(folder.path, info["mismatched_keys"])
        _check_plain(folder.path, model)
        if model.can_generate():
            model.generation_config = _generation_config(folder.path)
    unset = _unset_buffers(folder, model) if request.trusted else []
    model.config.name_or_path = model.name_or_path = folder.name
    whole, skip = (
        class_names(model._no_split_modules),
        class_names(model._skip_keys_device_placement),
    )
    notes = (_unset_note(unset, kind.__name__, transformers.__version__),) if unset else ()
    return LazyModel(model, info, whole, skip, notes, stays=expands_itself(model))


def _made(
    load: Callable[..., tuple[PreTrainedModel, Info]],
    weights: Mapping[str, Paged],
    read: Mapping[str, torch.Tensor],
    **options: object,
) -> tuple[PreTrainedModel, Info]:
    """What *load* makes of *weights*.

    Those in *read* are in memory, and so are those that it writes to, as where it fills in what it
    has loaded already.

    Raises:
        ReadOnly: it writes to many.
    """
    most = len(read) + _FEW
    while True:
        try:
            return load(None, state_dict={**weights, **read} if read else weights, **options)
        except ReadOnly as refusal:
            if len(read) >= most:
                raise  # it writes to all there are, one by one, and each time is made anew
            found = [
                name
                for name, each in weights.items()
                if name not in read and _lies_in(each, refusal.places)
            ]
            if not found:
                raise
            read = {**read, **{name: weights[name].read() for name in found}}


def _lies_in(weight: Paged, places: Iterable[tuple[Path, int, int]]) -> bool:
    """Whether a byte of *weight* is in one of *places*."""
    return any(
        each.path == path and each.start < start + nbytes and start < each.start + each.nbytes
        for each in weight.payload.sources
        for path, start, nbytes in places
    )


def _unset_buffers(folder: ModelFolder, model: PreTrainedModel) -> list[str]:
    """The buffers of *model*, whose code is the folder's, that no checkpoint holds and that have
    not what that code computes.
    """
    if not type(model).__module__.startswith("transformers_modules."):
        return []
    computed: dict[str, torch.Tensor] = {}
    with (
        suppress(LoadError),
        translated_errors(folder, library("transformers", LEAST)),
        init_empty_weights(),
    ):
        computed = dict(type(model)(deepcopy(model.config)).named_buffers())
    unset = []
    for prefix, module in model.named_modules():
        for name in sorted(non_persistent_buffers(module)):
            full, buffer = f"{prefix}.{name}" if prefix else name, own_buffers(module).get(name)
            if buffer is not None and full in computed and not _is_near(buffer, computed[full]):
                unset.append(full)
    return unset


def _unset_note(names: Iterable[str], kind: str, version: str) -> str:
    return (
        f"the checkpoint has no values for {listed(names)}, and they differ from those that "
        f"{kind} computes: "
        f"Transformers {version} makes models without memory, so that only _init_weights can set "
        "such buffers; "
        "let the code of the folder set them there, or set them now"
    )


def _is_near(buffer: torch.Tensor, computed: torch.Tensor) -> bool:
    """Whether *buffer* may be *computed*, in whichever type that was done."""
    if buffer.is_meta or buffer.shape != computed.shape:
        return False
    same, right = (each.detach().to("cpu", torch.complex128) for each in (buffer, computed))
    return computed.is_meta or torch.allclose(same, right, rtol=0.02, equal_nan=True)


def saved(model: nn.Module) -> Saved | None:
    """What Transformers would save of *model*, of which no weight is read that it only splits or
    renames.

    None if the model is not its own.
    """
    if "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.dynamic_module_utils import custom_object_save

    if not isinstance(model, PreTrainedModel):
        return None
    config = deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    saves: list[Callable[[str], object]] = [config.save_pretrained]
    if model.can_generate():
        saves.append(model.generation_config.save_pretrained)
    if type(model)._auto_class is not None:  # a class of the user's own, whose code goes along
        saves.insert(
            0, lambda folder: custom_object_save(model, folder, config=cast("Any", config))
        )  # declared as a dict
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    if (
        getattr(model, "hf_quantizer", None) is None
    ):  # else it has the names of its checkpoint, and no way back from there
        state = revert_weight_conversion(model, state)
    return Saved(state, written(*saves), frozenset(model.all_tied_weights_keys))


def without_weights(folder: ModelFolder, trusted: bool) -> nn.Module:
    """The model in *folder* with nothing in its weights, which have no memory.

    Raises:
        LoadError: Transformers is not there, or makes no model of the folder.
    """
    with translated_errors(folder, library("transformers", LEAST)), torch.device("meta"):
        kind = _class(folder, trusted)
        model: nn.Module = kind(_configuration(folder, kind, trusted))
        return model


def has_variant(folder: ModelFolder, variant: str | None) -> bool:
    """Whether *folder* has weights of that *variant*."""
    return folder.has_variant(_WEIGHTS, variant)


def _class(folder: ModelFolder, trusted: bool) -> type[PreTrainedModel]:
    """The class that config.json asks for."""
    import transformers

    architectures = folder.fields.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        raise LoadError(
            f"{shown_path(folder.path / 'config.json')} names no class under 'architectures'",
            hint="write the name of the model's class there",
        )
    remote = _remote(folder.fields, name)
    if remote is not None and trusted:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote, str(folder.path), local_files_only=True)
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    where = shown_path(folder.path / "config.json")
    raise LoadError(
        f"{where} asks for {shown(name)}, which Transformers {transformers.__version__} has not",
        hint=(
            "its code is in the folder: read it, and if you trust it, pass trust_remote_code=True"
        )
        if remote is not None
        else "update Transformers",
    )


def _remote(fields: Mapping[str, object], name: str) -> str | None:
    """Where the folder has the code of the class *name*, as its auto_map says it."""
    auto_map = fields.get("auto_map")
    places = auto_map.values() if isinstance(auto_map, dict) else ()
    return next(
        (place for place in places if isinstance(place, str) and place.rpartition(".")[2] == name),
        None,
    )


def _configuration(
    folder: ModelFolder, kind: type[PreTrainedModel], trusted: bool
) -> PreTrainedConfig:
    from transformers import AutoConfig

    own: type[PreTrainedConfig] | None = getattr(kind, "config_class", None)
    load = cast("Callable[..., PreTrainedConfig]", (own or AutoConfig).from_pretrained)
    return load(
        folder.path, local_files_only=True, **({} if own else {"trust_remote_code": trusted})
    )


def _weights(folder: ModelFolder, request: Request, config: PreTrainedConfig) -> Path:
    extra = [
        name for name in getattr(type(config), "extra_files", ()) if (folder.path / name).exists()
    ]
    if extra:
        raise LoadError(
            (
                f"{shown_path(folder.path)} has weights in files of their own, which are not "
                "loaded "
                f"here: {listed(extra)}"
            ),
            hint="load it with Transformers itself",
        )
    named = getattr(config, "transformers_weights", None)
    if not isinstance(named, str):
        return folder.weights(_WEIGHTS, request)
    if ".." in Path(named).parts or Path(named).is_absolute():
        raise LoadError(
            f"{shown_path(folder.path)}: config.json places its weights elsewhere, in "
            f"{shown(named)}",
            hint="move that file into the folder, and name it so under transformers_weights",
        )
    if not (folder.path / named).is_file():
        raise LoadError(
            (
                f"{shown_path(folder.path)} has no weights under the name that config.json gives: "
                f"{shown(named)}"
            ),
            hint="download that file, or take transformers_weights out of config.json",
        )
    return folder.path / named


def _check_shapes(
    folder: Path, mismatched: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]
) -> None:
    wrong = {name: (tuple(there), tuple(here)) for name, there, here in sorted(mismatched)}
    if wrong:
        first, (there, here) = next(iter(wrong.items()))
        more = f", and so with {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Mismatch(
            f"{shown_path(folder)}: config.json describes another model: {shown(first)} would be "
            f"{list(here)}, "
            f"and is {list(there)}{more}",
            wrong_shape=wrong,
            hint="take config.json and weights from the same model",
        )


def _check_plain(folder: Path, model: nn.Module) -> None:
    """See that no weight is an object of a library that is not known: it could neither stream nor
    be moved as it should.
    """
    odd = next(
        (
            each
            for each in weights_of(model)
            if type(each.tensor) not in _PLAIN and not is_packed(each.tensor)
        ),
        None,
    )
    if odd is not None:
        raise LoadError(
            (
                f"{shown_path(folder)}: {shown(odd.names[0])} becomes a "
                f"{type(odd.tensor).__name__}, "
                "which is not a plain tensor"
            ),
            hint="load it with Transformers itself, or store it in a format whose weights are "
            "plain tensors",
        )


def _generation_config(folder: Path) -> GenerationConfig:
    """What Transformers would set in the model if it read the weights itself."""
    from transformers import GenerationConfig

    load = cast("Callable[..., GenerationConfig]", GenerationConfig.from_pretrained)
    if (folder / "generation_config.json").is_file():
        return load(folder, local_files_only=True)
    return load(
        folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
    )
