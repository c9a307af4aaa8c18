"""A cheap gate against gross slowdowns: converting may take at most a few times as long as copying.

    python benchmarks/gate.py

Both run in this process, in turn, on the same file in the page cache. Only their ratio counts,
since machines differ. A busy machine can slow either one, so a ratio that is too large is measured
again. `benchmarks/convert.py` measures precisely.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import shardkit

BOUND = 3.0  # the ratio is near 1; a second copy, or a slow path for each byte, exceeds the bound
ATTEMPTS = 3
TENSORS, ELEMENTS = 32, 8_000_000  # 512 MB of bfloat16


def main() -> int:
    """Exit with 1 if every attempt exceeds the bound."""
    with tempfile.TemporaryDirectory() as room:
        source = Path(room, "checkpoint.pt")
        names = [f"layers.{i}.weight" for i in range(TENSORS)]
        weights = {name: torch.ones(ELEMENTS, dtype=torch.bfloat16) for name in names}
        torch.save(weights, source)
        ratio(source)  # the first of each pays for imports and for the page cache
        for attempt in range(1, ATTEMPTS + 1):
            found = ratio(source)
            print(f"convert / copy = {found:.2f} (attempt {attempt} of {ATTEMPTS})", flush=True)
            if found <= BOUND:
                return 0
    print(f"Converting takes more than {BOUND:.1f} times as long as copying.", file=sys.stderr)
    return 1


def ratio(source: Path) -> float:
    """Return the time that converting *source* takes, divided by the time that copying it takes."""
    copy, shards = source.with_name("copy.pt"), source.with_name("shards")
    copied = seconds(lambda: shutil.copyfile(source, copy))
    converted = seconds(lambda: shardkit.convert(source, shards, max_shard="200MB", sync=False))
    copy.unlink()
    shutil.rmtree(shards)
    return converted / copied


def seconds(work: Callable[[], object]) -> float:
    """Return how long *work* takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
