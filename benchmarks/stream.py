"""How fast a model runs that is larger than its memory: ``python benchmarks/stream.py --folder BIG
[--only CASE …]``.

For 500 forwards of one token, which take a while and are run only if they are asked for, and for
fewer: ``python benchmarks/stream.py --folder BIG --only endurance "endurance, 0.8 GB" [--forwards
N]``.

The model has the shape of Llama, 40 layers, 4.4 GB, and runs on the CPU, in bf16 where that has
such arithmetic and in fp32 where it has not. 4.2 GB of it, the layers and the head, stream from
disk in each forward. Accelerate, the baseline (the same blocks read into the same prefetch buffer,
and nothing else) and shardkit take turns, each as a process in a memory cgroup; the checkpoint is
dropped from the page cache before each forward. The throughput of the disk is printed. The folder,
and the checkpoints in it, are created if they are missing.

In the cases "cast" weights of bf16 stream into a model of fp32. The time is compared with that of
the same forward without a cast, and with the difference in compute between fp32 and bf16.

In the case "generate" a token comes out of `generate`, and AirLLM takes part where it is installed.
Its files, one for each layer, take another 4.4 GB. It asks for packages that it can do without
here, so install it alone, and nothing else changes: ``pip install --no-deps airllm==4.0.0``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from cages import output_of
from llama import BY_DTYPE, WIDE, Llama, suited
from measuring import machine, made

STREAMING = Path(__file__).parent / "streaming.py"
MUCH, LITTLE, HALF = 1_500_000_000, 800_000_000, 4_000_000_000  # limits of memory, in bytes


@dataclass(frozen=True, slots=True)
class Contender:
    """Who runs, and on what.

    Attributes:
        who: a name in streaming.py.
        plain: whether it reads what torch saved, and not what offload-prep made of that.
        resident: how many layers are in memory; all 40 and the head, and nothing streams.
        ring: blocks in memory at a time; 0 for as many as shardkit finds that pay.
        tokens: how many go in.
        limit: of the memory, in bytes.
        how: whether a forward is called, or `generate` for one token.
        warm: whether what is read is in the page cache.
    """

    who: str
    plain: bool = False
    resident: int = 0
    ring: int = 4
    tokens: int = 16
    limit: int | None = MUCH
    how: str = "forward"
    warm: bool = False

    def source(self, folder: Path, llama: Llama) -> Path:
        """What it reads."""
        if self.who == "airllm":
            return folder / f"{llama.layout}-airllm"
        return folder / (llama.plain if self.plain else llama.layout)


@dataclass(slots=True)
class Result:
    """What several runs came to."""

    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    told: set[float | None] = field(default_factory=set)
    held: list[dict[str, int]] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        times, read = sorted(self.seconds), statistics.median(self.read) / 1e9
        return (
            f"{self.median:6.2f} s  ({times[0]:.2f} to {times[-1]:.2f})  {read:5.2f} GB read  "
            f"{self.peak / 1e6:6.0f} MB"
        )


def casts(*, warm: bool) -> dict[str, Contender]:
    """Forwards of one token with a cast and without, each from disk and in memory."""
    limit = None if warm else HALF
    return {
        "no cast": Contender("shardkit", tokens=1, limit=limit, warm=warm),
        "cast": Contender("cast", tokens=1, limit=limit, warm=warm),
        "compute, no cast": Contender("shardkit", resident=40, tokens=1, limit=None),
        "compute, cast": Contender("cast", resident=40, tokens=1, limit=None),
    }


CASES: dict[str, dict[str, Contender]] = {
    "reading": {
        "baseline": Contender("floor"),
        "shardkit, no compute": Contender("reading"),
        "no compute, plain .bin": Contender("reading", plain=True),
        "baseline, 0.8 GB": Contender("floor", ring=2, limit=LITTLE),
        "no compute, 0.8 GB": Contender("reading", ring=2, limit=LITTLE),
    },
    "1 token": {
        "baseline": Contender("floor"),
        "compute": Contender("shardkit", resident=40, tokens=1, limit=None),
        "shardkit": Contender("shardkit", tokens=1),
        "shardkit, plain .bin": Contender("shardkit", plain=True, tokens=1),
        "accelerate": Contender("accelerate", tokens=1),
    },
    "16 tokens": {
        "baseline": Contender("floor"),
        "compute": Contender("shardkit", resident=40, limit=None),
        "shardkit": Contender("shardkit"),
        "shardkit, plain .bin": Contender("shardkit", plain=True),
        "shardkit, default buffer": Contender("shardkit", ring=0),
        "shardkit, auto": Contender("planned", ring=0),
        "accelerate": Contender("accelerate"),
    },
    "generate": {
        "shardkit": Contender("shardkit", how="generate", limit=HALF),
        "accelerate": Contender("accelerate", how="generate", limit=HALF),
        "airllm": Contender("airllm", how="generate", limit=HALF),
    },
    "0.8 GB": {
        "baseline": Contender("floor", ring=2, limit=LITTLE),
        "compute": Contender("shardkit", resident=40, limit=None),
        "shardkit": Contender("shardkit", ring=2, limit=LITTLE),
        "shardkit, plain .bin": Contender("shardkit", plain=True, ring=2, limit=LITTLE),
    },
    "512 tokens": {
        "baseline": Contender("floor"),
        "compute": Contender("shardkit", resident=40, tokens=512, limit=None),
        "compute, read beside": Contender("beside", tokens=512, limit=None),
        "shardkit": Contender("shardkit", tokens=512),
    },
    "half": {
        "baseline": Contender("floor", resident=20, limit=HALF),
        "compute": Contender("shardkit", resident=40, tokens=1, limit=None),
        "none resident": Contender("shardkit", tokens=1, limit=HALF),
        "shardkit": Contender("shardkit", resident=20, tokens=1, limit=HALF),
    },
    "cast": casts(warm=False),
    "cast, warm": casts(warm=True),
    "endurance": {"shardkit, plain .bin": Contender("shardkit", plain=True, tokens=1)},
    "endurance, 0.8 GB": {
        "shardkit, plain .bin": Contender("shardkit", plain=True, ring=2, tokens=1, limit=LITTLE)
    },
}
OF_BF16 = ("cast", "cast, warm")  # whatever the processor has
ALIKE = (
    {"shardkit", "planned", "beside", "accelerate", "airllm"},
    {"cast"},
)  # who must agree with whom
LONG = {
    "endurance": 500,
    "endurance, 0.8 GB": 500,
}  # forwards of what is run only if it is asked for, and once


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the checkpoints are, or are made"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--forwards",
        type=int,
        help="of each process, after one that does not count: 3, and for endurance 500",
    )
    parser.add_argument("--dtype", choices=BY_DTYPE, default=suited().dtype)
    parser.add_argument(
        "--only", nargs="*", choices=CASES, default=[name for name in CASES if name not in LONG]
    )
    parser.add_argument("--plot", type=Path, help="an SVG to draw (needs matplotlib)")
    asked = parser.parse_args()
    print(machine())
    found = {}
    for name in asked.only:
        llama = WIDE if name in OF_BF16 else BY_DTYPE[asked.dtype]
        prepared(asked.folder, llama)
        print(f"\n{name}: {llama.dtype}, hidden {llama.hidden}, inner {llama.inner}", flush=True)
        forwards = asked.forwards or LONG.get(name, 3)
        found[name] = race(
            installed(CASES[name]),
            llama,
            asked.folder,
            1 if name in LONG else asked.rounds,
            forwards,
        )
        for who, result in found[name].items():
            limit = CASES[name][who].limit
            print(
                f"  {who:22}{result}  {f'of {limit / 1e6:.0f} MB' if limit else ''}".rstrip(),
                flush=True,
            )
        for line in (*ratios(found[name]), *(flatness(found[name]) if name in LONG else ())):
            print(f"  {line}", flush=True)
    if asked.plot:
        draw(found, asked.plot)


def installed(case: dict[str, Contender]) -> dict[str, Contender]:
    """Those of *case* who can run here; a line tells of the others."""
    missing = [
        name for name, each in case.items() if each.who == "airllm" and not find_spec("airllm")
    ]
    for name in missing:
        print(f"  {name} is left out: it is not installed (pip install --no-deps airllm)")
    return {name: each for name, each in case.items() if name not in missing}


def prepared(folder: Path, llama: Llama) -> None:
    """Make the checkpoints, if they are missing."""
    plain, layout = made(folder, llama.plain), folder / llama.layout
    if not layout.exists():
        subprocess.run(
            [sys.executable, "-m", "shardkit", "offload-prep", plain, "-o", layout], check=True
        )
    beside = Contender("airllm").source(folder, llama)
    if find_spec("airllm") and not beside.exists():
        beside.mkdir()
        (beside / "config.json").write_text(llama.empty().config.to_json_string())
        for path in layout.glob("model*"):
            (beside / path.name).symlink_to(path.resolve())


def race(
    case: dict[str, Contender], llama: Llama, folder: Path, rounds: int, forwards: int
) -> dict[str, Result]:
    """Let all of *case* take turns."""
    results = {name: Result() for name in case}
    for _ in range(rounds):
        for name, each in case.items():
            numbers = [each.resident, each.ring, each.tokens, forwards]
            how = [each.how, "warm" if each.warm else "cold"]
            command = [
                sys.executable,
                STREAMING,
                llama.dtype,
                each.who,
                each.source(folder, llama),
                *numbers,
                *how,
            ]
            told = json.loads(output_of([str(part) for part in command], each.limit))
            result = results[name]
            result.seconds += told["seconds"]
            result.waited += told["waited"]
            result.read += told["read"]
            result.told.add(told["told"])
            result.held += told["held"]
            result.peak = max(result.peak, told["peak"])
    for alike in ALIKE:
        answers = {
            answer
            for name, result in results.items()
            if case[name].who in alike
            for answer in result.told
        }
        if len(answers) > 1:
            sys.exit(f"the contenders do not agree: {answers}")
    return results


def ratios(results: dict[str, Result]) -> Iterator[str]:
    """What the medians are to each other."""
    median = {name: result.median for name, result in results.items()}
    for ours, theirs in COMPARED:
        if ours in median and theirs in median:
            read = statistics.median(results[ours].read) / max(
                1, statistics.median(results[theirs].read)
            )
            yield (
                f"{ours} takes {median[ours] / median[theirs]:.2f} x {theirs}, and reads "
                f"{read:.2f} x as many bytes"
            )
    if {"cast", "no cast"} <= median.keys():
        without = median["no cast"] + median["compute, cast"] - median["compute, no cast"]
        yield (
            f"cast takes {median['cast'] / without:.2f} x no cast and the difference in "
            f"compute ({without:.2f} s)"
        )
    if {"baseline", "shardkit"} <= median.keys():
        waited = statistics.median(results["shardkit"].waited)
        yield (
            f"forwards waited {waited:.2f} s for weights: {1 - waited / median['baseline']:.0%} "
            "of the baseline is hidden"
        )
    if {"baseline", "compute", "shardkit"} <= median.keys():
        read, compute, both = median["baseline"], median["compute"], median["shardkit"]
        longer = both / max(read, compute)
        yield f"shardkit takes {longer:.2f} x the longer of baseline and compute"
        yield (
            f"{(read + compute - both) / min(read, compute):.0%} of the shorter is hidden "
            "behind the longer"
        )


def flatness(results: dict[str, Result]) -> Iterator[str]:
    """What was held in the course of many forwards, and in the end."""
    for name, result in results.items():
        before, *during, after = result.held
        slower = tenth(result.seconds, -1) / tenth(result.seconds, 0)
        yield (
            f"{name}: {len(during)} forwards, the last tenth of which took {slower:.2f} x as "
            "long as the first"
        )
        for what in ("memory", "descriptors", "threads"):
            held = [each[what] for each in during]
            first, later = held[0], max(held[1:], default=held[0])
            told = (
                f"{before[what]:,} before, {first:,} after one forward, {later:,} at most "
                f"later, {held[-1]:,} after the last"
            )
            yield f"  {what:12}{told}; {after[what]:,} after the end"


def tenth(seconds: list[float], which: int) -> float:
    """The median of the first (0) or the last (-1) tenth of *seconds*."""
    count = max(1, len(seconds) // 10)
    return statistics.median(seconds[:count] if which == 0 else seconds[-count:])


COMPARED = [
    ("shardkit, no compute", "baseline"),
    ("no compute, plain .bin", "shardkit, no compute"),
    ("no compute, 0.8 GB", "baseline, 0.8 GB"),
    ("shardkit", "baseline"),
    ("shardkit, plain .bin", "shardkit"),
    ("shardkit, default buffer", "shardkit"),
    ("shardkit, auto", "baseline"),
    ("accelerate", "shardkit"),
    ("accelerate", "shardkit, auto"),
    ("airllm", "shardkit"),
    ("shardkit", "none resident"),
    ("shardkit", "compute, read beside"),
]


def draw(found: dict[str, dict[str, Result]], path: Path) -> None:
    """A bar for each contender."""
    import matplotlib as mpl  # wanted by whoever asks for a plot

    mpl.use("svg")
    from matplotlib import pyplot as plt

    rows = [
        (f"{case}: {who}", result)
        for case, results in found.items()
        for who, result in results.items()
    ][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(rows) + 0.9))
    for name, result in rows:
        colour = (
            "#d6604d" if "accelerate" in name else "#2166ac" if "shardkit" in name else "#bbbbbb"
        )
        spread = [[result.median - min(result.seconds)], [max(result.seconds) - result.median]]
        axes.barh([name], [result.median], xerr=spread, color=colour, error_kw={"elinewidth": 0.8})
    axes.set_xlabel("seconds per forward: median, least and most")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
