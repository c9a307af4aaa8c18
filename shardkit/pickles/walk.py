"""From unpickled objects to named tensors: dicts, lists, unknown objects and whole modules, walked
without recursion.

1. A key is one step of a path, dots and all: the "layers.0.weight" of a state dict is not split.
2. A module is known by the shape of its state (`_parameters`, `_buffers`, `_modules`), since its
   class cannot be imported. It stands for its state dict: names relative to the outermost module
   are one step, joined with dots, in torch's order. A module under two names gives both, as in
   torch. What `get_extra_state` would compute cannot be known and is missing.
3. Any other container gives its tensors at every place that refers to it, as torch does. It is not
   entered inside of itself; and where shared containers would give more names than there is time
   for, the places that are not walked are weights left out.
4. A subtree without a tensor is one `Other` at its top. Plain attributes of a module are not
   mentioned, unless they are tensors: torch leaves these out of the state dict too, but they should
   not vanish in silence.
5. The attributes of an OrderedDict that hold tensors are named like its items. A tensor in a key is
   refused by name.
6. A tensor whose attributes hold tensors (a scale, a table) is more than its values, and what a
   `torch.ScriptObject` holds is packed weights: both are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shardkit.checkpoint.entries import Other, OtherKind, TensorEntry
from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.payloads.payload import Literal, Payload
from shardkit.pickles.byte_strings import Strings
from shardkit.pickles.modules import (
    Item,
    is_quantised,
    module_items,
    module_state,
    packed_class,
)
from shardkit.pickles.numpy_arrays import Array, Numbers, is_tensor, numbers_of
from shardkit.pickles.object_graph import (
    CONTAINERS,
    Key,
    Named,
    attribute,
    attributes,
    bearing_of,
    children,
    described,
    inside,
    nbytes_of,
)
from shardkit.pickles.objects import Dict
from shardkit.pickles.shared_containers import Meeting, Repeats
from shardkit.pickles.torch_tensors import NonDense, Record, Stateful, Storage, View
from shardkit.printable import listed, shown
from shardkit.sizes import format_size

Names = tuple[str, ...]
_MOST_COUNTED = 1_000_000
_NAME = 64  # bytes of a name, for a guess


@dataclass(frozen=True, slots=True)
class Found:
    """What a tree of objects holds, in its order, and sentences that the user should see."""

    tensors: tuple[TensorEntry, ...]
    others: tuple[Other, ...]
    notes: tuple[str, ...] = ()


def collect(
    path: Path,
    root: object,
    *,
    record: Record,
    limits: Limits,
    calls: Iterable[str] = (),
    big_endian: bool = False,
    strings: Strings | None = None,
) -> Found:
    """Name all tensors below *root*.

    Args:
        path: the file, for messages.
        root: what `pickles.unpickle` gave.
        record: finds the bytes of a storage.
        limits: `tensors` and `held_bytes` bound what is found.
        calls: what was never called; each becomes an `Other`.
        big_endian: whether the bytes of multi-byte words stand in reverse.
        strings: finds the bytes of an array; None for a pickle that has no long strings.

    Raises:
        Malformed: a tensor does not fit its storage.
        LimitExceeded: there are too many.
    """
    walk = _Walk(
        path, record, strings or Strings(path, Literal(b"")), limits, big_endian, bearing_of(root)
    )
    walk.everything(root)
    for call in calls:
        walk.other((), OtherKind.CALL, call)
    return Found(tuple(walk.tensors), tuple(walk.others), tuple(walk.notes()))


class _Walk:
    """One pass over the objects, and what it has found so far."""

    def __init__(
        self,
        path: Path,
        record: Record,
        strings: Strings,
        limits: Limits,
        big_endian: bool,
        bearing: frozenset[int],
    ) -> None:
        self.path = path
        self.record = record
        self.strings = strings
        self.limits = limits
        self.big_endian = big_endian
        self.bearing = bearing
        self.tensors: list[TensorEntry] = []
        self.others: list[Other] = []
        self._repeats = Repeats(bearing, limits.tensors // 2)
        self._known: dict[int, TensorEntry] = {}  # an array under several names is one payload
        self._has_arrays = False
        self._named = Named()
        self._attributes: list[tuple[Names, Item]] = []
        self._left_out: list[str] = []  # attributes with tensors that have no name
        self._counted = 0  # objects that were looked at only to count bytes
        self._names: list[str] = []  # from the root to the container that is being read
        self._seen = 0
        self._held = 0

    def everything(self, root: object) -> None:
        """Visit *root* and, in the order of the file, everything below it."""
        stack = [(0, iter([("", root)]))]
        while stack:
            around, items = stack[-1]
            for name, value in items:
                if self._visit(around, name, value):
                    self._names.append(name)
                    stack.append((id(value), children(value, self._holds)))
                    break
            else:
                stack.pop()
                if stack:
                    self._repeats.leave()
                    del self._names[-1]
        for path, item in self._attributes:  # now that all that has a name is known
            if nbytes := self._named.rest(item.value):
                self.other(path, OtherKind.OBJECT, item.aside, nbytes)
                self._left_out.append(f"{shown('.'.join(path))} ({format_size(nbytes)})")

    def notes(self) -> Iterator[str]:
        """What there is to say about what was found."""
        if self._has_arrays:  # without their number, so that many shards have one note
            yield "the pickle holds NumPy arrays, which are read like tensors"
        if self._left_out:
            left = listed(self._left_out, most=3)
            yield f"tensors in plain attributes of modules are left out, as by state_dict(): {left}"
        if refused := self._repeats.refused:
            places = (
                "1 place holds an object" if refused == 1 else f"{refused:,} places hold objects"
            )
            yield (
                f"{places} that the file has at another place too; the tensors in it are named "
                "at the other place only"
            )

    def _visit(self, around: int, name: str, value: object) -> bool:
        """Note *value*, or say that it should be entered."""
        if type(value) is View:
            self._dense(self._path_to(name) or ("tensor",), value)
        elif is_tensor(value):
            self.weight(self._path_to(name) or ("tensor",), value)
        elif type(value) is Key:
            self.other(
                self._path_to(name),
                OtherKind.UNKNOWN_TENSOR,
                "a tensor in a key of a dict",
                self._nbytes_below((value.value,)),
            )
        elif id(value) not in self.bearing:
            self.other(self._path_to(name), OtherKind.OBJECT, described(value))
        elif packed_class(value) is not None:
            self._unreadable(self._path_to(name), value)
        elif (state := module_state(value)) is not None:
            self._module(self._path_to(name), state)
        else:
            return self._enters(around, name, value)
        return False

    def _enters(self, around: int, name: str, value: object) -> bool:
        room = (self.limits.held_bytes // 2 - self._held) // (8 * len(self._names) + _NAME)
        meeting = self._repeats.meet(value, around, name, room)
        if meeting is not Meeting.ENTER:
            same = f"the same object as {shown(self._repeats.first_name(value))}"
            if meeting is Meeting.CYCLE:
                self.other(self._path_to(name), OtherKind.OBJECT, same)
            else:
                reason = f"{same}, whose tensors would have too many names"
                self.other(
                    self._path_to(name), OtherKind.UNKNOWN_TENSOR, reason, self._nbytes_below(value)
                )
        return meeting is Meeting.ENTER

    def _holds(self, value: object) -> bool:
        return is_tensor(value) or id(value) in self.bearing

    def _path_to(self, name: str) -> Names:
        # The first name is that of the root, which has none.
        return (*self._names[1:], name) if self._names else ()

    def _module(self, names: Names, state: Dict) -> None:
        for item in module_items(state, self._spend, lambda value: id(value) in self.bearing):
            path = (*names, item.name)
            if item.is_deep:
                self._spend(8 * len(path) + len(item.name))
                self._attributes.append((path, item))
                continue
            self._named.add(item.value)
            if item.aside:
                self.other(path, OtherKind.OBJECT, item.aside, nbytes_of(item.value))
            elif is_tensor(item.value):
                self.weight(path, item.value)
            else:
                self._unreadable(path, item.value)

    def _unreadable(self, path: Names, value: object) -> None:
        """What stands where a module or a parameter should, and has no state that we know."""
        if id(value) not in self.bearing:
            self.other(
                path, OtherKind.OBJECT, f"{described(value)}, whose state has a private layout"
            )
        elif (packed := packed_class(value)) is not None:
            self.other(
                path, OtherKind.QUANTISED, f"packed weights, {packed}", self._nbytes_below(value)
            )
        elif is_quantised(value):
            reason = f"packed weights of {described(value)}"
            self.other(path, OtherKind.QUANTISED, reason, self._nbytes_below(value))
        else:
            reason = f"{described(value)}, whose state has a private layout"
            self.other(path, OtherKind.UNKNOWN_TENSOR, reason, self._nbytes_below(value))

    def weight(self, path: Names, value: object) -> None:
        """Note a tensor, for which `is_tensor` is true."""
        match value:
            case View():
                self._dense(path, value)
            case Array():
                self._array(path, value)
            case Stateful():
                self._stateful(path, value)
            case NonDense():
                self.other(path, value.kind, value.reason, value.nbytes)
            case Storage():
                self.other(
                    path,
                    OtherKind.UNKNOWN_TENSOR,
                    f"a bare storage of {value.kind.dtype.code}",
                    value.nbytes,
                )

    def _stateful(self, path: Names, value: Stateful) -> None:
        if id(value) not in self.bearing:
            self.weight(path, value.tensor)
            return
        states = value.state if isinstance(value.state, tuple) else (value.state,)
        named = (item for state in states for item in attributes(state, self._holds))
        bearing = [attribute(name, part) for name, part in named if self._holds(part)]
        reason = f"{value.name} with tensors in its attributes {listed(bearing, most=3)}"
        self.other(path, OtherKind.UNKNOWN_TENSOR, reason, value.nbytes + self._nbytes_below(value))

    def _nbytes_below(self, value: object) -> int:
        """Bytes of the tensors in *value*, each counted once; 0 from when on that took too long."""
        total, seen, stack = 0, {id(value)}, [value]
        while stack and self._counted < _MOST_COUNTED:
            for child in inside(stack.pop()):
                self._counted += 1
                if id(child) not in seen:
                    seen.add(id(child))
                    total += child.nbytes if is_tensor(child) else 0  # type: ignore[attr-defined]  # a tensor has bytes
                    stack += [child] if type(child) in CONTAINERS else []
        return 0 if stack else total

    def other(self, path: Names, kind: OtherKind, reason: str, nbytes: int = 0) -> None:
        """Note what is no dense tensor."""
        self._spend(8 * len(path) + len(reason))
        self.others.append(Other(path, kind, nbytes, reason))

    def _dense(self, path: Names, view: View) -> None:
        self._spend(8 * len(path) + len(path[-1]))
        try:
            payload = view.payload(self.record, big_endian=self.big_endian)
            self.tensors.append(TensorEntry(path, view.dtype, view.logical_shape, payload))
        except ValueError as error:
            raise self._refusal(path, error) from None

    def _array(self, path: Names, array: Array) -> None:
        try:
            found = numbers_of(array)
            if isinstance(found, NonDense):
                self.other(path, found.kind, found.reason, found.nbytes)
                return
            self._spend(8 * len(path) + len(path[-1]))
            known = self._known.get(id(array))
            if known is None:
                entry = TensorEntry(path, found.dtype, found.shape, self._values(found))
                known = self._known[id(array)] = entry
            self.tensors.append(replace(known, path=path))
            self._has_arrays = True
        except ValueError as error:
            raise self._refusal(path, error) from None

    def _values(self, numbers: Numbers) -> Payload:
        string = self.strings.payload(numbers.content, numbers.nbytes, number=len(self._known))
        return numbers.payload(string)

    def _refusal(self, path: Names, error: ValueError) -> Malformed:
        hint = "the file is corrupt or malicious: download it again, from a source that you trust"
        return Malformed(self.path, str(error), where=f"tensor {shown('.'.join(path))}", hint=hint)

    def _spend(self, nbytes: int) -> None:
        """Count one thing found, whose name takes *nbytes* to hold."""
        self._seen += 1
        self._held += nbytes
        most = self.limits.tensors
        if self._seen > 4 * most:
            raise LimitExceeded(
                self.path,
                f"holds more than {self._seen:,} names",
                limit="tensors",
                actual=self._seen,
            )
        if len(self.tensors) > most:
            raise LimitExceeded(
                self.path, f"holds more than {most:,} tensors", limit="tensors", actual=2 * most
            )
        if self._held > self.limits.held_bytes:
            raise LimitExceeded(
                self.path,
                f"its names take more than {self._held:,} bytes",
                limit="held_bytes",
                actual=2 * self._held,
            )
