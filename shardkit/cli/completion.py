"""Shell completion of option values: names of formats, codecs, types, limits and devices. Nothing
here reads a checkpoint.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    import click

_SHORT_TYPES = ("bf16", "fp16", "fp32", "fp64")
RATES = ("disk", "copy", "link", "compute")  # the fields of `shardkit.load.rates.Rates`


def formats(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Formats that are installed, with the endings that their files have."""
    from shardkit.sources import registry

    found = [
        (each.name, " ".join(each.record.suffixes)) for each in registry.formats() if each.record
    ]
    return [
        CompletionItem(name, help=endings) for name, endings in found if name.startswith(incomplete)
    ]


def codecs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Codecs that are installed and can compress."""
    from shardkit.sources import registry

    names = (each.name for each in registry.codecs() if each.record and each.record.compress)
    return [name for name in names if name.startswith(incomplete)]


def types(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Types that floats can be cast to."""
    from shardkit.dtypes import DTYPES

    full = [
        dtype.torch for dtype in DTYPES if dtype.torch and dtype.kind == "float" and dtype.writable
    ]
    return [name for name in (*_SHORT_TYPES, *full) if name.startswith(incomplete)]


def limits(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Limits, each up to the value that is to be typed."""
    from shardkit.limits import Limits

    return [f"{field.name}=" for field in fields(Limits) if field.name.startswith(incomplete)]


def rates(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Rates that are not given yet, after those that are."""
    given, comma, last = incomplete.rpartition(",")
    taken = {part.partition("=")[0] for part in given.split(",")}
    return [
        f"{given}{comma}{name}=" for name in RATES if name.startswith(last) and name not in taken
    ]
