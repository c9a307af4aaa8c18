"""Create a pipeline of Diffusers whose models have lazy weights.

1. The models are created one by one, as they are from folders of their own. Diffusers then creates
   the pipeline around them, and its other parts: schedulers, tokenizers, image processors.
2. A model of another library, or one that Diffusers or Transformers loads by a method of its own,
   is read by them, and is in memory.
3. The classes are those of Diffusers and Transformers, and other code only where it is trusted.
4. If no type is requested, each model has the type of its weights, whatever its config.json says:
   the models of a pipeline must be compatible.
5. A replacement for one of its parts is used as it is, and is not moved.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from shardkit.errors import LoadError
from shardkit.load.libraries import diffusers_model, transformers_model
from shardkit.load.libraries.model_folder import (
    LazyModel,
    ModelFolder,
    Request,
    library,
    loads_as_all_do,
    translated_errors,
)
from shardkit.load.modules.sizes import class_names
from shardkit.printable import shown, shown_path

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def addressed(
    folder: ModelFolder, request: Request, given: Mapping[str, object]
) -> tuple[DiffusionPipeline, dict[str, LazyModel]]:
    """The pipeline in *folder*, and the models in it by their names, of which no weight has been
    read but by rule 2.

    Args:
        folder: where it is.
        request: how its models are made.
        given: what is to be in place of parts of it, by their names.

    Raises:
        FormatError: weights cannot be read.
        LoadError: Diffusers is not there, or makes no pipeline of the folder, or code is asked for
            that is not trusted, or there is no such part.
    """
    diffusers = library("diffusers", diffusers_model.LEAST)
    made = models(folder, request, given)
    options: dict[str, Any] = {
        name: each.model for name, each in made.items()
    }  # Any: they have types of their own
    options |= given
    options |= {"variant": request.variant} if request.variant else {}
    options |= {"trust_remote_code": True} if request.trusted else {}
    options |= (
        {} if request.use_safetensors is None else {"use_safetensors": request.use_safetensors}
    )
    with translated_errors(folder, diffusers):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder.path, local_files_only=True, **options
        )
    pipeline.register_to_config(_name_or_path=folder.name)
    others = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module) and name not in made and name not in given
    }
    return pipeline, made | {name: _in_memory(part, request) for name, part in others.items()}


def models(folder: ModelFolder, request: Request, given: Collection[str]) -> dict[str, LazyModel]:
    """The models of the pipeline in *folder* that are made here and not *given*, by their names.

    Raises:
        LoadError: as `addressed` does.
    """
    library("diffusers", diffusers_model.LEAST)
    _refuse_unknown(folder, given)
    if not request.trusted:
        _refuse_code(folder)
    return dict(_models(folder, replace(request, as_stored=True), given))


def _models(
    folder: ModelFolder, request: Request, given: Container[str]
) -> Iterator[tuple[str, LazyModel]]:
    """The models that are made here and not *given*, by their names in the pipeline."""
    import diffusers

    for name, home, class_name in _parts(folder):
        kind = getattr(_known(home), class_name, None)
        if not isinstance(kind, type) or name in given:
            continue
        if loads_as_all_do(kind, diffusers.ModelMixin):
            yield name, _of_variant(diffusers_model, folder.part(name), request, kind)
        elif find_spec("transformers"):
            from transformers import PreTrainedModel

            if loads_as_all_do(kind, PreTrainedModel):
                yield name, _of_variant(transformers_model, folder.part(name), request, kind)


def _of_variant(
    maker: Any, folder: ModelFolder, request: Request, kind: type
) -> LazyModel:  # Any: one of two modules
    """The model in *folder*, with the weights of the variant that is asked for, if it has any."""
    variant = request.variant if maker.has_variant(folder, request.variant) else None
    made: LazyModel = maker.addressed(folder, replace(request, variant=variant), kind)
    return made


def _parts(folder: ModelFolder) -> Iterator[tuple[str, str, str]]:
    """What model_index.json lists: name, where its class comes from, and the class."""
    for name, value in folder.fields.items():
        match value:
            case [str(home), str(class_name)] if name.isidentifier() and not name.startswith("_"):
                yield name, home, class_name


def _known(home: str) -> ModuleType | None:
    """Return the module of Diffusers or Transformers that model_index.json calls *home*."""
    import diffusers

    if home == "diffusers":
        return diffusers
    if home == "transformers":
        return library("transformers", transformers_model.LEAST)
    found = getattr(diffusers.pipelines, home, None)
    return found if isinstance(found, ModuleType) else None


def _refuse_unknown(folder: ModelFolder, given: Iterable[str]) -> None:
    """See that the pipeline in *folder* has a part of each name that is *given*."""
    known = [name for name in folder.fields if not name.startswith("_")]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise LoadError(
            f"the pipeline in {shown_path(folder.path)} has no part called {shown(unknown[0])}",
            hint=f"its parts are {', '.join(map(shown, known))}",
        )


def _refuse_code(folder: ModelFolder) -> None:
    """See that nothing in *folder* asks for code that is neither of Diffusers nor of
    Transformers.
    """
    asking = [
        name
        for name, home, _ in _parts(folder)
        if _known(home) is None or (folder.path / name / f"{home}.py").exists()
    ]
    asking += [] if isinstance(folder.fields.get("_class_name"), str) else ["_class_name"]
    if asking:
        raise LoadError(
            f"{shown_path(folder.path)} needs code that is part of neither Diffusers nor "
            f"Transformers: "
            f"{shown(asking[0])} is {shown(folder.fields.get(asking[0]))}",
            hint="read it, and if you trust it, pass trust_remote_code=True",
        )


def _in_memory(model: nn.Module, request: Request) -> LazyModel:
    """A model that its library has read."""
    if request.dtype is not None:
        model.to(request.dtype)
    return LazyModel(
        model.eval(), {}, class_names(getattr(model, "_no_split_modules", None)), frozenset()
    )
