"""Carry out a plan: every file of it written, synced and checked, a few at a time, with no choices left."""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from shardkit.errors import OutputError, shown_path
from shardkit.hints import after_writing
from shardkit.metadata import manifest, offload_index, safetensors_header
from shardkit.metadata.manifest import MANIFEST_NAME, Digests, Listed, Manifest, Run
from shardkit.metadata.offload_index import OFFLOAD_NAME
from shardkit.payloads.digests import Sums
from shardkit.payloads.payload import Extent, Literal, Trailer
from shardkit.planning.plan import OutputFile, Plan
from shardkit.sizes import format_size
from shardkit.system.progress import OnBytes
from shardkit.system.threads import Pool
from shardkit.writing import reference_check
from shardkit.writing.compress import write_compressed
from shardkit.writing.copier import Copier, Engine, See, can_clone, clonable, engine_of, reserve
from shardkit.writing.journal import Journal

_LOG = logging.getLogger("shardkit")
_TOGETHER = 8  # more files at a time than this do not help one disk


def write(
    plan: Plan, journal: Journal, *, jobs: int | None = None, sync: bool = True, on_bytes: OnBytes = lambda count: None
) -> Counter[Engine]:
    """Write the files of *plan* that *journal* does not have yet, and count the bytes by engine.

    Args:
        plan: what to write.
        journal: the folder to write in.
        jobs: files written at a time; None for one more than there are processors, or as many where they are compressed, at
            most 8.
        sync: make each file last before it counts as done.
        on_bytes: called, from any thread, with the number of bytes after each step; first with those that *journal* has.

    Raises:
        FormatError: a source cannot be read.
        OutputError: a file cannot be written, or is not what the reference reader expects.
    """
    todo = sorted((file for file in plan.files if file.name not in journal.done), key=lambda file: -file.nbytes)
    on_bytes(plan.nbytes - sum(file.nbytes for file in todo))
    clones = cache(lambda path: can_clone(path, journal.folder))
    together = jobs or _at_a_time(plan)
    with Pool(together, "shardkit-compress") as frames, Pool(together, "shardkit-write") as pool:
        run = _Run(plan, journal, clones, sync, on_bytes, frames, ahead=together + 1)
        try:
            futures = [pool.submit(run.write, file) for file in todo]
            if any(run.is_read_by_reference(file) for file in todo):
                frames.submit(reference_check.fetch)  # its threads have little to do: nothing of that kind is compressed
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            run.stop.set()
            pool.shutdown(cancel_futures=True)
    counts = _added(futures)
    _Run(plan, journal, clones, sync, lambda count: None, frames, ahead=1).write_digests()
    return counts


def _at_a_time(plan: Plan) -> int:
    """As many files as keep all processors at work.

    Shards are seldom as many as the processors, or a multiple: with one file more, the system evens out what is left of them.
    But one that is compressed takes all processors by itself, and memory.
    """
    processors = os.cpu_count() or 1
    return min(_TOGETHER, processors if any(file.codec for file in plan.files) else processors + 1)


def forecast(plan: Plan, folder: Path) -> Counter[Engine]:
    """How many bytes of *plan* each engine would move into *folder*, by what its file system can do.

    Bytes that no clone saves are counted as copied in the kernel; which engine does it in the end, the run tells.
    """
    clones = cache(lambda path: can_clone(path, folder))
    counts: Counter[Engine] = Counter()
    for file in plan.files:
        if file.codec is not None:
            counts[Engine.COMPRESSED] += file.nbytes
            continue
        at = 0
        for part in file.parts:
            cloned = clonable(part, at) if isinstance(part, Extent) and clones(part.path) else 0
            counts[Engine.CLONED] += cloned
            counts[engine_of(part)] += part.nbytes - cloned
            at += part.nbytes
    return +counts


def bytes_to_store(plan: Plan, folder: Path, *, done: Container[str] = ()) -> int:
    """Bytes that writing *plan* takes from the disk of *folder*: copies, not clones, and not the files that are *done*."""
    todo = replace(plan, files=tuple(file for file in plan.files if file.name not in done))
    return sum(count for engine, count in forecast(todo, folder).items() if engine is not Engine.CLONED)


