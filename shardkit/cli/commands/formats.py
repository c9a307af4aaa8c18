"""`shardkit formats`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from shardkit.cli import options
from shardkit.cli.command import Command
from shardkit.cli.output.printing import Role, aligned, painted, put, put_json
from shardkit.printable import printable

if TYPE_CHECKING:
    from shardkit.payloads.codec import Codec
    from shardkit.sources.format import Format
    from shardkit.sources.registry import Loaded


@click.command(
    "formats",
    cls=Command,
    epilog="""\b
For example:
  shardkit formats
  pip install shardkit-npz && shardkit formats""",
)
@options.json_option("them")
def command(as_json: bool) -> None:
    """List the installed formats and codecs, the packages that provide them, and the plugins that
    cannot be used.

    Files are recognised by their content; the suffixes are those that such files usually have.
    """
    from shardkit.sources import registry

    formats, codecs = registry.formats(), registry.codecs()
    if as_json:
        put_json(
            "formats",
            {
                "formats": [*map(_format_document, formats)],
                "codecs": [*map(_codec_document, codecs)],
            },
        )
    else:
        put("\n".join(_lines(formats, codecs)))


def _lines(formats: Sequence[Loaded[Format]], codecs: Sequence[Loaded[Codec]]) -> Iterator[str]:
    rows = [
        (each.name, _abilities(each.record), " ".join(each.record.suffixes), each.distribution)
        for each in formats
        if each.record
    ]
    rows += [
        (each.name, _codec_abilities(each.record), each.record.suffix, each.distribution)
        for each in codecs
        if each.record
    ]
    heading, *lines = aligned(
        [("NAME", "CAN", "ENDINGS", "FROM"), *(tuple(map(printable, row)) for row in rows)],
        indent=0,
    )
    yield painted(heading, Role.HEADING)
    yield from lines
    for error in (*(each.error for each in formats), *(each.error for each in codecs)):
        if error:
            hint = f"; {error.command_hint}" if error.command_hint else ""
            yield f"{painted('cannot be used:', Role.ERROR)} {printable(str(error))}{hint}"


def _abilities(record: Format) -> str:
    return "read, write" if record.lay_out else "read"


def _codec_abilities(record: Codec) -> str:
    return "expand, compress" if record.compress else "expand"


def _format_document(loaded: Loaded[Format]) -> dict[str, object]:
    record = loaded.record
    return {
        "name": loaded.name,
        "can": _abilities(record).split(", ") if record else [],
        "suffixes": record.suffixes if record else [],
        "distribution": loaded.distribution,
        "error": str(loaded.error) if loaded.error else None,
    }


def _codec_document(loaded: Loaded[Codec]) -> dict[str, object]:
    record = loaded.record
    return {
        "name": loaded.name,
        "can": _codec_abilities(record).split(", ") if record else [],
        "suffixes": [record.suffix] if record else [],
        "distribution": loaded.distribution,
        "error": str(loaded.error) if loaded.error else None,
    }
