"""Write the files of a plan that are not there yet, by an `Executor`: first those that depend on no
other, then those that hold digests of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator

from shardkit.events import Event, OnEvent
from shardkit.fleet.executor import Executor, Threads
from shardkit.planning.plan import OutputFile, Plan
from shardkit.writing.copier import Engine
from shardkit.writing.transaction import Transaction
from shardkit.writing.writer import Work


def execute(
    plan: Plan,
    transaction: Transaction,
    executor: Executor,
    *,
    on_event: OnEvent = lambda event: None,
    only: Collection[str] | None = None,
) -> Counter[Engine]:
    """Write the files of *plan* that *transaction* has not, and count the bytes by engine.

    Args:
        plan: what to write.
        transaction: has begun; its folder is written in.
        executor: does the units of work.
        on_event: called, from any thread, after each step; first for those that are written
            already.
        only: names of the files to write, which are not those that hold digests of others; None for
            all.

    Raises:
        FormatError: a source cannot be read.
        OutputError: a file cannot be written, or is not what the reference reader expects.
    """
    wanted = [file for file in plan.files if only is None or file.name in only]
    on_event(Event("planned", transaction.out.name, sum(file.nbytes for file in wanted)))
    todo: list[OutputFile] = []
    for file in wanted:
        if file.name in transaction.done:
            on_event(Event("resumed", file.name, file.nbytes))
        else:
            todo.append(file)
    counts: Counter[Engine] = Counter()

    def write(files: Collection[OutputFile], by: Executor) -> None:
        work = [Work.of(plan, file, transaction) for file in files]
        results = by(work, on_event)
        try:
            for done in results:
                transaction.done[done.name] = done.finished
                counts.update(done.engines)
        finally:  # an interrupt here ends the units before the folder is given up
            if isinstance(results, Generator):
                results.close()

    # The largest first.
    early = (file for file in todo if file.late is None)
    write(sorted(early, key=lambda file: -file.nbytes), executor)
    for file in todo:
        if file.late is not None:
            write([file.settled(transaction.done)], Threads(1))
    return counts
