"""Carry out a plan: every file of it written, synced and checked, a few at a time, with no choices left."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

from shardkit.copying import Copier, Engine, OnBytes, can_clone, clonable, engine_of, reserve
from shardkit.errors import OutputError, shown_path
from shardkit.journal import Journal, advice
from shardkit.payload import Extent, Literal, Trailer
from shardkit.plan import OutputFile, Plan

_TOGETHER = 8  # more files at a time than this do not help one disk


def write(
    plan: Plan, journal: Journal, *, jobs: int | None = None, sync: bool = True, on_bytes: OnBytes = lambda count: None
) -> Counter[Engine]:
    """Write the files of *plan* that *journal* does not have yet, and count the bytes by engine.

    Args:
        plan: what to write.
        journal: the folder to write in.
        jobs: files written at a time; None for one per processor, at most 8.
        sync: make each file last before it counts as done.
        on_bytes: called, from any thread, with the number of bytes after each step; first with those that *journal* has.

    Raises:
        FormatError: a source cannot be read.
        OutputError: a file cannot be written, or is not what the reference reader expects.
    """
    todo = sorted((file for file in plan.files if file.name not in journal.done), key=lambda file: -file.nbytes)
    on_bytes(plan.nbytes - sum(file.nbytes for file in todo))
    shards = set(plan.weight_map.values())
    run = _Run(journal, cache(lambda path: can_clone(path, journal.folder)), sync, on_bytes)
    with ThreadPoolExecutor(jobs or min(_TOGETHER, os.cpu_count() or 1), "shardkit-write") as pool:
        futures = [pool.submit(run.write, file, checked=file.name in shards and plan.format == "safetensors") for file in todo]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            run.stop.set()
            pool.shutdown(cancel_futures=True)
    return _added(futures)


def forecast(plan: Plan, folder: Path) -> Counter[Engine]:
    """How many bytes of *plan* each engine would move into *folder*, by what its file system can do.

    Bytes that no clone saves are counted as copied in the kernel; which engine does it in the end, the run tells.
    """
    clones = cache(lambda path: can_clone(path, folder))
    counts: Counter[Engine] = Counter()
    for file in plan.files:
        at = 0
        for part in file.parts:
            cloned = clonable(part, at) if isinstance(part, Extent) and clones(part.path) else 0
            counts[Engine.CLONED] += cloned
            counts[engine_of(part)] += part.nbytes - cloned
            at += part.nbytes
    return +counts


class _Run:
    def __init__(self, journal: Journal, clones: Callable[[Path], bool], sync: bool, on_bytes: OnBytes) -> None:
        self.stop = threading.Event()
        self._journal = journal
        self._clones = clones
        self._sync = sync
        self._report = on_bytes
        self._lock = threading.Lock()

    def write(self, file: OutputFile, *, checked: bool) -> Counter[Engine]:
        path = self._journal.folder / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            counts = self._fill(file, path)
        except OSError as error:
            message = f"{shown_path(path)}: cannot be written: {error.strerror or error}"
            raise OutputError(message, hint=advice(error)) from None
        if checked:
            check(path, file)
        with self._lock:
            self._journal.finished(file.name)
        return counts

    def _fill(self, file: OutputFile, path: Path) -> Counter[Engine]:
        with (
            open(path, "wb", buffering=0) as output,
            Copier(output.fileno(), clones=self._clones, on_bytes=self._on_bytes) as copier,
        ):
            if not self._shares_pages(file):
                reserve(output.fileno(), file.nbytes)
            summed = any(isinstance(part, Trailer) for part in file.parts)
            (_write_summed if summed else _write_parts)(file, copier)
            if self._sync:
                os.fsync(output.fileno())
            return copier.counts

    def _shares_pages(self, file: OutputFile) -> bool:
        return any(self._clones(part.path) for part in file.parts if isinstance(part, Extent))

    def _on_bytes(self, count: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self._lock:
            self._report(count)


class _Stopped(BaseException):
    """Another file failed, or the run was interrupted."""


def check(path: Path, file: OutputFile) -> None:
    """Open *path* with the reference reader of safetensors; where it is not installed, hold its size against the plan.

    Raises:
        OutputError: it does not take the file.
    """
    try:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as opened:  # which itself imports numpy
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise _faulty(path, f"the reference reader does not take it: {error}") from None
    except ImportError:
        if path.stat().st_size != file.nbytes:
            raise _faulty(path, f"{file.nbytes:,} bytes were planned, {path.stat().st_size:,} are there") from None


def _faulty(path: Path, message: str) -> OutputError:
    return OutputError(
        f"{shown_path(path)} was not written right: {message}",
        hint="run the command again; if it stays so, it is a bug in shardkit",
    )


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


def _write_summed(file: OutputFile, copier: Copier) -> None:
    """Write a file that ends in what is computed from the CRCs of its parts; they pass through this process."""
    at = 0
    crcs: list[int] = []
    for part in file.parts:
        payload = Literal(part.make(crcs)) if isinstance(part, Trailer) else part
        crcs.append(copier.write_summed(payload, at))
        at += part.nbytes
