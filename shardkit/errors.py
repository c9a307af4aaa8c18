"""Everything that shardkit raises on purpose.

    ShardkitError (.hint)           the root of the tree
    ├── FormatError (.path)         the input cannot be read
    │   ├── UnknownFormat           no format recognises the file, or more than one does
    │   ├── Malformed (.where)      the file violates the rules of its format
    │   └── LimitExceeded (.limit)  the file exceeds a safety limit for untrusted files
    ├── PlanError                   the options cannot be applied to this input
    │   ├── NameClash               two tensors would get one name
    │   ├── AmbiguousRoot           several subtrees could be the model
    │   ├── Unwritable              the output format cannot store a tensor
    │   ├── NothingSelected         no tensor is left to write
    │   ├── BadSize                 a size cannot be parsed
    │   └── BadDType                an unknown element type, or one without a conversion
    ├── OutputError                 the output cannot be written or replaced
    │   └── NoRoom                  the disk has too little free space
    ├── UnknownTensor (.name)       a checkpoint has no tensor of this name; also a KeyError
    ├── LoadError                   a checkpoint cannot become a running model
    │   ├── Mismatch (.missing)     the model and the checkpoint are not compatible
    │   ├── ReadOnly (.places)      a lazy tensor of a checkpoint cannot be written
    │   ├── NotTrained              no gradient for a streamed weight; also a RuntimeError
    │   └── OverBudget (.needed)    the memory budget is too small
    └── PluginError                 a plugin cannot be loaded, or violates its contract

A message is a sentence for the person who holds the file: which file, what was found, what was
expected. *hint* says what to try; a traceback ends with it. Values that come out of a file reach a
message only through `shown`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shardkit.hints import Hint, Option, in_python, on_command_line

_SHOWN_CHARACTERS = 80
_DAMAGED = "the file is corrupt: download it again or re-export it"


class ShardkitError(Exception):
    """The root of the tree: catch this to catch them all.

    Attributes:
        hint: what to try next, one sentence that names arguments of the library; None where there
            is nothing to suggest. It is a note of the exception as well (PEP 678), so that a
            traceback ends with it.
        command_hint: the same for the command line, with options as they are typed there.

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.convert("model.safetensors", "out", include=["decoder.*"])
        ... except shardkit.ShardkitError as error:
        ...     print(error.hint)
        run `shardkit inspect` to list the contents of the file
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

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.open("missing.safetensors")
        ... except shardkit.FormatError as error:
        ...     print(error)
        missing.safetensors: cannot be read: No such file or directory
    """

    def __init__(self, path: Path, message: str, *, hint: Hint | None = None) -> None:
        super().__init__(f"{shown_path(path)}: {message}", hint=hint)
        self.path = path


class UnknownFormat(FormatError):
    """No format recognises the file, or more than one does.

    Attributes:
        claimed: whether more than one does.
        holds_weights: whether the file is known to hold weights, in a form that is not read.

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.open("notes.txt")
        ... except shardkit.UnknownFormat as error:
        ...     print(error.path, error.claimed)
        notes.txt False
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
    """The file violates the rules of its format.

    Attributes:
        where: the part at fault (a tensor, a member, a byte offset); empty where it is the file as
            a whole.

    Example:
        >>> import shardkit
        >>> from pathlib import Path
        >>> incomplete = Path("model.safetensors").read_bytes()[:-4]
        >>> _ = Path("incomplete.safetensors").write_bytes(incomplete)
        >>> try:
        ...     shardkit.open("incomplete.safetensors")
        ... except shardkit.Malformed as error:
        ...     print(error)
        incomplete.safetensors: the tensors need 304 bytes, ...
    """

    def __init__(
        self, path: Path, message: str, *, where: str = "", hint: Hint | None = None
    ) -> None:
        super().__init__(
            path, f"{_printable(where)}: {message}" if where else message, hint=hint or _DAMAGED
        )
        self.where = where


