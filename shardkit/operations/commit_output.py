"""End an output that was written in parts, or say how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from shardkit.brief import brief
from shardkit.errors import OutputError
from shardkit.events import OnEvent
from shardkit.metadata.unit_records import LOCK, PLAN, PlanRecord
from shardkit.operations.convert import Report, asked_how, reported
from shardkit.operations.offload_prep import prepare_offload
from shardkit.operations.write_output import commit_parts
from shardkit.planning.output_path import followed, partial_folder
from shardkit.planning.prepare import Conversion, prepare
from shardkit.planning.request import Asked
from shardkit.printable import shown_path
from shardkit.sources import path_arguments
from shardkit.system import folders
from shardkit.system.progress import OnBytes
from shardkit.writing.transaction import Transaction
from shardkit.writing.unit_files import read_plan, read_records


@dataclass(frozen=True, slots=True, repr=False)
class Status:
    """How far an output is.

    Attributes:
        out: the folder, or the one file.
        state: ``"in place"``; ``"complete"``, all parts are written, and `commit` puts it in place;
            ``"unfinished"``; or ``"not begun"``.
        source: what is converted; "" where no record tells.
        files: how many files are written before the output is committed; 0 where no record tells.
        done: how many of them are complete.
        nbytes: size of all files in bytes, as planned.
        done_nbytes: size of those that are complete, in bytes.
        missing: names of the files that are not complete.
        running: whether a process holds the lock of the output, on this machine or, where the file
            system tells, on another.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("model.safetensors", "out", part="2/2")
        >>> status = shardkit.status("out")
        >>> status.state, status.files, status.done, status.missing
        ('unfinished', 1, 0, ('model.safetensors',))
    """

    out: Path
    state: str
    source: str
    files: int
    done: int
    nbytes: int
    done_nbytes: int
    missing: tuple[str, ...]
    running: bool

    def __repr__(self) -> str:
        return brief(self)


def commit(
    out: str | PathLike[str],
    *,
    overwrite: bool = False,
    on_bytes: OnBytes | None = None,
    on_event: OnEvent | None = None,
) -> Report:
    """Put an output in its place that `convert` or `offload_prep` has written in parts.

    The source is planned again, and every record compared with the plan; the files that hold
    digests of others are written; and what killed processes left is removed.

    Args:
        out: the output, as it was given to the parts.
        overwrite: replace an earlier output of shardkit.
        on_bytes: called with the number of bytes after each step.
        on_event: called with each `Event`.

    Returns:
        What is in place.

    Raises:
        Incomplete: files are missing; *missing* has their names.
        OutputError: nothing was begun, a part is still being written, or it cannot be put in place.
        FormatError: the source changed, or cannot be read.

    Example:
        >>> import shardkit
        >>> for part in ("1/2", "2/2"):  # each may run on another machine
        ...     report = shardkit.convert("training.pt", "out", max_shard="700", part=part)
        >>> shardkit.commit("out").tensors
        7
        >>> shardkit.verify("out", "training.pt").same
        True
    """
    begun = time.monotonic()
    place = followed(path_arguments.to_write(out))
    plan = _begun(place)
    if plan is None or plan.request is None:
        raise _without_parts(place)
    conversion = _planned_again(plan, place)
    how = asked_how(None, overwrite, on_bytes, on_event, True, None)
    report = reported(conversion, commit_parts(conversion.output, how))
    return replace(report, seconds=time.monotonic() - begun)


def status(out: str | PathLike[str]) -> Status:
    """Tell how far an output is; nothing is planned, and no source is read.

    Args:
        out: the output, as it was given to `convert` or `offload_prep`.

    Raises:
        OutputError: its records cannot be read.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("model.safetensors", "out")
        >>> shardkit.status("out").state
        'in place'
    """
    place = followed(path_arguments.to_write(out))
    folder = partial_folder(place)
    plan = _begun(place)
    if plan is None or not (folder / PLAN).exists():  # the latter where a commit was killed
        state = "in place" if place.exists() else "not begun"
        return Status(place, state, "", 0, 0, 0, 0, (), False)
    try:
        complete = {
            record.name
            for record in read_records(folder)
            if record.key == plan.key and record.finished.is_whole(folder / record.name)
        }
    except OSError as error:
        raise _unreadable(folder, error) from None
    early = [(name, nbytes) for name, nbytes in plan.files if name not in plan.late]
    missing = tuple(name for name, _ in early if name not in complete)
    return Status(
        place,
        "unfinished" if missing else "complete",
        plan.request.source if plan.request else "",
        len(early),
        len(early) - len(missing),
        sum(nbytes for _, nbytes in early),
        sum(nbytes for name, nbytes in early if name in complete),
        missing,
        _is_locked(folder / LOCK),
    )


def _begun(place: Path) -> PlanRecord | None:
    """For which plan the output at *place* is being written; None for none."""
    folder = partial_folder(place)
    try:
        plan = read_plan(folder) or read_plan(place)  # the latter where a commit was killed
        if plan is None and (folder / PLAN).exists():
            raise OutputError(
                f"{shown_path(folder / PLAN)} is damaged",
                hint="remove the folder, and write all parts again",
            )
        return plan
    except NotADirectoryError:
        return None
    except OSError as error:
        raise _unreadable(folder, error) from None


def _without_parts(place: Path) -> OutputError:
    """Why there is nothing to commit; ends what a commit that was killed has left."""
    if not place.exists():
        return OutputError(
            f"there are no parts of {shown_path(place)} to commit",
            hint="write the parts first, as with `shardkit convert SRC -o OUT --part 1/16`",
        )
    Transaction(place, PlanRecord("", (), "", "")).recover()
    return OutputError(
        f"there are no parts of {shown_path(place)} to commit: it is in its place already",
        hint="to replace it, write the parts with `--overwrite` first",
    )


def _planned_again(plan: PlanRecord, place: Path) -> Conversion:
    assert plan.request is not None
    asked = Asked.of(plan.request, partial_folder(place))
    if asked.operation == "offload-prep":
        return prepare_offload(
            asked.source,
            place,
            asked.edits,
            asked.options,
            blocks=asked.blocks,
            order=asked.order,
            in_parts=True,
        )
    return prepare(asked.source, place, asked.edits, asked.options, in_parts=True)


def _is_locked(path: Path) -> bool:
    for mode in ("rb+", "rb"):  # who may not write may still ask
        try:
            with open(path, mode, buffering=0) as file:
                return not folders.lock(file)
        except OSError:
            continue
    return False


def _unreadable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{shown_path(folder)}: cannot be read: {error.strerror or error}",
        hint="check who may read it",
    )
