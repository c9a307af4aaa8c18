"""What the hooks of a dispatched model cost where nothing moves: ``python benchmarks/hooks.py
[--rounds N]``.

A block is a Linear of one weight, so that next to nothing but the call is measured; each has the
hook that a block has whose inputs are where they are needed. Plain and hooked forwards take turns;
printed is the median of the differences, per block.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from shardkit.load.hooks.device_moves import Mover, RoundTrip

_BLOCKS = 200
_FORWARDS = 20
_MOST = 15  # microseconds per block and forward


def chain() -> nn.Sequential:
    """Many tiny blocks, one after the other."""
    return nn.Sequential(*(nn.Linear(1, 1) for _ in range(_BLOCKS))).eval()


def hooked() -> nn.Sequential:
    """The same, as a model on one device is dispatched by force and a pipeline's stages are."""
    model, here = chain(), torch.device("cpu")
    for block in model:
        Mover(here).attach(block)
    RoundTrip(here).attach(model)
    return model


def seconds(model: nn.Module, given: torch.Tensor) -> float:
    """Of the processor for one forward, on average of a few: nothing waits, and other work of the
    machine is no part of it.
    """
    begun = time.process_time()
    for _ in range(_FORWARDS):
        model(given)
    return (time.process_time() - begun) / _FORWARDS


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    plain, with_hooks, given = chain(), hooked(), torch.ones(1, 1)
    with torch.no_grad():
        pairs = [(seconds(plain, given), seconds(with_hooks, given)) for _ in range(rounds + 1)][1:]
    added = statistics.median(after - before for before, after in pairs) / _BLOCKS * 1e6
    bare = statistics.median(before for before, _ in pairs) / _BLOCKS * 1e6
    print(
        f"hooks add {added:.1f} µs to each block and forward ({bare:.1f} µs without); at most "
        f"{_MOST} are wanted"
    )


if __name__ == "__main__":
    main()
