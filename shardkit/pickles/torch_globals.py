"""The names of torch in a pickle: the functions that rebuild tensors, the classes of storages, the
types.

Wrappers (Parameter, subclasses with dense data) are what they wrap, or `Stateful` if they have
attributes that may hold tensors. Tensors without dense bytes are `NonDense`, with their kind. No
function executes torch; they only parse the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import islice

from shardkit.checkpoint.entries import OtherKind
from shardkit.dtypes import BY_TORCH, DType
from shardkit.pickles import numpy_arrays
from shardkit.pickles.numpy_arrays import Array, dtype_of
from shardkit.pickles.objects import Builder, Dict, Global, LongString, Opaque
from shardkit.pickles.torch_tensors import (
    STORAGE_CLASSES,
    TENSORS,
    NonDense,
    Stateful,
    Storage,
    Tensor,
    View,
    stated,
)
from shardkit.printable import shown


def find(module: str, name: str) -> object:
    """What stands for a global of a torch pickle."""
    full = f"{_RENAMED.get(module, module)}.{name}"
    if module.split(".", 1)[0] == "torch":
        if name in STORAGE_CLASSES:
            return STORAGE_CLASSES[name]
        if module == "torch" and name in BY_TORCH:
            return BY_TORCH[name]
    build = _BUILDERS.get(full)
    return Builder(full, build) if build else Global(full)


def _view(args: tuple[object, ...], dtype: object, flags: object) -> Tensor:
    """The tensor that the first four arguments of all three functions describe."""
    if len(args) < 4:
        raise _wrong("_rebuild_tensor", args)
    storage, offset, shape, strides = args[:4]
    # One by one, since this runs for every tensor and a pattern takes twice as long.
    if not (
        isinstance(storage, Storage)
        and isinstance(offset, int)
        and isinstance(shape, _ROW)
        and isinstance(strides, _ROW)
    ):
        raise _wrong("_rebuild_tensor", args)
    lengths, steps = _integers(shape), _integers(strides)
    if storage.kind.quantised:
        return NonDense(
            OtherKind.QUANTISED, storage.nbytes, "a quantised storage without its scale"
        )
    if not isinstance(dtype, DType):
        return NonDense(OtherKind.UNKNOWN_TENSOR, storage.nbytes, f"of the type {_named(dtype)}")
    if isinstance(flags, Dict) and flags:
        return View(
            storage,
            dtype,
            offset,
            lengths,
            steps,
            flags.get("conj") is True,
            flags.get("neg") is True,
        )
    return View(storage, dtype, offset, lengths, steps)


_ROW = (tuple, list)


def _integers(values: tuple[object, ...] | list[object]) -> tuple[int, ...]:
    for value in values:
        if type(value) is not int:
            raise ValueError(
                f"a shape or stride of a tensor is {shown(values)}, which are not all whole numbers"
            )
    return _shared(tuple(values))


@lru_cache(4096)
def _shared(row: tuple[int, ...]) -> tuple[int, ...]:
    """*row*, as one object for all tensors that have it: most tensors of a model have the shape of
    another.
    """
    return row


def _rebuild_v1(args: tuple[object, ...]) -> Tensor:
    return _view(args, _dtype_of(args), None)


def _rebuild_v2(args: tuple[object, ...]) -> Tensor:
    return _view(args, _dtype_of(args), args[6] if len(args) > 6 else None)


def _rebuild_v3(args: tuple[object, ...]) -> Tensor:
    if len(args) < 7:
        raise _wrong("_rebuild_tensor_v3", args)
    return _view(args, args[6], args[7] if len(args) > 7 else None)


def _dtype_of(args: tuple[object, ...]) -> DType | None:
    return args[0].kind.dtype if args and isinstance(args[0], Storage) else None


def _rebuild_wrapped(args: tuple[object, ...]) -> object:
    """A Parameter: its first argument is the tensor."""
    if not args:
        raise _wrong("_rebuild_parameter", args)
    return args[0]


def _rebuild_with_state(args: tuple[object, ...]) -> object:
    """A Parameter with attributes of its own: (tensor, requires_grad, hooks, attributes)."""
    made = _rebuild_wrapped(args)
    return (
        stated(made, "torch.nn.Parameter", args[3:]) if isinstance(made, View | Stateful) else made
    )


def _rebuild_from_type(args: tuple[object, ...]) -> object:
    """A subclass: (function, class, its arguments, state). Such calls may be nested, as deep as a
    stranger likes.
    """
    states: list[object] = []
    while True:
        match args:
            case (Builder(build=build), _, tuple(inner), state) if build is _rebuild_from_type:
                states.append(state)
                args = inner
            case (Builder(build=build), kind, tuple(inner), state):
                return _of_type(build(inner), _named(kind), (*states, state))
            case (_, kind, tuple(inner), *state):
                nbytes = _nbytes_in(inner, *states, *state)
                return NonDense(OtherKind.UNKNOWN_TENSOR, nbytes, f"of the class {_named(kind)}")
            case _:
                raise _wrong("_rebuild_from_type_v2", args)


def _of_type(made: object, name: str, states: tuple[object, ...]) -> object:
    match made:
        case NonDense(
            kind=OtherKind.UNKNOWN_TENSOR | OtherKind.DISTRIBUTED as kind,
            nbytes=nbytes,
            reason=reason,
        ):
            reason = reason if name in reason else f"of the class {name}, {reason}"
            return NonDense(kind, nbytes + _nbytes_in(*states), reason)
        case View() | Stateful():
            return stated(made, name, states)
    return made  # what is refused anyway needs no state


def _rebuild_from_cpu(args: tuple[object, ...]) -> object:
    """A tensor of a device that keeps its data on the CPU in files: (tensor, dtype, device,
    requires_grad).
    """
    match args:
        case (View() as view, DType() as dtype, *_) if view.dtype != dtype:
            return NonDense(
                OtherKind.UNKNOWN_TENSOR,
                view.nbytes,
                f"kept as {view.dtype.code}, to be cast to {dtype.code} by a device",
            )
        case (View() | NonDense() | Stateful() as tensor, *_):
            return tensor
    raise _wrong("_rebuild_device_tensor_from_cpu_tensor", args)


def _rebuild_from_numpy(args: tuple[object, ...]) -> object:
    """A tensor of a device that keeps its data in an array: (array, dtype, device,
    requires_grad).
    """
    match args:
        case (Array() as array, DType() as dtype, *_) if dtype_of(array) == dtype:
            return array
        case (Array() as array, DType() as dtype, *_):
            return NonDense(
                OtherKind.UNKNOWN_TENSOR,
                array.nbytes,
                f"{array.description}, to be cast to {dtype.code} by a device",
            )
    return NonDense(OtherKind.UNKNOWN_TENSOR, 0, "kept as a NumPy array")


def _rebuild_sparse(args: tuple[object, ...]) -> NonDense:
    inside = args[1] if len(args) > 1 and isinstance(args[1], tuple) else ()
    values = [part for part in inside if isinstance(part, View)]
    size = next((part for part in inside if type(part) is tuple), None)
    described = _described(values[-1].dtype if values else None, size)
    return NonDense(
        OtherKind.SPARSE, _nbytes_in(inside), _named(args[0] if args else None) + described
    )


def _layout(args: tuple[object, ...]) -> Global:
    return Global(args[0] if args and isinstance(args[0], str) else "torch.layout")


def _rebuild_quantised(args: tuple[object, ...]) -> NonDense:
    """A tensor of codes: (storage, offset, size, stride, (scheme, scales, …), …)."""
    nbytes = args[0].nbytes if args and isinstance(args[0], Storage) else 0
    scheme = args[4][0] if len(args) > 4 and isinstance(args[4], tuple) and args[4] else None
    described = _described(_dtype_of(args), args[2] if len(args) > 2 else None)
    return NonDense(OtherKind.QUANTISED, nbytes, _named(scheme) + described)


def _rebuild_nested(args: tuple[object, ...]) -> NonDense:
    """Tensors of unequal shapes: (values, sizes, strides, offsets), or a dict with the values and
    the offsets.
    """
    return NonDense(
        OtherKind.NESTED, _nbytes_in(*args[:1]), "several tensors of unequal shapes in one"
    )


def _rebuild_meta(args: tuple[object, ...]) -> NonDense:
    described = _described(*args[:2]) if len(args) > 1 else ""
    return NonDense(OtherKind.META, 0, f"saved from the meta device, without data{described}")


def _rebuild_wrapper(args: tuple[object, ...]) -> NonDense:
    """A tensor whose class keeps the data in attributes: (class, dtype, size, …)."""
    name = _named(args[0] if args else None)
    module, _, last = name.rpartition(".")
    spread = module.startswith("torch.distributed.") and last in ("DTensor", "ShardedTensor")
    kind = OtherKind.DISTRIBUTED if spread else OtherKind.UNKNOWN_TENSOR
    return NonDense(
        kind, 0, f"of the class {name}{_described(*args[1:3]) if len(args) > 2 else ''}"
    )


def _described(dtype: object, size: object) -> str:
    """A type and a shape, to follow a reason; no text where they are neither."""
    if not (isinstance(dtype, DType) and type(size) is tuple and len(size) <= _MOST_SHOWN):
        return ""
    return f", {dtype.code} [{', '.join(map(shown, size))}]"


def _size(args: tuple[object, ...]) -> object:
    return tuple(args[0]) if args and isinstance(args[0], tuple | list) else ()


def _ordered(args: tuple[object, ...]) -> Dict:
    """An OrderedDict; Python 2 gave it its items as a list of lists."""
    table = Dict()
    for item in args[0] if args and isinstance(args[0], list) else ():
        match item:
            case [key, value]:
                table.put(key, value)
            case _:
                raise ValueError(
                    f"an item of an OrderedDict is {shown(item)}, not a key and a value"
                )
    return table


def _bytes(args: tuple[object, ...]) -> object:
    return Opaque("builtins.bytes", args) if args else b""


def _encoded(args: tuple[object, ...]) -> object:
    """Bytes, as protocol 2 has to write them."""
    match args:
        case (str(text), "latin1" | "latin-1") if all(character <= "\xff" for character in text):
            return text.encode("latin-1")
        case (LongString() as long, "latin1" | "latin-1"):
            return replace(long, is_latin1=True)
    return Opaque("_codecs.encode", args)


def _harmless(name: str) -> Callable[[tuple[object, ...]], Opaque]:
    """A class that holds no weights, and whose making is not worth a mention."""
    return lambda args: Opaque(name, args)


def _collection(name: str) -> Callable[[tuple[object, ...]], Opaque]:
    return lambda args: Opaque(name, items=args[0] if args and type(args[0]) is list else None)


def _wrong(name: str, args: tuple[object, ...]) -> ValueError:
    given = ", ".join(shown(arg) for arg in args[:8])
    return ValueError(
        f"torch's {name} is called with ({given}), from which it cannot make a tensor"
    )


def _named(value: object) -> str:
    return value.name if isinstance(value, Global | Builder | Opaque) else shown(value)


def _nbytes_in(*values: object) -> int:
    """Bytes of the tensors among *values*, and among what containers in them hold; of each only the
    first few are looked at.
    """
    inside = [part for value in values for part in islice(_parts(value), _MOST_SHOWN)]
    deeper = (
        part
        for value in inside
        if isinstance(value, Dict)
        for part in islice(value.values(), _MOST_SHOWN)
    )
    return sum(
        part.nbytes
        for part in (*inside, *deeper)
        if isinstance(part, TENSORS) and not isinstance(part, Storage)
    )


def _parts(value: object) -> Iterable[object]:
    match value:
        case Dict():
            return value.values()
        case tuple() | list():
            return value
    return (value,)


_MOST_SHOWN = 16

_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "torch.tensor": "torch._tensor",
} | numpy_arrays.RENAMED

_BUILDERS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "torch._utils._rebuild_tensor": _rebuild_v1,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _rebuild_wrapped,
    "torch._utils._rebuild_parameter_with_state": _rebuild_with_state,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _rebuild_from_cpu,
    "torch._utils._rebuild_device_tensor_from_numpy": _rebuild_from_numpy,
    "torch._utils._rebuild_xla_tensor": _rebuild_from_numpy,
    "torch._utils._rebuild_sparse_tensor": _rebuild_sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _rebuild_sparse,
    "torch._utils._rebuild_qtensor": _rebuild_quantised,
    "torch._utils._rebuild_nested_tensor": _rebuild_nested,
    "torch.nested._internal.nested_tensor._rebuild_njt": _rebuild_nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta,
    "torch._utils._rebuild_wrapper_subclass": _rebuild_wrapper,
    "torch.Size": _size,
    "torch.device": _harmless("torch.device"),
    "torch.serialization._get_layout": _layout,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _harmless("collections.defaultdict"),
    "_codecs.encode": _encoded,
    "builtins.set": _collection("builtins.set"),
    "builtins.frozenset": _collection("builtins.frozenset"),
    "builtins.bytes": _bytes,
    "builtins.complex": _harmless("builtins.complex"),
    "builtins.bytearray": _harmless("builtins.bytearray"),
} | numpy_arrays.BUILDERS
