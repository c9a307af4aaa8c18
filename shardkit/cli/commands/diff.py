"""`shardkit diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.command import Command
from shardkit.system.progress import progress

if TYPE_CHECKING:
    from shardkit.limits import Limits
    from shardkit.operations.comparison import Comparison


@click.command(
    "diff",
    cls=Command,
    epilog="""\b
For example:
  shardkit diff before.pt after.pt
  shardkit diff llama/ finetuned/ --json""",
)
@options.path_argument("a", "A")
@options.path_argument("b", "B")
@click.option(
    "--root", metavar="PATH", help="Compare the subtree at this dotted path; '.' for everything."
)
@options.limit_option
@options.json_option("all differences")
@options.quiet_option
@click.pass_context
def command(
    context: click.Context,
    a: str,
    b: str,
    root: str | None,
    limits: Limits,
    as_json: bool,
    quiet: bool,
) -> None:
    """List what changes from checkpoint A to checkpoint B.

    A line that begins with - names a tensor that only A has, + one that only B has, ~ one whose
    type, shape or bytes changed. Bits are compared: a NaN equals itself, and the format does not
    matter. In a nested checkpoint the model is compared, unless --root says otherwise. The exit
    code is 0 if nothing changes, 1 if something does, and 2 if A or B cannot be read.
    """
    from shardkit.cli.output.comparison_report import report
    from shardkit.operations.compare import diff

    with progress("comparing", quiet=quiet or as_json) as bar:
        comparison = diff(a, b, root=root, limits=limits, on_bytes=bar.add, on_total=bar.expect)
    report("diff", comparison, _verdict(comparison), as_json=as_json, quiet=quiet)
    context.exit(0 if comparison.same else 1)


def _verdict(comparison: Comparison) -> str:
    from shardkit.cli.output.comparison_report import amount, beside

    rest = beside(comparison)
    if comparison.same:
        return f"no difference: {amount(comparison)}{rest}"
    counts = {
        word: sum(each.change == word for each in comparison.differences)
        for word in ("added", "removed")
    }
    counts["changed"] = len(comparison.differences) - sum(counts.values())
    return (
        ", ".join(f"{count:,} {word}" for word, count in counts.items())
        + f", {comparison.tensors:,} in both{rest}"
    )
