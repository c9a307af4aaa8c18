"""Everything that shardkit raises on purpose.

::

    ShardkitError (.hint)
    ├── FormatError (.path)        the input cannot be read
    │   ├── UnknownFormat (.claimed)   no format recognises it, or more than one does
    │   ├── Malformed (.where)         it breaks the rules of its format
    │   └── LimitExceeded (.limit .actual)   it exceeds a safety limit for untrusted files
    ├── PlanError                  the request cannot be met with this input
    │   ├── NameClash                  two tensors would get one name
    │   ├── AmbiguousRoot              several subtrees could be the model
    │   ├── Unwritable                 the output format cannot store a tensor
    │   ├── NothingSelected            no tensor is left
    │   ├── BadSize                    a size that cannot be parsed
    │   └── BadDType                   an unknown type, or one that nothing can be cast to
    ├── OutputError                the output cannot be written or replaced
    │   └── NoRoom                     the disk is too small for it
    ├── UnknownTensor (.name)      a checkpoint has no tensor of this name; also a KeyError
    ├── LoadError                  a checkpoint cannot become a running model
    │   ├── Mismatch (.missing .unexpected .wrong_shape)   model and checkpoint are not compatible
    │   ├── ReadOnly (.places)         a lazy tensor would be written
    │   ├── NotTrained                 a gradient is wanted of a streamed weight; a RuntimeError too
    │   └── OverBudget (.needed .available)   the memory that may be used is too small
    └── PluginError (.distribution .entry_point)   a plugin cannot be loaded

A message is a sentence for the person who holds the file: where, what was found, what was needed.
*hint* says what to try; a traceback ends with it. Values that come out of a file reach a message
only through `shown`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shardkit.hints import Hint, Option, in_python, on_command_line

_SHOWN_CHARACTERS = 80
_DAMAGED = (
    "it was damaged on its way, or written wrong: fetch it again, or have it saved again "
    "where it was made"
)


class ShardkitError(Exception):
    """The root of the tree: catch this to catch them all.

    Attributes:
        hint: what to try next, one sentence that names arguments of the library; None where there
            is nothing to say. It is a note of the exception as well (PEP 678), so that a traceback
            ends with it.
        command_hint: the same for the command line, with options as they are typed there.
    """

    def __init__(self, message: str, *, hint: Hint | None = None) -> None:
        super().__init__(message)
        self.hint = None if hint is None else _printable(in_python(hint))
        self.command_hint = None if hint is None else _printable(on_command_line(hint))
        if self.hint:
            self.add_note(f"hint: {self.hint}")

    def __reduce__(self) -> tuple[object, ...]:
        # By default an exception is made anew from its message alone, which most of these do not
        # take.
        return _revived, (type(self), self.args), self.__dict__


class FormatError(ShardkitError):
    """The input cannot be read.

    Attributes:
        path: the file or folder at fault.
    """

    def __init__(self, path: Path, message: str, *, hint: Hint | None = None) -> None:
        super().__init__(f"{shown_path(path)}: {message}", hint=hint)
        self.path = path


class UnknownFormat(FormatError):
    """No format recognises the file, or more than one does.

    Attributes:
        claimed: whether more than one does.
        holds_weights: whether it is known to hold weights, in a form that is not read.
    """

    def __init__(
        self,
        path: Path,
        message: str,
        *,
        claimed: bool = False,
        holds_weights: bool = False,
        hint: Hint | None = None,
    ) -> None:
        super().__init__(path, message, hint=hint)
        self.claimed = claimed
        self.holds_weights = holds_weights


class Malformed(FormatError):
    """The file breaks the rules of its format.

    Attributes:
        where: the part at fault (a tensor, a member, a byte offset); empty where it is the file as
            a whole.
    """

    def __init__(
        self, path: Path, message: str, *, where: str = "", hint: Hint | None = None
    ) -> None:
        super().__init__(
            path, f"{_printable(where)}: {message}" if where else message, hint=hint or _DAMAGED
        )
        self.where = where


class LimitExceeded(FormatError):
    """The file asks for more than a stranger's file is given.

    Attributes:
        limit: name of the field of `Limits` that was hit.
        actual: what the file asked for, in that field's unit.
    """

    def __init__(
        self, path: Path, message: str, *, limit: str, actual: int, hint: Hint | None = None
    ) -> None:
        super().__init__(
            path,
            message,
            hint=hint or ("if you trust the file, raise the limit: ", _raised(limit, actual)),
        )
        self.limit = limit
        self.actual = actual


class PlanError(ShardkitError):
    """The request cannot be met with this input."""


class NameClash(PlanError):
    """Two tensors would get the same name."""


class AmbiguousRoot(PlanError):
    """Several subtrees could be the model."""


class Unwritable(PlanError):
    """The output format has no way to hold what was selected."""


class NothingSelected(PlanError):
    """No tensor is left to write."""


class BadSize(PlanError):
    """A size that cannot be read."""


class BadDType(PlanError):
    """A type that is none, or that nothing can be cast to."""


class OutputError(ShardkitError):
    """The output cannot be written or replaced."""


class NoRoom(OutputError):
    """The disk has less room than the output needs."""


class UnknownTensor(ShardkitError, KeyError):
    """A checkpoint holds no tensor of this name.

    Attributes:
        name: the one that was asked for.
    """

    def __init__(self, name: object, near: Sequence[str] = ()) -> None:
        """Say so, with names that are *near*."""
        hint = (
            f"near to it: {listed([shown(each) for each in near])}"
            if near
            else "list the names to see what there is"
        )
        super().__init__(f"there is no tensor {shown(name)}", hint=hint)
        self.name = name

    def __str__(self) -> str:  # a KeyError shows the repr of what it holds
        return str(self.args[0])


class LoadError(ShardkitError):
    """A checkpoint cannot become a running model."""


class Mismatch(LoadError):
    """The model and the checkpoint are not of one kind.

    Attributes:
        missing: names that the model has and the checkpoint has not.
        unexpected: names that the checkpoint has and the model has not.
        wrong_shape: for each name, the shape in the checkpoint and the shape in the model.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        wrong_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
        hint: Hint | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.missing = missing
        self.unexpected = unexpected
        self.wrong_shape = dict(wrong_shape or {})


