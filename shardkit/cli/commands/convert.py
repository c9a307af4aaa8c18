"""`shardkit convert`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.command import Command

if TYPE_CHECKING:
    from shardkit.checkpoint.edits import Edits
    from shardkit.cli.run_conversion import Writing
    from shardkit.planning.options import ConversionOptions


@click.command(
    "convert",
    cls=Command,
    epilog="""\b
For example:
  shardkit convert big.bin --max-shard 2GB
  shardkit convert run/last.ckpt --root ema --rename '^module\\.=' --dtype bf16 -o ema-bf16
  shardkit convert llama/ -o llama.safetensors

An interrupted run resumes when the same command is run again.""",
)
@options.path_argument("source", "SRC")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="OUT",
    help="Folder to create, or a file if it ends in .safetensors. Default: SRC's name with "
    "-shards, beside it.",
)
@options.shard_size_option
@options.edit_options
@options.writing_options
@click.pass_context
def command(
    context: click.Context,
    source: str,
    output: str | None,
    edits: Edits,
    terms: ConversionOptions,
    writing: Writing,
) -> None:
    """Write the checkpoint SRC as safetensors shards of bounded size.

    SRC is a torch file of any age, a TorchScript archive, safetensors, an index, a folder, or a
    .zst of a file. No pickle is executed, and memory does not grow with the size of SRC. OUT
    appears complete or not at all.

    The edits are applied in the order in which they are listed below: root, include and exclude,
    rename, dtype, ties.
    """
    from shardkit.cli.run_conversion import write
    from shardkit.planning.prepare import prepare

    begun = time.monotonic()
    if writing.executor is not None:
        from shardkit.operations.convert import as_all_see_them, refuse_alone

        refuse_alone(writing.part, writing.sync)
        source, output = as_all_see_them(source, output)
    _refuse_shards_of_one_file(context, output, terms)
    conversion = prepare(source, output, edits, terms, in_parts=writing.is_shared)
    write("convert", conversion, begun, writing)


def _refuse_shards_of_one_file(
    context: click.Context, output: str | None, terms: ConversionOptions
) -> None:
    from click.core import ParameterSource

    from shardkit.sources import registry

    asked = context.get_parameter_source("max_shard") is ParameterSource.COMMANDLINE
    out = Path(output or "")
    if (
        asked
        and terms.max_shard is not None
        and not out.is_dir()
        and registry.writer_for(out.suffix)
    ):
        raise click.UsageError(
            (
                f"-o {out} is one file, which has no shards: leave out --max-shard, or name a "
                f"folder, as in -o {out.stem}"
            ),
            context,
        )
