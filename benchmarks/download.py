"""What a download from the Hub costs beside its connections: 4.4 GB from a double on this machine.

    python benchmarks/download.py [--folder FOLDER] [--rounds N] [--only whole slow killed]

`whole` is a race to an empty cache. Its limits are eight connections that write what comes and do
nothing else, and the sha256 of the file, which huggingface_hub does not compute. In `slow` the
server sends no faster than 20 MB/s on each connection, as a CDN may. In `killed` each is killed
when half has come, and started again; printed is what the server sent. huggingface_hub downloads by
HTTP here (HF_HUB_DISABLE_XET=1): the double has no Xet.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import Benching, Contender, race, remove, run_those_asked_for, settle

JOB = str(Path(__file__).parent / "download_job.py")
WAYS = ("raw", "sha256", "shardkit", "huggingface_hub")
TELLS = "ready"


@contextmanager
def served(source: Path, home: Path, rate: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A server of *source*, whose address is in the environment meanwhile."""
    command = [sys.executable, JOB, "serve", str(source), str(home), str(rate)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in iter(server.stdout.readline, f"{TELLS}\n"):
        name, _, value = line.rstrip("\n").partition("=")
        os.environ[name] = value
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def contenders(home: Path) -> dict[str, Contender]:
    """Who downloads to *home*."""
    return {way: Contender([sys.executable, JOB, way], home / "hub", tells=True) for way in WAYS}


def whole(bench: Benching, rate: int = 0) -> None:
    """The race."""
    source, home = bench.source("big.safetensors"), bench.folder / "home"
    os.environ["SOURCE"] = str(source)
    with served(source, home, rate):
        medians = race(contenders(home), bench.rounds, settle)
    limit = medians["raw"].seconds
    nbytes = source.stat().st_size
    limited = f", at most {rate / 1e6:.0f} MB/s on a connection" if rate else ""
    print(f"{nbytes / 1e9:.1f} GB in one file{limited}")
    for way, each in medians.items():
        print(f"  {way:16} {each}  {each.seconds / limit:5.2f} ×", flush=True)


def slow(bench: Benching) -> None:
    """The race with a limit on each connection."""
    whole(bench, 20_000_000)


def killed(bench: Benching) -> None:
    """What is fetched twice."""
    source, home = bench.source("big.safetensors"), bench.folder / "home"
    nbytes = source.stat().st_size
    with served(source, home) as server:
        for way in WAYS[2:]:
            remove(home / "hub")
            before = sent(server)
            process = subprocess.Popen([sys.executable, JOB, way], stdout=subprocess.DEVNULL)
            while sent(server) - before < nbytes / 2:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            subprocess.run([sys.executable, JOB, way], check=True, stdout=subprocess.DEVNULL)
            share = (sent(server) - before) / nbytes
            print(f"  killed at half of it: {way} fetched {share:.3f} × the file", flush=True)
            remove(home / "hub")


def sent(server: subprocess.Popen[str]) -> int:
    """Bytes of bodies that *server* has sent so far."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("\n")
    server.stdin.flush()
    return int(server.stdout.readline())


if __name__ == "__main__":
    benches = {"whole": whole, "slow": slow, "killed": killed}
    run_those_asked_for(__doc__, benches, Benching)
