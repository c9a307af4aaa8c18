"""Print the plan of convert or offload-prep, or execute it and report what was done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardkit.cli.interruption import Terminated
from shardkit.cli.output.printing import named, put_json, say
from shardkit.events import Event, OnEvent
from shardkit.system.progress import Progress, progress

if TYPE_CHECKING:
    from shardkit.fleet.executor import Executor
    from shardkit.fleet.parts import Part
    from shardkit.operations.convert import Report
    from shardkit.planning.prepare import Conversion


@dataclass(frozen=True, slots=True)
class Writing:
    """How an output is written, and what is printed.

    Attributes:
        jobs: files written in parallel; None to choose automatically.
        sync: make every file durable (fsync) before the output appears.
        limit: bytes moved in a second at most; None for as many as there can be.
        part: which part to write, and to put nothing in place; None for all.
        executor: writes the files; None for threads of this process.
        dry_run: print the plan, and write nothing.
        overwrite: replace an earlier output.
        as_json: print what was done as JSON.
        quiet: print nothing.
    """

    jobs: int | None
    sync: bool
    limit: int | None
    part: Part | None
    executor: Executor | None
    dry_run: bool
    overwrite: bool
    as_json: bool
    quiet: bool

    @property
    def is_shared(self) -> bool:
        """Whether several processes write the output."""
        return self.part is not None or self.executor is not None


def write(command: str, conversion: Conversion, begun: float, how: Writing) -> None:
    """Carry out *conversion*, which *command* has decided, or only show it, and say what was done.

    Args:
        command: its name.
        conversion: what to write.
        begun: when it began, on the clock of `time.monotonic`.
        how: how to write it, and what to print.

    Raises:
        FormatError: the source cannot be read.
        OutputError: the output cannot be written.
    """
    if how.dry_run:
        from shardkit.cli.output.dry_run import rehearse

        rehearse(command, conversion, overwrite=how.overwrite, as_json=how.as_json)
        return
    report = replace(_written(conversion, how), seconds=time.monotonic() - begun)
    if how.as_json:
        put_json(command, asdict(report))
    elif not how.quiet:
        from shardkit.cli.output.summary import summary

        say("\n".join(summary(report)))


def _written(conversion: Conversion, how: Writing) -> Report:
    from shardkit.operations.convert import carry_out
    from shardkit.operations.write_output import How

    with _resumable(conversion.out), progress("writing", quiet=how.quiet or how.as_json) as bar:
        asked = How(how.jobs, how.overwrite, how.sync, how.limit, shown_on(bar), how.executor)
        return carry_out(conversion, asked, how.part)


def shown_on(bar: Progress) -> OnEvent:
    """Draws a run on *bar*."""

    def draw(event: Event) -> None:
        if event.kind == "planned":
            bar.expect(event.nbytes)
        elif event.kind in ("resumed", "written"):
            bar.add(event.nbytes)

    return draw


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Report how to resume, if a signal stops the run."""
    from shardkit.planning.output_path import partial_folder

    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        partial = partial_folder(out)
        if partial.exists():
            stop.add_note(
                f"finished files are kept in {named(partial)}; the same command resumes from there"
            )
        raise