class _Run:
    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        clones: Callable[[Path], bool],
        sync: bool,
        on_bytes: OnBytes,
        frames: Executor,
        *,
        ahead: int,
    ) -> None:
        self.stop = threading.Event()
        self._plan = plan
        self._shards = set(plan.weight_map.values()) if plan.format == "safetensors" else set()
        self._journal = journal
        self._clones = clones
        self._sync = sync
        self._report = on_bytes
        self._frames = frames
        self._ahead = ahead
        self._lock = threading.Lock()

    def write(self, file: OutputFile) -> Counter[Engine]:
        path = self._journal.folder / file.name
        sums = self._sums(file)
        begun = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            counts = self._fill(file, path, sums)
        except OSError as error:
            message = f"{shown_path(path)}: cannot be written: {error.strerror or error}"
            raise OutputError(message, hint=after_writing(error)) from None
        if file.name in self._shards:
            reference_check.check(path, file)
        _LOG.info("%s: %s in %.3f s", shown_path(path), _amounts(counts), time.monotonic() - begun)
        with self._lock:
            self._journal.finished(file.name, sums.digests() if self._plan.is_summed(file) else None)
        return counts

    def is_read_by_reference(self, file: OutputFile) -> bool:
        """Whether the reference reader opens *file* when it is written."""
        return file.name in self._shards and file.codec is None

    def write_digests(self) -> None:
        """Write the files that are planned without their bytes, as they hold digests of the others."""
        for file in self._with_digests():
            if file.name not in self._journal.done:
                self.write(file)

    def _with_digests(self) -> Iterator[OutputFile]:
        files, digests = self._plan.files, self._journal.digests
        record = self._plan.record
        if record is not None:
            content = offload_index.dump(record, {file.expanded: digests[file.name].blocks for file in self._plan.shards})
            files = (*files, OutputFile(OFFLOAD_NAME, (Literal(content),)))
            yield files[-1]
        if self._plan.checksum is not None:
            listed = tuple(Listed(file.name, self._stored(file), self._runs(file), digests[file.name]) for file in files)
            yield OutputFile(MANIFEST_NAME, (Literal(manifest.dump(Manifest(self._plan.checksum, listed))),))

    def _sums(self, file: OutputFile) -> _Sums:
        checksum, record = self._plan.checksum, self._plan.record
        runs = self._runs(file) if checksum else ()
        blocks = record.runs_in(file.expanded) if record is not None else ()
        return _Sums(
            tuple(run.name for run in runs),
            Sums(checksum, [(run.start, run.stop) for run in runs]) if checksum else None,
            Sums(record.algorithm, [(run.start, run.stop) for run in blocks], whole=False) if record and blocks else None,
        )

    def _stored(self, file: OutputFile) -> int:
        return file.nbytes if file.codec is None else (self._journal.folder / file.name).stat().st_size

    def _runs(self, file: OutputFile) -> tuple[Run, ...]:
        """The tensors in *file*; none where it is compressed, and they do not lie in it as they are."""
        if file.name not in self._shards or file.codec is not None or not isinstance(file.parts[0], Literal):
            return ()
        return tuple(Run(*place) for place in safetensors_header.places(file.parts[0].content))

    def _fill(self, file: OutputFile, path: Path, sums: _Sums) -> Counter[Engine]:
        if file.codec is not None:
            return self._compress(file, path, sums)
        with (
            open(path, "w+b", buffering=0) as output,
            Copier(output.fileno(), clones=self._clones, on_bytes=self._on_bytes) as copier,
        ):
            if not self._shares_pages(file):
                reserve(output.fileno(), file.nbytes)
            if sums.see or any(isinstance(part, Trailer) for part in file.parts):
                _write_seen(file, copier, sums.see)
            else:
                _write_parts(file, copier)
            if self._sync:
                os.fsync(output.fileno())
            return copier.counts

    def _compress(self, file: OutputFile, path: Path, sums: _Sums) -> Counter[Engine]:
        with open(path, "wb", buffering=0) as output:
            write_compressed(
                file,
                output.fileno(),
                self._frames,
                ahead=self._ahead,
                see=[sums.for_record.see] if sums.for_record else [],
                see_stored=[sums.for_manifest.see] if sums.for_manifest else [],
                on_bytes=self._on_bytes,
            )
            if self._sync:
                os.fsync(output.fileno())
        return Counter({Engine.COMPRESSED: file.nbytes})

    def _shares_pages(self, file: OutputFile) -> bool:
        return any(self._clones(part.path) for part in file.parts if isinstance(part, Extent))

    def _on_bytes(self, count: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self._lock:
            self._report(count)


@dataclass(frozen=True, slots=True)
class _Sums:
    """What is summed of a file: all of it and its *tensors*, for a manifest; and its blocks, for a record of these."""

    tensors: tuple[str, ...]
    for_manifest: Sums | None
    for_record: Sums | None

    @property
    def see(self) -> tuple[See, ...]:
        """To be called with the bytes as they pass."""
        return tuple(sums.see for sums in (self.for_manifest, self.for_record) if sums)

    def digests(self) -> Digests:
        """Everything that was summed, once all bytes have passed."""
        whole, tensors = self.for_manifest.ended() if self.for_manifest else ("", [])
        blocks = self.for_record.ended()[1] if self.for_record else []
        return Digests(whole, dict(zip(self.tensors, tensors, strict=False)), tuple(blocks))


def _amounts(counts: Mapping[Engine, int]) -> str:
    return ", ".join(f"{format_size(nbytes)} {engine}" for engine, nbytes in counts.items() if nbytes) or "no bytes"


class _Stopped(BaseException):
    """Another file failed, or the run was interrupted."""


def _added(futures: Iterable[Future[Counter[Engine]]]) -> Counter[Engine]:
    """The sum of what the files counted, or else what went wrong first; that others then stopped is no news."""
    done = [future for future in futures if not future.cancelled()]
    failures = [error for future in done if (error := future.exception()) is not None]
    for error in failures:
        if not isinstance(error, _Stopped):
            raise error
    return sum((future.result() for future in done), Counter[Engine]())


def _write_parts(file: OutputFile, copier: Copier) -> None:
    at = 0
    for part in file.parts:
        assert not isinstance(part, Trailer)
        copier.write(part, at)
        at += part.nbytes


def _write_seen(file: OutputFile, copier: Copier, see: tuple[See, ...]) -> None:
    """Write a file whose bytes are to be seen: to be summed, or since it ends in what their CRCs give."""
    at = 0
    crcs: list[int] = []
    trailed = any(isinstance(part, Trailer) for part in file.parts)
    for part in file.parts:
        payload = Literal(part.make(crcs)) if isinstance(part, Trailer) else part
        crc = _Crc()
        copier.write_seen(payload, at, *((crc.see, *see) if trailed else see))
        crcs.append(crc.value)
        at += part.nbytes


@dataclass(slots=True)
class _Crc:
    value: int = 0

    def see(self, chunk: memoryview) -> None:
        self.value = zlib.crc32(chunk, self.value)
