"""What was asked for, as JSON and back: with it an unfinished output is planned again.

The arguments have the names and values of `shardkit.convert` and `shardkit.offload_prep`; only
those that differ from the defaults are kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from shardkit.checkpoint.edits import Edits
from shardkit.dtypes import parse_dtype
from shardkit.errors import Malformed
from shardkit.limits import Limits
from shardkit.metadata.unit_records import Request
from shardkit.planning.options import ConversionOptions
from shardkit.sizes import parse_size


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of an operation.

    Attributes:
        operation: "convert" or "offload-prep".
        source: what is read.
        edits: what is changed.
        options: how the source is read and the output laid out.
        blocks: the pattern of the blocks of offload-prep.
        order: the order of its blocks.
    """

    operation: str
    source: Path
    edits: Edits
    options: ConversionOptions
    blocks: str | None = None
    order: tuple[str, ...] | None = None

    def request(self) -> Request:
        """The same as values of JSON."""
        max_shard = self.options.max_shard
        given: dict[str, object] = {
            **{field.name: getattr(self.edits, field.name) for field in fields(Edits)},
            **{field.name: getattr(self.options, field.name) for field in fields(self.options)},
            "max_shard": None if max_shard is None else parse_size(max_shard),
            "dtype": self.edits.dtype and self.edits.dtype.code,
            "limits": asdict(self.options.limits),
            "blocks": self.blocks,
            "order": self.order,
        }
        arguments = {
            name: _listed(value) for name, value in given.items() if value != _DEFAULTS[name]
        }
        return Request(self.operation, os.path.abspath(self.source), arguments)

    @classmethod
    def of(cls, request: Request, path: Path) -> Asked:
        """What *request*, which was read from *path*, asks for.

        Raises:
            Malformed: it has arguments that no operation takes.
        """
        given = _DEFAULTS | dict(request.arguments)
        try:
            dtype, limits = given["dtype"], given["limits"]
            edits = Edits(
                _text(given["root"]),
                _texts(given["include"]),
                _texts(given["exclude"]),
                tuple(_pair(rule) for rule in _sequence(given["rename"])),
                None if dtype is None else parse_dtype(_some_text(dtype)),
                "copy" if given["ties"] == "copy" else "keep-first",
            )
            options = ConversionOptions(
                _size(given["max_shard"]),
                _text(given["format"]),
                given["with_companions"] is True,
                _text(given["checksum"]),
                _text(given["compress"]),
                replace(Limits(), **_numbers(limits)),
            )
            order = given["order"]
            return cls(
                request.operation,
                Path(request.source),
                edits,
                options,
                _text(given["blocks"]),
                None if order is None else _texts(order),
            )
        except (TypeError, ValueError) as error:
            raise Malformed(
                path,
                f"says arguments that cannot be read: {error}",
                hint="run the command again with which the output was begun",
            ) from None


def pattern_text(blocks: str | re.Pattern[str] | None) -> str | None:
    """The regular expression *blocks* as it is written, its flags in front."""
    if not isinstance(blocks, re.Pattern):
        return blocks
    letters = "".join(letter for letter in "aimsx" if blocks.flags & re.RegexFlag[letter.upper()])
    return f"(?{letters}){blocks.pattern}" if letters else blocks.pattern


_DEFAULTS: dict[str, object] = {
    **{field.name: getattr(Edits(), field.name) for field in fields(Edits)},
    **{field.name: getattr(ConversionOptions(), field.name) for field in fields(ConversionOptions)},
    "max_shard": parse_size(str(ConversionOptions().max_shard)),
    "limits": asdict(Limits()),
    "blocks": None,
    "order": None,
}


def _listed(value: object) -> object:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def _sequence(value: object) -> Sequence[object]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} is no list")
    return value


def _some_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _text(value: object) -> str | None:
    return None if value is None else _some_text(value)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(_some_text, _sequence(value)))


def _pair(value: object) -> tuple[str, str]:
    pattern, replacement = _texts(value)
    return pattern, replacement


def _size(value: object) -> str | int | None:
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"{value!r} is no size")


def _numbers(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping) or not all(isinstance(each, int) for each in value.values()):
        raise TypeError(f"{value!r} are no limits")
    return dict(value)
