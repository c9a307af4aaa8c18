"""`shardkit place`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from shardkit.cli import completion, options
from shardkit.cli.command import Command
from shardkit.cli.output.printing import put, put_json
from shardkit.errors import ShardkitError
from shardkit.sizes import parse_size

if TYPE_CHECKING:
    from shardkit.dtypes import DType
    from shardkit.limits import Limits

_DEVICE = re.compile(r"(?:(?:cuda|xpu):)?(\d+)", re.ASCII)


def parse_rates(
    context: click.Context, parameter: click.Parameter, word: str | None
) -> dict[str, int]:
    """The bytes per second that ``disk=SIZE,compute=SIZE`` gives."""
    rates: dict[str, int] = {}
    for part in word.split(",") if word else ():
        name, _, size = part.strip().partition("=")
        if name not in completion.RATES:
            raise click.BadParameter(
                f"{part!r} must be NAME=SIZE, and NAME one of {', '.join(completion.RATES)}"
            )
        rates[name] = _nbytes(size.removesuffix("/s"), least=1)
    return rates


def parse_budgets(
    context: click.Context, parameter: click.Parameter, words: tuple[str, ...]
) -> dict[str, int]:
    """The budgets that several ``DEVICE=SIZE,DEVICE=SIZE`` give, in the order in which devices are
    filled.
    """
    budgets: dict[str, int] = {}
    for word in ",".join(words).split(",") if words else ():
        name, equals, size = word.strip().partition("=")
        number = _DEVICE.fullmatch(name)
        if not equals or not (number or name in ("cpu", "mps")):
            raise click.BadParameter(
                f"{word!r} must be DEVICE=SIZE, and DEVICE cpu, mps or the number of an accelerator"
            )
        device = str(int(number[1])) if number else name
        if device in budgets:
            raise click.BadParameter(f"device {device} has two sizes")
        budgets[device] = _nbytes(size)
    return dict(
        sorted(
            budgets.items(),
            key=lambda item: (item[0] == "cpu", item[0] == "mps", len(item[0]), item[0]),
        )
    )


@click.command(
    "place",
    cls=Command,
    epilog="""\b
For example:
  shardkit place llama/ --max-memory cpu=30GB,0=10GB
  shardkit place llama/ --max-memory 0=24GB,1=24GB --dtype bf16
  shardkit place llama/ --max-memory cpu=4GB --predict --tokens 16
  shardkit place llama/ --max-memory 0=24GB,cpu=60GB --rates disk=3GB,link=25GB,compute=900GB
  shardkit place unet.bin --max-memory cpu=2GB --no-split 'transformer_blocks\\.\\d+$'""",
)
@options.path_argument("source", "SRC")
@click.option(
    "--max-memory",
    "budgets",
    metavar="DEVICE=SIZE,...",
    multiple=True,
    callback=parse_budgets,
    help="Memory budget of each device: accelerators by number, cpu, mps. Without cpu, all free "
    "memory of this machine is used.",
)
@click.option(
    "--dtype",
    metavar="TYPE",
    callback=options.parse_type,
    shell_complete=completion.types,
    help="Count floats as bf16, fp16, fp32 ...",
)
@click.option(
    "--no-split",
    metavar="REGEX",
    callback=options.parse_pattern,
    help="Keep each module whose name matches on one device. By default these are the numbered "
    "layers.",
)
@click.option(
    "--predict",
    is_flag=True,
    help="Measure this machine for a second, and predict the time of a forward; needs torch.",
)
@click.option(
    "--rates",
    metavar="NAME=SIZE,...",
    callback=parse_rates,
    shell_complete=completion.rates,
    help="Predict with these bytes per second: disk, copy (in memory), link (to an accelerator), "
    "compute (weights multiplied).",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=1,
    help="Tokens in a forward, for --predict. Default: 1.",
)
@options.root_option
@options.format_option
@options.limit_option
@options.json_option("the device of every block")
@click.pass_context
def command(
    context: click.Context,
    source: str,
    budgets: dict[str, int],
    dtype: DType | None,
    no_split: re.Pattern[str] | None,
    predict: bool,
    rates: dict[str, int],
    tokens: int,
    root: str | None,
    format: str | None,  # noqa: A002 - the word of the command line
    limits: Limits,
    as_json: bool,
) -> None:
    """Show on which device each part of the model in SRC would be, what is left, and what does not
    fit.

    Only headers are read, and no model class is needed: blocks are inferred from tensor names.
    Accelerators are filled one after the other, as with device_map="sequential", then the CPU; the
    rest stays on disk. Blocks on CPU or disk are copied to the first accelerator to be run, and
    those on disk through the CPU, so room for the largest block is reserved on both. Activations
    are not counted.

    --predict and --rates also show how long a forward would take, and what limits it. If compute
    throughput is unknown, as for an accelerator of another machine, only a lower bound is shown:
    the time to transfer the weights.
    """
    from shardkit.cli.output.place_report import document, drawn, foreseen
    from shardkit.operations.place import placed
    from shardkit.sources.open import collector_paused
    from shardkit.sources.open import open as open_checkpoint

    _refuse_idle(context, predict=predict, rates=rates)
    with collector_paused():
        checkpoint = open_checkpoint(source, format=format, limits=limits)
        found = placed(Path(source), checkpoint, budgets, root=root, dtype=dtype, no_split=no_split)
    forecast = foreseen(found, rates, tokens if predict else None) if predict or rates else None
    if as_json:
        put_json("place", document(found, forecast))
    else:
        put("\n".join(drawn(found, forecast)))


def _refuse_idle(context: click.Context, *, predict: bool, rates: Mapping[str, int]) -> None:
    """Options that change nothing look like a prediction for what they say."""
    tokens = context.get_parameter_source("tokens") is ParameterSource.COMMANDLINE
    if tokens and not predict:
        raise click.UsageError("--tokens has no effect without --predict", context)
    if predict and len(rates) == len(completion.RATES):
        raise click.UsageError("--predict has no effect: --rates gives every rate", context)
    if tokens and "compute" in rates:
        raise click.UsageError(
            "--tokens has no effect: --rates gives the compute throughput", context
        )


def _nbytes(size: str, *, least: int = 0) -> int:
    try:
        return parse_size(size, least=least)
    except ShardkitError as error:
        raise click.BadParameter(f"{error}; {error.command_hint}") from None
