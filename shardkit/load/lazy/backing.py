"""Memory for lazy tensors that are written: a weight and its views share one `Backing`, and use its
memory once it has some.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from shardkit.errors import LoadError, OverBudget
from shardkit.load.devices.budgets import device_key, free_memory
from shardkit.load.devices.device_payload import Remote
from shardkit.load.lazy.lazy_view import Recipe, dtype_of
from shardkit.load.memory.allocate import aligned, memory_of
from shardkit.load.memory.parallel_reads import read_into
from shardkit.load.modules.torch_modes import unseen
from shardkit.payloads.payload import Buffer
from shardkit.printable import shown
from shardkit.sizes import format_size


@dataclass(eq=False, slots=True)
class Backing:
    """What a lazy tensor and its views look at.

    Attributes:
        recipe: the recipe of the whole tensor.
        device: the device that gets the memory.
        name: the name of the weight in its model, for messages.
        memory: the bytes from the first element to the last; None as long as nobody wrote.
    """

    recipe: Recipe
    device: torch.device
    name: str = ""
    memory: torch.Tensor | None = None

    @classmethod
    @unseen
    def of(cls, tensor: torch.Tensor) -> Backing:
        """The memory of *tensor*, which is shared and not copied.

        Raises:
            LoadError: its elements have a type that no format stores.
        """
        plain = tensor.detach().resolve_conj().resolve_neg()
        dtype = dtype_of(plain)
        if dtype is None:
            raise LoadError(
                f"a Paged cannot hold {plain.dtype}, which no format stores",
                hint="keep this tensor in memory",
            )
        nbytes = _reach(plain.shape, plain.stride()) * plain.element_size()
        with torch.inference_mode(False):
            bytes_ = torch.empty(0, dtype=torch.uint8, device=plain.device)
            memory = bytes_.set_(
                plain.untyped_storage(),
                int(plain.storage_offset()) * plain.element_size(),
                (nbytes,),
                (1,),
            )
        is_host = memory.device.type == "cpu"
        content = (
            Buffer(memory_of(memory))
            if is_host
            else Remote.of(memory, (str(memory.device), memory.data_ptr()))
        )
        return cls(
            Recipe(content, dtype, tuple(plain.shape), plain.stride()), plain.device, memory=memory
        )

    @unseen
    def settle(self) -> None:
        """Read the tensor into memory of its own, unless it has memory.

        Raises:
            FormatError: the file cannot be read.
            OverBudget: the device has too little free memory.
        """
        if self.memory is not None:
            return
        itemsize = self.recipe.dtype.itemsize
        nbytes = _reach(self.recipe.shape, self.recipe.strides) * itemsize
        check_room(self.name, nbytes, self.device)
        with torch.inference_mode(False):  # what is read in inference mode outlives it
            memory = aligned(nbytes)
            read_into(
                self.recipe.storage.narrow(self.recipe.offset * itemsize, nbytes), memory_of(memory)
            )
            self.memory = memory.to(self.device)

    @unseen
    def tensor(self, recipe: Recipe) -> torch.Tensor:
        """The part of the memory that *recipe* looks at: an ordinary tensor that shares it."""
        assert self.memory is not None
        shift = (
            recipe.offset * recipe.dtype.itemsize - self.recipe.offset * self.recipe.dtype.itemsize
        )
        offset = (int(self.memory.storage_offset()) + shift) // recipe.dtype.itemsize
        with torch.inference_mode(False):
            empty = torch.empty(0, dtype=recipe.torch_dtype, device=self.memory.device)
            return empty.set_(self.memory.untyped_storage(), offset, recipe.shape, recipe.strides)


def check_room(name: str, nbytes: int, device: torch.device) -> None:
    """See that *device* has *nbytes* for the weight *name*, which is written.

    Raises:
        OverBudget: it has not.
    """
    free = free_memory(device_key(device))
    if free is not None and nbytes > free:
        raise OverBudget(
            f"{shown(name)} streams, and needs {format_size(nbytes)} of memory to be written: "
            f"{str(device)!r} has {format_size(free)} free",
            needed=nbytes,
            available=free,
            hint="free memory, or do this where all weights that are written fit into memory",
        )


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The number of elements from the first to the last, with those in gaps."""
    return (
        1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if prod(shape)
        else 0
    )
