"""Print the result of a comparison, for verify and diff."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from shardkit.cli.output.printing import Role, aligned, painted, put, put_json, say
from shardkit.printable import printable, several
from shardkit.sizes import format_size

if TYPE_CHECKING:
    from shardkit.operations.comparison import Comparison, Difference

_MOST = 20
_SIGNS = {"added": "+", "removed": "-"}


def report(
    command: str, comparison: Comparison, verdict: str, *, as_json: bool, quiet: bool
) -> None:
    """Print what *command* found: the differences and then the *verdict*; nothing if *quiet*."""
    if as_json:
        put_json(command, {"same": comparison.same, **asdict(comparison)})
    elif not quiet:
        for note in comparison.notes:
            say(f"{painted('note:', Role.NOTE)} {printable(note)}")
        for part in comparison.left_out[:_MOST]:
            what = f"{printable(part.path)}, {format_size(part.nbytes)}: {printable(part.reason)}"
            say(f"{painted('not compared:', Role.NOTE)} {what}")
        if len(comparison.left_out) > _MOST:
            say(
                f"{painted('not compared:', Role.NOTE)} {len(comparison.left_out) - _MOST:,} "
                "more; --json lists all"
            )
        for line in _differences(comparison.differences):
            put(line)
        put(verdict)


def amount(comparison: Comparison) -> str:
    """What was compared, counted as `convert` counts what it writes."""
    tied = f" and {several(comparison.tied, 'tied name')}" if comparison.tied else ""
    stored = several(comparison.tensors - comparison.tied, "tensor")
    return f"{stored}{tied}, {format_size(comparison.nbytes)}"


def beside(comparison: Comparison) -> str:
    """The end of a verdict: what it does not cover."""
    count = len(comparison.left_out)
    return f"; {several(count, 'part')} with weights not compared" if count else ""


def _differences(differences: tuple[Difference, ...]) -> Iterator[str]:
    rows = [
        (_SIGNS.get(each.change, "~"), printable(each.name), _what(each))
        for each in differences[:_MOST]
    ]
    yield from aligned(rows, indent=0, roles={"-": Role.REMOVED, "+": Role.ADDED, "~": Role.NOTE})
    if len(differences) > _MOST:
        yield f"... and {len(differences) - _MOST:,} more; --json lists all"


def _what(difference: Difference) -> str:
    return (
        difference.detail
        if difference.change in _SIGNS
        else f"{difference.change}: {difference.detail}"
    )
