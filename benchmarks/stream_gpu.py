"""How fast weights come to an accelerator, beside what its link can: ``python
benchmarks/stream_gpu.py --folder BIG``.

The model is that of stream.py; its layers and head lie in main memory or on disk, and run on the
accelerator. Each figure has its limit beside it: copies out of pinned memory, measured in the same
minute, or the disk as `floor` of streaming.py reads it, turn and turn about and with nothing in the
page cache. Where there is no accelerator it says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama import VOCABULARY, WIDE
from measuring import made, settle
from streaming import evict, floor, where

LONG = 8192  # tokens of a prefill that computes for longer than its weights take to come
TIMES = 5
COLD = 3  # the same for a disk, which may be slow


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the checkpoint is, or is made"
    )
    asked = parser.parse_args()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        sys.exit("there is no accelerator here, and nothing to measure")
    source, device = made(asked.folder, "big.safetensors"), torch.device(kind.type, 0)
    settle()
    print(f"torch {torch.__version__} on {torch.get_device_module(device).get_device_name(0)}")
    from_memory(source, device)
    from_disk(source, device)


def from_memory(source: Path, device: torch.device) -> None:
    """The CPU tier, beside the link and Accelerate; and a prefill beside what it computes."""
    link = pinned_rate(device)
    say("copies out of pinned memory", link)
    model = ours(source, "cpu")
    seconds = median(forward(model, device, 16))
    say(
        "CPU tier, 16 tokens",
        streamed_bytes() / seconds,
        f"{streamed_bytes() / seconds / link:.0%} of that",
    )
    theirs = median(forward(accelerated(source), device, 16))
    say(
        "Accelerate, the same memory",
        streamed_bytes() / theirs,
        f"{theirs / seconds:.1f} x as long",
    )
    long, compute = (
        median(forward(model, device, LONG)),
        median(forward(resident(source, device), device, LONG)),
    )
    copying = streamed_bytes() / link
    hidden = (compute + copying - long) / min(compute, copying)
    print(
        f"prefill of {LONG} tokens {long:.3f} s: computing {compute:.3f} s, copying "
        f"{copying:.3f} s, {hidden:.0%} hidden"
    )
    close(model)


def from_disk(source: Path, device: torch.device) -> None:
    """The disk tier, beside the disk."""
    model = ours(source, "disk")
    stream, run = stream_of(model), forward(model, device, 16)
    once = floor(WIDE, source, 0, 4, 16)
    rates, limits = [], []
    for _ in range(COLD + 1):
        evict(source)
        before = stream.counts.disk
        seconds = timed(run)
        rates.append(
            (stream.counts.disk - before) / seconds
        )  # but for what was read ahead since the last one
        stream.rest()
        evict(source)
        limits.append(streamed_bytes() / timed(once))
    close(model)
    ratios = [rate / limit for rate, limit in zip(rates[1:], limits[1:], strict=True)]
    say("the disk, read and left", statistics.median(limits[1:]))
    say(
        "disk tier, 16 tokens",
        statistics.median(rates[1:]),
        f"{statistics.median(ratios):.0%} of that",
    )


def say(what: str, rate: float, more: str = "") -> None:
    """Print a line of the table."""
    print(f"{what:30} {rate / 1e9:6.1f} GB/s{', ' if more else ''}{more}", flush=True)


def streamed_bytes() -> int:
    """Of the layers and the head."""
    names = ("embed", "model.norm")
    return sum(
        p.numel() * 2
        for name, p in WIDE.empty().named_parameters()
        if not any(part in name for part in names)
    )


def pinned_rate(device: torch.device) -> float:
    """Bytes per second from pinned memory, in pieces of one layer."""
    host = torch.empty(103 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)

    def copies() -> None:
        for _ in range(20):
            there.copy_(host, non_blocking=True)

    return 20 * len(host) / median(copies)


def ours(source: Path, tier: str) -> Any:  # Any: a model of transformers
    """The model with shardkit, its layers and head on *tier*."""
    from shardkit.load import load_checkpoint_and_dispatch

    return load_checkpoint_and_dispatch(
        WIDE.empty(), source, places(tier), no_split_module_classes=["LlamaDecoderLayer"]
    )


def stream_of(model: Any) -> Any:  # Any: likewise; what brings its weights
    """What counts the bytes that are read for *model*."""
    from shardkit.load.dispatch.attachments import attachments
    from shardkit.load.hooks.streaming_hooks import Pager

    return next(each.stream for *_, each in attachments(model) if isinstance(each, Pager))


def accelerated(source: Path) -> Any:  # Any: likewise
    """The same with Accelerate, from main memory."""
    from accelerate import load_checkpoint_and_dispatch  # type: ignore[import-untyped]  # as it comes

    return load_checkpoint_and_dispatch(
        WIDE.empty(), str(source), places("cpu"), no_split_module_classes=["LlamaDecoderLayer"]
    )


def resident(source: Path, device: torch.device) -> Any:  # Any: likewise
    """The same, all of it on the accelerator."""
    from shardkit.load import load_checkpoint_and_dispatch

    return load_checkpoint_and_dispatch(WIDE.empty(), source, {"": device.index})


def places(tier: str) -> dict[str, str | int]:
    """A device map: what stays is on the accelerator."""
    return {name: tier if device == "disk" else 0 for name, device in where(0).items()}


def forward(model: Any, device: torch.device, tokens: int) -> Callable[[], object]:  # Any: likewise
    """A forward of *model*."""
    ids = (torch.arange(tokens) * 7 % VOCABULARY)[None].to(device)

    def run() -> None:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)

    return run


def median(run: Callable[[], object]) -> float:
    """Seconds of *run*, of several after one that does not count."""
    timed(run)
    return statistics.median(timed(run) for _ in range(TIMES))


def timed(run: Callable[[], object]) -> float:
    """Seconds until the accelerator has done what *run* issues."""
    torch.accelerator.synchronize()
    begun = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - begun


def close(model: Any) -> None:  # Any: likewise
    """Give back what it holds."""
    from shardkit.load import close as end

    end(model)


if __name__ == "__main__":
    main()
