"""The command group: a table of commands, each of which is imported only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from shardkit import __version__
from shardkit.cli.output.printing import put, stdout_or_sentence

_COMMANDS = {
    "convert": "Write a checkpoint as size-bounded safetensors shards.",
    "offload-prep": "Write a checkpoint in the layout for streaming.",
    "commit": "Put an output in place that was written in parts.",
    "status": "Show how far an output is.",
    "inspect": "Show what a checkpoint holds, without reading weights.",
    "verify": "Check that an output is complete and equals its source.",
    "diff": "List what changes from one checkpoint to another.",
    "place": "Show on which device each part of a model would be.",
    "formats": "List the formats that can be read and written.",
}


class LazyGroup(click.Group):
    """A group whose commands are the modules of `commands`."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:  # Any: as of click.Group
        with stdout_or_sentence():  # --help and --version print
            return super().make_context(info_name, args, parent, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = import_module(f"shardkit.cli.commands.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(_what_else(args[0]), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(
    cls=LazyGroup,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
For example:
  shardkit inspect big.bin
  shardkit convert big.bin --max-shard 2GB
  shardkit verify big-shards --against big.bin""",
)
@click.version_option(__version__, prog_name="shardkit", message="%(prog)s %(version)s")
@click.pass_context
def shardkit(context: click.Context) -> None:
    """Turn any torch checkpoint into safe, size-bounded safetensors shards, without running its
    pickle.
    """
    if context.invoked_subcommand is None:
        put(context.get_help())


def _what_else(word: str) -> str:
    """What *word*, which is no command, may have been meant to be."""
    from difflib import get_close_matches

    if Path(word).exists():
        what = "folder" if Path(word).is_dir() else "file"
        return f"{word!r} is a {what}; a command must come first, as in: shardkit inspect {word}"
    close = get_close_matches(word, _COMMANDS, 1)
    return f"there is no command {word!r}" + (f"; did you mean {close[0]}?" if close else "")
