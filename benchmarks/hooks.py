"""What the hooks of a dispatched model cost: ``python benchmarks/hooks.py [--rounds N]``.

1. **Nothing moves**: each block has the hook of a block whose inputs are on its device already.
   Plain and hooked forwards take turns; printed is the median difference, per block.
2. **Ready**: each block streams, and all of them fit into the prefetch buffer.
3. **Next miss**: each block streams through a prefetch buffer of four blocks, in the usual order.
4. **Random miss**: the same in an order that no prediction knows, so that nearly every block is
   read when it is needed.

The last two print the median time of a block, from the call to its result, alone and beside a
thread that runs Python code all the time. The other threads of a process get the interpreter once
in a switch interval (``sys.getswitchinterval()``), so the second figure is a multiple of that.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from shardkit.load import close, load_checkpoint_and_dispatch
from shardkit.load.hooks.device_moves import Mover, RoundTrip

_BLOCKS = 200
_FORWARDS = 20
_MOST = 15  # microseconds per block and forward
_WIDTH = 128  # of a block that streams, whose weight has 64 KiB


def chain(width: int = 1, count: int = _BLOCKS) -> nn.Sequential:
    """Many small blocks, one after the other."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count))).eval()


def hooked() -> nn.Sequential:
    """The same, as a model on one device is dispatched by force and a pipeline's stages are."""
    model, here = chain(), torch.device("cpu")
    for block in model:
        Mover(here).attach(block)
    RoundTrip(here).attach(model)
    return model


def streaming(folder: Path, ring: int | str) -> nn.Sequential:
    """Blocks that stream from *folder* through a prefetch buffer of *ring*."""
    path = folder / "model.safetensors"
    model = chain(_WIDTH, 40)
    if not path.exists():
        save_file(model.state_dict(), path)
    return load_checkpoint_and_dispatch(model, path, {"": "disk"}, ring=ring)


def cpu_seconds(model: nn.Module, given: torch.Tensor) -> float:
    """Processor time of one forward, on average of a few: other work of the machine is no part of
    it.
    """
    begun = time.process_time()
    for _ in range(_FORWARDS):
        model(given)
    return (time.process_time() - begun) / _FORWARDS


def added(plain: nn.Sequential, other: nn.Sequential, given: torch.Tensor, rounds: int) -> float:
    """Microseconds of the processor that *other* adds to each block of *plain*."""
    pairs = [(cpu_seconds(plain, given), cpu_seconds(other, given)) for _ in range(rounds + 1)][1:]
    return statistics.median(after - before for before, after in pairs) / len(plain) * 1e6


def block_seconds(
    model: nn.Sequential, given: torch.Tensor, order: Callable[[], Sequence[int]], rounds: int
) -> float:
    """The median time of one block."""
    times = []
    for _ in range(rounds + 1):
        for number in order():
            begun = time.perf_counter()
            model[number](given)
            times.append(time.perf_counter() - begun)
    return statistics.median(times[len(model) :])


@contextmanager
def busy_thread() -> Iterator[None]:
    """A thread that runs Python code all the time."""
    stop = threading.Event()

    def run() -> None:
        count = 0
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    given = torch.ones(1, _WIDTH)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        none = added(chain(), hooked(), torch.ones(1, 1), rounds)
        print(
            f"nothing moves: {none:.1f} µs for each block and forward; at most {_MOST} are wanted"
        )
        ready = streaming(Path(folder), "100MB")
        microseconds = added(chain(_WIDTH, len(ready)), ready, given, rounds)
        print(f"ready: {microseconds:.1f} µs for each block; at most {_MOST} are wanted")
        close(ready)
        model = streaming(Path(folder), 4)
        shuffled = list(range(len(model)))

        def at_random() -> list[int]:
            random.shuffle(shuffled)
            return shuffled

        orders = {"next miss": lambda: range(len(model)), "random miss": at_random}
        for name, order in orders.items():
            alone = block_seconds(model, given, order, rounds)
            with busy_thread():
                beside = block_seconds(model, given, order, max(1, rounds // 10))
            intervals = beside / sys.getswitchinterval()
            print(
                f"{name}: {alone * 1e6:.0f} µs alone; beside a busy thread {beside * 1e3:.1f} ms, "
                f"{intervals:.1f} switch intervals"
            )
        close(model)


if __name__ == "__main__":
    main()
