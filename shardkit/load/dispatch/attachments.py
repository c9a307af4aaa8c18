"""What `arrange` attached to a model: to find it, to take it off, and to give back what it took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType

from torch import nn

from shardkit.load.hooks.device_moves import Mover
from shardkit.load.hooks.forward_timer import Clock
from shardkit.load.hooks.gradients import Training
from shardkit.load.hooks.reloading import unguard
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.file_watch import Sources
from shardkit.load.lazy.paged import is_address
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.model_group import Pipeline, models_of


def attachments(model: nn.Module) -> Iterator[tuple[nn.Module, Mapping[int, object], int, object]]:
    """What `arrange` attached to *model* or what it was copied from: module, table of hooks, key in it, and what is behind."""
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                attached = getattr(hook, "__self__", None)
                if isinstance(attached, Pager | Mover | Sources | Clock | Training):
                    yield module, table, key, attached


def remove_hooks(model: nn.Module) -> None:
    """Take away what was attached to *model*. What it had in memory before it was dispatched is there again.

    Weights that were loaded to stream stay addresses, which are read whenever they are used: right, and slow.

    Raises:
        FormatError: a file cannot be read.
    """
    for pager in detach(model):
        pager.let_go()
        for seat in pager.seats:
            stood = seat.tensor
            if isinstance(stood, Streamed) and stood.origin is not None and is_address(stood):
                value = stood.read().to(stood.origin)
                seat.take(nn.Parameter(value, requires_grad=stood.learned) if isinstance(stood, nn.Parameter) else value)
            elif isinstance(stood, Streamed) and not is_address(stood) and not stood.is_trained:
                seat.take(stood.alias().requires_grad_(stood.learned))


def close(model: nn.Module | Pipeline) -> None:
    """Give back the threads and the memory that streaming took, for *model* and all copies of it, or the models of a pipeline.

    The model still runs where it ran, and reads each weight whenever it is used.
    """
    for pager in (pager for each in models_of(model) for pager in detach(each, Pager | Sources | Clock | Training)):
        pager.let_go()
        pager.stream.close()


def detach(model: nn.Module, kinds: type | UnionType = object) -> list[Pager]:
    """Take the hooks of `arrange` that are of these *kinds* away from *model*, and give the pagers among what was attached."""
    if kinds is object:
        unguard(model)
    pagers: dict[Pager, None] = {}
    for module, table, key, attached in list(attachments(model)):
        if not isinstance(attached, kinds):
            continue
        if isinstance(attached, Pager):
            pagers[attached] = None
        flags = [module._forward_pre_hooks_with_kwargs] if table is module._forward_pre_hooks else []
        flags = flags or [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]
        for each in (table, *flags):
            each.pop(key, None)  # type: ignore[attr-defined]  # a dict, which the annotation does not let be changed
    return list(pagers)
