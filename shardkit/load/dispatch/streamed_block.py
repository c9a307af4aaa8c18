"""A block that streams: where its weights are stored, what replaces them meanwhile, and its
prefetch buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from shardkit.errors import LoadError
from shardkit.load.devices.budgets import device_key, free_memory
from shardkit.load.devices.transfers import DeviceTransfer
from shardkit.load.lazy.lazy_view import Recipe, dtype_of
from shardkit.load.lazy.paged import Paged, is_address
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.blocks import ModuleBlock
from shardkit.load.modules.weights import ParameterSlot, weights_of
from shardkit.load.performance.bandwidth import rates_for
from shardkit.load.performance.cost_model import (
    LITTLE,
    SMALL,
    USUAL,
    Depth,
    Ring,
    Step,
    depth_for,
    step_of,
)
from shardkit.load.streaming.page_layout import Layout
from shardkit.load.streaming.pages import Piece
from shardkit.load.streaming.pinned_blocks import kept_recipes, memory_of_page
from shardkit.payloads.payload import Buffer

_CPU = torch.device("cpu")
_SHARE = (
    2  # one part in so many of what is free may become the ring: what is computed needs room too
)

Origin = tuple[torch.device | None, bool]


@dataclass(frozen=True, eq=False, slots=True)
class StreamedBlock:
    """A block that streams.

    Attributes:
        module: the block.
        device: what it runs on.
        names: the first name of each of its weights.
        seats: where its weights belong.
        buffers: of each, whether it is a buffer.
        origins: of each, where it was.
        recipes: of each, where it is.
    """

    module: nn.Module
    device: torch.device
    names: tuple[str, ...]
    seats: tuple[ParameterSlot, ...]
    buffers: tuple[bool, ...]
    origins: tuple[Origin, ...]
    recipes: tuple[Recipe, ...]

    @classmethod
    def of(
        cls, block: ModuleBlock, device: torch.device, addresses: Mapping[str, Recipe]
    ) -> StreamedBlock:
        """*block*, which runs on *device*; its weights have *addresses*, or are what the model
        holds.
        """
        recipes = (
            addresses.get(weight.names[0]) or _recipe(weight.tensor) for weight in block.weights
        )
        return cls(
            module=block.module,
            device=device,
            names=tuple(weight.names[0] for weight in block.weights),
            seats=tuple(block.seats),
            buffers=tuple(weight.is_buffer for weight in block.weights),
            origins=tuple(_origin(weight.tensor) for weight in block.weights),
            recipes=tuple(recipes),
        )

    @property
    def pieces(self) -> list[Piece]:
        """What is read, or sent, for it."""
        laid_out = [(recipe, *recipe.in_memory) for recipe in self.recipes]
        return [
            Piece(payload, recipe.torch_dtype, recipe.shape, strides, is_buffer)
            for (recipe, payload, strides), is_buffer in zip(laid_out, self.buffers, strict=True)
        ]

    @property
    def step(self) -> Step:
        """What it asks of a forward."""
        payloads, compute = (
            [piece.payload for piece in self.pieces],
            sum(map(_multiplied, self.recipes)),
        )
        return step_of(payloads, compute=compute, linked=self.device.type != "cpu")

    def kept(self, lane: DeviceTransfer) -> StreamedBlock:
        """The same in memory that *lane* sends from, if it is not there."""
        payloads = [piece.payload for piece in self.pieces]
        there = memory_of_page(payloads, Layout.of(payloads)) is not None
        recipes = self.recipes if there else kept_recipes([self.recipes], lane)[0]
        return replace(
            self,
            recipes=recipes,
            origins=tuple((origin or _CPU, learned) for origin, learned in self.origins),
        )

    def stand_in(self) -> None:
        """Put the addresses in the places of the weights."""
        weights = zip(self.names, self.seats, self.recipes, self.buffers, self.origins, strict=True)
        for name, seat, recipe, is_buffer, (origin, learned) in weights:
            stands = Streamed.standing_for(
                recipe, self.device, is_buffer=is_buffer, name=name, origin=origin, learned=learned
            )
            seat.take(stands)


def _origin(tensor: torch.Tensor) -> Origin:
    """The device that has *tensor* in memory, or had it before it streamed, and whether it asks for
    a gradient.
    """
    if isinstance(tensor, Streamed):
        return tensor.origin if is_address(tensor) else tensor.device, tensor.asks
    return None if tensor.is_meta or isinstance(
        tensor, Paged
    ) else tensor.device, tensor.requires_grad


def ring_for(blocks: Sequence[StreamedBlock], model: nn.Module, ring: Ring) -> Depth | int | str:
    """*ring*, or the number of *blocks* chosen automatically, which all run on one device and are
    in their places in *model*.

    Raises:
        FormatError: a file cannot be read, in which the disk is measured.
    """
    if ring is not None:
        return ring
    if sum(block.step.room for block in blocks) <= LITTLE:
        return Depth(USUAL, SMALL)
    device = blocks[0].device
    pieces = [piece for block in blocks for piece in block.pieces]
    rates = rates_for(((piece.payload, piece.dtype, piece.shape) for piece in pieces), device)
    free = free_memory(device_key(device))
    return depth_for(list(_steps(blocks, model)), rates, (free or 0) // _SHARE)


def _steps(blocks: Sequence[StreamedBlock], model: nn.Module) -> Iterator[Step]:
    """What a forward asks for: what stays and what streams, in the order of *model*."""
    numbers = {
        id(seat.tensor): number for number, block in enumerate(blocks) for seat in block.seats
    }
    met: set[int] = set()
    for weight in weights_of(model):
        number = numbers.get(id(weight.tensor))
        if number is None:
            yield Step(compute=weight.tensor.nbytes if weight.tensor.ndim > 1 else 0)
        elif number not in met:
            met.add(number)
            yield blocks[number].step


def _multiplied(recipe: Recipe) -> int:
    """Bytes that are multiplied, which those of matrices are."""
    return prod(recipe.shape) * recipe.torch_dtype.itemsize if len(recipe.shape) > 1 else 0


def _recipe(tensor: torch.Tensor | None) -> Recipe:
    """How to make *tensor*, which may be in memory."""
    assert tensor is not None
    if isinstance(tensor, Paged) and is_address(tensor):
        return tensor.recipe
    held = tensor.detach().to("cpu").contiguous()
    dtype = dtype_of(held)
    if dtype is None:
        raise LoadError(
            f"a weight of the type {held.dtype} cannot stream: no format stores it",
            hint="keep its module in memory by the device map",
        )
    memory = Buffer(held.reshape(-1).view(torch.uint8).numpy().data)  # which keeps the tensor
    return Recipe(memory, dtype, tuple(held.shape), held.stride())
