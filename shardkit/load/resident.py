"""Give weights their values: read them into memory of their devices, and only when all are there, put them into the model.

1. A tensor that is real keeps its identity and gets new memory, so that optimizers, and modules that hold it by other means,
   see the new values. One on the meta device is replaced, by the same new one under each of its names.
2. Class, attributes and `requires_grad` of a parameter stay as they are; one that gets integers asks for no gradient.
3. Reading may fail, and has not touched the model then; putting in does not fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardkit.checkpoint import TensorEntry
from shardkit.load.assign import Home
from shardkit.load.memory import OnBytes, mapped, materialise
from shardkit.load.paged import Paged
from shardkit.load.weights import torch_type

_STAGED = 256 << 20  # bytes in main memory on their way to another device

Placed = tuple[Home, torch.device]


def read(placed: Iterable[Placed], *, on_bytes: OnBytes = lambda _: None) -> dict[str, torch.Tensor]:
    """The values of weights, each in memory of its own on its device, by their first names.

    Args:
        placed: what to read, and where it goes.
        on_bytes: called with the number of bytes after each read.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room for it.
    """
    placed = list(placed)
    values = _in_main_memory([home for home, device in placed if device.type == "cpu"], on_bytes)
    for group in _staged(each for each in placed if each[1].type != "cpu"):
        staged = _in_main_memory([home for home, _ in group], on_bytes)
        values |= {home.name: staged[home.name].to(device) for home, device in group}
    return values


def share(homes: Iterable[Home]) -> dict[str, torch.Tensor]:
    """The values of those of *homes* that can share the page cache with their files, by their first names.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
    """
    wanted = list(homes)
    tensors = mapped((home.payload, home.dtype, home.shape) for home in wanted)
    return {home.name: tensor for home, tensor in zip(wanted, tensors, strict=True) if tensor is not None}


def read_extra(extra: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    """The tensors that are the extra state of modules, as they are stored.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
    """
    known = {name: (entry, torch_type(entry.dtype)) for name, entry in extra.items()}
    items = [(entry.payload, dtype, _shape(entry)) for entry, dtype in known.values() if dtype]
    return dict(zip((name for name, (_, dtype) in known.items() if dtype), materialise(items), strict=True))


def install(
    model: nn.Module, homes: Iterable[Home], values: Mapping[str, torch.Tensor], extra: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Put *values* into *model*.

    Args:
        model: what they belong to.
        homes: the weights that get a value; those without one are passed over.
        values: what they get, by their first names; `Paged` for what is read when it is used.
        extra: what modules take by `set_extra_state`, by their keys.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, state in (extra or {}).items():
        modules[name.rpartition(".")[0]].set_extra_state(state)
    for home in homes:
        if home.name in values:
            _put(modules, home.names, values[home.name])


def _in_main_memory(homes: Sequence[Home], on_bytes: OnBytes) -> dict[str, torch.Tensor]:
    tensors = materialise(((home.payload, home.dtype, home.shape) for home in homes), on_bytes=on_bytes)
    return {home.name: tensor for home, tensor in zip(homes, tensors, strict=True)}


def _staged(placed: Iterable[Placed]) -> Iterator[list[Placed]]:
    """*placed* in groups that take no more main memory than there is for them, or are one weight."""
    group: list[Placed] = []
    room = _STAGED
    for home, device in placed:
        if group and home.nbytes > room:
            yield group
            group, room = [], _STAGED
        group.append((home, device))
        room -= home.nbytes
    if group:
        yield group


def _shape(entry: TensorEntry) -> tuple[int, ...]:
    return (*entry.shape[:-1], entry.shape[-1] // entry.dtype.packed) if entry.shape else ()


def _put(modules: Mapping[str, nn.Module], names: Sequence[str], value: torch.Tensor) -> None:
    places = [(modules[prefix], attribute) for prefix, _, attribute in (name.rpartition(".") for name in names)]
    old = getattr(*places[0])
    new = _renewed(old, value)
    if new is not old:
        for module, attribute in places:
            setattr(module, attribute, new)  # and not into its dict of parameters: LSTM, for one, keeps a list of its own


def _renewed(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """*old* with the memory of *value*, or else its successor."""
    paged = isinstance(value, Paged)
    trains = old.requires_grad and not paged and (value.is_floating_point() or value.is_complex())
    plain = is_lazy(old) or isinstance(old, Paged)  # stands for a parameter that had no memory, and is no class to keep
    # Asked as Module._apply asks it before it does the same.
    if not (old.is_meta or plain or paged) and torch._has_compatible_shallow_copy_type(old, value):
        old.requires_grad_(trains)
        old.data = value
        return old
    if not isinstance(old, nn.Parameter):
        return value
    if plain or paged:
        return nn.Parameter(value, requires_grad=trains)
    made: torch.Tensor = torch.Tensor._make_subclass(type(old), value, trains)
    made.__dict__.update(old.__dict__)
    return made
