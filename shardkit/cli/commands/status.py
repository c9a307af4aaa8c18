"""`shardkit status`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.command import Command
from shardkit.cli.output.printing import Role, listed, named, painted, put, put_json, remarked
from shardkit.printable import several
from shardkit.sizes import format_size

if TYPE_CHECKING:
    from shardkit.operations.commit_output import Status

_MOST = 20  # names of missing files that are printed


@click.command("status", cls=Command)
@options.path_argument("output", "OUT")
@options.json_option("it")
def command(output: str, as_json: bool) -> None:
    """Show how far the output OUT of convert or offload-prep is: which files are complete, which
    are missing, and whether a process is writing.

    Nothing is changed, and the source is not read.
    """
    from shardkit.operations.commit_output import status

    found = status(output)
    if as_json:
        put_json("status", asdict(found))
    else:
        put("\n".join(_lines(found)))


def _lines(found: Status) -> Iterator[str]:
    out = named(found.out)
    if not found.files:
        state = "is in place" if found.state == "in place" else "is not begun"
        yield painted(f"{out} {state}", Role.HEADING)
        return
    amount = f"{format_size(found.done_nbytes)} of {format_size(found.nbytes)}"
    files = f"{found.done} of {several(found.files, 'file')}"
    yield painted(f"{out} is {found.state}: {files} written, {amount}", Role.HEADING)
    rows = [("source", named(Path(found.source)))] if found.source else []
    if found.missing:
        rows.append(("missing", listed(found.missing, most=_MOST)))
    rows.append(("running", "a process is writing" if found.running else "no process is writing"))
    if not found.missing and not found.running:
        rows.append(("next", f"shardkit commit {shlex.quote(str(found.out))}"))
    yield from remarked(rows)
