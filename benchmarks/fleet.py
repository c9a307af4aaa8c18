"""What a fleet costs beside one process: 4.4 GB in a hundred files, synced.

    python benchmarks/fleet.py [--folder FOLDER] [--rounds N]

One process, two parts and a commit, and a cluster of Ray with two machines take turns, all on this
machine. Printed are medians without the start-up, their ratio to one process, the start-up, and by
how much the largest worker grew beyond an idle one. `cp` and `sync` are the limit of the disk.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from measuring import Benching, in_page_cache, remove, run_those_asked_for, settle

JOB = str(Path(__file__).parent / "fleet_job.py")
FILES = 100


def fleet(bench: Benching) -> None:
    """The race."""
    source = bench.source("big.safetensors")
    max_shard = str(source.stat().st_size // FILES)
    ways = ["alone", "parts", *(["ray"] if find_spec("ray") else [])]
    if "ray" not in ways:
        print("ray is left out: it is not installed (pip install 'shardkit[ray]')")
    told: dict[str, list[dict[str, float]]] = {way: [] for way in ["cp; sync", *ways]}
    for number in range(bench.rounds + 1):
        for way, found in told.items():
            out = bench.folder / f"out-{way.partition(';')[0]}"
            remove(out)
            settle()
            in_page_cache(source)
            if way in ways:
                command = [sys.executable, JOB, way, str(source), str(out), max_shard]
                ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                run = json.loads(ran.stdout.splitlines()[-1])
            else:
                begun = time.perf_counter()
                subprocess.run(["cp", str(source), str(out)], check=True)
                subprocess.run(["sync", str(out)], check=True)
                run = {"seconds": time.perf_counter() - begun, "start": 0.0}
            remove(out)
            if number:
                found.append(run)
    base = statistics.median(run["seconds"] for run in told["alone"])
    print(f"big.safetensors → {FILES} files")
    for way, runs in told.items():
        times = sorted(run["seconds"] for run in runs)
        median = statistics.median(times)
        start = statistics.median(run["start"] for run in runs)
        grown = max(run.get("grown", 0.0) for run in runs) / 1e6
        more = f"  grows by {grown:.0f} MB" if "grown" in runs[0] else ""
        print(
            f"  {way:10} {median:6.2f} s ({times[0]:.2f} to {times[-1]:.2f})  "
            f"{median / base:5.2f} ×  start {start:5.2f} s{more}",
            flush=True,
        )


if __name__ == "__main__":
    run_those_asked_for(__doc__, {"fleet": fleet}, Benching)
