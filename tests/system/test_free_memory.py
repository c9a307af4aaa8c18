"""What memory is left: the system's word, bounded by the containers around this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkit.system.free_memory import available_memory

MIB = 1 << 20


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


SYSTEM = {"proc/meminfo": f"MemTotal:  999999 kB\nMemAvailable:   {8 * 1024} kB\n"}
V2 = {"proc/self/cgroup": "0::/user/box\n", "sys/fs/cgroup/user/box/memory.max": f"{4 * MIB}\n"}
TAKEN = {"sys/fs/cgroup/user/box/memory.current": f"{3 * MIB}\n"}
FILES = {
    "sys/fs/cgroup/user/box/memory.stat": (
        f"anon {MIB}\ninactive_file {MIB}\nactive_file {MIB // 2}\n"
    )
}
AROUND = {
    "sys/fs/cgroup/user/memory.max": f"{2 * MIB}",
    "sys/fs/cgroup/user/memory.current": f"{2 * MIB - 5}",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * MIB}",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{MIB}",
}
FULL = {"sys/fs/cgroup/user/box/memory.current": f"{9 * MIB}\n"}
UNLIMITED = {"sys/fs/cgroup/user/box/memory.max": "max\n"}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        (SYSTEM, 8 * MIB),
        (SYSTEM | V2 | TAKEN, MIB),
        (SYSTEM | V2 | TAKEN | FILES, MIB + MIB + MIB // 2),
        (SYSTEM | V2 | TAKEN | AROUND, 5),
        (SYSTEM | V2 | TAKEN | UNLIMITED, 8 * MIB),
        (SYSTEM | V2 | FULL, 0),
        (SYSTEM | V1, 2 * MIB),
    ],
    ids=[
        "no group",
        "limit",
        "pages of files are given back",
        "the group around it",
        "no limit",
        "full",
        "first kind",
    ],
)
def test_the_least_of_what_system_and_groups_leave_is_available(
    tmp_path: Path, files: dict[str, str], available: int
) -> None:
    assert available_memory(machine(tmp_path, files)) == available


def test_a_machine_without_proc_says_what_it_has(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > MIB


def test_this_machine_has_memory() -> None:
    assert available_memory() > MIB
