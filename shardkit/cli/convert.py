"""`shardkit convert`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.interruption import Terminated
from shardkit.cli.printing import named, put_json, say
from shardkit.progress import progress

if TYPE_CHECKING:
    from shardkit.conversion import Conversion, Report
    from shardkit.dtypes import DType
    from shardkit.edits import Ties
    from shardkit.limits import Limits


@click.command(
    "convert",
    epilog="""\b
For example:
  shardkit convert big.bin --max-shard 2GB
  shardkit convert run/last.ckpt --root ema --rename '^module\\.=' --dtype bf16 -o ema-bf16
  shardkit convert llama/ -o llama.safetensors

A run that was stopped goes on where it was when the same command is given again.""",
)
@options.path_argument("source", "SRC")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Folder to make, or one file if it ends in .safetensors. By default SRC's name with -shards, beside it.",
)
@click.option(
    "--max-shard",
    metavar="SIZE",
    default="5GB",
    show_default=True,
    callback=options.parse_shard_size,
    help="Bound on each file, header included, as in 2GB or 500MiB; none for a single shard.",
)
@options.edit_options
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Files written at a time: one per processor by default.")
@click.option("--no-fsync", is_flag=True, help="Do not wait for the disk; a power cut may then cost the output.")
@click.option(
    "--checksum",
    type=click.Choice(["xxh3", "sha256"]),
    help="Write digests of every file and tensor to shardkit.manifest.json, and check the source's own first.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of shardkit.")
@click.option("--no-companions", is_flag=True, help="Leave out the small files beside the weights: config, tokenizer, licence.")
@options.format_option
@options.limit_option
@options.json_option("what was done")
@options.quiet_option
@click.pass_context
def command(
    context: click.Context,
    source: Path,
    output: Path | None,
    max_shard: int | None,
    root: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    rename: tuple[tuple[str, str], ...],
    dtype: DType | None,
    ties: Ties,
    jobs: int | None,
    no_fsync: bool,
    checksum: str | None,
    dry_run: bool,
    overwrite: bool,
    no_companions: bool,
    format: str | None,  # noqa: A002 - the word of the command line
    limits: Limits,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the checkpoint SRC as safetensors shards of bounded size.

    SRC is a torch file of any age, a TorchScript archive, safetensors, an index, a folder, or a .zst of a file. Nothing in a
    pickle is run, and memory does not grow with the size of SRC. OUT appears whole, or not at all.

    The edits are applied in the order in which they are listed below: root, include and exclude, rename, dtype, ties.
    """
    from shardkit.cli.dry_run import rehearse
    from shardkit.conversion import prepare
    from shardkit.edits import Edits

    begun = time.monotonic()
    _refuse_shards_of_one_file(context, output, max_shard)
    edits = Edits(root, include, exclude, rename, dtype, ties)
    conversion = prepare(
        source,
        output,
        edits,
        max_shard=max_shard,
        format=format,
        with_companions=not no_companions,
        checksum=checksum,
        limits=limits,
    )
    if dry_run:
        rehearse(conversion, overwrite=overwrite, as_json=as_json)
        context.exit()
    report = _written(conversion, jobs=jobs, overwrite=overwrite, sync=not no_fsync, quiet=quiet or as_json)
    report = replace(report, seconds=time.monotonic() - begun)
    if as_json:
        put_json(asdict(report))
    elif not quiet:
        from shardkit.cli.summary import summary

        say("\n".join(summary(report)))


def _refuse_shards_of_one_file(context: click.Context, output: Path | None, max_shard: int | None) -> None:
    from click.core import ParameterSource

    from shardkit import registry

    asked = context.get_parameter_source("max_shard") is ParameterSource.COMMANDLINE
    if asked and max_shard is not None and output and not output.is_dir() and registry.writer_for(output.suffix):
        raise click.UsageError(
            f"-o {output} is one file, which has no shards: leave out --max-shard, or name a folder, as in -o {output.stem}",
            context,
        )


def _written(conversion: Conversion, *, jobs: int | None, overwrite: bool, sync: bool, quiet: bool) -> Report:
    from shardkit.conversion import carry_out

    with _resumable(conversion.out), progress("writing", quiet=quiet) as bar:
        bar.expect(conversion.plan.nbytes)
        return carry_out(conversion, jobs=jobs, overwrite=overwrite, on_bytes=bar.add, sync=sync)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say, where a signal stops the run, how it goes on."""
    from shardkit.destination import partial_folder

    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        partial = partial_folder(out.absolute())
        if partial.exists():
            stop.add_note(f"what is done is kept in {named(partial)}, and the same command goes on from there")
        raise
