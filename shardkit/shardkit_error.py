"""The root of the error tree: a sentence with a hint, in the words of Python and of the command
line.
"""

from __future__ import annotations

from shardkit.hints import Hint, in_python, on_command_line
from shardkit.printable import printable


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
        self.hint = None if hint is None else printable(in_python(hint))
        self.command_hint = None if hint is None else printable(on_command_line(hint))
        if self.hint:
            self.add_note(f"hint: {self.hint}")

    def __reduce__(self) -> tuple[object, ...]:
        # By default an exception is made anew from its message alone, which most of these do not
        # take.
        return _revived, (type(self), self.args), self.__dict__


def _revived(kind: type[ShardkitError], args: tuple[object, ...]) -> ShardkitError:
    return kind.__new__(kind, *args)
