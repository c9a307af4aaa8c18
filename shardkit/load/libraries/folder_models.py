"""What is in a folder, made by its library: one model, or a pipeline and the models in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardkit.errors import LoadError
from shardkit.load.libraries import diffusers_model, diffusers_pipeline, transformers_model
from shardkit.load.libraries.model_folder import LazyModel, ModelFolder, Request
from shardkit.printable import shown


def made(
    folder: ModelFolder, request: Request, components: Mapping[str, object]
) -> tuple[Any, dict[str, LazyModel]]:  # Any: the folder says of which class it is
    """What is in *folder*, and the models that it consists of by their names; a model that is all
    of it has none.

    Args:
        folder: where it is.
        request: how it is made.
        components: replacements for the parts of a pipeline.

    Raises:
        FormatError: the weights cannot be read.
        LoadError: the library is not there, or makes nothing of the folder.
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
    model = maker.addressed(folder, request)
    return model.model, {"": model}


def models_alone(
    folder: ModelFolder, request: Request, components: Mapping[str, object]
) -> dict[str, LazyModel]:
    """The models in *folder*, without the pipeline around them and what its library reads."""
    if folder.kind == "pipeline":
        return diffusers_pipeline.models(folder, request, components)
    return made(folder, request, components)[1]
