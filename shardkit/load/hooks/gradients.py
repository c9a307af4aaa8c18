"""Autograd and weights that stream: which path torch takes, and which error is raised where a
gradient is impossible.

1. A weight that streams requires no gradient while gradients are enabled: autograd would keep it in
   memory. The modules of torch that choose a path by the flag read the attribute, and an `Asking`
   weight returns there what it returned in memory.
2. A backward through a block whose weights were evicted from the prefetch buffer raises
   `NotTrained` before torch reaches the first of them.
3. A backward of a model in training mode warns of weights that stream, and would have been trained
   in memory.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from shardkit.errors import NotTrained
from shardkit.load.lazy.paged import is_address
from shardkit.load.lazy.streamed_weight import TRAIN, Streamed
from shardkit.load.modules.torch_internals import make_subclass, use_count, version_of
from shardkit.load.modules.torch_modes import eager, is_watched
from shardkit.printable import shown

if TYPE_CHECKING:
    from torch.autograd.graph import Node

_FREE = 1  # uses of a tensor that nothing but its Python object has
_CALLER = 5  # frames from a hook of a backward to who called it


BY_FLAG = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""The modules of torch that choose a path by the flags of their weights, as Python sees them."""


class Asking(nn.Parameter):
    """A weight in its block's forward that says it requires a gradient, and gets none."""

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]  # nobody sets it while a forward runs
        return True

    @classmethod
    def of(cls, weight: torch.Tensor) -> Asking:
        """*weight*, whose memory and version it shares."""
        made = make_subclass(cls, weight, False)
        assert isinstance(made, Asking)
        return made


def refuse_late(output: object, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """See that no backward through a block uses weights that are not there any more.

    Args:
        output: that of the block's forward.
        weights: the block's, by their names, as the forward used them.
    """
    nodes = list(_nodes(output))
    if nodes and not is_watched():  # by a transform, which got copies
        kept = [
            (name, weight, version_of(weight))
            for name, weight in weights
            if use_count(weight) > _FREE
        ]
        for node in nodes if kept else ():
            node.register_prehook(partial(_check, kept))


class Training:
    """The hook of a model that tells of weights that are not trained."""

    def __init__(self) -> None:
        self._warned = False

    def attach(self, model: nn.Module) -> None:
        """Watch the forwards of *model*."""
        model.register_forward_hook(self.watch)

    @eager
    def watch(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Have a backward that begins at *output* look for them."""
        if module.training and torch.is_grad_enabled() and not self._warned and not is_watched():
            for node in _nodes(output):
                node.register_prehook(partial(self._warn, weakref.ref(module)))

    def _warn(self, module: weakref.ref[nn.Module], gradients: object) -> None:
        model = module()
        if model is None or self._warned:
            return
        streamed = [
            each
            for each in model.parameters()
            if isinstance(each, Streamed) and each.learned and is_address(each)
        ]
        if streamed:
            self._warned = True
            more = f" and {len(streamed) - 1} more weights" if len(streamed) > 1 else ""
            warnings.warn(
                f"{shown(streamed[0].backing.name)}{more} stream and are not trained: {TRAIN}; "
                "requires_grad_(False) on those that stream ends this warning",
                UserWarning,
                stacklevel=_CALLER,
            )


def _check(kept: list[tuple[str, torch.Tensor, int]], gradients: object) -> None:
    gone = [name for name, weight, version in kept if version_of(weight) != version]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        raise NotTrained(
            (
                f"backward needs {shown(gone[0])}{more}: they stream, and other weights took their "
                "place in memory since the forward"
            ),
            hint="use gradient checkpointing, which runs each block again, or keep these layers "
            "in memory (set their device in the device_map); "
            "without a backward, run the forward under torch.no_grad()",
        )


def _nodes(output: object) -> Iterator[Node]:
    """Where a backward enters what made *output*."""
    match output:
        case torch.Tensor():
            if output.grad_fn is not None:
                yield output.grad_fn
        case tuple() | list():
            for part in output:
                yield from _nodes(part)
        case Mapping():
            for part in output.values():
                yield from _nodes(part)
