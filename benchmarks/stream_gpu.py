"""How fast weights come to an accelerator, beside what its link can: ``python benchmarks/stream_gpu.py --folder BIG``.

The model is that of stream.py; its layers and head lie in main memory or on disk, and run on the accelerator. Each figure has its
limit beside it: copies out of pinned memory, measured in the same minute, or the disk as `floor` of streaming.py reads it. Where
there is no accelerator it says so.
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
from measuring import made
from streaming import floor, where

LONG = 8192  # tokens of a prefill that computes for longer than its weights take to come


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is made")
    asked = parser.parse_args()
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        sys.exit("there is no accelerator here, and nothing to measure")
    source, device = made(asked.folder, "big.safetensors"), torch.device(kind.type, 0)
    link = pinned_rate(device)
    print(f"copies out of pinned memory     {link / 1e9:6.1f} GB/s")
    for tier in ("cpu", "disk"):
        model, streamed = ours(source, tier), streamed_bytes()
        seconds = timed(model, device, 16)
        print(
            f"{tier:4} tier, 16 tokens            {streamed / seconds / 1e9:6.1f} GB/s, {streamed / seconds / link:.0%} of that"
        )
        if tier == "cpu":
            theirs = timed(accelerated(source), device, 16)
            print(f"Accelerate, the same memory     {streamed / theirs / 1e9:6.1f} GB/s: {theirs / seconds:.1f} x as long")
            long, compute = timed(model, device, LONG), timed(resident(source, device), device, LONG)
            copying = streamed / link
            print(f"prefill of {LONG} tokens: {(compute + copying - long) / min(compute, copying):.0%} of the shorter is hidden")
        close(model)
    once = floor(WIDE, source, 0, 4, 16)
    begun = time.perf_counter()
    once()
    print(f"the disk, read and left         {streamed_bytes() / (time.perf_counter() - begun) / 1e9:6.1f} GB/s")


def streamed_bytes() -> int:
    """Of the layers and the head."""
    names = ("embed", "model.norm")
    return sum(p.numel() * 2 for name, p in WIDE.empty().named_parameters() if not any(part in name for part in names))


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

    return load_checkpoint_and_dispatch(WIDE.empty(), source, places(tier), no_split_module_classes=["LlamaDecoderLayer"])


def accelerated(source: Path) -> Any:  # Any: likewise
    """The same with Accelerate, from main memory."""
    from accelerate import load_checkpoint_and_dispatch  # type: ignore[import-untyped]  # as it comes

    return load_checkpoint_and_dispatch(WIDE.empty(), str(source), places("cpu"), no_split_module_classes=["LlamaDecoderLayer"])


def resident(source: Path, device: torch.device) -> Any:  # Any: likewise
    """The same, all of it on the accelerator."""
    from shardkit.load import load_checkpoint_and_dispatch

    return load_checkpoint_and_dispatch(WIDE.empty(), source, {"": device.index})


def places(tier: str) -> dict[str, str | int]:
    """A device map: what stays is on the accelerator."""
    return {name: tier if device == "disk" else 0 for name, device in where(0).items()}


def timed(model: Any, device: torch.device, tokens: int) -> float:  # Any: likewise
    """Seconds of a forward."""
    ids = (torch.arange(tokens) * 7 % VOCABULARY)[None].to(device)

    def forward() -> None:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)

    return median(forward)


def median(run: Callable[[], None]) -> float:
    """Seconds until the accelerator has done what *run* issues, of five after one that does not count."""
    seconds = []
    for _ in range(6):
        torch.accelerator.synchronize()
        begun = time.perf_counter()
        run()
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def close(model: Any) -> None:  # Any: likewise
    """Give back what it holds."""
    from shardkit.load import close as end

    end(model)


if __name__ == "__main__":
    main()
