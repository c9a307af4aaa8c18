"""What convert and offload-prep do with what they decided: print it, or carry it out and say what was done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardkit.cli.interruption import Terminated
from shardkit.cli.printing import named, put_json, say
from shardkit.progress import progress

if TYPE_CHECKING:
    from shardkit.conversion import Report
    from shardkit.preparation import Conversion


def write(
    conversion: Conversion,
    begun: float,
    *,
    jobs: int | None,
    sync: bool,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Carry out *conversion*, or only show it, and say what was done since *begun*, on the clock of `time.monotonic`.

    Raises:
        FormatError: the source cannot be read.
        OutputError: the output cannot be written.
    """
    if dry_run:
        from shardkit.cli.dry_run import rehearse

        rehearse(conversion, overwrite=overwrite, as_json=as_json)
        return
    report = _written(conversion, jobs=jobs, overwrite=overwrite, sync=sync, quiet=quiet or as_json)
    report = replace(report, seconds=time.monotonic() - begun)
    if as_json:
        put_json(asdict(report))
    elif not quiet:
        from shardkit.cli.summary import summary

        say("\n".join(summary(report)))


def _written(conversion: Conversion, *, jobs: int | None, overwrite: bool, sync: bool, quiet: bool) -> Report:
    from shardkit.conversion import carry_out

    with _resumable(conversion.out), progress("writing", quiet=quiet) as bar:
        bar.expect(conversion.plan.nbytes)
        return carry_out(conversion, jobs=jobs, overwrite=overwrite, on_bytes=bar.add, sync=sync)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say, where a signal stops the run, how it goes on."""
    from shardkit.destination import partial_folder

    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        partial = partial_folder(out.absolute())
        if partial.exists():
            stop.add_note(f"what is done is kept in {named(partial)}, and the same command goes on from there")
        raise
