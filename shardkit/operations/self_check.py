"""Compare the files of a checkpoint with their own checksums: every tensor is read once.

Checksums are those of a manifest, of the blocks in an offload.json, of zip members, or in
compressed frames. Tensors without one are read as well, to find unreadable bytes, and are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from shardkit.checkpoint.edits import fold_ties
from shardkit.checkpoint.entries import Checkpoint, SourceFile, TensorEntry
from shardkit.fleet.parts import ALL, Part
from shardkit.limits import Limits
from shardkit.metadata.manifest import MANIFEST_NAME, Listed, Manifest
from shardkit.metadata.offload_index import OFFLOAD_NAME, BlockRun, OffloadRecord
from shardkit.operations.comparison import Comparison, Difference
from shardkit.operations.integrity import (
    Archive,
    Fault,
    archive_faults,
    archives,
    block_fault,
    listed_faults,
    manifest_of,
    said,
)
from shardkit.operations.uncompared import Side
from shardkit.payloads.payload import Payload
from shardkit.payloads.small_reads import SmallReads, chunks_of
from shardkit.printable import listed, several
from shardkit.sources import registry
from shardkit.sources.candidates import expanded
from shardkit.sources.format import Source
from shardkit.sources.offload_check import record_in, refuse_stale_shard
from shardkit.sources.open import open as open_checkpoint
from shardkit.sources.scanner import Scanner
from shardkit.sources.weight_file_names import is_index
from shardkit.system.progress import OnBytes
from shardkit.system.threads import each


def checked(
    out: Path, limits: Limits, on_bytes: OnBytes, on_total: OnBytes, part: Part = ALL
) -> Comparison:
    """What the files of *out* say about themselves, compared with their bytes.

    Args:
        out: the checkpoint.
        limits: what its files may ask for.
        on_bytes: called, from any thread, with the number of bytes after each step.
        on_total: called once, before, with the number of bytes to come.
        part: which share of the bytes is read.

    Raises:
        FormatError: it cannot be read.
    """
    manifest = _manifest_for(out, limits)
    if manifest is not None:
        files = part.share(manifest.files, lambda file: file.nbytes)
        return _as_listed(out, manifest, files, limits, on_bytes, on_total, part)
    checkpoint = open_checkpoint(out, limits=limits)
    record = _record_for(out, limits)
    if record is not None:
        runs = part.share(record.runs, lambda run: run.stop - run.start)
        comparison = _as_recorded(checkpoint, record, runs, on_bytes, on_total, part)
    else:
        comparison = _as_stored(checkpoint, limits, on_bytes, on_total, part)
    return _with_rest(comparison, Side(out, checkpoint))


def _folder_of(out: Path) -> Path:
    return out if out.is_dir() else out.parent


def _manifest_for(out: Path, limits: Limits) -> Manifest | None:
    """What the manifest in the folder of *out* lists of it: all of it for a folder and an index, or
    else the one file.
    """
    manifest = manifest_of(_folder_of(out), limits)
    if manifest is None or out.is_dir():
        return manifest
    if all(file.name != out.name for file in manifest.files):
        return None
    if is_index(expanded(out.name)):
        return manifest
    return replace(manifest, files=tuple(file for file in manifest.files if file.name == out.name))


def _record_for(out: Path, limits: Limits) -> OffloadRecord | None:
    """What the record in the folder of *out* says of it: all of it for a folder and an index, or
    else of the one shard.

    Raises:
        Malformed: it was made with other shards.
    """
    record = record_in(_folder_of(out), limits)
    if record is None or out.is_dir() or is_index(expanded(out.name)):
        return record
    name = expanded(out.name)
    shards = tuple(shard for shard in record.shards if shard.name == name)
    if not shards:
        return None
    refuse_stale_shard(out.parent, record, shards[0], Scanner(None, limits, None).source(out))
    return replace(record, shards=shards, runs=record.runs_in(name))


def _with_rest(comparison: Comparison, side: Side, seen: Iterable[Path] = ()) -> Comparison:
    """Return *comparison* with the files of the folder that were not examined."""
    names = side.others(seen)
    beside = [f"files beside the weights were not checked: {listed(names)}"] if names else []
    notes = (*comparison.notes, *side.checkpoint.notes, *side.indexes(), *beside)
    return replace(comparison, notes=notes, left_out=tuple(side.left_out()))


def _as_stored(
    checkpoint: Checkpoint, limits: Limits, on_bytes: OnBytes, on_total: OnBytes, part: Part
) -> Comparison:
    zips = archives(checkpoint.files, limits)
    inside = {archive.path for archive in zips}
    outside = [
        entry
        for entry in checkpoint.tensors
        if entry.nbytes and not _reads_only(entry.payload, inside)
    ]
    read, aliases = fold_ties(outside, reserved=())
    read = part.share(read, lambda entry: entry.nbytes)
    zips = list(part.share(zips, lambda archive: archive.nbytes))
    named = checkpoint.tensors
    if part != ALL:
        names, files = {entry.name for entry in read}, {archive.path for archive in zips}
        outside = [entry for entry in outside if aliases.get(entry.name, entry.name) in names]
        named = (*outside, *(each for each in named if _reads_only(each.payload, files)))
    stored, aliases = fold_ties(named, reserved=())
    on_total(sum(archive.nbytes for archive in zips) + sum(entry.nbytes for entry in read))
    faults = [
        fault for archive in zips for fault in archive_faults(archive, checkpoint.tensors, on_bytes)
    ]
    _read_through(read, on_bytes)
    expanded = _compressed(checkpoint.files, limits)
    return Comparison(
        len(named),
        sum(entry.nbytes for entry in stored),
        _differences(faults),
        (*(said(archive) for archive in zips), *_unsummed(read, expanded)),
        unchecked=len(outside) + _without_crc(checkpoint, zips),
        tied=len(aliases),
    )


def _without_crc(checkpoint: Checkpoint, zips: Iterable[Archive]) -> int:
    """How many tensors are in archives of which some member has no CRC."""
    paths = {archive.path for archive in zips if archive.unchecked}
    return sum(_reads_only(entry.payload, paths) for entry in checkpoint.tensors)


def _compressed(files: Iterable[SourceFile], limits: Limits) -> set[Path]:
    return {
        file.path for file in files if registry.codec_of(Source.file(file.path, limits)) is not None
    }


def _unsummed(entries: Sequence[TensorEntry], compressed: set[Path]) -> Iterator[str]:
    """Sentences on *entries* that nothing lists a checksum of: those in files that are
    *compressed*, and the others.
    """
    expanded = sum(_reads_only(entry.payload, compressed) for entry in entries)
    if expanded:
        yield (
            "decompressed, and compared with the checksums in the frames, where there are any: "
            f"{several(expanded, 'tensor')}"
        )
    if expanded < len(entries):
        yield (
            "readable, but not checked, for lack of a checksum: "
            f"{several(len(entries) - expanded, 'tensor')}"
        )


def _as_listed(
    out: Path,
    manifest: Manifest,
    files: Sequence[Listed],
    limits: Limits,
    on_bytes: OnBytes,
    on_total: OnBytes,
    part: Part,
) -> Comparison:
    """The *files* that are to be read of those that *manifest* lists."""
    on_total(sum(file.nbytes for file in files))
    folder = _folder_of(out)

    def faults_of(file: Listed, report: OnBytes) -> list[Fault]:
        return listed_faults(folder, file, manifest.algorithm, report)

    found = each(faults_of, files, on_bytes)
    runs = [run for file in files for run in file.runs]
    amount = f"{several(len(files), 'file')} and {several(len(runs), 'tensor')}"
    note = f"compared with the {manifest.algorithm} of {amount} in {MANIFEST_NAME}"
    faults = [fault for faults in found for fault in faults]
    if faults:
        return Comparison(
            len(runs), sum(run.stop - run.start for run in runs), _differences(faults), (note,)
        )
    checkpoint = open_checkpoint(
        out, limits=limits
    )  # headers and the index, which say what is wrong with them themselves
    stored = {entry.payload: entry for entry in checkpoint.tensors}
    seen = {folder / file.name for file in manifest.files}
    unlisted = part.share(
        [
            entry
            for payload, entry in stored.items()
            if entry.nbytes and not _reads_only(payload, seen)
        ],
        lambda entry: entry.nbytes,
    )
    if part != ALL:
        mine = {folder / file.name for file in files}
        read = (entry for entry in stored.values() if _reads_only(entry.payload, mine))
        stored = {entry.payload: entry for entry in (*read, *unlisted)}
    _read_through(unlisted, lambda count: None)
    notes = [note]
    if unlisted:
        count = several(len(unlisted), "tensor")
        notes.append(
            f"readable, but not checked, in files that the manifest does not list: {count}"
        )
    nbytes = sum(entry.nbytes for entry in stored.values())
    return _with_rest(
        Comparison(len(stored), nbytes, (), tuple(notes), unchecked=len(unlisted)),
        Side(out, checkpoint),
        seen,
    )


def _as_recorded(
    checkpoint: Checkpoint,
    record: OffloadRecord,
    runs: Sequence[BlockRun],
    on_bytes: OnBytes,
    on_total: OnBytes,
    part: Part,
) -> Comparison:
    """The *runs* that are to be read of a folder, which is known to be that of *record*, compared
    with their digests.
    """
    in_blocks = {name for run in record.runs for name in run.tensors}
    checked = {entry.payload for entry in checkpoint.tensors if entry.name in in_blocks}
    outside = part.share(
        [entry for entry in checkpoint.tensors if entry.payload not in checked],
        lambda entry: entry.nbytes,
    )
    on_total(sum(run.stop - run.start for run in runs) + sum(entry.nbytes for entry in outside))
    found = each(
        lambda run, report: block_fault(checkpoint, run, record.algorithm, report),
        runs,
        on_bytes,
    )
    _read_through(outside, on_bytes)
    notes = [
        (
            f"compared with the {record.algorithm} of "
            f"{several(len({run.block for run in runs}), 'block')} in "
            f"{OFFLOAD_NAME}"
        )
    ]
    notes += (
        [f"not checked, because no block contains them: {several(len(outside), 'tensor')}"]
        if outside
        else []
    )
    nbytes = sum(run.stop - run.start for run in runs) + sum(entry.nbytes for entry in outside)
    faults = [fault for fault in found if fault is not None]
    count = len({name for run in runs for name in run.tensors}) + len(outside)
    return Comparison(count, nbytes, _differences(faults), tuple(notes), unchecked=len(outside))


def _differences(faults: Iterable[Fault]) -> tuple[Difference, ...]:
    return tuple(Difference(fault.name, fault.change, fault.detail) for fault in faults)


def _reads_only(payload: Payload, files: set[Path]) -> bool:
    return bool(payload.sources) and all(extent.path in files for extent in payload.sources)


def _read_through(entries: Iterable[TensorEntry], on_bytes: OnBytes) -> None:
    """Read all of *entries*, so that a byte that cannot be read is found."""
    reads = SmallReads()
    each(lambda entry, report: _drain(entry.payload, reads, report), entries, on_bytes)


def _drain(payload: Payload, reads: SmallReads, on_bytes: OnBytes) -> None:
    for chunk in chunks_of(payload, reads):
        on_bytes(len(chunk))
