"""A checkpoint as text: a header, the tree of names, and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint, OtherKind, TensorEntry
from shardkit.checkpoint.model_root import select_root
from shardkit.cli.output.name_tree import Leaf, Line, outline
from shardkit.cli.output.printing import (
    INDENT,
    Role,
    aligned,
    listed,
    named,
    painted,
    parts_left_out,
    remarked,
)
from shardkit.cli.output.shared_storage import overlaps, ties
from shardkit.errors import AmbiguousRoot, NothingSelected
from shardkit.payloads.strided import Strided
from shardkit.printable import printable, several, shown
from shardkit.sizes import format_size

_MOST_LINES = 200
_MOST_NAMES = 10
_LONGEST = 120  # characters of a label or remark
_DEEPEST = 30  # levels; what lies deeper is not indented further
_SIZE_COLUMN = frozenset({3})


def portrait(
    source: Path, checkpoint: Checkpoint, root: str | None = None, *, everything: bool
) -> Iterator[str]:
    """The lines that show *checkpoint*, or its part *root*; of any number if *everything* is to be
    seen.
    """
    lines, folded = outline(_leaves(checkpoint), most=None if everything else _MOST_LINES)
    yield from _head(source, checkpoint, root)
    if lines:
        yield ""
        yield from aligned(map(_cells, lines), right=_SIZE_COLUMN, indent=0)
    foot = list(_foot(checkpoint, root, folded=folded))
    if foot:
        yield ""
        yield from remarked(foot, indent=0)


def _head(source: Path, checkpoint: Checkpoint, root: str | None) -> Iterator[str]:
    files = several(len(checkpoint.files), "file")
    size = format_size(sum(file.size for file in checkpoint.files))
    yield painted(f"{named(source)}: {checkpoint.format}, {files}, {size}", Role.HEADING)
    codes = Counter(entry.dtype.code for entry in checkpoint.tensors)
    types = ", ".join(f"{count:,} {code}" for code, count in codes.most_common())
    below = f"{shown(root)}: " if root not in (None, ".") else ""
    made = f"{below}{several(len(checkpoint.tensors), 'tensor')}, {format_size(checkpoint.nbytes)}"
    yield f"{made}: {types}" if types else made


def _leaves(checkpoint: Checkpoint) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    tensors = checkpoint.tensors
    tied = ties(tensors)
    over = overlaps(tensors, tied)
    plain = cache(_plain)  # most are alike, and there may be a hundred thousand
    for number, entry in enumerate(tensors):
        if number in tied:
            kept = tensors[tied[number]]
            yield (
                entry.path,
                Leaf(
                    entry.dtype.code,
                    str(list(entry.shape)),
                    0,
                    f"= {kept.name}",
                    tie=_seen_from(entry, kept),
                ),
            )
        else:
            remark = _remark(entry, tensors[over[number]] if number in over else None)
            yield entry.path, plain(entry.dtype.code, entry.shape, entry.nbytes, remark)
    for other in checkpoint.others:
        if other.kind is not OtherKind.CALL:
            yield other.path, Leaf(other.kind, "", other.nbytes, other.reason, is_tensor=False)


def _plain(code: str, shape: tuple[int, ...], nbytes: int, remark: str) -> Leaf:
    return Leaf(code, str(list(shape)), nbytes, remark)


def _remark(entry: TensorEntry, below: TensorEntry | None) -> str:
    """What there is to say of *entry*, which lies over *below*."""
    if below is None:
        return "strided view" if type(entry.payload) is Strided else ""
    place = f"in the storage of {below.name}"
    return f"strided view, {place}" if type(entry.payload) is Strided else place


def _seen_from(entry: TensorEntry, kept: TensorEntry) -> str:
    """The way from the one name to the other, which is the same for two pairs that lie alike in the
    tree.
    """
    here, there = entry.name.split("."), kept.name.split(".")
    same = next(
        (at for at, (a, b) in enumerate(zip(here, there, strict=False)) if a != b),
        min(len(here), len(there)),
    )
    return ".".join([*("^" for _ in here[same:]), *there[same:]])


def _cells(line: Line) -> tuple[str, str, str, str, str]:
    indent = INDENT * min(line.depth, _DEEPEST)
    if line.item is None:
        return f"{indent}… {line.hidden:,} more", "", "", "", ""
    item = line.item
    label = indent + (_clipped(item.label) or "(the file itself)")
    times = f"{item.times:,} × " if item.times > 1 else ""
    if item.leaf:
        leaf = item.leaf
        size = "" if leaf.tie or not (leaf.is_tensor or leaf.nbytes) else format_size(item.nbytes)
        return label, f"{times}{leaf.kind}", leaf.shape, size, _clipped(leaf.remark)
    return (
        label,
        times.rstrip(),
        several(item.tensors // item.times, "tensor"),
        format_size(item.nbytes),
        "",
    )


def _clipped(text: str) -> str:
    return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def _foot(checkpoint: Checkpoint, root: str | None, *, folded: bool) -> Iterator[tuple[str, str]]:
    if folded:
        yield "folded", "--all shows every tensor"
    if root is None:
        yield from _root(checkpoint)
    calls = tuple(other.reason for other in checkpoint.others if other.kind is OtherKind.CALL)
    if calls:
        yield "never run", listed(calls, most=_MOST_NAMES)
    for key, text in list(checkpoint.metadata.items())[:_MOST_NAMES]:
        yield "metadata", f"{_clipped(key)}: {shown(text)}"
    if len(checkpoint.metadata) > _MOST_NAMES:
        yield "metadata", f"{len(checkpoint.metadata) - _MOST_NAMES:,} more; --json lists all"
    yield from parts_left_out(checkpoint.left_out)
    yield from (("note", printable(note)) for note in checkpoint.notes)


def _root(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """What convert would take."""
    try:
        rooted = select_root(checkpoint, None)
    except (AmbiguousRoot, NothingSelected) as error:
        yield "convert", f"{error}; {error.command_hint}" if error.command_hint else str(error)
        return
    weighty = [part for part in rooted.left_out if part.nbytes]
    if rooted.path or weighty:
        without = [f"{part.path} ({format_size(part.nbytes)}, {part.reason})" for part in weighty]
        leaves = f" and leaves out {listed(without, most=_MOST_NAMES)}" if without else ""
        yield (
            "convert",
            f"takes {shown('.'.join(rooted.path)) if rooted.path else 'the rest'}{leaves}",
        )
