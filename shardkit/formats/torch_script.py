"""TorchScript archives: the state dict as `torch.jit.load(…).state_dict()` returns it, without
executing any of the code.

1. The pickle names every attribute of every module, but not which of them are weights: that is in
   the text of the classes, `code/**.py`, in lines of a fixed form. The text is searched for these
   lines, and neither compiled nor executed.
2. Non-persistent buffers are part of this state dict: the archive does not distinguish them.
3. Before torch 1.5 a class had no `__buffers__` line, and every tensor that was not a parameter was
   a buffer.
4. A module with a `__setstate__`, or of a class built into torch (packed weights), has a private
   state.
5. The tensors of the code itself are in `constants.pkl`; a frozen module has all its weights there,
   without names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from shardkit.formats.torch_zip import Records, has_member
from shardkit.pickles.objects import Builder, Dict, Opaque, Vocabulary
from shardkit.pickles.torch_globals import find
from shardkit.pickles.torch_tensors import NonDense, View, storage_of
from shardkit.pickles.unpickle import Pickle, unpickle
from shardkit.pickles.walk import collect
from shardkit.plugin import (
    Checkpoint,
    Format,
    LimitExceeded,
    Malformed,
    Member,
    Other,
    OtherKind,
    Source,
    SourceFile,
    shown,
)


def sniff(source: Source) -> bool:
    """Whether it is a zip archive that `torch.jit.save` wrote."""
    return has_member(source, "data.pkl") and has_member(source, "constants.pkl")


def scan(source: Source) -> Checkpoint:
    """Read the pickles and the text of the classes; no weights.

    Raises:
        Malformed: the archive, a pickle or the code is broken.
        LimitExceeded: it asks for too much.
    """
    records = Records(source)
    pickle = _unpickled(source, records.member("data.pkl"))
    code = _Code(source, records)
    _shape_modules(_outermost(source, pickle.value, code), code)
    found = collect(
        source.path,
        pickle.value,
        record=records.storage,
        limits=source.limits,
        calls=pickle.calls,
        big_endian=records.is_big_endian(),
    )
    constants = tuple(_constants(source, records))
    notes = (_frozen(constants),) if constants and not found.tensors else ()
    return Checkpoint(
        found.tensors, (*found.others, *constants), files=(SourceFile.of(source.path),), notes=notes
    )


def _unpickled(source: Source, member: Member) -> Pickle:
    return unpickle(
        source.path,
        source.member(member),
        Vocabulary(_find, storage_of),
        limits=source.limits,
        where=member.name,
    )


def _find(module: str, name: str) -> object:
    """What stands for a global: beside what torch always names, the classes of the archive and the
    tags of typed lists.
    """
    full = f"{module}.{name}"
    if full.startswith("__torch__."):
        return Builder(full, lambda args: Opaque(full, args))
    if module == "torch.jit._pickle":
        return Builder(full, lambda args: args[0] if args else None)
    return find(module, name)


@dataclass(slots=True)
class _Class:
    """What the text of a class says.

    Attributes:
        is_module: whether its base is Module.
        parameters: names of its parameters.
        buffers: names of its buffers; None if it does not say, as before torch 1.5.
        tensors: names of the attributes that are declared to be tensors, and not to be optional
            ones.
        restores: whether it has a `__setstate__`.
    """

    is_module: bool
    parameters: frozenset[str] = frozenset()
    buffers: frozenset[str] | None = None
    tensors: set[str] = field(default_factory=set)
    restores: bool = False


class _Code:
    """The classes of the archive, read file by file as they are asked for."""

    def __init__(self, source: Source, records: Records) -> None:
        self._source = source
        self._records = records
        self._files: dict[str, dict[str, _Class]] = {}
        self._read = 0

    def find(self, name: str) -> _Class | None:
        """The class of this dotted name; None if the archive has no text of it."""
        module, _, last = name.rpartition(".")
        if module not in self._files:
            self._files[module] = dict(_classes(self._lines(f"code/{module.replace('.', '/')}.py")))
        return self._files[module].get(last)

    def _lines(self, name: str) -> list[str]:
        member = self._records.find(name)
        if member is None:
            return []
        self._read += member.nbytes
        limit = self._source.limits.header_bytes
        if self._read > limit:
            raise LimitExceeded(
                self._source.path,
                f"its code has more than {limit:,} bytes",
                limit="header_bytes",
                actual=2 * self._read,
            )
        return self._source.peek(member, member.nbytes).decode("utf-8", "replace").split("\n")


_CLASS = re.compile(r"class (\w+)(?:\((\w+)\))?:")
_WEIGHTS = re.compile(r"  __(parameters|buffers)__ = \[(.*)\]")
_NAME = re.compile(r'"([^"]*)"')
_TENSOR = re.compile(r'  (?:(\w+) : |__annotations__\["([^"]*)"\] = )Tensor')
_RESTORES = "  def __setstate__("


def _classes(lines: Iterable[str]) -> Iterator[tuple[str, _Class]]:
    """The classes in the text of a file, with their names."""
    current = _Class(is_module=False)
    for line in lines:
        if line[:2] != "  ":
            if match := _CLASS.fullmatch(line):
                current = _Class(is_module=match[2] == "Module")
                yield match[1], current
        elif match := _WEIGHTS.fullmatch(line):
            names = frozenset(_NAME.findall(match[2]))
            if match[1] == "parameters":
                current.parameters = names
            else:
                current.buffers = names
        elif match := _TENSOR.fullmatch(line):
            current.tensors.add(match[1] or match[2])
        elif line.startswith(_RESTORES):
            current.restores = True


def _outermost(source: Source, value: object, code: _Code) -> Opaque:
    if not isinstance(value, Opaque):
        raise Malformed(
            source.path,
            f"holds {shown(value)} instead of a TorchScript module",
            where="data.pkl",
        )
    found = code.find(value.name)
    if found is None or not found.is_module:
        mobile = has_member(
            source, "bytecode.pkl"
        )  # torch.jit.load reads it only if it has the code as well
        raise Malformed(
            source.path,
            f"its code does not say which attributes of {shown(value.name)} are weights",
            hint=_FROM_MOBILE
            if mobile
            else "load it with torch.jit.load and save its state_dict()",
        )
    return value


_FROM_MOBILE = "it is for PyTorch Mobile: convert the checkpoint or module that it was made from"


def _shape_modules(outermost: Opaque, code: _Code) -> None:
    """Give the modules below *outermost* the state that pickled modules have, by which they are
    known for what they are.
    """
    stack, known = [outermost], {id(outermost)}
    while stack:
        module = stack.pop()
        found = code.find(module.name)
        match module.states:
            case [Dict() as attributes] if (
                found is not None and found.is_module and not found.restores
            ):
                module.states[:] = [_shaped(attributes, found, code)]
                inside = [
                    value
                    for value in attributes.values()
                    if isinstance(value, Opaque) and id(value) not in known
                ]
                known.update(map(id, inside))
                stack.extend(inside)


def _shaped(attributes: Dict, kind: _Class, code: _Code) -> Dict:
    """The attributes of a module, sorted as `nn.Module` keeps them."""
    buffers = kind.tensors if kind.buffers is None else kind.buffers & kind.tensors
    parameters, kept, modules, state = Dict(), Dict(), Dict(), Dict()
    for name, value in attributes.items():
        if isinstance(value, View | NonDense) and name in kind.parameters:
            parameters[name] = value
        elif isinstance(value, View | NonDense) and name in buffers:
            kept[name] = value
        elif isinstance(value, Opaque) and not _is_record(value, code):
            modules[name] = value
        else:
            state[name] = _flat(value)
    state["_parameters"], state["_buffers"], state["_modules"] = parameters, kept, modules
    return state


def _is_record(value: Opaque, code: _Code) -> bool:
    """Whether *value* is a plain object of the archive's own code."""
    found = code.find(value.name)
    return found is not None and not found.is_module