class LimitExceeded(FormatError):
    """The file exceeds a safety limit for untrusted files.

    Attributes:
        limit: name of the field of `Limits` that was exceeded.
        actual: what the file needs, in that field's unit.

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.open("model.safetensors", limits=shardkit.Limits(tensors=2))
        ... except shardkit.LimitExceeded as error:
        ...     print(error.limit, error.actual)
        tensors 4
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
    """The options cannot be applied to this input.

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.convert("model.safetensors", "out", rename=[("(", "")])
        ... except shardkit.PlanError as error:
        ...     print(error)
        cannot rename '(' to '': missing ), unterminated subpattern at position 0
    """


class NameClash(PlanError):
    """Two tensors would get the same name.

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.convert("model.safetensors", "out", rename=[("^[02]", "linear")])
        ... except shardkit.NameClash as error:
        ...     print(error)
        rename gives '0.weight' and '2.weight' the same name, 'linear.weight'
    """


class AmbiguousRoot(PlanError):
    """Several subtrees could be the model; choose one with *root*.

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.convert("gan.pt", "out")
        ... except shardkit.AmbiguousRoot:
        ...     report = shardkit.convert("gan.pt", "out", root="generator")
        >>> report.tensors
        2
    """


class Unwritable(PlanError):
    """The output format cannot store a tensor that was selected.

    Example:
        The safetensors format has no type for complex numbers of 128 bits.

        >>> import shardkit
        >>> try:
        ...     shardkit.convert("complex128.pt", "out")
        ... except shardkit.Unwritable as error:
        ...     print("C128" in str(error), error.hint is not None)
        True True
    """


class NothingSelected(PlanError):
    """No tensor is left to write.

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.convert("model.safetensors", "out", exclude=["*"])
        ... except shardkit.NothingSelected as error:
        ...     print(error)
        include and exclude leave none of the 4 tensors
    """


class BadSize(PlanError):
    """A size cannot be parsed.

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.convert("model.safetensors", "out", max_shard="2 gigs")
        ... except shardkit.BadSize as error:
        ...     print(error)
        '2 gigs' is not a size
    """


class BadDType(PlanError):
    """An unknown element type, or one that nothing can be converted to.

    Example:
        >>> import shardkit
        >>> try:
        ...     shardkit.convert("model.safetensors", "out", dtype="int9")
        ... except shardkit.BadDType as error:
        ...     print(error)
        'int9' is not a floating-point type
    """


class OutputError(ShardkitError):
    """The output cannot be written or replaced.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("model.safetensors", "shards")
        >>> try:
        ...     shardkit.convert("model.safetensors", "shards")
        ... except shardkit.OutputError as error:
        ...     print(error)
        shards exists...
    """


class NoRoom(OutputError):
    """The disk has less free space than the output needs.

    Nothing is written before the free space is checked.

    Example:
        >>> import shardkit
        >>> try:
        ...     report = shardkit.convert("model.safetensors", "shards")
        ... except shardkit.NoRoom as error:
        ...     print(f"Choose another disk: {error}")
        ... else:
        ...     print(f"{report.nbytes} bytes of tensors written")
        304 bytes of tensors written
    """


class UnknownTensor(ShardkitError, KeyError):
    """A checkpoint has no tensor of this name.

    Attributes:
        name: the name that was requested.

    Example:
        >>> import shardkit
        >>> checkpoint = shardkit.open("model.safetensors")
        >>> try:
        ...     checkpoint["0.wieght"]
        ... except shardkit.UnknownTensor as error:
        ...     print(error.name, "weight" in error.hint)
        0.wieght True
    """

    def __init__(self, name: object, near: Sequence[str] = ()) -> None:
        """Compose the message; the hint lists names that are *near*."""
        hint = (
            f"similar names: {listed([shown(each) for each in near])}"
            if near
            else "list the names of the checkpoint to see all tensors"
        )
        super().__init__(f"there is no tensor {shown(name)}", hint=hint)
        self.name = name

    def __str__(self) -> str:  # a KeyError shows the repr of what it holds
        return str(self.args[0])


class LoadError(ShardkitError):
    """A checkpoint cannot become a running model.

    Example:
        >>> import shardkit
        >>> from shardkit.load import get_max_memory
        >>> try:
        ...     get_max_memory({"tpu": "8GB"})
        ... except shardkit.LoadError as error:
        ...     print("'tpu'" in str(error))
        True
    """


class Mismatch(LoadError):
    """The model and the checkpoint are not compatible.

    Attributes:
        missing: names that the model has and the checkpoint has not.
        unexpected: names that the checkpoint has and the model has not.
        wrong_shape: for each name, the shape in the checkpoint and the shape in the model.

    Example:
        >>> import shardkit
        >>> from shardkit.load import load_checkpoint_in_model
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> try:
        ...     load_checkpoint_in_model(model, "model.safetensors")
        ... except shardkit.Mismatch as error:
        ...     print(error.wrong_shape["2.weight"])
        ((4, 8), (2, 8))
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
    """A lazy tensor of a checkpoint cannot be written; clone it first.

    Attributes:
        places: where its bytes are stored: for each run of bytes the file, the offset of its first
            byte, and its length in bytes.

    Example:
        >>> import shardkit
        >>> from shardkit.load import tensors
        >>> bias = tensors("model.safetensors")["0.bias"]
        >>> try:
        ...     bias.zero_()
        ... except shardkit.ReadOnly:
        ...     bias = bias.clone().zero_()
        >>> float(bias.sum())
        0.0
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
    """A gradient is requested for a streamed weight, or through one that is no longer in memory.

    Example:
        >>> import shardkit
        >>> from shardkit.load import close, load_checkpoint_and_dispatch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = load_checkpoint_and_dispatch(model, "model.safetensors", {"": "disk"})
        >>> try:
        ...     model[0].weight.requires_grad_()
        ... except shardkit.NotTrained as error:
        ...     print(error)
        '0.weight' streams, and cannot be trained
        >>> close(model)
    """


class OverBudget(LoadError):
    """The memory budget is too small.

    Attributes:
        needed: bytes that the model needs.
        available: bytes that the budget allows.

    Example:
        >>> import shardkit
        >>> from shardkit.load import init_empty_weights, load_checkpoint_and_dispatch
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> try:
        ...     load_checkpoint_and_dispatch(
        ...         model, "model.safetensors", "auto", max_memory={"cpu": 200}, offload="never"
        ...     )
        ... except shardkit.OverBudget as error:
        ...     print(error.needed, error.available)
        384 200
    """

    def __init__(
        self, message: str, *, needed: int, available: int, hint: Hint | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.needed = needed
        self.available = available


class PluginError(ShardkitError):
    """A plugin cannot be loaded, or violates its contract.

    Attributes:
        distribution: the installed distribution that provides the plugin, with its version.
        entry_point: the entry point, as ``group:name``.

    Example:
        >>> import shardkit
        >>> try:
        ...     raise shardkit.PluginError(
        ...         "shardkit-npz 0.1", "shardkit.formats:npz", "No module named 'numpy'"
        ...     )
        ... except shardkit.PluginError as error:
        ...     print(error)
        plugin shardkit.formats:npz of shardkit-npz 0.1: No module named 'numpy'
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
    r"""Quote a *value* from an untrusted file as one bounded, escaped piece of a sentence.

    The value's own methods are never called. Text and bytes are quoted, cut at 80 characters and
    freed of control characters. Containers and objects are named by kind only, since the `repr` of
    a deep or shared structure may never end.

    Args:
        value: anything that a file holds.

    Returns:
        Printable text on one line.

    Example:
        >>> from shardkit.plugin import shown
        >>> print(shown("name\n\x1b[31m"), shown([1, 2]), shown(2**200))
        'name\n\x1b[31m' a list of 2 an integer of 201 bits
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
    """Write *count* with its *noun*, in the plural unless it is one.

    Args:
        count: how many there are.
        noun: in the singular; the plural adds an "s".

    Example:
        >>> from shardkit.plugin import several
        >>> several(1, "file"), several(1200, "tensor")
        ('1 file', '1,200 tensors')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shown_path(path: Path) -> str:
    """Return *path* as it is printed: complete, but with control characters escaped."""
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
