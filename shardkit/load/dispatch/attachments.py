"""The hooks that `arrange` attached to a model: find and remove them, and release memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from shardkit.errors import LoadError
from shardkit.load.hooks.device_moves import Mover
from shardkit.load.hooks.forward_timer import Clock
from shardkit.load.hooks.gradients import Training
from shardkit.load.hooks.reloading import unguard
from shardkit.load.hooks.streaming_hooks import Pager
from shardkit.load.lazy.file_watch import Sources
from shardkit.load.lazy.paged import is_address
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.model_group import Pipeline, models_of
from shardkit.load.modules.torch_internals import forward_hook_tables


def attachments(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, tuple[dict[int, Any], ...], int, object]]:
    """Yield what `arrange` attached to *model* or to what it was copied from: module, tables of
    hooks, key in them, and the object behind the hook.
    """
    for module in model.modules():
        for tables in forward_hook_tables(module):
            for key, hook in list(tables[0].items()):
                attached = getattr(hook, "__self__", None)
                if isinstance(attached, Pager | Mover | Sources | Clock | Training):
                    yield module, tables, key, attached


def remove_hooks(model: nn.Module) -> None:
    """Remove every hook that was attached to *model*, and restore the weights that it had in
    memory.

    Weights that were loaded to stream become lazy tensors, which are read whenever they are used:
    the results are the same, but slow.

    Args:
        model: a model that was dispatched; any other is left unchanged.

    Raises:
        FormatError: a file cannot be read.
        LoadError: another thread runs a block of the model that streams. The model is unchanged.

    Example:
        >>> from shardkit.load import close, disk_offload, remove_hooks
        >>> from torch import nn
        >>> model = disk_offload(nn.Linear(4, 8), "offload")
        >>> remove_hooks(model)
        >>> type(model.weight).__name__, tuple(model.weight.shape)
        ('Parameter', (8, 4))
    """
    for pager in detach(model):
        for seat in pager.seats:
            stood = seat.tensor
            if isinstance(stood, Streamed) and stood.origin is not None and is_address(stood):
                value = stood.read().to(stood.origin)
                seat.take(
                    nn.Parameter(value, requires_grad=stood.learned)
                    if isinstance(stood, nn.Parameter)
                    else value
                )
            elif isinstance(stood, Streamed) and not is_address(stood) and not stood.is_trained:
                seat.take(stood.alias().requires_grad_(stood.learned))


def close(model: nn.Module | Pipeline) -> None:
    """Stop the threads and release the memory that streaming uses.

    This covers *model* and all copies of it, or the models of a pipeline. The model still runs
    where it ran, and reads each weight whenever it is used. So does a forward that another thread
    runs meanwhile.

    Args:
        model: a model that was dispatched, or a pipeline of Diffusers; any other is left unchanged.

    Example:
        >>> import torch
        >>> from shardkit.load import close, init_empty_weights, load_checkpoint_and_dispatch
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = load_checkpoint_and_dispatch(model, "model.safetensors", {"": "disk"})
        >>> try:
        ...     with torch.inference_mode():
        ...         answer = model(torch.ones(1, 4))
        ... finally:
        ...     close(model)
    """
    models = list(models_of(model))
    pagers = [pager for each in models for pager in pagers_of(each)]
    for pager in pagers:
        pager.retire()
    # First, so that nothing is read into the memory of a forward that another thread is in.
    for stream in dict.fromkeys(pager.stream for pager in pagers):
        stream.close()
    for pager in pagers:
        # On the CPU, memory lasts as long as another thread computes with it. An accelerator must
        # know what that thread has issued, which it says itself when it leaves the block: till then
        # it keeps its hooks, which do nothing afterwards.
        pager.let_go(even_running=not pager.stream.lane.apart)
    for each in models:
        for _, tables, key, attached in list(attachments(each)):
            if isinstance(attached, Sources | Clock | Training) or (
                isinstance(attached, Pager) and not attached.is_run_by_another
            ):
                _remove(tables, key)


def detach(model: nn.Module) -> list[Pager]:
    """Remove the hooks of `arrange` from *model*, and return the pagers among what was attached,
    which have put the lazy weights back.

    Raises:
        LoadError: another thread runs a block of the model that streams; nothing was changed.
    """
    pagers = pagers_of(model)
    for pager in pagers:
        pager.retire()
    if any(pager.is_run_by_another for pager in pagers):
        for pager in pagers:
            pager.is_retired = False
        raise LoadError(
            "another thread runs a block of the model that streams, and needs its hooks",
            hint="remove the hooks, or dispatch the model anew, while no thread runs it; "
            "shardkit.load.close may be called at any time",
        )
    for pager in pagers:
        pager.let_go()
    unguard(model)
    for _, tables, key, _ in list(attachments(model)):
        _remove(tables, key)
    for pager in pagers:
        pager.uncover()
    return pagers


def pagers_of(model: nn.Module) -> list[Pager]:
    """The hooks of the blocks of *model* that stream."""
    found = (attached for *_, attached in attachments(model) if isinstance(attached, Pager))
    return list(dict.fromkeys(found))


def _remove(tables: tuple[dict[int, Any], ...], key: int) -> None:
    # The flags stay: another thread may be about to call the hook, and looks at them then.
    tables[0].pop(key, None)
