"""Write an `Output`, for convert, offload-prep and `save`: it appears complete or not at all.

`write_output` does all of it in one run. In a fleet, `write_part` writes the files of one part, as
often as there are parts, and `commit_parts` then puts the output in place.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardkit.errors import Incomplete, LimitExceeded, Malformed, NoRoom, OutputError
from shardkit.events import Event, OnEvent
from shardkit.fleet.execute import execute
from shardkit.fleet.executor import Executor, Threads
from shardkit.fleet.parts import ALL, Part
from shardkit.metadata.unit_records import PlanRecord
from shardkit.operations.integrity import refuse_changed, refuse_damaged
from shardkit.planning.output import Output
from shardkit.planning.output_path import check_output, check_room
from shardkit.planning.plan import Plan
from shardkit.planning.prepare import scratch_beside
from shardkit.printable import listed, several, shown, shown_path
from shardkit.sizes import format_size
from shardkit.system.rate_limit import RateLimit
from shardkit.version import __version__
from shardkit.writing.copier import Engine
from shardkit.writing.transaction import Transaction, boot_id
from shardkit.writing.writer import bytes_to_store

_LOG = logging.getLogger("shardkit")


@dataclass(frozen=True, slots=True)
class How:
    """How an output is written, which its bytes do not depend on.

    Attributes:
        jobs: files written at a time; None to choose by the number of processors.
        overwrite: replace an earlier output of shardkit.
        sync: make every file last before it counts.
        limit: bytes that are moved in a second at most; None for as many as there can be.
        on_event: called, from any thread, after each step.
        executor: writes the files; None for threads of this process.
    """

    jobs: int | None = None
    overwrite: bool = False
    sync: bool = True
    limit: int | None = None
    on_event: OnEvent = lambda event: None
    executor: Executor | None = None

    def writers(self) -> Executor:
        """Who writes the files: by default as many threads as *jobs*, no faster than *limit*."""
        return self.executor or Threads(self.jobs, RateLimit(self.limit) if self.limit else None)


@dataclass(frozen=True, slots=True)
class Written:
    """What was done to write an output.

    Attributes:
        engines: bytes of all files by how they came there.
        resumed: files that an earlier, interrupted run had finished.
        notes: what the checksums of the source said.
        seconds: wall time.
    """

    engines: Counter[Engine]
    resumed: int
    notes: tuple[str, ...]
    seconds: float


def write_output(output: Output, how: How = How()) -> Written:
    """Write *output*, or resume or end what an earlier run of the same plan began.

    Raises:
        FormatError: a file that is read cannot be read, is damaged, or changed meanwhile.
        OutputError: the output cannot be written or replaced.
    """
    begun = time.monotonic()
    out, plan = output.out, output.plan
    record = _plan_record(output, boot="" if how.sync else boot_id())
    transaction = Transaction(out, record, single=output.single)
    size = format_size(plan.nbytes)
    _LOG.info("%s: %d files to write, %s", shown_path(out), len(plan.files), size)
    if transaction.recover():
        return _was_in_place(output, begun)
    _refuse_what_is_there(output, transaction, how)
    notes = _checked_source(output)
    with transaction.begin():
        resumed = _say_resumed(transaction)
        try:
            needed = bytes_to_store(plan, transaction.folder, done=transaction.done)
            check_room(transaction.folder, needed, output.name)
            engines = execute(plan, transaction, how.writers(), on_event=how.on_event)
            refuse_changed(output.files)
        except (Malformed, LimitExceeded):
            transaction.discard()
            raise
        except NoRoom:
            if not resumed:  # else what an earlier run finished stays, for when there is room
                transaction.discard()
            raise
        _put_in_place(output, transaction, how)
    _LOG.info("%s: in place after %.3f s", shown_path(out), time.monotonic() - begun)
    return Written(engines, resumed, notes, time.monotonic() - begun)


def write_part(output: Output, part: Part, how: How = How()) -> Written:
    """Write the files of *output* that are of *part*, and leave them for `commit_parts`; other
    parts may be written at the same time.

    Raises:
        FormatError: a file that is read cannot be read, is damaged, or changed meanwhile.
        OutputError: they cannot be written, the output is there already, or other parts are of
            another plan.
    """
    begun = time.monotonic()
    mine = part.files(output.plan.files)
    plan = replace(output.plan, files=mine)
    transaction = Transaction(output.out, _plan_record(output, in_parts=True), single=output.single)
    size = format_size(plan.nbytes)
    _LOG.info("%s: part %s, %d files, %s", shown_path(output.out), part, len(mine), size)
    if transaction.recover(shared=True):  # a commit was killed when it had put all of it in place
        return replace(_was_in_place(output, begun), resumed=len(mine))
    _refuse_what_is_there(output, transaction, how)
    notes = _checked_source(output, part)
    with transaction.join():
        names = {file.name for file in mine}
        resumed = len(names & transaction.done.keys())
        needed = bytes_to_store(plan, transaction.folder, done=transaction.done)
        check_room(transaction.folder, needed, output.name)
        engines = execute(
            output.plan, transaction, how.writers(), on_event=how.on_event, only=names
        )
        refuse_changed(output.files)
    return Written(engines, resumed, notes, time.monotonic() - begun)


def commit_parts(output: Output, how: How = How()) -> Written:
    """Put *output* in place, all parts of which are written, and remove what killed runs left.

    Raises:
        FormatError: a source changed meanwhile.
        Incomplete: files are missing.
        OutputError: a part is still being written, or the output cannot be put in place.
    """
    begun = time.monotonic()
    plan = output.plan
    transaction = Transaction(output.out, _plan_record(output, in_parts=True), single=output.single)
    if transaction.recover():
        return _was_in_place(output, begun)
    check_output(output, overwrite=how.overwrite)
    with transaction.begin(anew=False):
        resumed = _say_resumed(transaction)
        missing = missing_files(plan, transaction.done)
        if missing:
            few = len(plan.files) - sum(file.late is not None for file in plan.files)
            raise Incomplete(
                f"{shown_path(output.out)} is not complete: {len(missing)} of "
                f"{several(few, 'file')} missing: {listed([shown(name) for name in missing])}",
                missing=missing,
                hint="write the missing parts, and commit again; `shardkit status` lists the files",
            )
        transaction.prune()
        engines = execute(plan, transaction, how.writers(), on_event=how.on_event)
        refuse_changed(output.files)
        _put_in_place(output, transaction, how)
    _LOG.info("%s: in place after %.3f s", shown_path(output.out), time.monotonic() - begun)
    return Written(engines, resumed, (), time.monotonic() - begun)


def missing_files(plan: Plan, done: Mapping[str, object]) -> list[str]:
    """Names of the files of *plan* that parts write, and that are not among those *done*."""
    return [file.name for file in plan.files if file.late is None and file.name not in done]


def _plan_record(output: Output, *, boot: str = "", in_parts: bool = False) -> PlanRecord:
    files = tuple((file.name, file.nbytes) for file in output.plan.files)
    late = tuple(file.name for file in output.plan.files if file.late is not None)
    return PlanRecord(
        output.plan.digest, output.files, boot, __version__, files, late, output.request, in_parts
    )


def _refuse_what_is_there(output: Output, transaction: Transaction, how: How) -> None:
    try:
        check_output(output, overwrite=how.overwrite)
    except OutputError:
        transaction.withdraw()
        raise


def _checked_source(output: Output, part: Part = ALL) -> tuple[str, ...]:
    """What the checksums of the source say; each part checks other files of it."""
    if output.check is None:
        return ()
    checkpoint, limits = output.check.checkpoint, output.check.limits
    files = checkpoint.files[part.number - 1 :: part.count]
    if not files:  # other parts check them, and say what they found
        return ()
    return tuple(refuse_damaged(files, checkpoint.tensors, limits, scratch_beside(output.out)))


def _say_resumed(transaction: Transaction) -> int:
    resumed = len(transaction.done)
    if resumed:
        path = shown_path(transaction.out)
        _LOG.info("%s: %d files were written by an earlier run", path, resumed)
    return resumed


def _put_in_place(output: Output, transaction: Transaction, how: How) -> None:
    check_output(output, overwrite=how.overwrite)  # what is there may be new, or have grown
    transaction.commit()
    how.on_event(Event("committed", output.out.name, output.plan.nbytes))


def _was_in_place(output: Output, begun: float) -> Written:
    _LOG.info("%s: an earlier run had written all of it", shown_path(output.out))
    return Written(Counter(), len(output.plan.files), (), time.monotonic() - begun)
