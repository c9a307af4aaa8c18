"""`shardkit verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.printing import named
from shardkit.errors import several
from shardkit.progress import progress

if TYPE_CHECKING:
    from shardkit.compare import Comparison
    from shardkit.edits import Edits
    from shardkit.limits import Limits


@click.command(
    "verify",
    epilog="""\b
For example:
  shardkit verify big-shards
  shardkit verify big-shards --against big.bin
  shardkit verify ema-bf16 --against run/last.ckpt --root ema --dtype bf16""",
)
@options.path_argument("output", "OUT")
@click.option("--against", metavar="SRC", type=click.Path(path_type=Path), help="Hold OUT against this checkpoint, bit for bit.")
@options.edit_options
@options.limit_option
@options.json_option("the differences")
@options.quiet_option
@click.pass_context
def command(
    context: click.Context,
    output: Path,
    against: Path | None,
    edits: Edits,
    limits: Limits,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check that OUT is whole: every header, the index against its shards, every byte there to be read, and every checksum
    that there is: the digests of shardkit.manifest.json, or the CRCs of a zip archive.

    With --against, check that it holds what converting SRC gives: the same names, types, shapes and bits, a tied weight
    under each of its names. Give the edits that were given to convert. Two checkpoints of any formats can be compared so.

    The exit code is 0 if all is well, 1 if something differs. In the list, - is missing from OUT, + is only in OUT, and ~
    differs.
    """
    from shardkit.cli.comparison import report
    from shardkit.compare import verify

    if against is None:
        _refuse_idle(context, edits)
    with progress("checking", quiet=quiet or as_json) as bar:
        comparison = verify(output, against, edits, limits=limits, on_bytes=bar.add, on_total=bar.expect)
    report(comparison, _verdict(comparison, output, against), as_json=as_json, quiet=quiet)
    context.exit(0 if comparison.same else 1)


def _refuse_idle(context: click.Context, edits: Edits) -> None:
    """Edits without a source to apply them to would look like a check that was made."""
    from dataclasses import replace

    from shardkit.edits import Edits

    if replace(edits, ties="keep-first") != Edits():
        raise click.UsageError("the edits are applied to the source: name it with --against", context)


def _verdict(comparison: Comparison, output: Path, against: Path | None) -> str:
    from shardkit.sizes import format_size

    amount = f"{several(comparison.tensors, 'tensor')}, {format_size(comparison.nbytes)}"
    if against is None and comparison.same:
        return f"{named(output)} is whole: {amount}, every byte read"
    if against is None:
        return f"{named(output)} is damaged in {several(len(comparison.differences), 'place')}"
    if comparison.same:
        return f"{named(output)} is the same as {named(against)}: {amount}, bit for bit"
    return f"{named(output)} differs from {named(against)} in {several(len(comparison.differences), 'tensor')}"
