"""`--dry-run`: print the plan, and whether it can be executed."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardkit.checkpoint.blocks import runs_of_names
from shardkit.checkpoint.entries import OtherKind
from shardkit.cli.output.printing import Role, aligned, named, painted, put, put_json, remarked
from shardkit.cli.output.summary import amounts, remarks, ways
from shardkit.errors import OutputError
from shardkit.hints import output
from shardkit.planning.output_path import check_output, check_room
from shardkit.printable import printable, several, shown_path
from shardkit.sizes import format_size
from shardkit.writing.copier import Engine
from shardkit.writing.writer import forecast

if TYPE_CHECKING:
    from shardkit.planning.plan import Plan
    from shardkit.planning.prepare import Conversion

_SIZE_COLUMN = frozenset({1})
_WORDS = {
    Engine.CLONED: "to clone",
    Engine.COPIED: "to copy",
    Engine.READ: "to read and write",
    Engine.TRANSFORMED: "to transform",
    Engine.WRITTEN: "headers",
    Engine.COMPRESSED: "to compress",
}


def rehearse(command: str, conversion: Conversion, *, overwrite: bool, as_json: bool) -> None:
    """Print what *conversion*, which *command* has decided, would write, and touch nothing.

    Raises:
        OutputError: it could not be carried out.
    """
    plan, out = conversion.plan, conversion.out
    folder = _standing(out.parent)
    moves = {file.name: _moves(replace(plan, files=(file,)), folder) for file in plan.files}
    total: Counter[str] = sum(moves.values(), Counter())
    needed = sum(count for word, count in total.items() if word != _WORDS[Engine.CLONED])
    if as_json:
        put_json(f"{command}.dry-run", _document(conversion, moves, needed, folder))
    else:
        put("\n".join(_lines(conversion, moves, total)))
    check_output(conversion.output, overwrite=overwrite)
    if not os.access(folder, os.W_OK):
        raise OutputError(
            f"{shown_path(folder)} is not writable",
            hint=("choose another output with ", output()),
        )
    check_room(folder, needed, conversion.output.name)
    if not as_json:
        free = format_size(shutil.disk_usage(folder).free)
        put(
            f"It needs {format_size(needed)}, and {named(folder)} has {free} free. Nothing was "
            "written."
        )


def _lines(
    conversion: Conversion, moves: Mapping[str, Counter[str]], total: Counter[str]
) -> Iterator[str]:
    plan, checkpoint = conversion.plan, conversion.checkpoint
    blocks = plan.record.blocks if plan.record else ()
    made = amounts(len(plan.shards), len(blocks), len(plan.weight_map), plan.total_size)
    yield painted(
        f"{named(conversion.source)} ({checkpoint.format}) → {named(conversion.out)}: {made}",
        Role.HEADING,
    )
    counts = Counter(plan.weight_map.values())
    files = (
        (file.name, format_size(file.nbytes), _content(counts[file.name]), ways(moves[file.name]))
        for file in plan.files
    )
    yield from aligned(((printable(name), *rest) for name, *rest in files), right=_SIZE_COLUMN)
    rows = [
        ("in all", ways(total)),
        *([("blocks", " → ".join(_runs(blocks)))] if blocks else []),
        *remarks(
            aliases=plan.aliases,
            cast=conversion.edited.cast,
            left_out=conversion.edited.left_out,
            objects=_names(conversion, OtherKind.OBJECT),
            calls=tuple(
                other.reason for other in checkpoint.others if other.kind is OtherKind.CALL
            ),
            notes=conversion.notes,
        ),
    ]
    yield from remarked(rows, indent=0)


def _runs(blocks: Sequence[str]) -> Iterator[str]:
    """The names of *blocks* in their order, those that are numbered one after the other as one."""
    for run in runs_of_names(blocks):
        yield printable(run[0] if len(run) == 1 else f"{run[0]} … {run[-1].rpartition('.')[2]}")


def _moves(plan: Plan, folder: Path) -> Counter[str]:
    """Bytes of *plan* by what is to be done with them."""
    return Counter({_WORDS[engine]: count for engine, count in forecast(plan, folder).items()})


def _content(tensors: int) -> str:
    return several(tensors, "tensor") if tensors else ""


def _document(
    conversion: Conversion, moves: Mapping[str, Counter[str]], needed: int, folder: Path
) -> dict[str, object]:
    plan = conversion.plan
    return {
        "source": conversion.source,
        "out": conversion.out,
        "format": conversion.checkpoint.format,
        "files": [
            {"name": file.name, "nbytes": file.nbytes, "engines": moves[file.name]}
            for file in plan.files
        ],
        "weight_map": plan.weight_map,
        "blocks": [asdict(run) for run in plan.record.runs] if plan.record else [],
        "aliases": plan.aliases,
        "nbytes": plan.total_size,
        "cast": conversion.edited.cast,
        "left_out": [asdict(part) for part in conversion.edited.left_out],
        "notes": conversion.notes,
        "needed": needed,
        "free": shutil.disk_usage(folder).free,
    }


def _names(conversion: Conversion, kind: OtherKind) -> tuple[str, ...]:
    return tuple(other.name for other in conversion.checkpoint.others if other.kind is kind)


def _standing(folder: Path) -> Path:
    """*folder*, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
