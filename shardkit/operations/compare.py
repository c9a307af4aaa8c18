"""Compare two checkpoints bit by bit, or an output with its source: the engine of verify and diff.

Bytes are compared, not numbers: a NaN equals itself, -0.0 is not 0.0, and two formats that hold the
same weights are the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Literal

from shardkit.checkpoint.edits import Edits, clash, edit, fold_ties
from shardkit.checkpoint.entries import TensorEntry
from shardkit.checkpoint.model_root import select_root
from shardkit.errors import FormatError, Malformed, UnknownFormat
from shardkit.fleet.parts import ALL, Part
from shardkit.fleet.ray_cluster import RayCluster, connected, each_on, executor_named, refuse_part
from shardkit.hints import Hint, option
from shardkit.limits import Limits
from shardkit.metadata.shard_names import is_shard_name
from shardkit.operations.comparison import Comparison, Difference
from shardkit.operations.self_check import checked
from shardkit.operations.uncompared import Side
from shardkit.payloads.payload import Extent, Payload, unreadable
from shardkit.payloads.small_reads import SMALL, SmallReads
from shardkit.printable import several, shown_path
from shardkit.sizes import format_size
from shardkit.sources import path_arguments
from shardkit.sources.open import open as open_checkpoint
from shardkit.system.progress import OnBytes
from shardkit.system.threads import each

_LOG = logging.getLogger("shardkit")


def diff(
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    root: str | None = None,
    limits: Limits = Limits(),
    on_bytes: OnBytes | None = None,
    on_total: OnBytes | None = None,
) -> Comparison:
    """List what changes from checkpoint *a* to checkpoint *b*.

    Args:
        a: anything that `shardkit.open` reads.
        b: anything that `shardkit.open` reads.
        root: dotted path of the subtree to compare in both; None to find the model in each.
        limits: safety limits for untrusted files.
        on_bytes: called, from any thread, with the number of bytes compared after each step.
        on_total: called once, before, with the number of bytes to compare.

    Returns:
        The tensors that differ, and what was not compared.

    Raises:
        FormatError: one of them cannot be read.
        AmbiguousRoot: several subtrees of one could be the model.
        NameClash: two tensors of one have the same dotted name.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("model.safetensors", "renamed", rename=[("^2", "last")])
        >>> for difference in shardkit.diff("model.safetensors", "renamed").differences:
        ...     print(difference.name, difference.change)
        2.weight removed
        2.bias removed
        last.weight added
        last.bias added
    """
    opened = [open_checkpoint(path, limits=limits) for path in (a, b)]
    rooted = [select_root(checkpoint, root) for checkpoint in opened]
    sides = [
        Side(Path(path), replace(checkpoint, others=chosen.others), chosen.left_out)
        for path, checkpoint, chosen in zip((a, b), opened, rooted, strict=True)
    ]
    lefts, rights = (
        _by_name(chosen.tensors, shown_path(Path(path)))
        for path, chosen in zip((a, b), rooted, strict=True)
    )
    comparison = _compared(lefts, rights, on_bytes, on_total)
    return _with_rest(comparison, sides)


def verify(
    out: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    edits: Edits = Edits(),
    *,
    part: str | None = None,
    executor: str | RayCluster | None = None,
    limits: Limits = Limits(),
    on_bytes: OnBytes | None = None,
    on_total: OnBytes | None = None,
) -> Comparison:
    """Check that *out* is complete and holds the tensors that converting *against* with *edits*
    gives.

    Without *against*, the files are checked against their own checksums: every header, the index
    against the shards, that no byte is missing, the digests of a manifest or of blocks, the CRCs of
    zip archives; each tensor is read once. The notes list what was compared with what, and which
    tensors have no checksum. Files beside the weights (config, tokenizer) are compared with nothing
    but a manifest that lists them.

    Args:
        out: the output of `convert`, or any other checkpoint.
        against: the checkpoint that it was made from.
        edits: the changes that were applied to *against*.
        part: ``"K/N"`` to read and compare only part K of N, from 1, and leave the other bytes to
            other processes; ``"env"`` as in `convert`. None for all.
        executor: ``"ray"``, or a `RayCluster`, to have the machines of a cluster read; None for
            this process.
        limits: safety limits for untrusted files.
        on_bytes: called, from any thread, with the number of bytes after each step.
        on_total: called once, before, with the number of bytes to come.

    Returns:
        The tensors that differ, and what was not compared.

    Raises:
        FormatError: one of them cannot be read, or a file of *out* is damaged so that its tensors
            cannot be found, as where it is truncated.
        PlanError: *edits* cannot be applied to *against*.
        NameClash: two tensors of one have the same dotted name.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("model.safetensors", "shards", checksum="xxh3")
        >>> shardkit.verify("shards", "model.safetensors").same
        True
        >>> shardkit.verify("shards").unchecked  # every tensor has a checksum in the manifest
        0
    """
    if executor is not None:
        refuse_part(part)
        cluster = executor_named(executor) if isinstance(executor, str) else executor
        return verified_by(cluster, out, against, edits, limits, on_bytes or _unheard)
    share = ALL if part is None else Part.parse(part)
    told = [f"only part {share} was read; the other parts are not checked here"]
    if against is None:
        path = path_arguments.to_read(out)
        found = checked(path, limits, on_bytes or _unheard, on_total or _unheard, share)
        return found if share == ALL else replace(found, notes=(*told, *found.notes))
    # The source first: to read a pickle takes more memory than is kept of it, and now there is
    # nothing beside it.
    origin = open_checkpoint(against, limits=limits)
    edited = edit(origin, replace(edits, ties="copy"))
    written = open_checkpoint(out, limits=limits)
    inside = edited.left_out[len(origin.left_out) :]
    sides = [Side(Path(against), replace(origin, others=()), inside), Side(Path(out), written)]
    lefts, rights = (
        _by_name(edited.entries, shown_path(Path(against))),
        _by_name(written.tensors, shown_path(Path(out))),
    )
    comparison = _compared(lefts, rights, on_bytes, on_total, share)
    notes = (*([] if share == ALL else told), *origin.notes, *edited.notes)
    return _with_rest(replace(comparison, notes=notes), sides)


def verified_by(
    cluster: RayCluster,
    out: str | PathLike[str],
    against: str | PathLike[str] | None,
    edits: Edits,
    limits: Limits,
    on_bytes: OnBytes,
) -> Comparison:
    """The same, by the machines of *cluster*, each of which reads some parts.

    Raises:
        ShardkitError: as `verify`, or the cluster is out of reach.
    """
    read = path_arguments.to_read
    paths = os.path.abspath(read(out)), None if against is None else os.path.abspath(read(against))
    with connected(cluster) as slots:
        tasks = [(*paths, edits, f"{k}/{slots}", limits) for k in range(1, slots + 1)]
        found: dict[str, Comparison] = {}
        for task, result in each_on(cluster, _verify_part, tasks, lambda task: f"part {task[3]}"):
            if isinstance(result, OSError):
                raise unreadable(Path(task[0]), result)
            on_bytes(result.nbytes)
            found[task[3]] = result
    return _merged([found[task[3]] for task in tasks])


def _verify_part(task: tuple[str, str | None, Edits, str, Limits]) -> Comparison:
    out, against, edits, part, limits = task
    return verify(out, against, edits, part=part, limits=limits)


def _merged(parts: Sequence[Comparison]) -> Comparison:
    """What *parts*, which are all parts of one comparison, say together."""
    common = [note for note in parts[0].notes if all(note in part.notes for part in parts)]
    unchecked = sum(part.unchecked for part in parts)
    told = [f"checked in {several(len(parts), 'part')} on a cluster"] if len(parts) > 1 else []
    if unchecked:
        told.append(f"not checked, for lack of a checksum: {several(unchecked, 'tensor')}")
    differences = dict.fromkeys(each for part in parts for each in part.differences)
    return replace(
        parts[0],
        tensors=sum(part.tensors for part in parts),
        nbytes=sum(part.nbytes for part in parts),
        differences=tuple(differences),
        notes=(*told, *common) if len(parts) > 1 else parts[0].notes,
        unchecked=unchecked,
        tied=sum(part.tied for part in parts),
    )


def damage(
    error: FormatError, out: str | PathLike[str], against: str | PathLike[str] | None = None
) -> Comparison | None:
    """Describe the *error* that `verify` raised as a difference, where a file of *out* was found
    that is damaged or incomplete, so that the tensors in it could not be compared.

    Returns:
        The difference; None where *out* is not there, is no checkpoint or cannot be read, and where
        it is *against* that is damaged.
    """
    is_broken = isinstance(error, Malformed) or (  # emptied, or overwritten with something else
        isinstance(error, UnknownFormat) and is_shard_name(error.path.name)
    )
    out = path_arguments.to_read(out)
    folder = out if out.is_dir() else out.parent
    if not is_broken or not _is_below(error.path, folder):
        return None
    if against is not None:
        source = path_arguments.to_read(against)
        if _is_below(error.path, source) and not _is_below(out, source):
            return None
    name = error.path.name if error.path == folder else str(error.path.relative_to(folder))
    what = str(error).removeprefix(f"{shown_path(error.path)}: ")
    notes = ["nothing else was compared", *([error.hint] if error.hint else [])]
    return Comparison(0, 0, (Difference(name, "bytes", what),), tuple(notes))


def _is_below(path: Path, top: Path) -> bool:
    return path == top or top in path.parents


def compare(
    left: Iterable[TensorEntry],
    right: Iterable[TensorEntry],
    *,
    on_bytes: OnBytes | None = None,
    on_total: OnBytes | None = None,
) -> Comparison:
    """Compare the tensors of *right* with those of *left*, by name; the callbacks are those of
    `verify`.

    Raises:
        NameClash: two tensors of one side have the same dotted name.
    """
    return _compared(_by_name(left), _by_name(right), on_bytes, on_total)


def _by_name(entries: Iterable[TensorEntry], where: str = "") -> dict[str, TensorEntry]:
    """*entries* by dotted name, of which each is to be compared."""
    named: dict[str, TensorEntry] = {}
    for entry in entries:
        if (first := named.setdefault(entry.name, entry)) is not entry:
            raise clash(first, entry, where, hint=_BELOW_ONE)
    return named


_BELOW_ONE: Hint = ("compare one of the subtrees with ", option("root"))


def _compared(
    lefts: Mapping[str, TensorEntry],
    rights: Mapping[str, TensorEntry],
    on_bytes: OnBytes | None,
    on_total: OnBytes | None,
    part: Part = ALL,
) -> Comparison:
    """Of the tensors that both have, the bytes of those in *part* are compared."""
    common = [name for name in lefts if name in rights]
    whole, every_alias = fold_ties([rights[name] for name in common], reserved=())
    mine = {entry.name for entry in part.share(whole, lambda entry: entry.nbytes)}
    both = [name for name in common if every_alias.get(name, name) in mine]
    stored, aliases = fold_ties([rights[name] for name in both], reserved=())
    total = sum(lefts[name].nbytes for name in both)
    _LOG.info("%d tensors to compare, %s", len(both), format_size(total))
    (on_total or _unheard)(total)
    reads = SmallReads()
    found = each(
        lambda name, report: _difference(lefts[name], rights[name], reads, report),
        both,
        on_bytes or _unheard,
    )
    changed = {
        name: difference
        for name, difference in zip(both, found, strict=True)
        if difference is not None
    }
    differences = [
        *_in_order(lefts, rights, changed),
        *(_only(rights[name], "added") for name in rights if name not in lefts),
    ]
    nbytes = sum(entry.nbytes for entry in stored)
    return Comparison(len(both), nbytes, tuple(differences), tied=len(aliases))


def _with_rest(comparison: Comparison, sides: Sequence[Side]) -> Comparison:
    notes = (note for side in sides for note in side.notes())
    left_out = (part for side, other in (sides, sides[::-1]) for part in side.left_out(other))
    return replace(comparison, notes=(*comparison.notes, *notes), left_out=tuple(left_out))


def _unheard(count: int) -> None:
    """Stand for a callback that nobody gave."""


def _in_order(
    lefts: Mapping[str, TensorEntry],
    rights: Mapping[str, TensorEntry],
    changed: Mapping[str, Difference],
) -> Iterator[Difference]:
    for name, entry in lefts.items():
        if name not in rights:
            yield _only(entry, "removed")
        elif name in changed:
            yield changed[name]


def _only(entry: TensorEntry, change: Literal["added", "removed"]) -> Difference:
    return Difference(entry.name, change, f"{entry.dtype.code} {list(entry.shape)}")


def _difference(
    left: TensorEntry, right: TensorEntry, reads: SmallReads, on_bytes: OnBytes
) -> Difference | None:
    if left.dtype != right.dtype:
        return Difference(left.name, "dtype", f"{left.dtype.code} became {right.dtype.code}")
    if left.shape != right.shape:
        return Difference(left.name, "shape", f"{list(left.shape)} became {list(right.shape)}")
    at = _first_difference(left.payload, right.payload, reads, on_bytes)
    if at is None:
        return None
    return Difference(
        left.name,
        "bytes",
        (
            f"the first element that differs is number {at * 8 // left.dtype.bits:,} of "
            f"{left.nbytes * 8 // left.dtype.bits:,}"
        ),
    )


def _first_difference(
    left: Payload, right: Payload, reads: SmallReads, on_bytes: OnBytes
) -> int | None:
    """Offset of the first byte that differs; None if there is none."""
    if left == right or (left.nbytes <= SMALL and _is_read_alike(left, right, reads)):
        on_bytes(left.nbytes)
        return None
    at = 0
    for a, b in _paired(left.chunks(), right.chunks()):
        if bytearray(a) != b:  # a memoryview compares item by item, a bytearray with memcmp
            return at + next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        at += len(a)
        on_bytes(len(a))
    return None


def _is_read_alike(left: Payload, right: Payload, reads: SmallReads) -> bool:
    """Whether both are plain runs of files that hold the same bytes."""
    if type(left) is not Extent or type(right) is not Extent:
        return False
    content = bytes(reads.read(left))
    return content == reads.read(right)


def _paired(
    lefts: Iterator[memoryview], rights: Iterator[memoryview]
) -> Iterator[tuple[memoryview, memoryview]]:
    """Both streams in pieces of one length, however each is cut."""
    a = b = memoryview(b"")
    while (a := a or next(lefts, a)) and (b := b or next(rights, b)):
        count = min(len(a), len(b))
        yield a[:count], b[:count]
        a, b = a[count:], b[count:]
