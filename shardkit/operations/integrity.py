"""Check bytes without a second copy of them: by the digests of a manifest, and the CRCs of a zip
archive.

A fault names the tensor and the bytes of the file that differ. Tensors without a checksum are
counted and reported.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardkit.checkpoint.entries import Checkpoint, SourceFile, TensorEntry
from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.metadata.manifest import MANIFEST_NAME, Listed, Manifest, parse
from shardkit.metadata.offload_index import BlockRun, OffloadRecord
from shardkit.payloads.digests import Sums, new_hash
from shardkit.payloads.payload import Extent, Payload, read_all
from shardkit.payloads.small_reads import SmallReads, chunks_of
from shardkit.printable import several, shown, shown_path
from shardkit.sources.format import Source
from shardkit.sources.offload_check import record_in, refuse_stale_shard
from shardkit.sources.zip_directory import Member
from shardkit.system.progress import OnBytes
from shardkit.system.threads import each


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it was written.

    Attributes:
        name: of a tensor; of a file or a zip member where no tensor is at fault.
        change: "removed" is not there; "bytes" differ.
        detail: for a person: where.
    """

    name: str
    change: Literal["removed", "bytes"]
    detail: str


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip file among the sources.

    Attributes:
        path: the file.
        members: those that hold something, each with its bytes.
    """

    path: Path
    members: tuple[tuple[Member, Payload], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all members."""
        return sum(content.nbytes for _, content in self.members)

    @property
    def unchecked(self) -> int:
        """How many members carry no CRC."""
        return sum(not member.crc for member, _ in self.members)


