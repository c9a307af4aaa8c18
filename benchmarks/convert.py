"""How fast `shardkit convert` is, beside `cp`, the limit of the file system, and beside what others
would run.

    python benchmarks/convert.py [--folder FOLDER] [--rounds N] [--only NAME ...]

Contenders take turns within one run; what is printed are medians, their ratio to the limit, and the
largest peak of memory. The checkpoints are made once in FOLDER, which needs 45 GB with the outputs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from measuring import Benching, Contender, Medians, in_page_cache, race, run_those_asked_for, settle
from reflink import reshard

PEERS = str(Path(__file__).parent / "peers.py")


class Bench(Benching):
    """What is run, and on what."""

    def shardkit(self, command: str, source: Path, *options: str) -> Contender:
        out = self.folder / "out-shardkit"
        output = ("-o", str(out), "-q") if command in ("convert", "offload-prep") else ()
        return Contender(
            (sys.executable, "-m", "shardkit", command, str(source), *output, *options), out
        )

    def peer(self, job: str, source: Path) -> Contender:
        out = self.folder / f"out-{job}"
        return Contender(
            (
                sys.executable,
                PEERS,
                job,
                str(source),
                *([str(out)] if job.startswith("hub") else []),
            ),
            out,
        )

    def cp(self, source: Path, *, sync: bool = False) -> Contender:
        out = self.folder / "out-cp"
        copy = f"cp '{source}' '{out}'"
        return Contender(("sh", "-c", f"{copy} && sync '{out}'" if sync else f"exec {copy}"), out)


def same_bytes(bench: Bench, name: str) -> None:
    """2 GB shards, page cache warm, nothing synced on any side."""
    source = bench.source(name)
    peers = (
        ["hub"] if name == "legacy.bin" else ["hub", "hub-mmap"]
    )  # torch cannot map a legacy file
    contenders = {
        "cp": bench.cp(source),
        "shardkit": bench.shardkit("convert", source, "--max-shard", "2GB", "--no-fsync"),
        "shardkit --jobs 2": bench.shardkit(
            "convert", source, "--max-shard", "2GB", "--no-fsync", "--jobs", "2"
        ),
        **{f"huggingface_hub ({peer})": bench.peer(peer, source) for peer in peers},
    }
    report(f"{name} → 2 GB shards", contenders, bench, limit="cp", warm=source)


def synced(bench: Bench) -> None:
    """The same with everything on the disk before it counts."""
    source = bench.source("big.bin")
    contenders = {
        "cp; sync": bench.cp(source, sync=True),
        "shardkit, synced": bench.shardkit("convert", source, "--max-shard", "2GB"),
    }
    report("big.bin → 2 GB shards, synced", contenders, bench, limit="cp; sync", warm=source)


def blocks(bench: Bench) -> None:
    """The same by blocks, with a digest of each, beside the plain shards."""
    source = bench.source("big.safetensors")
    contenders = {
        "cp": bench.cp(source),
        "shardkit convert": bench.shardkit("convert", source, "--max-shard", "2GB", "--no-fsync"),
        "shardkit offload-prep": bench.shardkit(
            "offload-prep", source, "--max-shard", "2GB", "--no-fsync"
        ),
    }
    report("big.safetensors → 2 GB shards, by blocks", contenders, bench, limit="cp", warm=source)


def compressed(bench: Bench) -> None:
    """Zstd at its default level, on both processors on both sides."""
    source = bench.source("big.safetensors")
    out = bench.folder / "out-zstd"
    contenders = {
        "cp": bench.cp(source),
        "zstd -T0": Contender(("zstd", "-T0", "-q", "-f", str(source), "-o", str(out)), out),
        "shardkit --compress zstd": bench.shardkit(
            "convert", source, "--max-shard", "2GB", "--no-fsync", "--compress", "zstd"
        ),
    }
    report(
        "big.safetensors → 2 GB shards, compressed",
        contenders,
        bench,
        limit="zstd -T0",
        warm=source,
    )


def cast(bench: Bench) -> None:
    """8.7 GB of fp32 to bf16; the import of torch is no part of the work, and is measured beside
    it.
    """
    source = bench.source("big-fp32.bin")
    contenders = {
        "cp": bench.cp(source),
        "import torch": bench.peer("import-torch", source),
        "shardkit": bench.shardkit(
            "convert", source, "--max-shard", "2GB", "--no-fsync", "--dtype", "bf16"
        ),
        "huggingface_hub (hub-cast)": bench.peer("hub-cast", source),
    }
    medians = report("big-fp32.bin → bf16", contenders, bench, limit="cp", warm=source)
    shardkit, torch = medians["shardkit"], medians["import torch"]
    print(
        "  (shardkit − import torch) / cp = "
        f"{(shardkit.seconds - torch.seconds) / medians['cp'].seconds:.2f}"
    )
    print(f"  shardkit − import torch = {shardkit.peak_mb - torch.peak_mb:.0f} MB of memory\n")


def tiny(bench: Bench) -> None:
    """50,000 tensors of 64 bytes."""
    source = bench.source("tiny.pt")
    contenders = {
        "torch.load(weights_only=True)": bench.peer("load", source),
        "shardkit inspect": bench.shardkit("inspect", source),
        "shardkit convert": bench.shardkit("convert", source, "--no-fsync"),
    }
    report(
        "tiny.pt (50,000 tensors)",
        contenders,
        bench,
        limit="torch.load(weights_only=True)",
        warm=source,
    )


def many(bench: Bench) -> None:
    """160,000 tensors of 64 bytes, and what it takes to verify what came of them."""
    source = bench.source("many.bin")
    converted = bench.folder / "many-shards"
    if not converted.exists():
        subprocess.run(
            [sys.executable, "-m", "shardkit", "convert", str(source), "-o", str(converted), "-q"],
            check=True,
        )
    contenders = {
        "shardkit convert": bench.shardkit("convert", source, "--no-fsync"),
        "shardkit verify": Contender(
            (sys.executable, "-m", "shardkit", "verify", str(converted), "--against", str(source))
        ),
        "shardkit inspect": bench.shardkit("inspect", source),
        "torch.load(weights_only=True)": bench.peer("load", source),
    }
    report("many.bin (160,000 tensors)", contenders, bench, limit="shardkit convert", warm=source)


def index(bench: Bench) -> None:
    """An index of 100,000 entries over 40 shards."""
    contenders = {"shardkit inspect": bench.shardkit("inspect", bench.source("experts"))}
    report("experts (100,000 tensors, 40 shards)", contenders, bench, limit="shardkit inspect")


def report(
    title: str,
    contenders: Mapping[str, Contender],
    bench: Bench,
    *,
    limit: str,
    warm: Path | None = None,
) -> dict[str, Medians]:
    """Race, and print a table."""

    def before() -> None:
        settle()
        if warm is not None:
            in_page_cache(warm)

    medians = race(contenders, bench.rounds, before)
    print(title)
    for name, result in medians.items():
        print(f"  {name:32} {result}  {result.seconds / medians[limit].seconds:5.2f} × {limit}")
    print(flush=True)
    return medians


BENCHES: dict[str, Callable[[Bench], object]] = {
    "zip": lambda bench: same_bytes(bench, "big.bin"),
    "legacy": lambda bench: same_bytes(bench, "legacy.bin"),
    "safetensors": lambda bench: same_bytes(bench, "big.safetensors"),
    "blocks": blocks,
    "compressed": compressed,
    "many": many,
    "synced": synced,
    "cast": cast,
    "tiny": tiny,
    "index": index,
    "reflink": lambda bench: reshard(bench.source("big.safetensors")),
}


if __name__ == "__main__":
    run_those_asked_for(__doc__, BENCHES, Bench)
