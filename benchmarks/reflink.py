"""Resharding safetensors on a file system that shares blocks: a fresh XFS in a file that is
mounted. Needs root and mkfs.xfs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import settle

LAYERS = [f"model.layers.{number}.*" for number in range(19)]  # 2 GB of the 4.4

TIMED = """
import sys, time, shardkit
source, out = sys.argv[1:]
# Of little, so that no import is timed.
shardkit.convert(source, f"{out}.safetensors", include=["*.0.input_layernorm.*"])
for sync in False, True:
    begun = time.perf_counter()
    shardkit.convert(source, f"{out}-{sync}", max_shard="160MB", sync=sync)
    print(time.perf_counter() - begun)
"""
PART = "import sys, shardkit; shardkit.convert(sys.argv[1], sys.argv[2], include=sys.argv[3:])"


def reshard(big: Path) -> None:
    """Take 2 GB of *big* to the XFS, cut them into shards there, and print what that took."""
    if os.geteuid() or not shutil.which("mkfs.xfs"):
        print("reflink: skipped, since it needs root and mkfs.xfs (Debian: xfsprogs)\n")
        return
    with xfs(6_000_000_000) as folder:
        source, out = folder / "part.safetensors", folder / "out"
        subprocess.run([sys.executable, "-c", PART, big, source, *LAYERS], check=True)
        settle()
        used = shutil.disk_usage(folder).used
        timed = subprocess.run(
            [sys.executable, "-c", TIMED, source, out], check=True, capture_output=True, text=True
        )
        settle()
        grown = (shutil.disk_usage(folder).used - used) / 2  # for each of the two
        shards = len(list(Path(f"{out}-True").glob("*.safetensors")))
        unsynced, synced = (float(line) * 1000 for line in timed.stdout.split())
        print(
            f"reflink: {source.stat().st_size / 1e9:.2f} GB of safetensors → {shards} shards on XFS"
        )
        print(f"  {unsynced:.1f} ms, {synced:.1f} ms synced, {grown / 1e6:.2f} MB of new disk\n")


@contextmanager
def xfs(nbytes: int) -> Iterator[Path]:
    """A folder on a fresh XFS of *nbytes* bytes."""
    with tempfile.TemporaryDirectory() as parent:
        image, folder = Path(parent, "image"), Path(parent, "mounted")
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(nbytes)
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)
