"""The only place that prints: data to stdout, everything else to stderr, and no control characters of strangers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from shardkit.errors import OutputError

_STEP = "  "


def put(text: str) -> None:
    """Print *text*, which is data, to stdout.

    Raises:
        BrokenPipeError: nobody reads it.
        OutputError: it cannot be written for another reason, such as a full disk.
    """
    if sys.stdout is None:  # as Python leaves it where the shell has closed it: >&-
        raise OutputError("standard output is closed", hint="leave it open, or send it to a file")
    with _stdout_or_sentence():
        sys.stdout.write(f"{text}\n")


def put_json(document: object) -> None:
    """Print *document* to stdout on one line of ASCII; paths become text."""
    put(json.dumps(document, default=str))


def say(text: str, *, after_echo: bool = False) -> None:
    """Print *text*, which is for a person, to stderr; on a line of its own where the terminal has echoed a key before."""
    if sys.stderr is not None:
        start = "\n" if after_echo and sys.stderr.isatty() else ""
        print(f"{start}{text}", file=sys.stderr, flush=True)


def flush() -> None:
    """Write what stdout still holds; raises as `put` does."""
    if sys.stdout is not None:
        with _stdout_or_sentence():
            sys.stdout.flush()


def never_fail_to_encode() -> None:
    """Print as an escape what the terminal's encoding has no character for."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def nobody_reads() -> None:
    """Drop what is not printed yet, so that Python does not complain at its end that it cannot be."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        _drop(stream)


def printable(text: str) -> str:
    """*text* with all that a terminal might obey, or not show, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def named(path: Path) -> str:
    """*path* for a person; a folder ends in a slash."""
    return printable(f"{path}{os.sep if path.is_dir() else ''}")


def listed(names: Sequence[str], *, most: int) -> str:
    """The first *most* of *names*, and how many more there are."""
    shown = ", ".join(map(printable, names[:most]))
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def aligned(rows: Iterable[Sequence[str]], *, right: frozenset[int] = frozenset(), indent: int = 1) -> Iterator[str]:
    """*rows* of cells as lines; columns whose number is in *right* are aligned there."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.rjust(widths[at]) if at in right else cell.ljust(widths[at]) for at, cell in enumerate(row))
        yield f"{_STEP * indent}{_STEP.join(cells)}".rstrip()


@contextlib.contextmanager
def _stdout_or_sentence() -> Iterator[None]:
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
