"""`shardkit inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.command import Command
from shardkit.cli.output.printing import put, put_json

if TYPE_CHECKING:
    from shardkit.limits import Limits


@click.command(
    "inspect",
    cls=Command,
    epilog="""\b
For example:
  shardkit inspect big.bin
  shardkit inspect run/last.ckpt --all | less
  shardkit inspect run/last.ckpt --root ema
  shardkit inspect llama/ --json | jq '.tensors[] | select(.dtype == "F32") | .name'""",
)
@options.path_argument("source", "SRC")
@click.option(
    "--all", "everything", is_flag=True, help="Show every tensor, in any number of lines."
)
@click.option(
    "--root",
    metavar="PATH",
    help="Show only the subtree at this dotted path, as convert --root takes it; '.' for "
    "everything. Default: everything.",
)
@options.format_option
@options.limit_option
@options.json_option("every tensor, with its byte range,")
@click.pass_context
def command(
    context: click.Context,
    source: str,
    everything: bool,
    root: str | None,
    format: str | None,  # noqa: A002 - the word of the command line
    limits: Limits,
    as_json: bool,
) -> None:
    """Show what the checkpoint SRC holds: names, types, shapes, bytes, ties, views, and objects
    that are not tensors.

    Only headers are read, and no pickle is executed; functions that it asks to call are listed by
    name. Beyond 200 lines, numbered parts with equal content are folded, then the deepest parts.
    """
    from shardkit.checkpoint.model_root import at_root
    from shardkit.cli.output.inspect_json import document
    from shardkit.cli.output.inspect_text import portrait
    from shardkit.sources.open import collector_paused
    from shardkit.sources.open import open as open_checkpoint

    if everything and as_json:
        raise click.UsageError(
            "--all has no effect with --json, which lists every tensor anyway", context
        )
    with collector_paused():
        checkpoint = open_checkpoint(source, format=format, limits=limits)
        if root is not None:
            checkpoint = at_root(checkpoint, root)
        if as_json:
            put_json("inspect", document(Path(source), checkpoint, root))
        else:
            put("\n".join(portrait(Path(source), checkpoint, root, everything=everything)))
