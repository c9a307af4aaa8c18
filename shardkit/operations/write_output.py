"""Write an `Output`, for convert, offload-prep and `save`: it appears complete or not at all."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass

from shardkit.errors import LimitExceeded, Malformed, NoRoom, shown_path
from shardkit.operations.integrity import refuse_changed, refuse_damaged
from shardkit.planning.output import Output
from shardkit.planning.output_path import check_output, check_room
from shardkit.planning.prepare import scratch_beside
from shardkit.sizes import format_size
from shardkit.system.progress import OnBytes
from shardkit.writing.copier import Engine
from shardkit.writing.transaction import Identity, Transaction, boot_id
from shardkit.writing.writer import bytes_to_store, write

_LOG = logging.getLogger("shardkit")


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


def write_output(
    output: Output,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    on_bytes: OnBytes = lambda count: None,
    sync: bool = True,
) -> Written:
    """Write *output*, or resume or end what an earlier run of the same plan began.

    Raises:
        FormatError: a file that is read cannot be read, is damaged, or changed meanwhile.
        OutputError: the output cannot be written or replaced.
    """
    begun = time.monotonic()
    out, plan = output.out, output.plan
    identity = Identity(plan.digest, output.files, "" if sync else boot_id())
    transaction = Transaction(out, identity, single=output.single)
    size = format_size(plan.nbytes)
    _LOG.info("%s: %d files to write, %s", shown_path(out), len(plan.files), size)
    if transaction.recover():
        _LOG.info("%s: an earlier run had written all of it", shown_path(out))
        return Written(Counter(), len(plan.files), (), time.monotonic() - begun)
    check_output(output, overwrite=overwrite)
    notes: list[str] = []
    if output.check is not None:
        checkpoint, limits = output.check.checkpoint, output.check.limits
        notes += refuse_damaged(checkpoint.files, checkpoint.tensors, limits, scratch_beside(out))
    with transaction.begin():
        resumed = len(transaction.done)
        if resumed:
            _LOG.info("%s: %d files were written by an earlier run", shown_path(out), resumed)
        try:
            needed = bytes_to_store(plan, transaction.folder, done=transaction.done)
            check_room(transaction.folder, needed, output.name)
            engines = write(plan, transaction, jobs=jobs, sync=sync, on_bytes=on_bytes)
            refuse_changed(output.files)
        except (Malformed, LimitExceeded):
            transaction.discard()
            raise
        except NoRoom:
            if not resumed:  # else what an earlier run finished stays, for when there is room
                transaction.discard()
            raise
        check_output(output, overwrite=overwrite)  # what is there may be new, or have grown
        transaction.commit()
    _LOG.info("%s: in place after %.3f s", shown_path(out), time.monotonic() - begun)
    return Written(engines, resumed, tuple(notes), time.monotonic() - begun)
