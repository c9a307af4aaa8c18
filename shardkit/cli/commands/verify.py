"""`shardkit verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.command import Command
from shardkit.cli.output.printing import named
from shardkit.errors import FormatError
from shardkit.printable import several
from shardkit.system.progress import progress

if TYPE_CHECKING:
    from shardkit.checkpoint.edits import Edits
    from shardkit.fleet.parts import Part
    from shardkit.fleet.ray_cluster import RayCluster
    from shardkit.limits import Limits
    from shardkit.operations.comparison import Comparison


@click.command(
    "verify",
    cls=Command,
    epilog="""\b
For example:
  shardkit verify big-shards
  shardkit verify big-shards --against big.bin
  shardkit verify ema-bf16 --against run/last.ckpt --root ema --dtype bf16""",
)
@options.path_argument("output", "OUT")
@click.option(
    "--against",
    metavar="SRC",
    type=click.Path(),
    help="Compare OUT with this checkpoint, bit for bit.",
)
@options.edit_options
@options.part_option
@options.executor_options
@options.limit_option
@options.json_option("the differences")
@options.quiet_option
@click.pass_context
def command(
    context: click.Context,
    output: str,
    against: str | None,
    edits: Edits,
    part: Part | None,
    cluster: RayCluster | None,
    limits: Limits,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check that OUT is complete and intact: every header, the index against its shards, that no
    byte is missing, and every checksum: the digests of shardkit.manifest.json or offload.json, or
    the CRCs of a zip archive.

    With --against, check that OUT holds the tensors that converting SRC gives: the same names,
    types, shapes and bits, a tied weight under each of its names. Repeat the edits that were used
    with convert. Checkpoints of different formats can be compared.

    Items that are not compared (subfolders, other weights, files beside the weights) are listed.

    The exit code is 0 if nothing differs; 1 if something differs, or a file of OUT is missing,
    truncated or otherwise damaged; and 2 if OUT or SRC cannot be read, or SRC is damaged. In the
    list, - is missing from OUT, + is only in OUT, and ~ differs.
    """
    from shardkit.cli.output.comparison_report import report
    from shardkit.operations.compare import damage, verify

    if against is None:
        _refuse_idle(context, edits)
    try:
        with progress("checking", quiet=quiet or as_json) as bar:
            comparison = verify(
                output,
                against,
                edits,
                part=None if part is None else str(part),
                executor=cluster,
                limits=limits,
                on_bytes=bar.add,
                on_total=bar.expect,
            )
    except FormatError as error:
        found = damage(error, output, against)
        if found is None:
            raise
        comparison, against = found, None  # there is nothing to say of SRC
    verdict = (
        _verdict_alone(comparison, Path(output))
        if against is None
        else _verdict(comparison, Path(output), Path(against))
    )
    if part is not None:
        verdict = f"part {part} of {verdict}"
    report("verify", comparison, verdict, as_json=as_json, quiet=quiet)
    context.exit(0 if comparison.same else 1)


def _refuse_idle(context: click.Context, edits: Edits) -> None:
    """Edits without a source to apply them to would look like a check that was made."""
    from shardkit.checkpoint.edits import Edits

    if edits != Edits():
        raise click.UsageError(
            "the edits are applied to the source: name it with --against", context
        )


def _verdict_alone(comparison: Comparison, output: Path) -> str:
    from shardkit.cli.output.comparison_report import amount, beside

    if not comparison.same:
        return f"{named(output)} is damaged in {several(len(comparison.differences), 'place')}"
    is_checked = comparison.tensors and not comparison.unchecked
    state = "is intact" if is_checked else "is complete"
    how = "every byte read and compared with a checksum" if is_checked else "every byte read"
    return f"{named(output)} {state}: {amount(comparison)}, {how}{beside(comparison)}"


def _verdict(comparison: Comparison, output: Path, against: Path) -> str:
    from shardkit.cli.output.comparison_report import amount, beside

    rest = beside(comparison)
    if comparison.same:
        return (
            f"{named(output)} holds the same tensors as {named(against)}: {amount(comparison)}, "
            f"bit for bit{rest}"
        )
    return (
        f"{named(output)} differs from {named(against)} in "
        f"{several(len(comparison.differences), 'tensor')}{rest}"
    )
