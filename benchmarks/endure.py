"""What was tried to break a run, and what came of it: the table of faults in docs/verify.md. Takes
some minutes; Linux only.

Each program of `tests/crash` strikes one call after the other, checks the laws of an output that is
whole or not there, gives the same command again, and counts. Whatever is wrong is printed, and
makes the exit code 1.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

PROGRAMS = Path(__file__).parent.parent / "tests" / "crash"
HEAD = (
    "| what strikes, at one call after the other | calls | what is left | wrong then, or "
    "after the same command again |"
)
SOURCE = (errno.EIO, errno.EACCES, errno.ESTALE)
MODEL = (errno.EIO, errno.EMFILE)
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # for a fork


class Sweep(TypedDict):
    """What a program prints: how often what was left, and all that was wrong."""

    left: dict[str, int]
    faults: list[str]


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: for the table.
        runs: the programs that try it, with their arguments but for the folder, which comes first.
    """

    name: str
    runs: tuple[tuple[str, ...], ...]


def faults() -> tuple[Fault, ...]:
    """All of them."""
    scenarios = said("scenarios.py").split()
    return (
        Fault(
            "a call of the writer fails (EIO)",
            tuple(("failer.py", each, f"{errno.EIO}") for each in scenarios),
        ),
        Fault(
            "the disk is full (ENOSPC)",
            tuple(("failer.py", each, f"{errno.ENOSPC}") for each in scenarios),
        ),
        Fault(
            "SIGKILL, half of a write written",
            tuple(("killer.py", each, "1") for each in scenarios),
        ),
        Fault(
            "a source fails from there on (EIO, EACCES, ESTALE)",
            tuple(("failer.py", "folder", f"{n}", "reads") for n in SOURCE),
        ),
        Fault(
            "so does a file that a model streams from (EIO, EMFILE)",
            tuple(("streamer.py", f"{n}") for n in MODEL),
        ),
    )


def said(program: str, *arguments: str) -> str:
    """What a program of `tests/crash` prints."""
    command = [sys.executable, str(PROGRAMS / program), *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD}
    ).stdout


def tried(fault: Fault, base: Path) -> tuple[Counter[str], list[str]]:
    """How often what was left, and all that was wrong. As many programs run side by side as there
    are processors.
    """

    def swept(run: tuple[str, ...]) -> Sweep:
        program, *arguments = run
        sweep: Sweep = json.loads(said(program, tempfile.mkdtemp(dir=base), *arguments))
        return sweep

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sweeps = list(pool.map(swept, fault.runs))
    left = sum((Counter(sweep["left"]) for sweep in sweeps), Counter[str]())
    return left, [wrong for sweep in sweeps for wrong in sweep["faults"]]


def main() -> int:
    """Print the table."""
    memory = Path("/dev/shm")
    wrong: list[str] = []
    print(f"{HEAD}\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as base:
        for fault in faults():
            left, found = tried(fault, Path(base))
            ends = ", ".join(f"{end} {count:,}" for end, count in left.most_common())
            print(f"| {fault.name} | {left.total():,} | {ends} | {len(found):,} |", flush=True)
            wrong += found
    print(*wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
