"""Load a checkpoint into a model: open, match and read, and modify the model only when nothing can
fail any more.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from shardkit.dtypes import parse_dtype
from shardkit.errors import LoadError, Mismatch
from shardkit.load.devices.budgets import Device, device_key
from shardkit.load.devices.device_lookup import device_of, main_device, torch_device
from shardkit.load.lazy.checkpoint import LoadedHeaders
from shardkit.load.lazy.paged import Paged
from shardkit.load.loading.install import install, read, read_extra, share
from shardkit.load.loading.match import Assignment, Match, assign, listed
from shardkit.load.modules.weights import torch_type, weights_of
from shardkit.load.placement.device_map import DeviceMap, check_device_map
from shardkit.printable import shown
from shardkit.sources.open import collector_paused


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: DeviceMap | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Collection[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    *,
    mmap: bool = False,
    verify: bool = False,
) -> Assignment:
    """Load the weights of *checkpoint* into *model*; if that fails, the model is unchanged.

    The arguments are in the order of Accelerate's function of this name. Weights are read into
    memory that the model owns, and do not change when the checkpoint does. Every sentence about the
    match (missing and unexpected names above all) is returned, and is a warning too.

    Args:
        model: empty or not; tied weights stay tied.
        checkpoint: a file of any format, an index or a folder, as `shardkit.open` takes it.
        device_map: a device for each module, by name; None for where the weights are, and for the
            CPU where they are on the meta device. Weights on "disk" are read from the checkpoint
            itself each time they are used.
        offload_folder: ignored with a warning, since nothing is written.
        dtype: what floats are cast to; None for the types that the model has.
        offload_state_dict: ignored with a warning, since no state dict is held in memory.
        offload_buffers: whether buffers of modules on "disk" stay there too.
        keep_in_fp32_modules: names of modules whose floats become float32 where *dtype* is
            narrower.
        offload_8bit_bnb: True is an error: weights are not quantised here.
        strict: raise an error for names that only the model or only the checkpoint has.
        full_state_dict: False is an error: one process reads the complete checkpoint.
        broadcast_from_rank0: True is an error, for the same reason.
        mmap: map tensors from the files, where they are stored as they are in memory. Such weights
            take no memory until they are used, and change when the file is written to.
        verify: read the files once before, completely, and compare them with the checksums that
            were written with them: those of shardkit.manifest.json or of offload.json, or the CRCs
            of a zip file. It is an error if there are none.

    Returns:
        The match: which tensor became which weight, missing and unexpected names, and notes.

    Raises:
        FormatError: the checkpoint cannot be read.
        PlanError: several subtrees of it could be the model.
        Mismatch: it does not match the model.
        LoadError: an argument is not supported, or there is not enough memory for the weights.

    Example:
        >>> from shardkit.load import init_empty_weights, load_checkpoint_in_model
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> assignment = load_checkpoint_in_model(model, "model.safetensors", strict=True)
        >>> model[0].weight.device, model[0].weight[0, 1].item()
        (device(type='cpu'), 0.125)
    """
    _refuse(
        offload_8bit_bnb=offload_8bit_bnb,
        full_state_dict=full_state_dict,
        broadcast_from_rank0=broadcast_from_rank0,
    )
    places = _Places.of(model, device_map, offload_buffers)
    with collector_paused():
        opened = LoadedHeaders.at(checkpoint)
        assignment = match(
            model, opened, dtype=dtype, keep_in_fp32=keep_in_fp32_modules or (), strict=strict
        )
        if verify:
            opened.verify([*(home.entry for home in assignment.homes), *assignment.extra.values()])
        copied = _fill(model, opened, assignment, places, mmap=mmap)
    notes = [
        *opened.notes,
        *assignment.notes,
        *_objects(opened, assignment),
        *_unshared(copied if mmap else ()),
    ]
    notes += without_meaning(offload_folder=offload_folder, offload_state_dict=offload_state_dict)
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    return replace(assignment, notes=tuple(notes))


def match(
    model: nn.Module,
    opened: LoadedHeaders,
    *,
    dtype: str | torch.dtype | None = None,
    keep_in_fp32: Collection[str] = (),
    strict: bool = False,
) -> Assignment:
    """What of the checkpoint that is *opened* goes where in *model*; see `assign`.

    Raises:
        BadDType: *dtype* is not a floating-point type.
        Mismatch: it is not of this model, or one of its weights is no dense tensor.
    """
    others = {name: other for name, other in opened.others.items() if other.is_weight}
    non_dense = (
        [others[name] for weight in weights_of(model) for name in weight.names if name in others]
        if others
        else []
    )
    if non_dense:
        sentences = ", ".join(f"{shown(other.name)} is a {other.kind}" for other in non_dense[:5])
        raise Mismatch(
            (
                f"{opened.where} does not match the model: its weights must be dense tensors, and "
                f"{sentences}"
            ),
            missing=tuple(other.name for other in non_dense),
            hint="load the checkpoint with the library that wrote it, or store its weights as "
            "dense tensors",
        )
    return assign(
        model,
        opened.entries,
        dtype=floating(dtype),
        keep_in_fp32=keep_in_fp32,
        strict=strict,
        where=opened.where,
    )


def floating(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """*dtype* as torch has it: "float16", "torch.bfloat16", "bf16", torch.float32.

    Raises:
        BadDType: it is not a floating-point type.
        LoadError: the torch that is installed has no such type.
    """
    if dtype is None:
        return None
    found = torch_type(parse_dtype(str(dtype)))
    if found is None:
        raise LoadError(
            f"torch {torch.__version__}, which is installed, has no {dtype}",
            hint="update torch, or give another dtype",
        )
    return found


def _refuse(*, offload_8bit_bnb: bool, full_state_dict: bool, broadcast_from_rank0: bool) -> None:
    if offload_8bit_bnb:
        raise LoadError(
            "offload_8bit_bnb: weights are not quantised while they are loaded",
            hint="load a quantised checkpoint",
        )
    if broadcast_from_rank0 or not full_state_dict:
        name = "broadcast_from_rank0=True" if broadcast_from_rank0 else "full_state_dict=False"
        raise LoadError(
            f"{name} is not supported: one process loads the complete checkpoint",
            hint="load it in each process",
        )


def without_meaning(**given: object) -> list[str]:
    """A sentence for each argument that Accelerate has a use for, and that is *given* here."""
    why = "weights are read from the checkpoint itself when they are needed, and nothing is written"
    return [f"{name} is ignored: {why}" for name, value in given.items() if value]


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the weights go.

    Attributes:
        keys: the device map, in its own words; None where there is none.
        devices: the devices of the map, by these words.
        current: where each weight is now, by its first name, if there is no map.
        main: where what is on disk is used.
        buffers_too: whether "disk" holds for buffers.
    """

    keys: Mapping[str, Device] | None
    devices: Mapping[Device, torch.device]
    current: Mapping[str, torch.device]
    main: torch.device
    buffers_too: bool

    @classmethod
    def of(cls, model: nn.Module, device_map: DeviceMap | None, buffers_too: bool) -> _Places:
        if device_map is None:
            cpu = torch.device("cpu")
            current = {
                each.names[0]: cpu if each.tensor.is_meta else each.tensor.device
                for each in weights_of(model)
            }
            return cls(None, {}, current, cpu, buffers_too)
        given: object = device_map
        if not isinstance(given, Mapping):
            raise LoadError(
                f"device_map must be a dict here, found {shown(given)}",
                hint="make one with infer_auto_device_map, or call load_checkpoint_and_dispatch",
            )
        if set(device_map) != {""}:  # which is right for any model
            check_device_map(model, device_map)
        keys = {name: device_key(device) for name, device in device_map.items()}
        main = main_device(keys)
        devices = {key: main if key == "disk" else torch_device(key) for key in keys.values()}
        return cls(keys, devices, {}, main, buffers_too)

    def split(self, homes: Iterable[Match]) -> tuple[list[Match], list[tuple[Match, torch.device]]]:
        """Those of *homes* that go to disk, and the others with their devices."""
        if len(self.devices) == 1 and "disk" not in self.devices:
            return [], [(home, self.main) for home in homes]
        on_disk: list[Match] = []
        resident: list[tuple[Match, torch.device]] = []
        for home in homes:
            device = None if self.keys is None else device_of(home.names[0], self.keys)
            if device == "disk" and (self.buffers_too or not home.is_buffer):
                on_disk.append(home)
            else:
                resident.append(
                    (home, self.current[home.names[0]] if device is None else self.devices[device])
                )
        return on_disk, resident


def _fill(
    model: nn.Module, opened: LoadedHeaders, assignment: Assignment, places: _Places, *, mmap: bool
) -> list[Match]:
    """Give *model* all that is assigned to it, shared with the files where *mmap* asks for it; what
    was read is returned.
    """
    on_disk, resident = places.split(assignment.homes)
    values = share(home for home, device in resident if device.type == "cpu") if mmap else {}
    copied = [each for each in resident if each[0].name not in values] if values else resident
    values |= read(copied)
    values |= {
        home.name: Paged.of(home.stored, places.main, files=opened.files) for home in on_disk
    }
    extra = read_extra(assignment.extra)
    opened.check_unchanged()
    install(model, assignment.homes, values, extra)
    return [home for home, _ in copied]


def _objects(opened: LoadedHeaders, assignment: Assignment) -> Iterator[str]:
    names = [name for name in assignment.missing if name in opened.others]
    if names:
        yield f"{listed(names)}: an object of the pickle in {opened.where}, which is not executed"


def _unshared(copied: Iterable[Match]) -> Iterator[str]:
    names = [home.name for home in copied if home.nbytes]
    if names:
        yield (f"read into memory, because the file stores them in another form: {listed(names)}")
