"""Write one file of a plan: a unit of work, that any process on any machine that sees the folder
may do, with no choices left.

Doing a unit twice, even at once, is harmless: it gives the same bytes, under a unique name until
they are complete.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from shardkit.errors import OutputError
from shardkit.hints import after_writing
from shardkit.metadata.manifest import Digests, Run
from shardkit.metadata.unit_records import PLAN, Finished
from shardkit.payloads.digests import Sums
from shardkit.payloads.payload import Extent, Literal, Trailer
from shardkit.planning.plan import OutputFile, Plan
from shardkit.printable import shown, shown_path
from shardkit.sizes import format_size
from shardkit.system.progress import OnBytes
from shardkit.system.rate_limit import RateLimit
from shardkit.system.threads import Pool
from shardkit.version import __version__
from shardkit.writing import reference_check
from shardkit.writing.compress import write_compressed
from shardkit.writing.copier import Copier, Engine, See, can_clone, clonable, engine_of, reserve
from shardkit.writing.transaction import Transaction
from shardkit.writing.unit_files import new_path, read_plan, write_record

_LOG = logging.getLogger("shardkit")


@dataclass(frozen=True, slots=True)
class Work:
    """A unit of work: one output file. It pickles, and may be done on another machine.

    Attributes:
        file: what is written.
        folder: OUT.partial/, which that machine sees under the same path.
        key: of the plan that it belongs to.
        version: of shardkit that has planned it.
        sync: make it last before it is on record.
        is_safetensors: whether the reference reader has to take it.
        sums: what is summed of it.
    """

    file: OutputFile
    folder: Path
    key: str
    version: str
    sync: bool
    is_safetensors: bool
    sums: Summed

    @classmethod
    def of(cls, plan: Plan, file: OutputFile, transaction: Transaction) -> Work:
        """The unit that writes *file* of *plan* into the folder of *transaction*, which has
        begun.
        """
        return cls(
            file,
            transaction.folder,
            transaction.plan.key,
            __version__,
            not transaction.plan.boot,
            plan.is_safetensors(file),
            Summed.of(plan, file),
        )


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a unit of work.

    Attributes:
        name: of the file.
        finished: its size and digests, which are on record.
        engines: its bytes by how they came there.
    """

    name: str
    finished: Finished
    engines: Counter[Engine]


@dataclass(frozen=True, slots=True)
class Means:
    """What a process lends to the units that it does.

    Attributes:
        clones: whether the file system lets an output share the pages of a source.
        frames: compresses frames.
        ahead: how many of them are in it at a time, for each file.
        on_bytes: called with the number of bytes after each step.
        limit: how many bytes may be moved in a second; None for as many as there can be.
        stop: is set when the units are to end early.
    """

    clones: Callable[[Path], bool]
    frames: Executor
    ahead: int
    on_bytes: OnBytes
    limit: RateLimit | None
    stop: threading.Event

    @classmethod
    @contextlib.contextmanager
    def alone(cls, folder: Path, limit: RateLimit | None = None) -> Iterator[Means]:
        """Those of a process that does one unit in *folder*."""
        count = os.cpu_count() or 1
        with Pool(count, "shardkit-compress") as frames:
            clones = cache(lambda path: can_clone(path, folder))
            yield cls(clones, frames, count + 1, lambda count: None, limit, threading.Event())


def write_one(work: Work, means: Means | None = None) -> Done:
    """Write, sync and check the file of *work*, give it its name, and leave a record of it.

    Args:
        work: what to write.
        means: those of the process; None for its own.

    Raises:
        FormatError: a source cannot be read.
        OutputError: it cannot be written, it is not what the reference reader expects, or it is a
            unit of another plan or of another version of shardkit.
    """
    try:
        return attempt(work, means)
    except OSError as error:
        raise unwritten(work, error) from None


