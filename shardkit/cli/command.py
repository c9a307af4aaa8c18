"""What every command has: --verbose, a sentence if its help cannot be printed, and a check for
options that exclude each other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import click

from shardkit.cli.output.printing import Role, painted, say, stdout_or_sentence
from shardkit.printable import printable

_CONTRADICTIONS = (
    (
        "quiet",
        "as_json",
        ("--quiet has no effect with --json, which prints only the document: remove one of them"),
    ),
    ("quiet", "verbose", "--quiet and --verbose exclude each other: remove one of them"),
)


class Command(click.Command):
    """A command of shardkit."""

    def __init__(self, *args: Any, **attributes: Any) -> None:  # Any: as of click.Command
        super().__init__(*args, **attributes)
        self.params.append(
            click.Option(
                ["-v", "--verbose"],
                count=True,
                help="Log to stderr what is done, and how long it takes; -vv for more.",
            )
        )

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        with stdout_or_sentence():  # --help prints
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> object:
        _refuse_contradictions(ctx)
        with _logged(ctx.params.pop("verbose")):
            return super().invoke(ctx)


def _refuse_contradictions(context: click.Context) -> None:
    given: MutableMapping[str, Any] = context.params
    for one, other, sentence in _CONTRADICTIONS:
        if given.get(one) and given.get(other):
            raise click.UsageError(sentence, context)


@contextmanager
def _logged(verbosity: int) -> Iterator[None]:
    """Show on stderr what shardkit logs meanwhile: nothing, what is done, or all."""
    if not verbosity:
        yield
        return
    logger, handler = logging.getLogger("shardkit"), _OnStderr()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbosity == 1 else logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


class _OnStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print one line: the seconds since the start, and the message."""
        since = f"{record.relativeCreated / 1000:8.3f} s"
        say(f"{painted(since, Role.HINT)}  {printable(record.getMessage())}")