class ReadOnly(LoadError):
    """A weight would be written that is an address.

    Attributes:
        places: where it lies: for each run of bytes the file, the first byte, and how many they
            are.
    """

    def __init__(
        self,
        message: str,
        *,
        places: tuple[tuple[Path, int, int], ...] = (),
        hint: Hint | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.places = places


class NotTrained(LoadError, RuntimeError):
    """A gradient is asked of a weight that streams, or through it when it is no longer in
    memory.
    """


class OverBudget(LoadError):
    """The memory that may be used is too small.

    Attributes:
        needed: bytes.
        available: bytes.
    """

    def __init__(
        self, message: str, *, needed: int, available: int, hint: Hint | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.needed = needed
        self.available = available


class PluginError(ShardkitError):
    """A plugin cannot be loaded, or breaks its contract.

    Attributes:
        distribution: the installed distribution that brings the plugin, with its version.
        entry_point: the entry point, as ``group:name``.
    """

    def __init__(
        self, distribution: str, entry_point: str, message: str, *, hint: Hint | None = None
    ) -> None:
        super().__init__(f"plugin {entry_point} of {distribution}: {message}", hint=hint)
        self.distribution = distribution
        self.entry_point = entry_point


def _revived(kind: type[ShardkitError], args: tuple[object, ...]) -> ShardkitError:
    return kind.__new__(kind, *args)


def _raised(limit: str, actual: int) -> Option:
    return Option(f"--limit {limit}={actual}", f"limits=Limits({limit}={actual})")


def shown(value: object) -> str:
    """A foreign *value* as one bounded, escaped piece of a sentence; never calls its methods.

    Text and bytes are quoted, cut at 80 characters and freed of control characters. Containers and
    objects are named by kind only, since the `repr` of a deep or shared structure may never end.
    """
    match value:
        case str():
            return _clipped(value)
        case bytes() | bytearray():
            return "bytes " + _clipped(bytes(value[: _SHOWN_CHARACTERS + 1]).decode("latin-1"))
        case bool() | None | float():
            return str(value)
        case int():
            return (
                str(value)
                if value.bit_length() <= 128
                else f"an integer of {value.bit_length()} bits"
            )
        case tuple() | list() | dict() | set() | frozenset():
            return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def listed(items: Sequence[str], *, most: int = 5) -> str:
    """The first *most* of *items*, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def several(count: int, noun: str) -> str:
    """*count* of *noun*, as in "1 file" or "3 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shown_path(path: Path) -> str:
    """*path* as it is printed: whole, but with control characters escaped."""
    return _printable(str(path))


def _printable(text: str) -> str:
    return "".join(_escaped(c) for c in text)


def _clipped(text: str) -> str:
    body = "".join(_escaped(c) for c in text[:_SHOWN_CHARACTERS])
    return f"'{body}'" if len(text) <= _SHOWN_CHARACTERS else f"'{body}…'"


def _escaped(character: str) -> str:
    return (
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode()
    )
