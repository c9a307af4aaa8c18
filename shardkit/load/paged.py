"""Paged: a tensor that is an address. It has shape, type and device as any tensor, and its bytes are read when they are used.

1. What only moves elements or changes their float type is written into the recipe, and nothing is read: views of every kind,
   splits, copies, casts, stacks and cats. What only asks for shapes is answered from them.
2. Anything else reads its Paged arguments, and gives what torch computes with them. Nothing is kept: each use reads again.
3. A Paged cannot be written. What is copied from it goes from its file into the target's own memory.
4. It stands below autograd, autocast and the decomposition of composite operations (`__torch_dispatch__`, and no
   `__torch_function__`), so that every path that leads to a kernel leads here first, those inside C++ too. Where such an
   operation chooses its kernel by the kind of tensor, as LSTM and singular values do, a last bit may differ.
5. It is immutable but for the attributes that torch and others hang on it, and may be used by any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from shardkit.checkpoint import SourceFile, TensorEntry
from shardkit.dtypes import DType
from shardkit.errors import LoadError, ReadOnly, shown_path
from shardkit.load.filling import read_into
from shardkit.load.memory import aligned, memory_of
from shardkit.load.recipe import Recipe, dtype_of
from shardkit.load.recording import Address, Arguments, Options, device_of, record
from shardkit.load.sources import refuse_changed
from shardkit.load.storages import STORAGES, Storage
from shardkit.load.unseen import refuse_trace
from shardkit.payload import Buffer, Payload
from shardkit.sizes import format_size

if TYPE_CHECKING:
    from shardkit.load.recording import Operation

_Kind = TypeVar("_Kind")
OWN = ("recipe", "_storage")  # attributes that are made anew for a copy


class Paged(torch.Tensor):
    """A tensor whose bytes are read when they are used; see the rules of its module.

    Attributes:
        recipe: which bytes, and how they become elements.
    """

    recipe: Recipe
    _storage: Storage  # as soon as it was asked for

    # Rule 4: without this, torch would call Python once more on the way to every operation.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    @staticmethod
    def __new__(cls: type[Paged], recipe: Recipe, device: torch.device, requires_grad: bool = False) -> Paged:
        """A tensor that claims to be on *device*, which is where `read` puts it."""
        with torch.inference_mode(False):  # so that views taken in inference mode are what torch expects, and can outlive it
            made = torch.Tensor._make_wrapper_subclass(
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
    def of(cls, entry: TensorEntry, device: str | torch.device = "cpu", *, files: tuple[SourceFile, ...] = ()) -> Paged:
        """The tensor that *entry* describes.

        Args:
            entry: its bytes, type and shape.
            device: where `read` puts it.
            files: those of its checkpoint, as they were when it was opened. To read from one that changed is an error.

        Raises:
            LoadError: torch has no such tensors, or there is no such device.
        """
        return cls(Recipe.of(entry, files), device_of(device))

    @property
    def payload(self) -> Payload:
        """The address of its bytes: C order, little-endian, whatever its strides."""
        return self.recipe.payload

    @property
    def stored(self) -> DType:
        """The type of the bytes that `payload` gives, which is that of the tensor."""
        return self.recipe.dtype

    def read(self) -> torch.Tensor:
        """Its values in memory of their own, on its device.

        Strides are kept, but for those that leave gaps.

        Raises:
            FormatError: the file cannot be read, or has become shorter.
            LoadError: the file changed since it was opened, or there is no room for the tensor.
        """
        payload, strides = self.recipe.in_memory
        with torch.inference_mode(False):  # what was read in inference mode can outlive it too
            memory = aligned(payload.nbytes)
            read_into(payload, memory_of(memory))
            refuse_changed(self.recipe.files, payload)
            return memory.view(self.dtype).as_strided(self.shape, strides, 0).to(self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without the operation
        cls, func: Operation, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Options | None = None
    ) -> object:
        options = kwargs or {}
        refuse_trace()
        _refuse_writing(func, args, options)
        if _is_composite(func):
            return func.decompose(*args, **options)
        recorded = record(func, *_replaced((args, options), Paged, lambda paged: Address(paged.recipe, paged.device)))
        if recorded is not NotImplemented:
            return _replaced(recorded, Address, lambda address: Paged(address.recipe, address.device))
        read = cache(Paged.read)  # an argument that comes twice is read once
        with _outliving(func):
            return func(*_replaced(args, Paged, read), **_replaced(options, Paged, read))

    # What torch does without asking its dispatcher.

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        given = value if isinstance(value, Paged) else _holding(value)
        vars(torch._C.TensorBase)["data"].__set__(self, given)
        self.recipe = given.recipe
        vars(self).pop("_storage", None)

    def __repr__(self) -> str:  # type: ignore[override]  # torch hands what it would print to its own alone
        files = list(dict.fromkeys(source.path for source in self.payload.sources))
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        where = f" of {shown_path(files[0])}{more}" if files else ""
        size = format_size(self.payload.nbytes)
        return f"Paged({self.dtype}, {list(self.shape)}, device={str(self.device)!r}, {size}{where}, not read)"

    def __deepcopy__(self, memo: dict[int, object]) -> Paged:
        if id(self) not in memo:
            memo[id(self)] = _rebuilt(self.recipe, self.device, self.requires_grad, deepcopy(self._attributes(), memo))
        twin = memo[id(self)]
        assert isinstance(twin, Paged)
        return twin

    def __reduce_ex__(self, protocol: object) -> Any:  # Any: how it is made again, which differs
        if protocol == torch.serialization.DEFAULT_PROTOCOL:  # that of torch.save, whose files outlive addresses
            refuse_changed(self.recipe.files, self.payload)  # as where torch has just opened that very file to write to it
            value = self.read()
            held = nn.Parameter(value, self.requires_grad) if isinstance(self, nn.Parameter) else value
            return held.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return _rebuilt, (self.recipe, self.device, self.requires_grad, self._attributes())

    def numpy(self, *, force: bool = False) -> Any:  # Any: an array, of a package that may not be installed
        return self.read().numpy(force=force)

    def tolist(self) -> Any:  # Any: as deeply nested as there are axes
        return self.read().tolist()

    def __dlpack__(self, **asked: Any) -> Any:  # Any: torch 2.6 knows fewer words than those that came after it
        return self.read().__dlpack__(**asked)

    def data_ptr(self) -> int:
        """Where the values can be read: in the pages of the file, or of a temporary one (see `storages`); 0 if there are none."""
        if self.device.type != "cpu":
            raise _no_memory()
        start = self.untyped_storage().filled()
        return start and start + self.recipe.offset * self.recipe.dtype.itemsize

    def untyped_storage(self) -> Storage:  # type: ignore[override]  # it has what those ask for who save tensors
        """What tells apart the storages of tensors, and finds ties; nothing is read."""
        if not hasattr(self, "_storage"):
            self._storage = STORAGES.of(self.recipe.storage, self.recipe.files)
        return self._storage

    def _typed_storage(self) -> torch.TypedStorage:
        raise _no_memory()

    def _attributes(self) -> dict[str, object]:
        """What was hung on it, as `Parameter` and model libraries do."""
        return {name: value for name, value in self.__dict__.items() if name not in OWN}


def _hide_from_dynamo() -> None:
    """Let torch.compile run what this module does, and not trace it, which takes long and gives nothing.

    `torch.compiler.disable` would do the same, and import the compiler, which takes as long as to import torch.
    """
    with suppress(ImportError):  # an older torch: it traces, and computes the same
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
        set_code_exec_strategy(vars(Paged)["__torch_dispatch__"].__func__.__code__, skip)


_hide_from_dynamo()


def _rebuilt(recipe: Recipe, device: torch.device, requires_grad: bool, attributes: Mapping[str, object]) -> Paged:
    made = Paged(recipe, device, requires_grad)
    made.__dict__.update(attributes)
    return made


def _holding(tensor: torch.Tensor) -> Paged:
    """A Paged whose address is the memory of *tensor*."""
    held = tensor.detach().to("cpu").contiguous()
    memory = Buffer(held.reshape(-1).view(torch.uint8).numpy().data)  # which keeps the tensor
    dtype = dtype_of(held)
    if dtype is None:
        raise LoadError(f"a Paged cannot hold {held.dtype}, which no format stores")
    return Paged(Recipe(memory, dtype, tuple(held.shape), held.stride()), tensor.device)


def _no_memory() -> LoadError:
    return LoadError(
        "a Paged is the address of a weight in a checkpoint, and has no memory to point at",
        hint="take its value first: tensor.read(); to save a model that has such weights: shardkit.load.save(model, folder)",
    )


def _refuse_writing(func: Operation, args: Arguments, options: Options) -> None:
    for position, name in _written(func):
        target = args[position] if position < len(args) else options.get(name)
        weights = [each for each in (target if isinstance(target, list | tuple) else [target]) if isinstance(each, Paged)]
        if weights:
            raise ReadOnly(
                f"{func.overloadpacket.__name__} would write to a Paged, which is the address of a weight and cannot be written",
                places=tuple((each.path, each.start, each.nbytes) for weight in weights for each in weight.payload.sources),
                hint="take its value first: tensor.read(); or have it in memory, if its model writes to it: by the device map",
            )


def _outliving(func: Operation) -> AbstractContextManager[object]:
    """No inference mode for a view, which may outlive it; to leave a mode that is not there would let gradients flow again."""
    return torch.inference_mode(False) if func.is_view and torch.is_inference_mode_enabled() else nullcontext()


@cache
def _written(func: Operation) -> tuple[tuple[int, str], ...]:
    """Which arguments *func* writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, each.name) for i, each in arguments if each.alias_info is not None and each.alias_info.is_write)


@cache
def _is_composite(func: Operation) -> bool:
    """Whether *func* is made of other operations; such a one arrives whole in inference mode only."""
    name: str = func.name()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"))


def _replaced(value: Any, kind: type[_Kind], replacement: Callable[[_Kind], object]) -> Any:
    """*value* with all of one *kind* in it replaced, however deep in lists and the like."""
    if isinstance(value, kind):
        return replacement(value)
    if isinstance(value, list | tuple):
        return type(value)([_replaced(each, kind, replacement) for each in value])
    if isinstance(value, dict):
        return {key: _replaced(each, kind, replacement) for key, each in value.items()}
    return value
