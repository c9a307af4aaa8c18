"""A block that streams: where its weights are, and what stands in their places meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from shardkit.errors import LoadError
from shardkit.load.blocks import Block
from shardkit.load.kept import kept_recipes, memory_of_page
from shardkit.load.lanes import Lane
from shardkit.load.layouts import Layout
from shardkit.load.paged import Paged
from shardkit.load.pager import Streamed
from shardkit.load.pages import Piece
from shardkit.load.recipe import Recipe, dtype_of
from shardkit.load.weights import Seat
from shardkit.payload import Buffer

Origin = tuple[torch.device | None, bool]


@dataclass(frozen=True, eq=False, slots=True)
class StreamedBlock:
    """A block that streams.

    Attributes:
        module: the block.
        device: what it runs on.
        seats: where its weights belong.
        buffers: of each, whether it is a buffer.
        origins: of each, where it was.
        recipes: of each, where it is.
    """

    module: nn.Module
    device: torch.device
    seats: tuple[Seat, ...]
    buffers: tuple[bool, ...]
    origins: tuple[Origin, ...]
    recipes: tuple[Recipe, ...]

    @classmethod
    def of(cls, block: Block, device: torch.device, addresses: Mapping[str, Recipe]) -> StreamedBlock:
        """*block*, which runs on *device*; its weights have *addresses*, or are what the model holds."""
        recipes = (addresses.get(weight.names[0]) or _recipe(weight.tensor) for weight in block.weights)
        return cls(
            module=block.module,
            device=device,
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

    def kept(self, lane: Lane) -> StreamedBlock:
        """The same in memory that *lane* sends from, if it is not there."""
        payloads = [piece.payload for piece in self.pieces]
        if memory_of_page(payloads, Layout.of(payloads)) is not None:
            return self
        return replace(self, recipes=tuple(kept_recipes([self.recipes], lane)[0]))

    def stand_in(self) -> None:
        """Put the addresses in the places of the weights."""
        for seat, recipe, is_buffer, (origin, learned) in zip(self.seats, self.recipes, self.buffers, self.origins, strict=True):
            seat.take(Streamed.standing_for(recipe, self.device, is_buffer=is_buffer, origin=origin, learned=learned))


def _origin(tensor: torch.Tensor) -> Origin:
    """The device that has *tensor* in memory, or had it before it streamed, and whether it asks for a gradient."""
    if isinstance(tensor, Streamed):
        return tensor.origin, tensor.learned
    return None if tensor.is_meta or isinstance(tensor, Paged) else tensor.device, tensor.requires_grad


def _recipe(tensor: torch.Tensor | None) -> Recipe:
    """How to make *tensor*, which may be in memory."""
    assert tensor is not None
    if isinstance(tensor, Paged):
        return tensor.recipe
    held = tensor.detach().to("cpu").contiguous()
    dtype = dtype_of(held)
    if dtype is None:
        raise LoadError(f"a weight of the type {held.dtype} cannot stream: no format stores it")
    memory = Buffer(held.reshape(-1).view(torch.uint8).numpy().data)  # which keeps the tensor
    return Recipe(memory, dtype, tuple(held.shape), held.stride())
