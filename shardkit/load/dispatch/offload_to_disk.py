"""Lazy tensors for weights: read from a checkpoint, or from the folder that a model in memory is
written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardkit.checkpoint.edits import Edited
from shardkit.checkpoint.entries import TensorEntry
from shardkit.errors import LoadError, Mismatch
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.dispatch.attach import DispatchConfig, put
from shardkit.load.dispatch.model_entries import entries_of
from shardkit.load.lazy.checkpoint import LoadedHeaders
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.lazy.paged import Paged, is_address
from shardkit.load.loading import install
from shardkit.load.loading.match import assign, listed
from shardkit.load.modules.weights import Weight, weights_of
from shardkit.operations.write_output import How, write_output
from shardkit.planning.output import Output
from shardkit.planning.plan import plan_folder
from shardkit.printable import shown, shown_path
from shardkit.sources import registry

_MAX_SHARD = 5_000_000_000
_HINT = "choose another folder, or remove that one if it was made for another model"


def fill_empty(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    folder: Path | None,
    index: Mapping[str, Mapping[str, Any]],  # Any: as Accelerate has it
) -> None:
    """Give the weights of *model* that are on the meta device their values, or the addresses of
    these.

    Args:
        model: what to fill.
        state_dict: looked at first.
        folder: a checkpoint with the others.
        index: where the others are, for each name: ``{"safetensors_file": path, "weight_name": name
            there}``, or, if it is in *folder*, as a .dat file of Accelerate is, ``{"dtype": type,
            "shape": shape}``.

    Raises:
        FormatError: a file cannot be read.
        LoadError: what is found does not fit.
    """
    wanted = _without_values(model)
    for weight in wanted:
        found = next((state_dict[name] for name in weight.names if name in state_dict), None)
        if found is not None:
            _check_shape(weight, found)
            put(weight, found.detach().to(weight.tensor.dtype))
    if wanted and (folder is not None or index):
        opened = LoadedHeaders.at(folder) if folder and not index else None
        entries, files = (opened.entries, opened.files) if opened else (_indexed(index, folder), ())
        homes = assign(
            model, entries, where=shown_path(folder) if folder else "offload_index"
        ).homes
        names = {
            weight.names[0]
            for weight in wanted
            if not any(name in state_dict for name in weight.names)
        }
        lazy = {
            home.name: Paged.of(home.stored, files=files) for home in homes if home.name in names
        }
        install.install(model, homes, lazy)


def spill(model: nn.Module, wish: DispatchConfig, folder: Path | None) -> dict[str, Recipe]:
    """Write the weights of *model* that are in memory and shall stream from disk to *folder*, and
    say where they are there.

    Raises:
        FormatError: the folder holds something that cannot be read.
        LoadError: it holds other weights; or there is no folder, and one is needed; or a weight is
            no dense tensor.
        OutputError: it cannot be written.
    """
    inside = [weight for block in wish.cut(model).blocks for weight in block.weights]
    weights = [
        weight
        for weight in inside
        if device_of(weight.names[0], wish.device_map) == "disk" and _is_in_memory(weight)
    ]
    if not weights:
        return {}
    names = [weight.names[0] for weight in weights]
    if folder is None:
        raise LoadError(
            (
                f"{listed(names)}: in memory and mapped to the disk, but no offload_dir is given "
                f"to write them to"
            ),
            hint="pass a folder as offload_dir, or the files that hold them as state_dict or "
            "offload_index",
        )
    entries = tuple(entries_of({weight.names[0]: weight.tensor for weight in weights}))
    if folder.is_dir() and any(folder.iterdir()):
        _check_holds(folder, entries)
    else:
        _write(type(model).__name__, folder, entries)
    opened = LoadedHeaders.at(folder)
    return {name: Recipe.of(opened.entries[name], opened.files) for name in names}


def _without_values(model: nn.Module) -> list[Weight]:
    """The weights on the meta device, and the buffers beside them: these are real in an empty
    model, and not yet loaded.
    """
    weights = list(weights_of(model))
    is_empty = any(weight.tensor.is_meta for weight in weights)
    return [
        weight for weight in weights if weight.tensor.is_meta or (is_empty and weight.is_buffer)
    ]


def _is_in_memory(weight: Weight) -> bool:
    return not is_address(weight.tensor) and not weight.tensor.is_meta


def _check_shape(weight: Weight, found: torch.Tensor) -> None:
    if found.shape != weight.tensor.shape:
        shapes = (tuple(found.shape), tuple(weight.tensor.shape))
        raise Mismatch(
            (
                f"the state dict does not match the model: {shown(weight.names[0])} is "
                f"{list(shapes[0])} there, {list(shapes[1])} here"
            ),
            wrong_shape={weight.names[0]: shapes},
            hint="pass the state dict of a model with this configuration",
        )


def _indexed(index: Mapping[str, Mapping[str, Any]], folder: Path | None) -> dict[str, TensorEntry]:
    opened: dict[Path, LoadedHeaders] = {}
    entries: dict[str, TensorEntry] = {}
    for name, place in index.items():
        file, there = place.get("safetensors_file", folder), str(place.get("weight_name", name))
        if file is None:
            raise LoadError(
                (
                    f"offload_index has no safetensors_file for {shown(name)}, and there is no "
                    "offload_dir with its .dat file"
                ),
                hint="give the folder as offload_dir, or the checkpoint that it was made from",
            )
        if Path(file) not in opened:
            opened[Path(file)] = LoadedHeaders.at(file)
        if there not in opened[Path(file)].entries:
            raise LoadError(
                f"{shown_path(Path(file))} has no {shown(there)}, which offload_index lists",
                hint="give the offload_index that was made with this file",
            )
        entries[name] = opened[Path(file)].entries[there]
        _check_line(name, place, entries[name], Path(file))
    return entries


def _check_line(name: str, place: Mapping[str, Any], entry: TensorEntry, file: Path) -> None:
    """See that *entry* is what its line of the index says, where that says more than a place."""
    shape = place.get("shape", entry.shape)
    if "safetensors_file" not in place and (tuple(shape), place.get("dtype")) != (
        entry.shape,
        entry.dtype.torch,
    ):
        found, said = (
            f"{entry.dtype.torch} {list(entry.shape)}",
            f"{place.get('dtype')} {list(shape)}",
        )
        raise LoadError(
            f"{shown_path(file)} holds {shown(name)} as {found}, but offload_index says {said}",
            hint=_HINT,
        )


def _check_holds(folder: Path, entries: Sequence[TensorEntry]) -> None:
    """See that what *folder* holds are *entries*, byte for byte: then it was made for this model,
    in an earlier run.
    """
    stored = LoadedHeaders.at(folder).entries
    for entry in entries:
        earlier = stored.get(entry.name)
        if (
            earlier is None
            or (earlier.dtype, earlier.shape) != (entry.dtype, entry.shape)
            or earlier.read() != entry.read()
        ):
            raise LoadError(
                f"{shown_path(folder)} holds weights of another model: "
                f"not this {shown(entry.name)}",
                hint=_HINT,
            )


def _write(name: str, folder: Path, entries: tuple[TensorEntry, ...]) -> None:
    """Write *entries*, the weights of the model called *name*, to *folder*."""
    layout = registry.format_named("safetensors")
    plan = plan_folder(
        Edited(entries, {}, ()), layout, max_shard=_MAX_SHARD, metadata={"format": "pt"}
    )
    write_output(Output(name, folder, plan), How(sync=False))
