"""The state dict of a model as tensor entries: lazy tensors by their payloads, the others by their
memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import DType
from shardkit.errors import LoadError
from shardkit.load.devices.device_payload import Remote
from shardkit.load.lazy.lazy_view import dtype_of
from shardkit.load.lazy.paged import Paged, is_address
from shardkit.payloads.payload import Buffer, Payload
from shardkit.payloads.strided import strided
from shardkit.printable import shown

_Held = dict[tuple[str, int], Buffer | Remote]
"""The storages of tensors in memory, by device and address."""


def entries_of(state: Mapping[str, object]) -> list[TensorEntry]:
    """The tensors of *state* as a checkpoint has them, where they are: those that share memory
    share what stands for it.

    Raises:
        LoadError: something in it is no dense tensor, or has no value.
    """
    storages: _Held = {}
    return [_entry(name, value, storages) for name, value in state.items()]


def _entry(name: str, value: object, storages: _Held) -> TensorEntry:
    if not isinstance(value, torch.Tensor):
        raise LoadError(
            f"{shown(name)} is {shown(value)}, not a tensor, so safetensors cannot store it",
            hint="save it separately, as with torch.save",
        )
    dtype = dtype_of(value)
    if dtype is None or value.layout is not torch.strided or value.is_nested:
        raise LoadError(
            (
                f"{shown(name)} is a {value.layout} tensor of {value.dtype}, and only dense ones "
                "can "
                "be written"
            ),
            hint="make it dense first, or save it separately with torch.save",
        )
    if value.is_meta:
        raise LoadError(
            f"{shown(name)} is on the meta device, where it has no value",
            hint="load the model before it is saved",
        )
    shape = (*value.shape[:-1], value.shape[-1] * dtype.packed) if value.ndim else ()
    payload = (
        value.payload
        if isinstance(value, Paged) and is_address(value)
        else _held(value.detach(), dtype, storages)
    )
    return TensorEntry((name,), dtype, shape, payload)


def _held(tensor: torch.Tensor, dtype: DType, storages: _Held) -> Payload:
    """The memory of *tensor*; tensors that share a storage share what stands for it, and keeps it,
    in *storages*.
    """
    storage = tensor.untyped_storage()
    origin = str(tensor.device), storage.data_ptr()
    if origin not in storages:
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        storages[origin] = (
            Buffer(whole.numpy().data) if whole.device.type == "cpu" else Remote.of(whole, origin)
        )
    return strided(
        storages[origin],
        dtype=dtype,
        offset=int(tensor.storage_offset()),
        shape=tensor.shape,
        strides=tensor.stride(),
        conj=tensor.is_conj(),
        neg=tensor.is_neg(),
    )
