"""Hints: what to try next, worded once for the command line and for Python.

An option of a command is an argument of a function: `--root ema` is `root='ema'`. A hint is a text,
or a tuple of texts and options; `in_python` and `on_command_line` make one sentence of it.
"""

from __future__ import annotations

import errno
import glob
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

_LONGEST = 80  # characters of a name that are matched; the rest is a star


@dataclass(frozen=True, slots=True)
class Option:
    """A choice of the user, as it is written on the command line and in Python.

    Attributes:
        flag: on the command line.
        argument: in a call.

    Example:
        >>> from shardkit.plugin import Option, UnknownFormat
        >>> name = Option("--format npz", "format='npz'")
        >>> error = UnknownFormat("weights.npz", "is ambiguous", hint=("choose one with ", name))
        >>> error.hint, error.command_hint
        ("choose one with format='npz'", 'choose one with --format npz')
    """

    flag: str
    argument: str


Hint = str | tuple[str | Option, ...]


def option(name: str, value: str | bool | Sequence[str] | None = None) -> Option:
    """Name an option of a command, and the argument of the same name.

    Args:
        name: as in Python.
        value: what it is set to; a sequence for a flag that is repeated; None to name it only.

    Example:
        >>> from shardkit.plugin import option
        >>> option("max_shard", "2GB")
        Option(flag='--max-shard 2GB', argument="max_shard='2GB'")
        >>> option("exclude", ["*.bias", "head.*"]).flag
        "--exclude '*.bias' --exclude 'head.*'"
    """
    flag = f"--{name.replace('_', '-')}"
    match value:
        case None:
            return Option(flag, f"{name}=")
        case bool():
            return Option(flag, f"{name}={value}")
        case str():
            return Option(f"{flag} {shlex.quote(value)}", f"{name}={value!r}")
    return Option(
        " ".join(f"{flag} {shlex.quote(each)}" for each in value), f"{name}={list(value)!r}"
    )


def output(path: object = None) -> Option:
    """Name the option that chooses the output: *path*, or another place."""
    return (
        Option("-o", "out=")
        if path is None
        else Option(f"-o {shlex.quote(str(path))}", f"out={str(path)!r}")
    )


def renaming(pattern: str, replacement: str) -> Option:
    """Suggest to rename what matches *pattern*.

    Args:
        pattern: a regular expression.
        replacement: what replaces each match.

    Example:
        >>> from shardkit.plugin import renaming
        >>> renaming("^module[.]", "")
        Option(flag="--rename '^module[.]='", argument="rename=[('^module[.]', '')]")
    """
    return Option(
        f"--rename {shlex.quote(f'{pattern}={replacement}')}",
        f"rename=[({pattern!r}, {replacement!r})]",
    )


def excluding(names: Sequence[str], *, most: int = 5) -> Option:
    """Suggest to leave out the tensors called *names*."""
    globs = [glob.escape(name[:_LONGEST]) + "*" * (len(name) > _LONGEST) for name in names[:most]]
    found = option("exclude", globs)
    more = " …" * (len(names) > most)
    return Option(found.flag + more, found.argument + more)


def in_python(hint: Hint) -> str:
    """Word *hint* for someone who called a function."""
    return (
        hint
        if isinstance(hint, str)
        else "".join(part if isinstance(part, str) else part.argument for part in hint)
    )


def on_command_line(hint: Hint) -> str:
    """Word *hint* for someone who ran a command."""
    return (
        hint
        if isinstance(hint, str)
        else "".join(part if isinstance(part, str) else part.flag for part in hint)
    )


def after_reading(error: OSError) -> str:
    """Suggest what to do after *error*, which the system raised for a path to be read."""
    return _READING.get(error.errno or 0, "check the path and its disk")


def after_writing(error: OSError) -> Hint:
    """Suggest what to do after *error*, which the system raised for an output."""
    return _WRITING.get(error.errno or 0, _ELSEWHERE)


_ASK = "ask the owner of the file for permission to read it"
_READING = {
    errno.ENOENT: "check the path; it is relative to the working folder unless it begins with /",
    errno.ENOTDIR: "check the path: one of its parents is a file",
    errno.EACCES: _ASK,
    errno.EPERM: _ASK,
    errno.EIO: "run the command again, and check the disk or the network if it fails again",
    errno.ESTALE: "run the command again: a network file system has replaced the file",
    errno.EMFILE: "raise the limit of open files, as with: ulimit -n 4096",
}
_AGAIN = "run the same command again: it resumes where it stopped"
_ELSEWHERE: Hint = ("choose another output with ", output())
_WRITING: dict[int, Hint] = {
    errno.ENOSPC: f"free some space and {_AGAIN}",
    errno.EDQUOT: f"free some space and {_AGAIN}",
    errno.EFBIG: ("the file is too large for the file system: lower ", option("max_shard")),
    errno.EIO: f"{_AGAIN}; check the disk or the network if it fails again",
    errno.ENAMETOOLONG: ("choose a shorter name with ", output()),
}
