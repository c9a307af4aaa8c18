"""Execute a plan: write, sync and check every file of it, a few at a time, with no choices left."""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from shardkit.errors import OutputError, shown_path
from shardkit.hints import after_writing
from shardkit.metadata.manifest import Digests
from shardkit.payloads.digests import Sums
from shardkit.payloads.payload import Extent, Literal, Trailer
from shardkit.planning.plan import OutputFile, Plan
from shardkit.sizes import format_size
from shardkit.system.progress import OnBytes
from shardkit.system.threads import TOGETHER, Pool
from shardkit.writing import reference_check
from shardkit.writing.compress import write_compressed
from shardkit.writing.copier import Copier, Engine, See, can_clone, clonable, engine_of, reserve
from shardkit.writing.transaction import Transaction

_LOG = logging.getLogger("shardkit")


def write(
    plan: Plan,
    transaction: Transaction,
    *,
    jobs: int | None = None,
    sync: bool = True,
    on_bytes: OnBytes = lambda count: None,
) -> Counter[Engine]:
    """Write the files of *plan* that *transaction* has not, and count the bytes by engine.

    Args:
        plan: what to write.
        transaction: has begun; its folder is written in.
        jobs: files written at a time; None for one more than there are processors, or as many where
            they are compressed, at most 8.
        sync: make each file last before it counts as done.
        on_bytes: called, from any thread, with the number of bytes after each step; first with
            those that are written already.

    Raises:
        FormatError: a source cannot be read.
        OutputError: a file cannot be written, or is not what the reference reader expects.
    """
    todo = [file for file in plan.files if file.name not in transaction.done]
    on_bytes(plan.nbytes - sum(file.nbytes for file in todo))
    together = jobs or _at_a_time(plan)
    clones = cache(lambda path: can_clone(path, transaction.folder))
    with Pool(together, "shardkit-compress") as frames, Pool(together, "shardkit-write") as pool:
        files = _FileWriter(plan, transaction, clones, sync, on_bytes, frames, ahead=together + 1)
        # The largest first. Where one fails, or the run is interrupted, the others stop too.
        try:
            early = [file for file in todo if file.late is None]
            early.sort(key=lambda file: -file.nbytes)
            futures = [pool.submit(files.write, file) for file in early]
            if any(plan.is_safetensors(file) and file.codec is None for file in early):
                frames.submit(reference_check.fetch)  # these threads have little to do here
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            files.stop.set()
            pool.shutdown(cancel_futures=True)
        counts = _added(futures)
        # Then what holds digests of the files before it.
        files.stop.clear()
        for file in todo:
            if file.late is not None:
                counts += files.write(file.settled(transaction.done))
    return counts


def _at_a_time(plan: Plan) -> int:
    """As many files as keep all processors at work.

    Shards are seldom as many as the processors, or a multiple: with one file more, the system evens
    out what is left of them. But one that is compressed takes all processors by itself, and memory.
    """
    processors = os.cpu_count() or 1
    return min(TOGETHER, processors if any(file.codec for file in plan.files) else processors + 1)


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


class _FileWriter:
    """Writes files of one plan; may be called from several threads."""

    def __init__(
        self,
        plan: Plan,
        transaction: Transaction,
        clones: Callable[[Path], bool],
        sync: bool,
        on_bytes: OnBytes,
        frames: Executor,
        *,
        ahead: int,
    ) -> None:
        self.stop = threading.Event()
        self._plan = plan
        self._transaction = transaction
        self._clones = clones
        self._sync = sync
        self._report = on_bytes
        self._frames = frames
        self._ahead = ahead
        self._lock = threading.Lock()

    def write(self, file: OutputFile) -> Counter[Engine]:
        """Write, sync, check and record *file*; returns its bytes by engine.

        Raises:
            FormatError: a source cannot be read.
            OutputError: it cannot be written, or is not what the reference reader expects.
        """
        path = self._transaction.folder / file.name
        sums = _Sums.of(self._plan, file)
        begun = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w+b", buffering=0) as output:
                # Its bytes, and the digests of them as they pass.
                if file.codec is None:
                    counts = self._copy(file, output.fileno(), sums.see)
                else:
                    counts = Counter({Engine.COMPRESSED: file.nbytes})
                    write_compressed(
                        file,
                        output.fileno(),
                        self._frames,
                        ahead=self._ahead,
                        see=[sums.for_record.see] if sums.for_record else [],
                        see_stored=[sums.for_manifest.see] if sums.for_manifest else [],
                        on_bytes=self._on_bytes,
                    )
                # They last before it is on record.
                if self._sync:
                    os.fsync(output.fileno())
        except OSError as error:
            message = f"{shown_path(path)}: cannot be written: {error.strerror or error}"
            raise OutputError(message, hint=after_writing(error)) from None
        if self._plan.is_safetensors(file):
            reference_check.check(path, file)
        _LOG.info("%s: %s in %.3f s", shown_path(path), _amounts(counts), time.monotonic() - begun)
        with self._lock:
            self._transaction.finished(file.name, sums.digests() if sums.see else None)
        return counts

    def _copy(self, file: OutputFile, output: int, see: Sequence[See]) -> Counter[Engine]:
        """Write the parts of *file*, a trailer from the CRCs of the parts before it."""
        if not any(self._clones(part.path) for part in file.parts if isinstance(part, Extent)):
            reserve(output, file.nbytes)
        needs_crcs = any(isinstance(part, Trailer) for part in file.parts)
        crcs: list[int] = []
        at = 0
        with Copier(output, clones=self._clones, on_bytes=self._on_bytes) as copier:
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

    def _on_bytes(self, count: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self._lock:
            self._report(count)


@dataclass(frozen=True, slots=True)
class _Sums:
    """What is summed of a file: it and its *tensors* for a manifest, its blocks for
    offload.json.
    """

    tensors: tuple[str, ...]
    for_manifest: Sums | None
    for_record: Sums | None

    @classmethod
    def of(cls, plan: Plan, file: OutputFile) -> _Sums:
        """What *plan* wants summed of *file*."""
        for_manifest = for_record = None
        runs = plan.tensors_in(file) if plan.checksum else ()
        if plan.checksum:
            for_manifest = Sums(plan.checksum, [(run.start, run.stop) for run in runs])
        blocks = [(run.start, run.stop) for run in plan.blocks_in(file)]
        if plan.record and blocks:
            for_record = Sums(plan.record.algorithm, blocks, whole=False)
        return cls(tuple(run.name for run in runs), for_manifest, for_record)

    @property
    def see(self) -> tuple[See, ...]:
        """To be called with the bytes as they pass."""
        return tuple(sums.see for sums in (self.for_manifest, self.for_record) if sums)

    def digests(self) -> Digests:
        """Everything that was summed, once all bytes have passed."""
        whole, tensors = self.for_manifest.ended() if self.for_manifest else ("", [])
        blocks = self.for_record.ended()[1] if self.for_record else []
        return Digests(whole, dict(zip(self.tensors, tensors, strict=False)), tuple(blocks))


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


class _Stopped(BaseException):
    """Another file failed, or the run was interrupted."""


def _added(futures: Iterable[Future[Counter[Engine]]]) -> Counter[Engine]:
    """The sum of what the files counted, or else what went wrong first; that others then stopped is
    no news.
    """
    done = [future for future in futures if not future.cancelled()]
    failures = [error for future in done if (error := future.exception()) is not None]
    for error in failures:
        if not isinstance(error, _Stopped):
            raise error
    return sum((future.result() for future in done), Counter[Engine]())
