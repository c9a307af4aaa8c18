"""Install values in a model: read them into memory of their devices, and modify the model only when
all are there.

1. A tensor with memory keeps its identity and gets new memory, so that optimizers, and modules that
   refer to it by other means, see the new values. One on the meta device is replaced, by the same
   new one under each of its names.
2. Class, attributes and `requires_grad` of a parameter are kept; one that gets integers requires no
   gradient.
3. Reading may fail, and has not modified the model then; installing does not fail.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardkit.checkpoint.entries import TensorEntry
from shardkit.load.lazy.paged import Paged
from shardkit.load.loading.match import Match
from shardkit.load.memory.allocate import Item, mapped, materialise
from shardkit.load.modules.torch_internals import can_take_data, make_subclass
from shardkit.load.modules.weights import ParameterSlot, torch_type
from shardkit.sizes import format_size
from shardkit.system.progress import progress

_LOG = logging.getLogger("shardkit.load")
_STAGED = 256 << 20  # bytes in main memory on their way to another device

Placed = tuple[Match, torch.device]


def read(placed: Iterable[Placed]) -> dict[str, torch.Tensor]:
    """The values of weights, each in memory of its own on its device, by their first names.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room for it.
    """
    placed = list(placed)
    tensors = place([((home.payload, home.dtype, home.shape), device) for home, device in placed])
    return {home.names[0]: tensor for (home, _), tensor in zip(placed, tensors, strict=True)}


def place(items: Sequence[tuple[Item, torch.device]]) -> list[torch.Tensor]:
    """Tensors in memory of their devices, as `materialise` makes them; a bar on the terminal shows
    how far they are.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
        LoadError: there is no room for it.
    """
    placed: dict[int, torch.Tensor] = {}
    total = sum(payload.nbytes for (payload, _, _), _ in items)
    _LOG.info("%d weights to place in memory, %s", len(items), format_size(total))
    with progress("placing weights", total) as bar:
        if all(device.type == "cpu" for device in {device for _, device in items}):
            return materialise((item for item, _ in items), on_bytes=bar.add)
        for group in _staged(items):
            tensors = materialise((items[number][0] for number in group), on_bytes=bar.add)
            if items[group[0]][1].type != "cpu":
                tensors = [
                    tensor.to(items[number][1])
                    for number, tensor in zip(group, tensors, strict=True)
                ]
            placed |= zip(group, tensors, strict=True)
    return [placed[number] for number in range(len(items))]


def share(homes: Iterable[Match]) -> dict[str, torch.Tensor]:
    """The values of those of *homes* that can share the page cache with their files, by their first
    names.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
    """
    wanted = list(homes)
    tensors = mapped((home.payload, home.dtype, home.shape) for home in wanted)
    return {
        home.name: tensor
        for home, tensor in zip(wanted, tensors, strict=True)
        if tensor is not None
    }


def read_extra(extra: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    """The tensors that are the extra state of modules, as they are stored.

    Raises:
        FormatError: a file cannot be read, or has become shorter.
    """
    known = {name: (entry, torch_type(entry.dtype)) for name, entry in extra.items()}
    items = [(entry.payload, dtype, _shape(entry)) for entry, dtype in known.values() if dtype]
    return dict(
        zip((name for name, (_, dtype) in known.items() if dtype), materialise(items), strict=True)
    )


def install(
    model: nn.Module,
    homes: Iterable[Match],
    values: Mapping[str, torch.Tensor],
    extra: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Put *values* into *model*.

    Args:
        model: what they belong to.
        homes: the weights that get a value; those without one are passed over.
        values: what they get, by their first names; `Paged` for what is read when it is used.
        extra: what modules take by `set_extra_state`, by their keys.
    """
    for name, state in (extra or {}).items():
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(state)
    for home in homes:
        value = values.get(home.names[0])
        if value is not None:
            renew(home.seats, value)


def _staged(items: Sequence[tuple[Item, torch.device]]) -> Iterator[list[int]]:
    """The numbers of *items* in groups: what stays in main memory, then what goes on, as much as
    there is room for at a time.
    """
    main = {device for device in {device for _, device in items} if device.type == "cpu"}
    if resident := [number for number, (_, device) in enumerate(items) if device in main]:
        yield resident
    group: list[int] = []
    room = _STAGED
    for number, ((payload, _, _), device) in enumerate(items):
        if device in main:
            continue
        nbytes = payload.nbytes
        if group and nbytes > room:
            yield group
            group, room = [], _STAGED
        group.append(number)
        room -= nbytes
    if group:
        yield group


def _shape(entry: TensorEntry) -> tuple[int, ...]:
    return (*entry.shape[:-1], entry.shape[-1] // entry.dtype.packed) if entry.shape else ()


def renew(seats: Sequence[ParameterSlot], value: torch.Tensor) -> None:
    """Let what is in all of *seats* have *value* for its memory, and be the same object as far as
    torch can do that.
    """
    old = seats[0].tensor
    assert old is not None
    new = _renewed(old, value)
    if new is not old:
        for seat in seats:
            seat.take(new)


def _renewed(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """*old* with the memory of *value*, or else its successor."""
    usual = (
        type(old) is nn.Parameter and type(value) is torch.Tensor
    )  # classes of torch are slow to ask for more
    paged = not usual and isinstance(value, Paged)
    trains = old.requires_grad and not paged and (value.is_floating_point() or value.is_complex())
    # Stands for a parameter that had no memory, and is no class to keep.
    plain = not usual and (is_lazy(old) or isinstance(old, Paged))
    # Asked as Module._apply asks it before it does the same.
    if not (old.is_meta or plain or paged) and can_take_data(old, value):
        old.requires_grad_(trains)
        old.data = value
        return old
    if not isinstance(old, nn.Parameter):
        return value
    if (
        plain or type(value) is not torch.Tensor
    ):  # Paged, or the tensors of an accelerator that is made in Python
        return nn.Parameter(value, requires_grad=trains)
    made: torch.Tensor = make_subclass(type(old), value, trains)
    if old.__dict__:
        made.__dict__.update(old.__dict__)
    return made