def attempt(work: Work, means: Means | None = None) -> Done:
    """Do the same, and leave it to the caller what to do where the system refuses to write, which
    another attempt may overcome.

    Raises:
        OSError: it cannot be written.
        FormatError: as `write_one`.
        OutputError: likewise.
    """
    if means is None:
        with Means.alone(work.folder) as means:
            return attempt(work, means)
    file, path = work.file, work.folder / work.file.name
    sums = _Sums.of(work.sums)
    begun = time.monotonic()
    _refuse_another(work)
    new = new_path(work.folder)
    with _removed_on_failure(new):
        with open(new, "x+b", buffering=0) as output:
            # Its bytes, and the digests of them as they pass.
            if file.codec is None:
                counts = _copy(file, output.fileno(), sums.see, means)
            else:
                counts = Counter({Engine.COMPRESSED: file.nbytes})
                write_compressed(
                    file,
                    output.fileno(),
                    means.frames,
                    ahead=means.ahead,
                    see=[sums.for_record.see] if sums.for_record else [],
                    see_stored=[sums.for_manifest.see] if sums.for_manifest else [],
                    on_bytes=_limited(means),
                )
            # They last before it is on record.
            if work.sync:
                os.fsync(output.fileno())
            nbytes = os.fstat(output.fileno()).st_size
        if work.is_safetensors:
            reference_check.check(new, file, name=path)
        if path.parent != work.folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(new, path)
    finished = Finished(nbytes, sums.digests() if sums.see else None)
    write_record(work.folder, work.key, file.name, finished, sync=work.sync)
    _LOG.info("%s: %s in %.3f s", shown_path(path), _amounts(counts), time.monotonic() - begun)
    return Done(file.name, finished, counts)


def unwritten(work: Work, error: OSError) -> OutputError:
    """Report the error that the operating system raised for the file of *work*."""
    path = work.folder / work.file.name
    return OutputError(
        f"{shown_path(path)}: cannot be written: {error.strerror or error}",
        hint=after_writing(error),
    )


def forecast(plan: Plan, folder: Path) -> Counter[Engine]:
    """How many bytes of *plan* each engine would move into *folder*, by what its file system can
    do.

    Bytes that no clone saves are counted as copied in the kernel; which engine does it in the end,
    the run tells.
    """
    clones = cache(lambda path: can_clone(path, folder))
    counts: Counter[Engine] = Counter()
    for file in plan.files:
        if file.codec is not None or file.late is not None:
            counts[Engine.COMPRESSED if file.codec else Engine.WRITTEN] += file.nbytes
            continue
        at = 0
        for part in file.parts:
            cloned = clonable(part, at) if isinstance(part, Extent) and clones(part.path) else 0
            counts[Engine.CLONED] += cloned
            counts[engine_of(part)] += part.nbytes - cloned
            at += part.nbytes
    return +counts


def bytes_to_store(plan: Plan, folder: Path, *, done: Container[str] = ()) -> int:
    """Bytes that writing *plan* takes from the disk of *folder*: copies, not clones, and not the
    files that are *done*.
    """
    todo = replace(plan, files=tuple(file for file in plan.files if file.name not in done))
    return sum(
        count for engine, count in forecast(todo, folder).items() if engine is not Engine.CLONED
    )


def _refuse_another(work: Work) -> None:
    """Refuse a unit that was planned by another version, or that the output was not begun for."""
    name = f"the unit of work {shown(work.file.name)}"
    if work.version != __version__:
        raise OutputError(
            f"{name} was planned by shardkit {shown(work.version)}, and this is {__version__}",
            hint="install the same version of shardkit on all machines",
        )
    key = _key_in(work.folder)
    if key != work.key:
        what = "another plan" if key else "no plan: it may be in its place already, or removed"
        raise OutputError(
            f"{name} does not belong to {shown_path(work.folder)}, which holds {what}",
            hint="plan again: run the command with which the output was begun",
        )


