"""Paged: a lazy tensor. It has shape, type and device as any tensor, and its bytes are read when
they are used.

1. Operations that only move elements or change their float type are recorded, and nothing is read:
   views of every kind, splits, casts, stacks and cats. Questions about shapes are answered from the
   record.
2. Any other operation reads its Paged arguments, and returns the result of torch. Nothing is
   cached: each use reads again.
3. A clone is an ordinary tensor that owns its memory, and so is a deep copy, but for that of a
   module. So is a cast of a weight of a model.
4. A tensor of a checkpoint cannot be written. A weight of a model can: it gets memory of its own,
   which its views share. So can stacks and cats of weights. Copying from a Paged reads its file
   into the target's own memory.
5. It works below autograd, autocast and the decomposition of composite operations
   (`__torch_dispatch__`, and no `__torch_function__`), so that every path to a kernel, including
   those inside C++, passes here first. Where such an operation chooses its kernel by the kind of
   tensor, as LSTM and singular values do, the last bit may differ.
6. But for that memory, and the attributes that torch and others set on it, it is immutable. Any
   number of threads may use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardkit.checkpoint.entries import SourceFile, TensorEntry
from shardkit.dtypes import DType
from shardkit.errors import LoadError, ReadOnly
from shardkit.load.devices.device_lookup import torch_device
from shardkit.load.lazy.backing import Backing
from shardkit.load.lazy.file_watch import refuse_changed
from shardkit.load.lazy.lazy_ops import Address, Arguments, Options, record
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.lazy.storages import STORAGES, Storage
from shardkit.load.lazy.torch_operations import (
    asked_of_to,
    changes_shapes,
    is_composite,
    outliving,
    replaced,
    written,
)
from shardkit.load.memory.allocate import aligned, memory_of
from shardkit.load.memory.parallel_reads import read_into
from shardkit.load.modules.torch_internals import (
    PARAMETER_MARK,
    hide_from_compiler,
    make_wrapper_subclass,
    no_torch_function,
    tensor_data,
    typed_storage,
)
from shardkit.load.modules.torch_modes import is_watched, refuse_trace, unseen
from shardkit.payloads.payload import Payload
from shardkit.printable import shown, shown_path
from shardkit.sizes import format_size

if TYPE_CHECKING:
    from shardkit.load.modules.torch_internals import Operation

# Attributes that a copy does not get from `_attributes`.
OWN = ("recipe", "backing", "seated", "origin", "learned", "copied", "_storage")


class Paged(torch.Tensor):
    """A lazy tensor: it has shape, type and device, and its bytes are read whenever they are used.

    Views, casts, stacks and cats are recorded and read nothing; `tensors` returns values of this
    class.

    Attributes:
        recipe: which bytes it consists of, and how they become elements.
        backing: what it shares with the weight of a model that it is, or is a view of, and the
            memory of what was written; None for a tensor of a checkpoint.

    Example:
        >>> import shardkit
        >>> from shardkit.load import Paged
        >>> weight = Paged.of(shardkit.open("model.safetensors")["0.weight"])
        >>> half = weight.T[:2].half()  # recorded; nothing is read
        >>> half
        Paged(torch.float16, [2, 8], device='cpu', 32 B of model.safetensors, not read)
        >>> half.read()[0, :3]
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float16)
    """

    recipe: Recipe
    backing: Backing | None = None
    _storage: Storage  # as soon as it was asked for

    # Rule 5: without this, torch would call Python once more on the way to every operation.
    __torch_function__ = no_torch_function  # type: ignore[assignment]  # as torch documents it

    @staticmethod
    def __new__(
        cls: type[Paged], recipe: Recipe, device: torch.device, requires_grad: bool = False
    ) -> Paged:
        """Create a tensor that reports *device*, which is where `read` puts it."""
        with torch.inference_mode(
            False
        ):  # so that views taken in inference mode are what torch expects, and can outlive it
            made = make_wrapper_subclass(
                cls,
                recipe.shape,
                recipe.strides,
                recipe.offset,
                dtype=recipe.torch_dtype,
                device=device,
                requires_grad=requires_grad,
            )
        made.recipe = recipe
        return made

    @classmethod
    def of(
        cls,
        entry: TensorEntry,
        device: str | torch.device = "cpu",
        *,
        files: tuple[SourceFile, ...] = (),
    ) -> Paged:
        """Create the lazy tensor that *entry* describes.

        Args:
            entry: its bytes, type and shape.
            device: where `read` puts it.
            files: the files of its checkpoint, as they were when it was opened. Reading from one
                that changed is an error.

        Raises:
            LoadError: torch has no such type, or there is no such device.
        """
        return cls(Recipe.of(entry, files), torch_device(device))

    @property
    def payload(self) -> Payload:
        """Its bytes: C order, little-endian, whatever its strides."""
        return self._current.payload

    @property
    def stored(self) -> DType:
        """The type of the bytes of `payload`, which is that of the tensor."""
        return self.recipe.dtype

    @property
    def held(self) -> torch.Tensor | None:
        """An ordinary tensor that shares its memory; None if it has none."""
        backing = self.backing
        return None if backing is None or backing.memory is None else backing.tensor(self.recipe)

    @unseen
    def read(self) -> torch.Tensor:
        """Read the values into an ordinary tensor on its device, which owns its memory.

        Strides are kept, but for those that leave gaps.

        Raises:
            FormatError: the file cannot be read, or has become shorter.
            LoadError: the file changed since it was opened, or there is not enough memory.
        """
        if (held := self.held) is not None:
            return held.clone()
        payload, strides = self.recipe.in_memory
        with torch.inference_mode(False):  # what was read in inference mode can outlive it too
            memory = aligned(payload.nbytes)
            read_into(payload, memory_of(memory))
            refuse_changed(self.recipe.files, payload)
            return memory.view(self.dtype).as_strided(self.shape, strides, 0).to(self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without the operation
        cls,
        func: Operation,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Options | None = None,
    ) -> object:
        options = kwargs or {}
        refuse_trace()
        targets = _see_to_writing(func, args, options)
        if is_composite(func):
            return func.decompose(*args, **options)
        recorded = record(func, *replaced((args, options), Paged, Paged._address_or_memory))
        if recorded is not NotImplemented:
            return replaced(recorded, Address, _made)
        read = cache(_value)  # an argument that comes twice is read once
        with outliving(func):
            result = func(*replaced(args, Paged, read), **replaced(options, Paged, read))
        return (
            replaced(result, torch.Tensor, lambda each: _itself(each, targets, read))
            if targets
            else result
        )

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # Any: as torch declares it
        _, is_copy = asked_of_to(args, kwargs)
        moved: torch.Tensor = super().to(*args, **kwargs)
        return moved.clone() if is_copy and isinstance(moved, Paged) else moved

    def clone(self, *, memory_format: torch.memory_format | None = None) -> torch.Tensor:
        copy = super().clone(memory_format=memory_format)
        return (
            copy.clone() if isinstance(copy, Paged) else copy
        )  # it was asked to be contiguous, as `contiguous` asks it

    # What torch does without asking its dispatcher.

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        given = value if isinstance(value, Paged) else _holding(value)
        tensor_data.__set__(self, given)
        vars(self).pop("_storage", None)
        self._take(given)

    def _take(self, given: Paged) -> None:
        """Be what *given* is."""
        self.recipe, self.backing = given.recipe, given.backing

    def __repr__(self) -> str:  # type: ignore[override]  # torch hands what it would print to its own alone
        files = list(dict.fromkeys(source.path for source in self.payload.sources))
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        where = f" of {shown_path(files[0])}{more}" if files else ""
        size, state = (
            format_size(self.payload.nbytes),
            "not read" if is_address(self) else "in memory",
        )
        return (
            f"Paged({self.dtype}, {list(self.shape)}, device={str(self.device)!r}, "
            f"{size}{where}, {state})"
        )

    def __copy__(self) -> Paged:
        made = _rebuilt(self.recipe, self.device, self.requires_grad, self._attributes())
        made.backing = self.backing
        return made

    def __deepcopy__(self, memo: dict[int, object]) -> torch.Tensor:
        if id(self) not in memo:
            attributes = deepcopy(self._attributes(), memo)
            if is_address(self) and any(
                isinstance(each, nn.Module) for each in reversed(memo.values())
            ):
                copy = self._lazy_copy()
            else:
                copy = self._ordinary()
                attributes.pop(PARAMETER_MARK, None)
            copy.__dict__.update(attributes)
            memo[id(self)] = copy
        found = memo[id(self)]
        assert isinstance(found, torch.Tensor)
        return found

    def _lazy_copy(self) -> torch.Tensor:
        """Return the same lazy tensor for the deep copy of its module."""
        return _rebuilt(self.recipe, self.device, self.requires_grad, {})

    def _ordinary(self) -> torch.Tensor:
        """Its values as an ordinary tensor or parameter."""
        value = self.read()
        return nn.Parameter(value, self.requires_grad) if isinstance(self, nn.Parameter) else value

    def __reduce_ex__(self, protocol: object) -> Any:  # Any: how it is made again, which differs
        if (
            protocol == torch.serialization.DEFAULT_PROTOCOL
        ):  # that of torch.save, whose files outlive addresses
            if is_address(self):
                refuse_changed(
                    self.recipe.files, self.payload
                )  # as where torch has just opened that very file to write to it
            return self._ordinary().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return _rebuilt, (self._current, self.device, self.requires_grad, self._attributes())

    def numpy(
        self, *, force: bool = False
    ) -> Any:  # Any: an array, of a package that may not be installed
        return _value(self).numpy(force=force)

    def tolist(self) -> Any:  # Any: as deeply nested as there are axes
        return self.read().tolist()

    def __dlpack__(
        self, **asked: Any
    ) -> Any:  # Any: torch 2.6 knows fewer words than those that came after it
        return _value(self).__dlpack__(**asked)

    def data_ptr(self) -> int:
        """Return where the values can be read: in the memory-mapped file, or in that of a temporary
        one (see `storages`); 0 for an empty tensor.
        """
        if (held := self.held) is not None:
            return held.data_ptr()
        if self.device.type != "cpu":
            raise _no_memory()
        start = self._lazy_storage().filled()
        return start and start + self.recipe.offset * self.recipe.dtype.itemsize

    def untyped_storage(self) -> Storage | torch.UntypedStorage:  # type: ignore[override]  # it has what those ask for who save
        """Return an object that identifies the storage, by which libraries find ties; nothing is
        read.
        """
        return self._lazy_storage() if (held := self.held) is None else held.untyped_storage()

    def _typed_storage(self) -> torch.TypedStorage:
        if (held := self.held) is None:
            raise _no_memory()
        return typed_storage(held)

    def _lazy_storage(self) -> Storage:
        if not hasattr(self, "_storage"):
            self._storage = STORAGES.of(self.recipe.storage, self.recipe.files)
        return self._storage

    def _address_or_memory(self) -> Address | torch.Tensor:
        return self._as_address() if (held := self.held) is None else held

    def _as_address(self) -> Address:
        return Address(self.recipe, self.device, self.backing)

    @property
    def _current(self) -> Recipe:
        """The recipe of what it is now."""
        held = self.held
        return self.recipe if held is None else Backing.of(held).recipe

    def _attributes(self) -> dict[str, object]:
        """What was hung on it, as `Parameter` and model libraries do."""
        return {name: value for name, value in self.__dict__.items() if name not in OWN}


hide_from_compiler(vars(Paged)["__torch_dispatch__"].__func__)


def _rebuilt(
    recipe: Recipe, device: torch.device, requires_grad: bool, attributes: Mapping[str, object]
) -> Paged:
    made = Paged(recipe, device, requires_grad)
    made.__dict__.update(attributes)
    return made


def _holding(tensor: torch.Tensor) -> Paged:
    """A Paged that has the memory of *tensor*."""
    backing = Backing.of(tensor)
    made = Paged(backing.recipe, tensor.device)
    made.backing = backing
    return made


def _no_memory() -> LoadError:
    return LoadError(
        "a Paged is a lazy tensor, and has no memory to point to",
        hint="read it first: tensor.read(); to save a model that has such weights: "
        "shardkit.load.save(model, folder)",
    )


def is_address(tensor: torch.Tensor | None) -> bool:
    """Whether *tensor* is a Paged without memory."""
    return isinstance(tensor, Paged) and tensor.held is None


def _value(paged: Paged) -> torch.Tensor:
    """What to compute with in the place of *paged*."""
    return paged.read() if (held := paged.held) is None else held


def _made(address: Address) -> torch.Tensor:
    made = Paged(address.recipe, address.device)
    if address.is_copy:
        value = made.read()
        return (
            value.clone() if is_watched() else value
        )  # a graph copies it each time it runs, since what follows may write to it
    if address.backing is not None:
        made.backing = address.backing
    return made


def _itself(
    tensor: torch.Tensor, targets: Iterable[Paged], read: Callable[[Paged], torch.Tensor]
) -> torch.Tensor:
    """The one of *targets* that *tensor* is the memory of; else *tensor*."""
    return next((each for each in targets if read(each) is tensor), tensor)


def _see_to_writing(func: Operation, args: Arguments, options: Options) -> list[Paged]:
    """Give what *func* writes to memory of its own, and say what that is.

    Raises:
        OverBudget: there is too little memory.
        ReadOnly: it is a tensor of a checkpoint, or gets another shape.
    """
    targets = [each for each in written(func, args, options) if isinstance(each, Paged)]
    fixed = [each for each in targets if each.backing is None or changes_shapes(func)]
    if fixed:
        what = "write to a Paged, which is a lazy tensor and cannot be written"
        hint = "write to a copy of it: tensor.clone()"
        if (backing := fixed[0].backing) is not None:
            what = f"change the shape of {shown(backing.name)}, which streams and keeps its shape"
            if func.overloadpacket is torch.ops.aten.set_:
                what = f"replace the memory of {shown(backing.name)}, which streams"
                hint = "keep its layer in memory: give it a device in the device_map"
        raise ReadOnly(
            f"{func.overloadpacket.__name__} would {what}",
            places=tuple(
                (each.path, each.start, each.nbytes)
                for weight in fixed
                for each in weight.payload.sources
            ),
            hint=hint,
        )
    for backing in filter(None, (each.backing for each in targets)):
        backing.settle()
    return targets
