"""Processes in a memory cgroup, of either version: what they touch beyond its limit is reclaimed,
or ends them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def cage(limit: int | None) -> Iterator[list[str]]:
    """What to put before a command so that it runs with *limit* bytes of memory; nothing for None.

    Raises:
        SystemExit: no cgroup can be made here.
    """
    if limit is None:
        yield []
        return
    folder, name = _memory_cgroup() / f"shardkit-{os.getpid()}", "memory.max"
    try:
        folder.mkdir()
        if not (folder / name).exists():
            name = "memory.limit_in_bytes"
        (folder / name).write_text(str(limit))
    except OSError as error:
        sys.exit(
            f"no memory cgroup can be made here ({error}); run this as root, or where they are "
            "delegated"
        )
    try:
        yield ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh"]
    finally:
        with suppress(OSError):
            folder.rmdir()


def output_of(command: Sequence[str | Path], limit: int | None) -> str:
    """What *command* prints last, run with *limit* bytes of memory.

    Raises:
        SystemExit: it failed.
    """
    with cage(limit) as prefix:
        done = subprocess.run(
            [*prefix, *map(str, command)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def _memory_cgroup() -> Path:
    """The one that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/")
        if not controllers and (_ROOT / path.lstrip("/") / "cgroup.controllers").exists():
            return _ROOT / path.lstrip("/")
    return _ROOT