def manifest_of(folder: Path, limits: Limits) -> Manifest | None:
    """The manifest in *folder*; None where there is none.

    Raises:
        FormatError: it cannot be read, is none, or is longer than the limit for headers.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    nbytes = path.stat().st_size
    if nbytes > limits.header_bytes:
        raise LimitExceeded(
            path, f"the manifest takes {nbytes:,} bytes", limit="header_bytes", actual=nbytes
        )
    return parse(path, bytes(read_all(Extent(path, 0, nbytes))), limits)


def listed_faults(folder: Path, file: Listed, algorithm: str, on_bytes: OnBytes) -> list[Fault]:
    """How the file of *folder* that a manifest lists differs from what it says; reads it once.

    Raises:
        FormatError: it cannot be read.
    """
    path = folder / file.name
    if not path.is_file():
        return [Fault(file.name, "removed", "the manifest lists it, but it is missing")]
    nbytes = path.stat().st_size
    if nbytes != file.nbytes:
        return [
            Fault(
                file.name,
                "bytes",
                f"has {several(nbytes, 'byte')}, and {file.nbytes:,} were written",
            )
        ]
    sums = Sums(algorithm, [(run.start, run.stop) for run in file.runs])
    for chunk in Extent(path, 0, nbytes).chunks():
        sums.see(chunk)
        on_bytes(len(chunk))
    whole, runs = sums.ended()
    if whole == file.digests.whole:
        return []
    found = dict(zip((run.name for run in file.runs), runs, strict=True))
    return list(_differing(file, algorithm, found)) or [_outside_tensors(file, algorithm)]


def block_fault(
    checkpoint: Checkpoint | Mapping[str, TensorEntry],
    run: BlockRun,
    algorithm: str,
    on_bytes: OnBytes,
) -> Fault | None:
    """How the bytes of a block in *checkpoint* differ from what was written; None if they do not.
    Reads them once.

    Raises:
        FormatError: they cannot be read.
    """
    missing = next((name for name in run.tensors if name not in checkpoint), None)
    if missing is not None:
        return Fault(run.block, "removed", f"its tensor {shown(missing)} is missing")
    digest = new_hash(algorithm)
    for name in run.tensors:
        for chunk in checkpoint[name].payload.chunks():
            digest.update(chunk)
            on_bytes(len(chunk))
    if digest.hexdigest() == run.digest:
        return None
    return Fault(
        run.block,
        "bytes",
        f"block at [{run.start:,}, {run.stop:,}) of {shown(run.shard)}: the {algorithm} differs",
    )


def archives(
    files: Iterable[SourceFile], limits: Limits, scratch: Path | None = None
) -> list[Archive]:
    """Those of *files* that are zip archives.

    Raises:
        FormatError: one of them cannot be read.
    """
    sources = (Source.file(file.path, limits, scratch) for file in files if file.path.is_file())
    return [_archive(source) for source in sources if source.members]


def refuse_changed(files: Iterable[SourceFile]) -> None:
    """Raise Malformed where one of *files* is no longer what it was."""
    for file in files:
        if SourceFile.of(file.path) != file:
            raise Malformed(
                file.path,
                "changed while it was read",
                hint="run the command again when nothing writes to it",
            )


def refuse_damaged(
    files: Iterable[SourceFile],
    entries: Iterable[TensorEntry],
    limits: Limits,
    scratch: Path | None,
) -> list[str]:
    """Compare *files*, which hold *entries*, with their own checksums; return sentences on the
    result.

    Raises:
        Malformed: something differs.
    """
    zips = archives(files, limits, scratch)
    for archive in zips:
        for fault in archive_faults(archive, entries, lambda count: None):
            raise Malformed(
                archive.path,
                fault.detail,
                where=fault.name,
                hint="the file is corrupt: download it again",
            )
    return [said(archive) for archive in zips] or ["the source has no checksums to check"]


def refuse_unlike_written(
    paths: Iterable[Path], entries: Mapping[str, TensorEntry], limits: Limits
) -> list[Path]:
    """Hold files against the manifests or records of blocks that lie beside them, or else against
    the CRCs in them.

    Args:
        paths: the files.
        entries: the tensors in them by their names, to name what is damaged.
        limits: what the files may ask for.

    Returns:
        Those that have neither.

    Raises:
        Malformed: one differs.
        FormatError: one of them, or a manifest, cannot be read.
    """
    wanted = list(paths)
    folders = {path.parent for path in wanted}
    beside = {
        folder: _Beside(manifest_of(folder, limits), record_in(folder, limits))
        for folder in folders
    }
    found = each(
        lambda path, report: _faults(path, beside[path.parent], entries, limits, report),
        wanted,
        lambda count: None,
    )
    for path, faults in zip(wanted, found, strict=True):
        for fault in faults or ():
            raise Malformed(
                path, fault.detail, where=fault.name, hint="the file is corrupt: download it again"
            )
    return [path for path, faults in zip(wanted, found, strict=True) if faults is None]


def archive_faults(
    archive: Archive, entries: Iterable[TensorEntry], on_bytes: OnBytes
) -> list[Fault]:
    """How the members of *archive* differ from their CRCs, tensors named after *entries*; reads
    every member once.

    Raises:
        FormatError: it cannot be read.
    """
    holds = _held(archive, entries)
    reads = SmallReads()
    found = each(
        lambda place, report: _member_fault(archive, *place, holds, reads, report),
        archive.members,
        on_bytes,
    )
    return [fault for fault in found if fault is not None]


def said(archive: Archive) -> str:
    """A sentence about what of *archive* can be checked."""
    name, count = shown_path(archive.path), len(archive.members)
    if not archive.unchecked:
        return f"{name}: compared with its CRCs: {several(count, 'member')}"
    if archive.unchecked == count:
        return f"{name}: its writer stored no CRCs, so its bytes are not checked"
    return (
        f"{name}: not checked, without a CRC: {archive.unchecked:,} of {several(count, 'member')}"
    )


@dataclass(frozen=True, slots=True)
class _Beside:
    """The documents in a folder that describe its files."""

    manifest: Manifest | None
    record: OffloadRecord | None


def _faults(
    path: Path,
    beside: _Beside,
    entries: Mapping[str, TensorEntry],
    limits: Limits,
    on_bytes: OnBytes,
) -> list[Fault] | None:
    """How the file *path* differs from what was written; None where nothing tells."""
    listed = (
        next((file for file in beside.manifest.files if file.name == path.name), None)
        if beside.manifest
        else None
    )
    if beside.manifest and listed:
        return listed_faults(path.parent, listed, beside.manifest.algorithm, on_bytes)
    source = Source.file(path, limits)
    if beside.record:
        return _block_faults(source, beside.record, entries, on_bytes)
    if not source.members:
        return None
    archive = _archive(source)
    return archive_faults(archive, entries.values(), on_bytes) or (
        None if archive.unchecked else []
    )


def _block_faults(
    source: Source, record: OffloadRecord, entries: Mapping[str, TensorEntry], on_bytes: OnBytes
) -> list[Fault] | None:
    """The same for a file whose blocks are recorded."""
    names = (source.path.name, source.path.stem)  # which is without the suffix of a codec
    runs = [run for run in record.runs if run.shard in names]
    checked = {entries[name].payload for run in runs for name in run.tensors if name in entries}
    held = (
        entry
        for entry in entries.values()
        if any(extent.path == source.path for extent in entry.payload.sources)
    )
    if any(entry.payload not in checked for entry in held):
        return None
    for shard in record.shards:
        if shard.name == source.path.name:
            refuse_stale_shard(source.path.parent, record, shard, source)
    return [
        fault for run in runs if (fault := block_fault(entries, run, record.algorithm, on_bytes))
    ]


def _differing(file: Listed, algorithm: str, found: Mapping[str, str]) -> Iterator[Fault]:
    for run in file.runs:
        if found[run.name] != file.digests.tensors[run.name]:
            place = f"bytes [{run.start:,}, {run.stop:,}) of {shown(file.name)}"
            yield Fault(run.name, "bytes", f"{place} do not match the recorded {algorithm}")


def _outside_tensors(file: Listed, algorithm: str) -> Fault:
    place = f"bytes [0, {min((run.start for run in file.runs), default=file.nbytes):,})"
    return Fault(
        file.name,
        "bytes",
        f"{place} of it, which belong to no tensor, do not match the recorded {algorithm}",
    )


def _archive(source: Source) -> Archive:
    return Archive(
        source.path,
        tuple((member, source.member(member)) for member in source.members if member.nbytes),
    )


def _held(archive: Archive, entries: Iterable[TensorEntry]) -> dict[str, str]:
    """For each member of *archive* that holds tensors: the name of the first."""
    members = sorted((member.header_start, member.name) for member, _ in archive.members)
    starts = [start for start, _ in members]
    found: dict[str, str] = {}
    for entry in entries:
        for extent in entry.payload.sources:
            if extent.path == archive.path and (above := bisect_right(starts, extent.start)):
                found.setdefault(members[above - 1][1], entry.name)
    return found


def _member_fault(
    archive: Archive,
    member: Member,
    content: Payload,
    holds: Mapping[str, str],
    reads: SmallReads,
    on_bytes: OnBytes,
) -> Fault | None:
    """How the *content* of a zip *member* differs from its CRC, if it carries one; *holds* names
    the tensor in it.
    """
    crc = 0
    for chunk in chunks_of(content, reads):
        crc = zlib.crc32(chunk, crc)
        on_bytes(len(chunk))
    if not member.crc or crc == member.crc:
        return None
    start = content.start if isinstance(content, Extent) else member.header_start
    place = (
        f"bytes [{start:,}, {start + member.compressed:,}) of {shown_path(archive.path)} "
        f"(zip member {shown(member.name)})"
    )
    detail = f"{place} have the CRC {crc:08x}, expected {member.crc:08x}"
    return Fault(holds.get(member.name, member.name), "bytes", detail)
