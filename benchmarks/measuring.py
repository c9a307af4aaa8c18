"""Run commands in turn, as whole processes, and hold their medians against each other.

Every contender of a race runs once in each round, so that a machine whose speed drifts drifts for
all of them. This module stays small: a child counts the memory of the process that started it into
its own peak.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Benching:
    """Where things lie, and how often each contender runs."""

    folder: Path
    rounds: int

    def source(self, name: str) -> Path:
        return made(self.folder, name)


_Bench = TypeVar("_Bench", bound=Benching)


def run_those_asked_for(
    told: str, benches: Mapping[str, Callable[[_Bench], object]], kind: type[_Bench]
) -> None:
    """Be the program that runs *benches*, or some of them; the first line of *told* says what it
    is.
    """
    parser = argparse.ArgumentParser(description=told.partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "shardkit-benchmarks")
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=benches, default=list(benches))
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(machine(), end="\n\n", flush=True)
    for name in asked.only:
        benches[name](kind(asked.folder, asked.rounds))


def machine() -> str:
    """The processor and memory of this machine, and when Linux gives huge pages, for whoever quotes
    the figures.
    """
    facts = Path("/proc/cpuinfo"), Path("/sys/kernel/mm/transparent_hugepage/enabled")
    told, pages = (path.read_text() if path.exists() else "" for path in facts)
    names = dict.fromkeys(
        line.partition(":")[2].strip()
        for line in told.splitlines()
        if line.startswith("model name")
    )
    flags = [
        flag
        for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        if f" {flag} " in f"{told} ".replace("\n", " ")
    ]
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        if hasattr(os, "sysconf")
        else 0
    )
    processor = " + ".join(names) or platform.processor() or platform.machine()
    huge = pages.partition("[")[2].partition("]")[0] or "unknown"
    return (
        f"{processor} ({', '.join(flags)}), {os.cpu_count()} cores, {memory:.0f} GB of "
        f"memory, huge pages: {huge}"
    )


@dataclass(frozen=True, slots=True)
class Run:
    """One process: wall time in seconds, peak resident memory in bytes."""

    seconds: float
    peak: int


@dataclass(frozen=True, slots=True)
class Medians:
    """What several runs of one command come to."""

    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak_mb(self) -> float:
        return max(run.peak for run in self.runs) / 1e6

    def __str__(self) -> str:
        times = sorted(run.seconds for run in self.runs)
        return f"{self.seconds:7.2f} s  ({times[0]:.2f} to {times[-1]:.2f})  {self.peak_mb:7.0f} MB"


@dataclass(frozen=True, slots=True)
class Contender:
    """A command, and what it writes, which is removed before and after each run.

    Attributes:
        command: what is run.
        output: the file or folder that it writes.
        tells: whether the last line that it prints is the seconds that count, because much of its
            time is another matter.
    """

    command: Sequence[str]
    output: Path | None = None
    tells: bool = False


def race(
    contenders: Mapping[str, Contender], rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, Medians]:
    """Run all *contenders* in turn, *rounds* times after one round that does not count; *before*
    runs before each process.
    """
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            remove(contender.output)
            before()
            run = measured(contender.command, tells=contender.tells)
            remove(contender.output)
            if number:
                runs[name].append(run)
    return {name: Medians(tuple(each)) for name, each in runs.items()}


def measured(command: Sequence[str], *, tells: bool = False) -> Run:
    """Run *command* to its end, and take its time, or what it *tells* of it.

    Python keeps the bytecode of what it imports, whatever the environment says: pip makes that of
    what it installs, and a checkout has it from the round that does not count.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
    environment = {
        name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    begun = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if process.returncode:
        sys.exit(
            f"{' '.join(map(str, command))}\nended with "
            f"{process.returncode}:\n{said.decode(errors='replace')}"
        )
    return Run(float(said.splitlines()[-1]) if tells else seconds, usage.ru_maxrss * 1024)


def remove(path: Path | None) -> None:
    """Remove a file or a folder, if it is there."""
    if path is not None and path.is_dir():
        shutil.rmtree(path)
    elif path is not None:
        path.unlink(missing_ok=True)


def settle() -> None:
    """Let the disk come to rest, so that one process does not wait for the writes of another."""
    os.sync()


def in_page_cache(path: Path) -> None:
    """Read *path* once, so that it is in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(8 << 20):
            pass


def made(folder: Path, name: str) -> Path:
    """The checkpoint called *name* of checkpoints.py in *folder*; both are made, by a process of
    its own, if they are missing.
    """
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"making {path} …", file=sys.stderr, flush=True)
        subprocess.run(
            [sys.executable, Path(__file__).parent / "checkpoints.py", name, folder], check=True
        )
    return path
