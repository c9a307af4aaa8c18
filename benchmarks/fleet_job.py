"""One contender of fleet.py: writes SOURCE to OUT in some way, and prints as JSON the seconds that
it took without its start-up, the seconds of that, and the memory of its workers.

    python benchmarks/fleet_job.py WAY SOURCE OUT MAX_SHARD

The start-up of a part is what the same part takes when all of its files are written; that of Ray is
to start a cluster, import shardkit in its workers and connect.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shardkit

WORKERS = 2  # the processors of the machine


def alone(source: Path, out: Path, max_shard: str) -> dict[str, float]:
    """One process, as `shardkit convert` without options."""
    begun = time.perf_counter()
    shardkit.convert(source, out, max_shard=max_shard)
    return {"seconds": time.perf_counter() - begun, "start": 0.0}


def parts(source: Path, out: Path, max_shard: str) -> dict[str, float]:
    """Two processes at a time, each with a part, and a commit."""
    folder = str(Path(__file__).parent)
    program = (
        f"import sys; sys.path.insert(0, {folder!r}); import fleet_job; "
        "fleet_job.part(*sys.argv[1:])"
    )
    commands = [
        [sys.executable, "-c", program, str(source), str(out), max_shard, f"{k}/{WORKERS}"]
        for k in range(1, WORKERS + 1)
    ]
    begun = time.perf_counter()
    told = _together(commands)
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    again = _together(commands)
    start = time.perf_counter() - begun
    begun = time.perf_counter()
    shardkit.commit(out)
    committed = time.perf_counter() - begun
    grown = max(full["peak"] - idle["peak"] for full, idle in zip(told, again, strict=True))
    return {"seconds": seconds + committed - start, "start": start, "grown": grown}


def part(source: str, out: str, max_shard: str, text: str) -> None:
    """One part, and the memory that it took at most."""
    shardkit.convert(source, out, max_shard=max_shard, part=text)
    print(json.dumps({"peak": _peak()}))


def ray(source: Path, out: Path, max_shard: str) -> dict[str, float]:
    """Two machines of one processor each, which are processes of this one."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    begun = time.perf_counter()
    cluster: Any = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    for _ in range(WORKERS - 1):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        idle = dict(_asked(ray))
        start = time.perf_counter() - begun
        begun = time.perf_counter()
        shardkit.convert(source, out, max_shard=max_shard, executor="ray")
        seconds = time.perf_counter() - begun
        grown = max(dict(_asked(ray)).values()) - min(idle.values())
    finally:
        ray.shutdown()
        cluster.shutdown()
    return {"seconds": seconds, "start": start, "grown": grown}


def _asked(ray: Any) -> list[tuple[int, int]]:
    """The workers, and the memory that each took at most."""

    def told() -> tuple[int, int]:
        from shardkit.fleet import ray_cluster  # noqa: F401 - what a task is a function of
        from shardkit.writing import reference_check

        reference_check.fetch()  # an idle worker has imported all that it needs
        time.sleep(0.5)  # so that each worker gets one
        return os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # As small as the tasks of an output, of which a machine has one more than it has processors.
    task = ray.remote(told).options(scheduling_strategy="SPREAD", num_cpus=0.5)
    found: dict[int, int] = {}
    for _ in range(3):
        found |= dict(ray.get([task.remote() for _ in range(2 * WORKERS)]))
    return list(found.items())


def _together(commands: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for command in commands
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit("a part failed")
    return [json.loads(text) for text in said]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


WAYS = {"alone": alone, "parts": parts, "ray": ray}


if __name__ == "__main__":
    way, source, out, max_shard = sys.argv[1:]
    print(json.dumps(WAYS[way](Path(source), Path(out), max_shard)))
