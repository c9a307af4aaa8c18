"""`shardkit offload-prep`."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.command import Command

if TYPE_CHECKING:
    from shardkit.checkpoint.edits import Edits
    from shardkit.cli.run_conversion import Writing
    from shardkit.planning.options import ConversionOptions


@click.command(
    "offload-prep",
    cls=Command,
    epilog="""\b
For example:
  shardkit offload-prep big.bin --dtype bf16
  shardkit offload-prep mixtral/ --max-shard 2GB -o /nvme/mixtral
  shardkit offload-prep unet.bin --blocks 'transformer_blocks\\.\\d+$'

An interrupted run resumes when the same command is run again.""",
)
@options.path_argument("source", "SRC")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="OUT",
    help="Folder to create. Default: SRC's name with -offload, beside it.",
)
@options.shard_size_option
@click.option(
    "--blocks",
    metavar="REGEX",
    callback=options.parse_pattern,
    help="Each module whose name matches is a block. By default these are numbered layers, and "
    "the modules beside them.",
)
@click.option(
    "--model-class",
    is_flag=True,
    help="Take the blocks from _no_split_modules of the class that config.json names; needs "
    "transformers.",
)
@click.option(
    "--order",
    type=click.Path(),
    metavar="FILE",
    help="Blocks, or modules or tensors in them, in the order in which they run: a JSON list, or "
    "one on each line.",
)
@options.edit_options
@options.writing_options
@click.pass_context
def command(
    context: click.Context,
    source: str,
    output: str | None,
    blocks: re.Pattern[str] | None,
    model_class: bool,
    order: str | None,
    edits: Edits,
    terms: ConversionOptions,
    writing: Writing,
) -> None:
    """Write the checkpoint SRC as a folder from which a model larger than memory streams with one
    read per block.

    OUT is an ordinary folder of safetensors shards, which every library of Hugging Face loads. In
    it each block (a numbered layer with its experts, the embeddings, the head) is contiguous, and
    blocks are stored in the order in which they run. offload.json lists the byte range and a digest
    of each block; `shardkit verify` checks the digests. Use --dtype to cast once here, to the type
    that the model runs in.

    SRC may be in any format that convert reads. No model class is needed, and no pickle is
    executed.
    """
    from shardkit.cli.run_conversion import write
    from shardkit.operations.offload_prep import prepare_offload, read_order

    begun = time.monotonic()
    if writing.executor is not None:
        from shardkit.operations.convert import as_all_see_them, refuse_alone

        refuse_alone(writing.part, writing.sync)
        source, output = as_all_see_them(source, output)
    if blocks is not None and model_class:
        raise click.UsageError(
            "--blocks and --model-class exclude each other: remove one of them", context
        )
    conversion = prepare_offload(
        source,
        output,
        edits,
        terms,
        blocks=_pattern_of_class(source) if model_class else blocks,
        order=None if order is None else read_order(order),
        in_parts=writing.is_shared,
    )
    write("offload-prep", conversion, begun, writing)


def _pattern_of_class(source: str) -> re.Pattern[str]:
    from shardkit.load import no_split_pattern
    from shardkit.sources.path_arguments import to_read

    path = to_read(source)
    return no_split_pattern(path if path.is_dir() else path.parent)
