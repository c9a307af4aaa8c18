"""`shardkit place`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.printing import put, put_json
from shardkit.errors import ShardkitError
from shardkit.sizes import parse_size

if TYPE_CHECKING:
    from shardkit.dtypes import DType
    from shardkit.limits import Limits

_DEVICE = re.compile(r"(?:(?:cuda|xpu):)?(\d+)", re.ASCII)


def parse_budgets(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> dict[str, int]:
    """The budgets that several ``DEVICE=SIZE,DEVICE=SIZE`` give, in the order in which devices are filled."""
    budgets: dict[str, int] = {}
    for word in ",".join(words).split(",") if words else ():
        name, equals, size = word.strip().partition("=")
        number = _DEVICE.fullmatch(name)
        if not equals or not (number or name in ("cpu", "mps")):
            raise click.BadParameter(f"{word!r} must be DEVICE=SIZE, and DEVICE cpu, mps or the number of an accelerator")
        device = str(int(number[1])) if number else name
        if device in budgets:
            raise click.BadParameter(f"device {device} has two sizes")
        budgets[device] = _nbytes(size)
    return dict(sorted(budgets.items(), key=lambda item: (item[0] == "cpu", item[0] == "mps", len(item[0]), item[0])))


@click.command(
    "place",
    epilog="""\b
For example:
  shardkit place llama/ --max-memory cpu=30GB,0=10GB
  shardkit place llama/ --max-memory 0=24GB,1=24GB --dtype bf16
  shardkit place unet.bin --max-memory cpu=2GB --no-split 'transformer_blocks\\.\\d+$'""",
)
@options.path_argument("source", "SRC")
@click.option(
    "--max-memory",
    "budgets",
    metavar="DEVICE=SIZE,...",
    multiple=True,
    callback=parse_budgets,
    help="What each device may hold: accelerators by number, cpu, mps. Without cpu, it has what this machine has free.",
)
@click.option("--dtype", metavar="TYPE", callback=options.parse_type, help="Count floats as bf16, fp16, fp32 ...")
@click.option(
    "--no-split",
    metavar="REGEX",
    callback=options.parse_pattern,
    help="Keep each module whole in whose name this is found. By default numbered layers are.",
)
@options.root_option
@options.format_option
@options.limit_option
@options.json_option("the device of every block")
def command(
    source: Path,
    budgets: dict[str, int],
    dtype: DType | None,
    no_split: re.Pattern[str] | None,
    root: str | None,
    format: str | None,  # noqa: A002 - the word of the command line
    limits: Limits,
    as_json: bool,
) -> None:
    """Show on which device each part of the model in SRC would lie, what is left, and what does not fit.

    Only headers are read, and no model class is needed: what is run as one is told from the names. Accelerators are filled one
    after the other, as with device_map="sequential", then the CPU; the rest lies on disk. What lies on CPU or disk is brought
    to the first accelerator to be run, so that room for the largest block is kept there. Activations are not counted.
    """
    from shardkit.cli.placing import document, drawn, placed
    from shardkit.source import collector_paused
    from shardkit.source import open as open_checkpoint

    with collector_paused():
        checkpoint = open_checkpoint(source, format=format, limits=limits)
        found = placed(source, checkpoint, budgets, root=root, dtype=dtype, no_split=no_split)
    if as_json:
        put_json(document(found))
    else:
        put("\n".join(drawn(found)))


def _nbytes(size: str) -> int:
    try:
        return parse_size(size, least=0)
    except ShardkitError as error:
        raise click.BadParameter(f"{error}; {error.hint}") from None