def _key_in(folder: Path) -> str:
    """The key of the plan of *folder*, which is read again only where it changed: a plan may have
    thousands of files. "" where there is none.
    """
    try:
        stat = os.stat(folder / PLAN)
    except FileNotFoundError:
        return ""
    return _key_read(folder, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _key_read(folder: Path, *state: int) -> str:
    plan = read_plan(folder)
    return plan.key if plan else ""


def _copy(file: OutputFile, output: int, see: Sequence[See], means: Means) -> Counter[Engine]:
    """Write the parts of *file*, a trailer from the CRCs of the parts before it."""
    if not any(means.clones(part.path) for part in file.parts if isinstance(part, Extent)):
        reserve(output, file.nbytes)
    needs_crcs = any(isinstance(part, Trailer) for part in file.parts)
    crcs: list[int] = []
    at = 0
    with Copier(
        output, clones=means.clones, on_bytes=means.on_bytes, limit=means.limit, stop=means.stop
    ) as copier:
        for part in file.parts:
            payload = Literal(part.make(crcs)) if isinstance(part, Trailer) else part
            if needs_crcs:
                crc = _Crc()
                copier.write(payload, at, crc.see, *see)
                crcs.append(crc.value)
            else:
                copier.write(payload, at, *see)
            at += part.nbytes
        return copier.counts


def _limited(means: Means) -> OnBytes:
    def on_bytes(count: int) -> None:
        means.on_bytes(count)
        if means.limit is not None:
            means.limit.wait(count, means.stop)

    return on_bytes


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    """Leave nothing half-written behind where the process lives on."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # why it failed is what has to be said
            path.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class Summed:
    """What is summed of a file while it is written.

    Attributes:
        checksum: algorithm of the digests for a manifest; None for none.
        tensors: the byte ranges that a manifest has a digest of.
        algorithm: of the digests of blocks.
        blocks: the byte ranges of the blocks, as they are before compression.
    """

    checksum: str | None
    tensors: tuple[Run, ...]
    algorithm: str
    blocks: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, plan: Plan, file: OutputFile) -> Summed:
        """What *plan* wants summed of *file*."""
        return cls(
            plan.checksum,
            plan.tensors_in(file) if plan.checksum else (),
            plan.record.algorithm if plan.record else "",
            tuple((run.start, run.stop) for run in plan.blocks_in(file)),
        )


@dataclass(frozen=True, slots=True)
class _Sums:
    """The sums of one file as its bytes pass: for a manifest, and for offload.json."""

    tensors: tuple[Run, ...]
    for_manifest: Sums | None
    for_record: Sums | None

    @classmethod
    def of(cls, wanted: Summed) -> _Sums:
        for_manifest = for_record = None
        if wanted.checksum:
            runs = [(run.start, run.stop) for run in wanted.tensors]
            for_manifest = Sums(wanted.checksum, runs)
        if wanted.blocks:
            for_record = Sums(wanted.algorithm, list(wanted.blocks), whole=False)
        return cls(wanted.tensors, for_manifest, for_record)

    @property
    def see(self) -> tuple[See, ...]:
        """To be called with the bytes as they pass."""
        return tuple(sums.see for sums in (self.for_manifest, self.for_record) if sums)

    def digests(self) -> Digests:
        """Everything that was summed, once all bytes have passed."""
        whole, tensors = self.for_manifest.ended() if self.for_manifest else ("", [])
        blocks = self.for_record.ended()[1] if self.for_record else []
        names = (run.name for run in self.tensors)
        return Digests(whole, dict(zip(names, tensors, strict=False)), tuple(blocks))


@dataclass(slots=True)
class _Crc:
    value: int = 0

    def see(self, chunk: memoryview) -> None:
        self.value = zlib.crc32(chunk, self.value)


def _amounts(counts: Mapping[Engine, int]) -> str:
    return (
        ", ".join(f"{format_size(nbytes)} {engine}" for engine, nbytes in counts.items() if nbytes)
        or "no bytes"
    )
