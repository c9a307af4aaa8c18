"""The only module that prints: data to stdout, everything else to stderr, and control characters
escaped.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TextIO

from shardkit.errors import OutputError
from shardkit.printable import printable
from shardkit.sizes import format_size

if TYPE_CHECKING:
    from shardkit.checkpoint.entries import LeftOut

INDENT = "  "
_MOST_PARTS = 10


class Role(StrEnum):
    """What a piece of text is for a person, and the colour (SGR) that a terminal gives it."""

    HEADING = "1"
    ERROR = "1;31"
    HINT = "36"
    NOTE = "33"
    ADDED = "32"
    REMOVED = "31"


_NOTED = frozenset(
    {"note", "left out", "no tensors", "never run", "does not fit"}
)  # labels of what a person should see
_NO_ROLES: Mapping[str, Role] = MappingProxyType({})
_SGR = re.compile("\x1b\\[[0-9;]*m")


def painted(text: str, role: Role) -> str:
    """*text* in the colour of *role*, which `put` and `say` leave out where it is not wanted."""
    return f"\x1b[{role}m{text}\x1b[0m" if text else text


def put(text: str) -> None:
    """Print *text*, which is data, to stdout.

    Raises:
        BrokenPipeError: nobody reads it.
        OutputError: it cannot be written for another reason, such as a full disk.
    """
    if sys.stdout is None:  # as Python leaves it where the shell has closed it: >&-
        raise OutputError("standard output is closed", hint="leave it open, or send it to a file")
    with stdout_or_sentence():
        sys.stdout.write(f"{_for(sys.stdout, text)}\n")


def put_json(command: str, document: Mapping[str, object]) -> None:
    """Print the *document* of *command* to stdout on one line of ASCII, its schema first; paths
    become text.
    """
    put(json.dumps({"schema": f"shardkit.{command}/1", **document}, default=str))


def say(text: str, *, after_echo: bool = False) -> None:
    """Print *text*, which is for a person, to stderr; over what the terminal has echoed of a key
    before it.

    Raises:
        BrokenPipeError: nobody reads it. That it cannot be written for another reason stops no
            work.
    """
    if sys.stderr is None:
        return
    start = "\r" if after_echo and sys.stderr.isatty() else ""
    try:
        print(f"{start}{_for(sys.stderr, text)}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        _drop(sys.stderr)


def flush() -> None:
    """Write what stdout still holds; raises as `put` does."""
    if sys.stdout is not None:
        with stdout_or_sentence():
            sys.stdout.flush()


def never_fail_to_encode() -> None:
    """Print as an escape what the terminal's encoding has no character for."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def nobody_reads() -> None:
    """Drop what is not printed yet, so that Python does not complain at its end that it cannot
    be.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        _drop(stream)


def named(path: Path) -> str:
    """*path* for a person; a folder ends in a slash."""
    return printable(f"{path}{os.sep if path.is_dir() else ''}")


def listed(names: Sequence[str], *, most: int) -> str:
    """The first *most* of *names*, and how many more there are."""
    shown = ", ".join(map(printable, names[:most]))
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def parts_left_out(parts: Iterable[LeftOut]) -> Iterator[tuple[str, str]]:
    """What was not converted, each as a row with a word before it; the first of many."""
    weighty = [part for part in parts if part.nbytes]  # the others are among the objects
    for part in weighty[:_MOST_PARTS]:
        yield (
            "left out",
            f"{printable(part.path)}, {format_size(part.nbytes)}: {printable(part.reason)}",
        )
    if len(weighty) > _MOST_PARTS:
        yield "left out", f"{len(weighty) - _MOST_PARTS:,} more; --json lists all"


def aligned(
    rows: Iterable[Sequence[str]],
    *,
    right: frozenset[int] = frozenset(),
    indent: int = 1,
    roles: Mapping[str, Role] = _NO_ROLES,
) -> Iterator[str]:
    """*rows* of cells as lines; columns whose number is in *right* are aligned there, first cells
    in *roles* have its colour.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(widths[at]) if at in right else cell.ljust(widths[at])
            for at, cell in enumerate(row)
        ]
        if row[0] in roles:
            cells[0] = painted(cells[0], roles[row[0]])
        yield f"{INDENT * indent}{INDENT.join(cells)}".rstrip()


def remarked(rows: Iterable[Sequence[str]], *, indent: int = 1) -> Iterator[str]:
    """*rows* that begin with a label; those that a person should see have it in colour."""
    return aligned(rows, indent=indent, roles=dict.fromkeys(_NOTED, Role.NOTE))


def _for(stream: TextIO, text: str) -> str:
    return text if _is_colourful(stream) else _SGR.sub("", text)


def _is_colourful(stream: TextIO) -> bool:
    """Whether *stream* is to have colours: https://no-color.org, https://force-color.org, or a
    terminal that knows them.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    knows = os.environ.get("TERM") != "dumb" and (os.name != "nt" or "WT_SESSION" in os.environ)
    return knows and stream.isatty()


@contextlib.contextmanager
def stdout_or_sentence() -> Iterator[None]:
    """Raise OutputError where stdout, to which alone the body writes, cannot be written;
    BrokenPipeError goes through.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop(sys.stdout)
        message = f"standard output cannot be written: {error.strerror or error}"
        raise OutputError(message, hint="free some space, or send it elsewhere") from None


def _drop(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no file behind it
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
