"""The command line: run a command, and turn errors into a sentence and an exit code.

    0    done; for verify and diff: the same
    1    failed; for verify and diff, as for cmp and diff: different, or damaged
    2    invalid command line; for verify and diff also: failed
    130  interrupted by Ctrl-C
    141  the reader of the output has closed it
    143  terminated by SIGTERM

An exception that is not a `ShardkitError` is a bug, and keeps its traceback.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import Never

from shardkit.cli.interruption import Terminated, signals_raise
from shardkit.cli.output.printing import (
    Role,
    flush,
    never_fail_to_encode,
    nobody_reads,
    painted,
    say,
    stdout_or_sentence,
)
from shardkit.errors import ShardkitError
from shardkit.printable import printable

_CLOSED_PIPE = 141  # 128 + SIGPIPE, as of every other program in the pipe
_COMPARING = ("diff", "verify")  # their exit codes are those of cmp and diff
# what the shell sets when it asks for completions, by the convention of click
_COMPLETION = "_SHARDKIT_COMPLETE"


def run() -> Never:
    """Run the command line of this process, and end it with the exit code.

    The collector of cycles stays off: what is imported is no garbage, nor is what a command makes
    of a checkpoint, and to walk it all, again and again and last of all when Python ends, is much
    of the time of a short command.
    """
    gc.disable()
    code = main()
    gc.freeze()
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and give the exit code.

    Args:
        arguments: what follows ``shardkit``; None for the arguments of this process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        import click  # noqa: F401 - so that its absence has a sentence of its own
    except ModuleNotFoundError:
        _explain("the command line needs click, which is not installed", "pip install click")
        return _trouble(arguments)
    never_fail_to_encode()
    try:
        return _ended(arguments)
    except BrokenPipeError:
        nobody_reads()
        return _CLOSED_PIPE


def _ended(arguments: Sequence[str]) -> int:
    """Run to the end, whichever that is."""
    import click

    try:
        with signals_raise():
            code = _run(arguments)
        flush()
        return code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "shardkit"
        _explain(error.format_message(), f"see {command} --help")
        return error.exit_code
    except ShardkitError as error:
        _explain(str(error), error.command_hint)
        return _trouble(arguments)
    except (KeyboardInterrupt, Terminated) as stop:
        say(
            "; ".join(["shardkit: stopped", *getattr(stop, "__notes__", ())]),
            after_echo=isinstance(stop, KeyboardInterrupt),
        )
        return stop.exit_code if isinstance(stop, Terminated) else 130


def _run(arguments: Sequence[str]) -> int:
    from click.exceptions import Exit

    from shardkit.cli.group import shardkit

    if instruction := os.environ.get(_COMPLETION):
        from click.shell_completion import shell_complete

        with stdout_or_sentence():
            return shell_complete(shardkit, {}, "shardkit", _COMPLETION, instruction)
    try:
        with shardkit.make_context("shardkit", list(arguments)) as context:
            shardkit.invoke(context)
    except Exit as end:
        return end.exit_code
    return 0


def _trouble(arguments: Sequence[str]) -> int:
    """The exit code where the command in *arguments* could not do its work."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    return 2 if command in _COMPARING else 1


def _explain(sentence: str, hint: str | None) -> None:
    say(f"{painted('shardkit:', Role.ERROR)} {printable(sentence)}")
    if hint:
        say(f"{painted('hint:', Role.HINT)} {printable(hint)}")
