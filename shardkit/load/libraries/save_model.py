"""Save a model, whether its weights are in memory or lazy: streamed, sharded, and complete or not
at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from shardkit.checkpoint.edits import Edited, fold_ties
from shardkit.checkpoint.entries import SourceFile, TensorEntry
from shardkit.errors import LoadError, OutputError
from shardkit.load.dispatch.model_entries import entries_of
from shardkit.load.lazy.paged import Paged
from shardkit.load.libraries import diffusers_model, transformers_model
from shardkit.load.libraries.model_folder import Saved
from shardkit.load.loading.match import listed
from shardkit.metadata.shard_names import STEM
from shardkit.operations.convert import Report
from shardkit.operations.write_output import How, write_output
from shardkit.payloads.payload import Literal
from shardkit.planning.output import Output
from shardkit.planning.output_path import followed
from shardkit.planning.plan import OutputFile, plan_folder
from shardkit.printable import shown, shown_path
from shardkit.sizes import parse_size
from shardkit.sources import path_arguments, registry


def save(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    max_shard: str | int | None = "5GB",
    overwrite: bool = False,
) -> Report:
    """Write *model* to *folder*, as safetensors shards and an index.

    A model of Transformers or Diffusers is written with its configuration and under the weight
    names of its checkpoints, so that `from_pretrained` loads it. Of other models the state dict is
    written.

    Lazy weights are copied from their files to the output in chunks, and those on an accelerator by
    way of main memory, a few MB at a time. A weight under several names is written once, and its
    other names are recorded.

    Args:
        model: on any device, dispatched or not.
        folder: what will appear, complete or not at all.
        max_shard: limit for each file in bytes, header included, as ``"2GB"`` or a number; None for
            one shard.
        overwrite: replace an earlier output of shardkit.

    Returns:
        What was done.

    Raises:
        LoadError: *model* is not a module, or has adapters of PEFT; an item of its state dict is
            not a dense tensor, or has no value.
        FormatError: a file that weights are read from has changed since it was opened.
        PlanError: safetensors has no such type.
        OutputError: *folder* cannot be written or replaced.

    Example:
        >>> import shardkit
        >>> from shardkit.load import save
        >>> from torch import nn
        >>> report = save(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), "saved")
        >>> report.tensors, report.nbytes
        (4, 304)
        >>> list(shardkit.open("saved"))
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    _check_whole(model)
    known = transformers_model.saved(model) or diffusers_model.saved(model)
    state = known.state if known else model.state_dict()
    entries = tuple(entries_of(state))
    # A tie that the library would not make again is no tie there: without a weight of its own the
    # name would be missing.
    untied = state.keys() - known.tied if known else ()
    kept, aliases = fold_ties(sorted(entries, key=_comes_last(known)), {"format", *untied})
    edited = Edited(kept, aliases, ())
    limit = None if max_shard is None else parse_size(max_shard)
    companions = [
        OutputFile(name, (Literal(content),))
        for name, content in (known.files if known else {}).items()
    ]
    layout = registry.format_named("safetensors")
    stem = known.stem if known else STEM
    plan = plan_folder(
        edited, layout, max_shard=limit, metadata={"format": "pt"}, companions=companions, stem=stem
    )
    out = followed(path_arguments.to_write(folder))
    if not out.is_dir() and registry.writer_for(out.suffix):
        raise OutputError(
            f"{shown_path(out)} is named like a file, but a folder is written",
            hint="name a folder, without a suffix",
        )
    name = type(model).__name__
    output = Output(name, out, plan, tuple(_files(state, entries)))
    return Report.of(output, write_output(output, How(overwrite=overwrite)), source=Path(name))


def _check_whole(model: object) -> None:
    """See that *model* is one module, and has the names that its library loads.

    Raises:
        LoadError: it is a pipeline or no model at all, or has adapters, which give its weights
            other names.
    """
    if not isinstance(model, nn.Module):
        what, hint = "not a torch.nn.Module", "give the model itself: save(model, folder)"
        if hasattr(model, "components") and hasattr(model, "save_pretrained"):
            what, hint = (
                "a pipeline of several",
                "write all of it with pipeline.save_pretrained(folder)",
            )
        raise LoadError(
            f"save writes one model, and {shown(type(model).__name__)} is {what}", hint=hint
        )
    if adapters := _adapters(model):
        raise LoadError(
            (
                f"the model has adapters of PEFT ({listed(adapters)}), which give its weights "
                "names "
                "that no library loads"
            ),
            hint="merge them first: save(model.merge_and_unload(), folder), with the model that "
            "get_peft_model returned; "
            "or save the adapters alone: model.save_pretrained(folder)",
        )


def _adapters(model: nn.Module) -> list[str]:
    """The names of the adapters of PEFT in *model*."""
    tuners = sys.modules.get(
        "peft.tuners.tuners_utils"
    )  # as long as nobody imported it, there are none
    if tuners is None:
        return []
    layers: list[Any] = [
        each for each in model.modules() if isinstance(each, tuners.BaseTunerLayer)
    ]  # Any: as PEFT declares it
    return sorted(
        {
            name
            for each in layers
            for part in each.adapter_layer_names
            for name in getattr(each, part, ())
        }
    )


def _comes_last(known: Saved | None) -> Callable[[TensorEntry], bool]:
    """Which entries stand behind all others, so that of what is tied the name is kept that the
    library looks for.
    """
    return (lambda entry: entry.name in known.tied) if known else (lambda entry: False)


def _files(state: Mapping[str, object], entries: Iterable[TensorEntry]) -> Iterator[SourceFile]:
    """The files that *entries* are read from, as they were when they were opened."""
    opened = {
        file for value in state.values() if isinstance(value, Paged) for file in value.recipe.files
    }
    known = {file.path: file for file in opened}
    for path in dict.fromkeys(each.path for entry in entries for each in entry.payload.sources):
        yield known.get(path) or SourceFile.of(path)