def _flat(value: object) -> object:
    """The values of a dict or of a plain object as a list, so that tensors among them are
    noticed.
    """
    match value:
        case Dict():
            return list(value.values())
        case Opaque(states=[Dict() as attributes]):
            return list(attributes.values())
    return value


def _constants(source: Source, records: Records) -> Iterator[Other]:
    """The tensors among the constants, by the names that the code calls them."""
    member = records.find("constants.pkl")
    values = _unpickled(source, member).value if member else ()
    for i, value in enumerate(values if isinstance(values, tuple | list) else ()):
        if isinstance(value, View | NonDense):
            what = (
                f"{value.dtype.code} {list(value.shape)}" if isinstance(value, View) else value.kind
            )
            yield Other(
                (f"CONSTANTS.c{i}",),
                OtherKind.OBJECT,
                value.nbytes,
                f"{what}, a constant of the code",
            )


def _frozen(constants: tuple[Other, ...]) -> str:
    listed = ", ".join(
        f"{other.name} ({other.reason.rpartition(',')[0]})" for other in constants[:3]
    )
    more = ", …" if len(constants) > 3 else ""
    return (
        "it looks like a frozen TorchScript module, whose weights have become constants without "
        f"names ({len(constants)} of "
        f"them: {listed}{more}); save the module as it was before torch.jit.freeze, and convert "
        "that"
    )


FORMAT = Format(name="torchscript", suffixes=(".pt", ".jit", ".ts"), sniff=sniff, scan=scan)
