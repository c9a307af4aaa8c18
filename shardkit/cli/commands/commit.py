"""`shardkit commit`."""

from __future__ import annotations

from dataclasses import asdict

import click

from shardkit.cli import options
from shardkit.cli.command import Command


@click.command(
    "commit",
    cls=Command,
    epilog="""\b
For example, on one machine:
  for k in 1 2 3 4; do shardkit convert big.bin -o big-shards --part $k/4 & done; wait
  shardkit commit big-shards""",
)
@options.path_argument("output", "OUT")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of shardkit.")
@options.json_option("what was done")
@options.quiet_option
def command(output: str, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Put the output OUT in its place, which convert or offload-prep has written with --part.

    The source is planned again from its headers, and the record of every file is compared with the
    plan. Files that hold digests of others are written, what killed processes left is removed, and
    OUT appears. If files are missing, they are listed, nothing changes, and the exit code is 1.
    """
    from shardkit.cli.output.printing import put_json, say
    from shardkit.cli.output.summary import summary
    from shardkit.cli.run_conversion import shown_on
    from shardkit.operations.commit_output import commit
    from shardkit.system.progress import progress

    with progress("committing", quiet=quiet or as_json) as bar:
        report = commit(output, overwrite=overwrite, on_event=shown_on(bar))
    if as_json:
        put_json("commit", asdict(report))
    elif not quiet:
        say("\n".join(summary(report)))
