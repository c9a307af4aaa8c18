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
    │   ├── NoRoom                  the disk has too little free space
    │   └── Incomplete (.missing)   parts of the output are not written yet
    ├── UnknownTensor (.name)       a checkpoint has no tensor of this name; also a KeyError
    ├── LoadError                   a checkpoint cannot become a running model
    │   ├── Mismatch (.missing)     the model and the checkpoint are not compatible
    │   ├── ReadOnly (.places)      a lazy tensor of a checkpoint cannot be written
    │   ├── NotTrained              no gradient for a streamed weight; also a RuntimeError
    │   └── OverBudget (.needed)    the memory budget is too small
    └── PluginError                 a plugin cannot be loaded, or violates its contract

A message is a sentence for the person who holds the file: which file, what was found, what was
expected. *hint* says what to try; a traceback ends with it. Values that come out of a file reach a
message only through `shown` of `shardkit.printable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardkit.hints import Hint, Option
from shardkit.load_errors import LoadError, Mismatch, NotTrained, OverBudget, ReadOnly
from shardkit.printable import listed, printable, shown, shown_path
from shardkit.shardkit_error import ShardkitError

__all__ = [
    "AmbiguousRoot",
    "BadDType",
    "BadSize",
    "FormatError",
    "Incomplete",
    "LimitExceeded",
    "LoadError",
    "Malformed",
    "Mismatch",
    "NameClash",
    "NoRoom",
    "NotTrained",
    "NothingSelected",
    "OutputError",
    "OverBudget",
    "PlanError",
    "PluginError",
    "ReadOnly",
    "ShardkitError",
    "UnknownFormat",
    "UnknownTensor",
    "Unwritable",
]

_DAMAGED = "the file is corrupt: download it again or re-export it"


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
            path, f"{printable(where)}: {message}" if where else message, hint=hint or _DAMAGED
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


class Incomplete(OutputError):
    """Files of an output that is written in parts are missing, so it is not put in place.

    Attributes:
        missing: their names.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("model.safetensors", "out", part="2/2")
        >>> try:
        ...     shardkit.commit("out")
        ... except shardkit.Incomplete as error:
        ...     print(error.missing)
        ('model.safetensors',)
    """

    def __init__(
        self, message: str, *, missing: Sequence[str] = (), hint: Hint | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.missing = tuple(missing)


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


def _raised(limit: str, actual: int) -> Option:
    return Option(f"--limit {limit}={actual}", f"limits=Limits({limit}={actual})")
