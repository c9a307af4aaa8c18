"""Two checkpoints, tensor by tensor and bit by bit; or an output against its source. One engine for verify and diff.

Bytes are compared, not numbers: a NaN equals itself, -0.0 is not 0.0, and two formats that hold the same weights are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

from shardkit import registry, source
from shardkit.checkpoint import Checkpoint, SourceFile, TensorEntry
from shardkit.copying import OnBytes
from shardkit.edits import Edits, edit
from shardkit.errors import shown_path
from shardkit.format import Source
from shardkit.freshness import record_in
from shardkit.integrity import archive_faults, archives, block_fault, listed_faults, manifest_of, said
from shardkit.limits import Limits
from shardkit.manifest import MANIFEST_NAME, Manifest
from shardkit.offload_record import OFFLOAD_NAME, OffloadRecord
from shardkit.parallel import each
from shardkit.payload import Extent, Payload
from shardkit.roots import select_root
from shardkit.small_reads import SMALL, SmallReads, chunks_of

Change = Literal["added", "removed", "dtype", "shape", "bytes"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not the same on both sides.

    Attributes:
        name: of the tensor.
        change: "added" is on the right side only, "removed" on the left only; else the first thing that differs.
        detail: for a person: both values, or the first element that differs.
    """

    name: str
    change: Change
    detail: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing.

    Attributes:
        tensors: how many were compared.
        nbytes: bytes of one side that were compared.
        differences: what differs, in the order of the left side, then what is on the right only.
        notes: sentences that the user should see.
    """

    tensors: int
    nbytes: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return not self.differences


def diff(
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    root: str | None = None,
    limits: Limits = Limits(),
    on_bytes: OnBytes | None = None,
    on_total: OnBytes | None = None,
) -> Comparison:
    """What changes from checkpoint *a* to checkpoint *b*.

    Args:
        a: anything that `shardkit.open` reads.
        b: likewise.
        root: dotted path of the subtree to compare in both; None to find the model in each.
        limits: what the files may ask for.
        on_bytes: called, from any thread, with the number of bytes compared after each step.
        on_total: called once, before, with the number of bytes to compare.

    Raises:
        FormatError: one of them cannot be read.
        AmbiguousRoot: several subtrees of one could be the model.
    """
    sides = [source.open(path, limits=limits) for path in (a, b)]
    chosen = [select_root(checkpoint, root) for checkpoint in sides]
    notes = tuple(
        f"{shown_path(Path(path))}: {count} weights that are no dense tensors are not compared"
        for path, rooted in zip((a, b), chosen, strict=True)
        if (count := sum(other.is_weight for other in rooted.others))
    )
    return replace(compare(chosen[0].tensors, chosen[1].tensors, on_bytes=on_bytes, on_total=on_total), notes=notes)


def verify(
    out: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    edits: Edits = Edits(),
    *,
    limits: Limits = Limits(),
    on_bytes: OnBytes | None = None,
    on_total: OnBytes | None = None,
) -> Comparison:
    """Check that *out* is whole, and that it holds what converting *against* with *edits* gives.

    Without *against*, everything is checked that the files say about themselves: every header, the index against the shards,
    that no byte is missing, the digests of a manifest or of blocks, the CRCs of zip archives; each tensor is read once.

    Args:
        out: what `convert` wrote, or any other checkpoint.
        against: the checkpoint that it was made from.
        edits: what was changed on the way.
        limits: what the files may ask for.
        on_bytes: called, from any thread, with the number of bytes after each step.
        on_total: called once, before, with the number of bytes to come.

    Raises:
        FormatError: one of them cannot be read.
        PlanError: *edits* cannot be applied to *against*.
    """
    if against is None:
        return _sound(Path(out), limits, on_bytes or _unheard, on_total or _unheard)
    # The source first: to read a pickle takes more memory than is kept of it, and now there is nothing beside it.
    edited = edit(source.open(against, limits=limits), replace(edits, ties="copy"))
    written = source.open(out, limits=limits)
    return replace(compare(edited.entries, written.tensors, on_bytes=on_bytes, on_total=on_total), notes=edited.notes)


def compare(
    left: Iterable[TensorEntry],
    right: Iterable[TensorEntry],
    *,
    on_bytes: OnBytes | None = None,
    on_total: OnBytes | None = None,
) -> Comparison:
    """Hold the tensors of *right* against those of *left*, by name; the callbacks are those of `verify`."""
    lefts = {entry.name: entry for entry in left}
    rights = {entry.name: entry for entry in right}
    both = [name for name in lefts if name in rights]
    total = sum(lefts[name].nbytes for name in both)
    (on_total or _unheard)(total)
    reads = SmallReads()
    found = each(lambda name, report: _difference(lefts[name], rights[name], reads, report), both, on_bytes or _unheard)
    changed = {name: difference for name, difference in zip(both, found, strict=True) if difference is not None}
    differences = [*_in_order(lefts, rights, changed), *(_only(rights[name], "added") for name in rights if name not in lefts)]
    return Comparison(len(both), total, tuple(differences))


def _unheard(count: int) -> None:
    """Stand for a callback that nobody gave."""


def _in_order(
    lefts: Mapping[str, TensorEntry], rights: Mapping[str, TensorEntry], changed: Mapping[str, Difference]
) -> Iterator[Difference]:
    for name, entry in lefts.items():
        if name not in rights:
            yield _only(entry, "removed")
        elif name in changed:
            yield changed[name]


def _only(entry: TensorEntry, change: Literal["added", "removed"]) -> Difference:
    return Difference(entry.name, change, f"{entry.dtype.code} {list(entry.shape)}")


def _difference(left: TensorEntry, right: TensorEntry, reads: SmallReads, on_bytes: OnBytes) -> Difference | None:
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
        f"the first element that differs is number {at * 8 // left.dtype.bits:,} of {left.nbytes * 8 // left.dtype.bits:,}",
    )


def _first_difference(left: Payload, right: Payload, reads: SmallReads, on_bytes: OnBytes) -> int | None:
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


def _paired(lefts: Iterator[memoryview], rights: Iterator[memoryview]) -> Iterator[tuple[memoryview, memoryview]]:
    """Both streams in pieces of one length, however each is cut."""
    a = b = memoryview(b"")
    while (a := a or next(lefts, a)) and (b := b or next(rights, b)):
        count = min(len(a), len(b))
        yield a[:count], b[:count]
        a, b = a[count:], b[count:]


def _sound(out: Path, limits: Limits, on_bytes: OnBytes, on_total: OnBytes) -> Comparison:
    """What the files of *out* say about themselves, held against their bytes."""
    manifest = manifest_of(out, limits)
    if manifest is not None:
        return _as_listed(out, manifest, limits, on_bytes, on_total)
    checkpoint = source.open(out, limits=limits)
    record = record_in(out, limits)
    if record is not None:
        return _as_recorded(checkpoint, record, on_bytes, on_total)
    zips = archives(checkpoint.files, limits)
    inside = {archive.path for archive in zips}
    outside = [entry for entry in checkpoint.tensors if entry.nbytes and not _reads_only(entry.payload, inside)]
    on_total(sum(content.nbytes for archive in zips for _, content in archive.members) + sum(entry.nbytes for entry in outside))
    faults = [fault for archive in zips for fault in archive_faults(archive, checkpoint.tensors, on_bytes)]
    reads = SmallReads()
    each(lambda entry, report: _drain(entry.payload, reads, report), outside, on_bytes)
    notes = (*(said(archive) for archive in zips), *_unsummed(outside, _compressed(checkpoint.files, limits)))
    differences = tuple(Difference(fault.name, fault.change, fault.detail) for fault in faults)
    return Comparison(len(checkpoint.tensors), sum(entry.nbytes for entry in checkpoint.tensors), differences, notes)


def _compressed(files: Iterable[SourceFile], limits: Limits) -> set[Path]:
    return {file.path for file in files if registry.codec_of(Source.file(file.path, limits)) is not None}


def _unsummed(entries: Sequence[TensorEntry], compressed: set[Path]) -> Iterator[str]:
    """Sentences on *entries* that nothing lists a checksum of: those in files that are *compressed*, and the others."""
    expanded = sum(_reads_only(entry.payload, compressed) for entry in entries)
    if expanded:
        yield f"{expanded:,} tensors were expanded, and held against the checksums in their frames, where these have any"
    if expanded < len(entries):
        yield f"{len(entries) - expanded:,} tensors carry no checksum: their bytes can be read, and are unchecked"


def _as_listed(out: Path, listed: Manifest, limits: Limits, on_bytes: OnBytes, on_total: OnBytes) -> Comparison:
    on_total(sum(file.nbytes for file in listed.files))
    found = each(lambda file, report: listed_faults(out, file, listed.algorithm, report), listed.files, on_bytes)
    differences = tuple(Difference(fault.name, fault.change, fault.detail) for faults in found for fault in faults)
    runs = [run for file in listed.files for run in file.runs]
    note = f"held against the {listed.algorithm} of {len(listed.files):,} files and {len(runs):,} tensors in {MANIFEST_NAME}"
    if differences:
        return Comparison(len(runs), sum(run.stop - run.start for run in runs), differences, (note,))
    checkpoint = source.open(out, limits=limits)  # headers and the index, which say what is wrong with them themselves
    stored = {entry.payload: entry.nbytes for entry in checkpoint.tensors}
    return Comparison(len(stored), sum(stored.values()), (), (note,))


def _as_recorded(checkpoint: Checkpoint, record: OffloadRecord, on_bytes: OnBytes, on_total: OnBytes) -> Comparison:
    """The blocks of a folder, which is known to be that of *record*, held against their digests."""
    on_total(sum(run.stop - run.start for run in record.runs))
    found = each(lambda run, report: block_fault(checkpoint, run, record.algorithm, report), record.runs, on_bytes)
    differences = tuple(Difference(fault.name, fault.change, fault.detail) for fault in found if fault is not None)
    listed = {name for run in record.runs for name in run.tensors}
    checked = {entry.payload for entry in checkpoint.tensors if entry.name in listed}
    outside = sum(entry.payload not in checked for entry in checkpoint.tensors)
    notes = [f"held against the {record.algorithm} of {len(record.blocks):,} blocks in {OFFLOAD_NAME}"]
    notes += [f"{outside:,} tensors stand in no block, and are unchecked"] if outside else []
    return Comparison(len(listed), sum(size for _, size in record.dtypes), differences, tuple(notes))


def _reads_only(payload: Payload, files: set[Path]) -> bool:
    return bool(payload.sources) and all(extent.path in files for extent in payload.sources)


def _drain(payload: Payload, reads: SmallReads, on_bytes: OnBytes) -> None:
    for chunk in chunks_of(payload, reads):
        on_bytes(len(chunk))
