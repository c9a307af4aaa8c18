"""How many bytes of this machine's memory can still be taken: what the system has free, and what a
container leaves of it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)
_FILE_PAGES = re.compile(r"^(?:in)?active_file (\d+)$", re.MULTILINE)


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that can be allocated before the machine swaps or the limit of the container
    applies; on macOS, the installed memory.

    Args:
        root: where /proc and /sys are.
    """
    rooms = [room for room in (_system(root), *_containers(root)) if room is not None]
    return max(0, min(rooms)) if rooms else _elsewhere()


def _system(root: Path) -> int | None:
    found = _AVAILABLE.search(_text(root / "proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def _containers(root: Path) -> Iterator[int | None]:
    """What each control group around this process leaves, of the second kind or of the first."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for group in _upwards(root / "sys/fs/cgroup", path):
                yield _left(group, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            for group in _upwards(root / "sys/fs/cgroup/memory", path):
                yield _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """The folder of the group *path* and of those around it; inside a container, only some may be
    there.
    """
    steps = [step for step in path.split("/") if step not in ("", "..")]
    for depth in range(len(steps), -1, -1):
        yield top.joinpath(*steps[:depth])


def _left(group: Path, limit: str, usage: str) -> int | None:
    most, taken = _text(group / limit).strip(), _text(group / usage).strip()
    if not (most.isdecimal() and taken.isdecimal()):
        return None  # "max", or no such group here
    # Pages of files are given back when memory is short, as MemAvailable has it too.
    given_back = sum(map(int, _FILE_PAGES.findall(_text(group / "memory.stat"))))
    return int(most) - max(0, int(taken) - given_back)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _elsewhere() -> int:
    if sys.platform == "win32":
        return _windows()
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _windows() -> int:
    import ctypes

    # MEMORYSTATUSEX: two 32-bit numbers, then seven of 64 bits, of which the second is what is
    # available.
    status = (ctypes.c_uint64 * 8)()
    status[0] = ctypes.sizeof(status)
    ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined] # on Windows only
    return int(status[2])
