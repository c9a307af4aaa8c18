"""Makes every read of a model that is loaded and then streams fail in turn, and prints as JSON what
came of it.

python tests/crash/streamer.py FOLDER ERRNO
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from failer import Sweep
from injection import LOADS, Layer, failing
from shardkit.errors import ShardkitError
from shardkit.load import close, init_empty_weights, load_checkpoint_and_dispatch

WIDTH = 24
LAYERS = 6
X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


def model() -> nn.Sequential:
    """Six blocks, of which a ring of two cannot hold all."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS))
    ).eval()


def streaming(path: Path) -> nn.Sequential:
    """The model at *path*: its first block in memory, the others streaming."""
    with init_empty_weights():
        empty = model()
    return load_checkpoint_and_dispatch(empty, path, {"": "disk", "0": "cpu"}, ring=2)


def forward(streamed: nn.Sequential, right: torch.Tensor, sweep: Sweep, at: str) -> str:
    """Whether a forward is "right" or "told"; what is wrong goes to *sweep*."""
    try:
        if not torch.equal(streamed(X), right):
            sweep.faults.append(f"{at}: a wrong answer")
    except ShardkitError as error:
        if "model.pt" not in str(error):
            sweep.faults.append(f"{at}: it does not say where: {error}")
        left = [
            name
            for name, weight in streamed[1:].state_dict(keep_vars=True).items()
            if type(weight) is nn.Parameter
        ]
        sweep.faults += [f"{at}: {name} is left in memory" for name in left]
        return "told"
    return "right"


def struck(path: Path, right: torch.Tensor, number: int) -> Sweep:
    """From each read on, in turn, let all fail with the errno *number*: those of a load and two
    forwards. Then let none fail.
    """
    sweep = Sweep()
    for at in range(10_000):
        layer = Layer(path.parent, at, failing(number), watched=LOADS, lasting=True)
        with layer.installed():
            try:
                streamed = streaming(path)
            except ShardkitError as error:
                sweep.left["not loaded"] += 1
                sweep.faults += (
                    []
                    if "model.pt" in str(error)
                    else [f"read {at}: it does not say where: {error}"]
                )
                continue
            said = [forward(streamed, right, sweep, f"read {at}") for _ in range(2)]
        if layer.struck is None:
            return sweep
        sweep.left["told" if "told" in said else "right"] += 1
        forward(
            streamed, right, sweep, f"after read {at}"
        )  # a read ahead that was under way may fail still
        if forward(streamed, right, sweep, f"after read {at}") != "right":
            sweep.faults.append(f"after read {at}: it does not go on")
        close(streamed)
    raise AssertionError("it never ends")


def saved(folder: Path) -> tuple[Path, torch.Tensor]:
    """A model in *folder*, and what it makes of X."""
    torch.manual_seed(0)
    resident = model().requires_grad_(requires_grad=False)
    torch.save(resident.state_dict(), folder / "model.pt")
    return folder / "model.pt", resident(X)


def main(folder: Path, number: int) -> None:
    """Strike a model that is saved in *folder*."""
    print(struck(*saved(folder), number).dump())  # noqa: T201 - to the program that started us


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
